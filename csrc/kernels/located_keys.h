// Keys with their location term, E_jh = k_jh + sum_f x_fj M_fh (math.md, eq. 17), a tile at a time. E differs at every
// step, so prepared exponentials are of no use: a tile takes the direct form, on rows of E in a scratch that stays in
// the cache. Lanes run over features h.

constexpr int location_keys = 16;  // keys of a tile
constexpr int location_rows = 4;   // keys, or rows of M, side by side in registers
constexpr int location_vectors = VECTOR_BYTES == 64 ? 4 : 2;

// Rows of E, for a tile of keys at a time.
template <class T>
class LocatedKeys {
 public:
  static constexpr int L = lanes<T>;

  LocatedKeys(const StoredRows<T>& keys, const Location<T>& from, std::int64_t features)
      : key(keys), location(from), hidden(features), width(round_up(features, 2 * L)), row(width + L) {}

  // Packs the weight M of entry n, unless it is packed already.
  void begin(std::int64_t n) {
    entry = n;
    const T* from = location.weight.at(n, 0);
    if (from == packed_) return;
    packed_ = from;
    T* to = weight_memory_.get(location.features * row);
    for (std::int64_t f = 0; f < location.features; ++f)
      for (std::int64_t h = 0; h < width; h += L)
        store(to + f * row + h, load_part<T>(location.weight.at(n, f) + h, hidden - h, 0));
    weight = to;
  }

  // E of keys [key0, key0 + count), count <= location_keys, as rows that are `row` apart and padded to `width`.
  ALWAYS_INLINE T* rows(std::int64_t key0, std::int64_t count) {
    constexpr int R = location_rows, V = location_vectors;
    T* to = rows_memory_.get(location_keys * row);
    const T* keys = load_keys(key0, count);
    for (std::int64_t j = 0; j < count; j += R) {
      const T* from[R];  // beyond the last key, the last key again
      for (int r = 0; r < R; ++r) from[r] = keys + std::min(j + r, count - 1) * reader_.row;
      std::int64_t h = 0;
      for (; h + V * L <= hidden; h += V * L) block<V>(from, j, h, to);
      for (; h < width; h += L) block<1>(from, j, h, to);
    }
    return to;
  }

  // Loads the keys without their term, and their location into x. With one feature, the term stays in registers.
  const T* load_keys(std::int64_t key0, std::int64_t count) {
    load_location(key0, count);
    return reader_.read(key, entry, key0, count, hidden);
  }
  std::int64_t key_row() const { return reader_.row; }

  const StoredRows<T>& key;
  const Location<T>& location;
  const std::int64_t hidden, width, row;
  std::int64_t entry = 0;
  const T* weight = nullptr;  // M, padded
  T* x = nullptr;             // the tile's location, [feature][location_keys]

 private:
  void load_location(std::int64_t key0, std::int64_t count) {
    x = location_memory_.get(location.features * location_keys);
    for (std::int64_t f = 0; f < location.features; ++f) {
      T* to = x + f * location_keys;
      const T* from = location.x.at(entry, f) + key0;
      for (std::int64_t j = 0; j < location_keys; j += L) store(to + j, load_part<T>(from + j, count - j, 0));
    }
  }

  template <int V>
  ALWAYS_INLINE void block(const T* const* from, std::int64_t j, std::int64_t h, T* to) const {
    constexpr int R = location_rows;
    Vec<T> sum[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = V > 1 ? load(from[r] + h + v * L) : load_part<T>(from[r] + h, hidden - h, 0);
    for (std::int64_t f = 0; f < location.features; ++f)
      for (int v = 0; v < V; ++v) {
        const Vec<T> m = load(weight + f * row + h + v * L);
        for (int r = 0; r < R; ++r) sum[r][v] += m * x[f * location_keys + j + r];
      }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(to + (j + r) * row + h + v * L, sum[r][v]);
  }

  const T* packed_ = nullptr;
  StoredReader<T> reader_;
  Buffer<T> weight_memory_, rows_memory_, location_memory_;
};

// C (R rows) += A B for `inner` rows of B: element (r, k) of A lies at a[r * a_row + k * a_column].
template <class T, int R, int V>
inline void add_products_block(const T* a, std::int64_t a_row, std::int64_t a_column, const T* b, std::int64_t b_row,
                               T* c, std::int64_t c_row, std::int64_t inner) {
  constexpr int L = lanes<T>;
  Vec<T> sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = load(c + r * c_row + v * L);
  for (std::int64_t k = 0; k < inner; ++k) {
    Vec<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load(b + k * b_row + v * L);
    for (int r = 0; r < R; ++r) {
      const T factor = a[r * a_row + k * a_column];
      for (int v = 0; v < V; ++v) sum[r][v] += x[v] * factor;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * L, sum[r][v]);
}

// The same for rows of `width` columns, a multiple of two vectors.
template <class T, int R>
void add_products_rows(const T* a, std::int64_t a_row, std::int64_t a_column, const T* b, std::int64_t b_row, T* c,
                       std::int64_t c_row, std::int64_t inner, std::int64_t width) {
  constexpr int L = lanes<T>, V = location_vectors;
  std::int64_t h = 0;
  for (; h + V * L <= width; h += V * L)
    add_products_block<T, R, V>(a, a_row, a_column, b + h, b_row, c + h, c_row, inner);
  for (; h < width; h += 2 * L) add_products_block<T, R, 2>(a, a_row, a_column, b + h, b_row, c + h, c_row, inner);
}

template <class T>
void add_products(const T* a, std::int64_t a_row, std::int64_t a_column, const T* b, std::int64_t b_row, T* c,
                  std::int64_t c_row, std::int64_t rows, std::int64_t inner, std::int64_t width) {
  constexpr int R = location_rows;
  for (; rows >= R; rows -= R, a += R * a_row, c += R * c_row)
    add_products_rows<T, R>(a, a_row, a_column, b, b_row, c, c_row, inner, width);
  if (rows == 3) add_products_rows<T, 3>(a, a_row, a_column, b, b_row, c, c_row, inner, width);
  if (rows == 2) add_products_rows<T, 2>(a, a_row, a_column, b, b_row, c, c_row, inner, width);
  if (rows == 1) add_products_rows<T, 1>(a, a_row, a_column, b, b_row, c, c_row, inner, width);
}

// The sums over the lanes of `lanes` vectors, as one vector.
template <class T, int s = lanes<T> / 2>
inline Vec<T> sums(Vec<T>* x) {
  for (int i = 0; i < s; ++i) {
    exchange<T, s>(x[i], x[i + s], std::make_integer_sequence<int, lanes<T>>{});
    x[i] += x[i + s];
  }
  if constexpr (s > 1)
    return sums<T, s / 2>(x);
  else
    return x[0];
}

// Dot products of R rows of a with C rows of b, into out[r * out_row + c].
template <class T, int R, int C>
inline void dots_block(const T* a, std::int64_t a_row, const T* b, std::int64_t b_row, std::int64_t width, T* out,
                       std::int64_t out_row) {
  constexpr int L = lanes<T>;
  static_assert(R * C <= L);
  Vec<T> total[L] = {};
  for (std::int64_t h = 0; h < width; h += L) {
    Vec<T> y[C];
    for (int c = 0; c < C; ++c) y[c] = load(b + c * b_row + h);
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = load(a + r * a_row + h);
      for (int c = 0; c < C; ++c) total[r * C + c] += x * y[c];
    }
  }
  T all[L];
  store(all, sums<T>(total));
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r * out_row + c] = all[r * C + c];
}

// Dot products of `rows` rows of a with location_keys rows of b.
template <class T>
void dots(const T* a, std::int64_t a_row, std::int64_t rows, const T* b, std::int64_t b_row, std::int64_t width, T* out,
          std::int64_t out_row) {
  constexpr int L = lanes<T>, C = L < 4 ? L : 4, R = L / C;
  for (std::int64_t r = 0; r < rows; r += R)
    for (int c = 0; c < location_keys; c += C) {
      const T *from = a + r * a_row, *keys = b + c * b_row;
      T* to = out + r * out_row + c;
      const std::int64_t some = std::min<std::int64_t>(R, rows - r);
      if (some == R) dots_block<T, R, C>(from, a_row, keys, b_row, width, to, out_row);
      if constexpr (R > 3)
        if (some == 3) dots_block<T, 3, C>(from, a_row, keys, b_row, width, to, out_row);
      if constexpr (R > 2)
        if (some == 2) dots_block<T, 2, C>(from, a_row, keys, b_row, width, to, out_row);
      if constexpr (R > 1)
        if (some == 1) dots_block<T, 1, C>(from, a_row, keys, b_row, width, to, out_row);
    }
}
