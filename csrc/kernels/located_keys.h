// Keys with their location term, E_jh = k_jh + sum_f x_fj M_fh (math.md, eq. 17), a tile at a time. E is new at every
// step, so exponentials prepared once are of no use: a tile takes the direct form, on rows of E in a scratch that stays
// in the cache. Lanes run over features h.

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

  // Packs the weight M of entry n, unless it is there.
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
      const T* from[R];  // the last key stands for those beyond it
      for (int r = 0; r < R; ++r) from[r] = keys + std::min(j + r, count - 1) * reader_.row;
      std::int64_t h = 0;
      for (; h + V * L <= hidden; h += V * L) block<V>(from, j, h, to);
      for (; h < width; h += L) block<1>(from, j, h, to);
    }
    return to;
  }

  // The keys without their term, and their location in x: where there is one feature, its term stays in registers.
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
