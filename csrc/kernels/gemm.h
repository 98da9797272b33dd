// C (rows x columns) += A B for row-major C. B is packed in panels of two vectors of columns, [panel][k][column], so
// that the inner loop reads it in one stream. Element (i, k) of A lies at a[i * a_row + k * a_column].

template <class T>
constexpr int panel_columns = 2 * lanes<T>;

// Packs x (count x columns, rows `row` apart) in panels; the last vector is padded with zeros.
template <class T>
const T* pack_panels(const T* x, std::int64_t row, std::int64_t count, std::int64_t columns, Buffer<T>& buffer) {
  constexpr int L = lanes<T>;
  T* packed = buffer.get(count * round_up(columns, panel_columns<T>));
  for (std::int64_t k = 0; k < count; ++k)
    for (std::int64_t j = 0; j < columns; j += panel_columns<T>)
      for (int v = 0; v < 2 && columns > j + v * L; ++v)
        store(packed + j * count + k * panel_columns<T> + v * L,
              load_part<T>(x + k * row + j + v * L, columns - j - v * L, 0));
  return packed;
}

template <class T, int R, int V>
inline void gemm_block(const T* a, std::int64_t a_row, std::int64_t a_column, const T* b, T* c, std::int64_t c_row,
                       std::int64_t inner) {
  constexpr int L = lanes<T>;
  Vec<T> sum[R][V] = {};
  for (std::int64_t k = 0; k < inner; ++k) {
    Vec<T> right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + k * 2 * L + v * L);
    for (int i = 0; i < R; ++i) {
      const T left = a[i * a_row + k * a_column];
      for (int v = 0; v < V; ++v) sum[i][v] += right[v] * left;
    }
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) store(c + i * c_row + v * L, load(c + i * c_row + v * L) + sum[i][v]);
}

constexpr int gemm_row_block = 4;
constexpr std::int64_t values_cached = 256;  // so many values of a tile's keys are transposed at a time

template <class T, int R>
inline void gemm_panels(const T* a, std::int64_t a_row, std::int64_t a_column, const T* b, std::int64_t panel, T* c,
                        std::int64_t c_row, std::int64_t columns, std::int64_t inner) {
  for (; columns > lanes<T>; columns -= panel_columns<T>, b += panel, c += panel_columns<T>)
    gemm_block<T, R, 2>(a, a_row, a_column, b, c, c_row, inner);
  if (columns > 0) gemm_block<T, R, 1>(a, a_row, a_column, b, c, c_row, inner);
}

// Up to gemm_row_block rows of C, whose rows are whole panels wide; in the last panel, vectors behind the last column
// are not touched. The panels of B are `panel` elements apart.
template <class T>
void gemm(const T* a, std::int64_t a_row, std::int64_t a_column, const T* b, std::int64_t panel, T* c,
          std::int64_t c_row, std::int64_t rows, std::int64_t columns, std::int64_t inner) {
  if (rows == 4) gemm_panels<T, 4>(a, a_row, a_column, b, panel, c, c_row, columns, inner);
  if (rows == 3) gemm_panels<T, 3>(a, a_row, a_column, b, panel, c, c_row, columns, inner);
  if (rows == 2) gemm_panels<T, 2>(a, a_row, a_column, b, panel, c, c_row, columns, inner);
  if (rows == 1) gemm_panels<T, 1>(a, a_row, a_column, b, panel, c, c_row, columns, inner);
}

// Loads a vector of stored numbers as T.
template <Storage storage, class T>
inline Vec<T> load_stored(const T* x) {
  return load(x);
}
template <Storage storage>
inline Vec<float> load_stored(const std::uint16_t* x) {
  return widen<storage>(x);
}

// C += A B for R rows of A and C. B is not packed, and is read once and in order; columns beyond the last are not
// touched. With B in 16 bits, `columns` is a multiple of a vector.
template <class T, int R, Storage storage, class E>
void gemv_rows(const T* a, std::int64_t a_row, const E* b, std::int64_t b_row, T* c, std::int64_t c_row,
               std::int64_t columns, std::int64_t inner) {
  constexpr int L = lanes<T>;
  const std::int64_t whole = columns / L * L;
  std::int64_t k = 0;
  for (; k + 4 <= inner; k += 4) {
    const E *b0 = b + k * b_row, *b1 = b0 + b_row, *b2 = b1 + b_row, *b3 = b2 + b_row;
    for (std::int64_t j = 0; j < whole; j += L) {
      const Vec<T> x0 = load_stored<storage>(b0 + j), x1 = load_stored<storage>(b1 + j);
      const Vec<T> x2 = load_stored<storage>(b2 + j), x3 = load_stored<storage>(b3 + j);
      for (int r = 0; r < R; ++r) {
        const T* left = a + r * a_row + k;
        T* to = c + r * c_row + j;
        store(to, load(to) + x0 * left[0] + x1 * left[1] + x2 * left[2] + x3 * left[3]);
      }
    }
    if constexpr (sizeof(E) == sizeof(T))
      for (int r = 0; r < R; ++r)
        for (std::int64_t j = whole; j < columns; ++j) {
          const T* left = a + r * a_row + k;
          T* to = c + r * c_row + j;
          *to = *to + b0[j] * left[0] + b1[j] * left[1] + b2[j] * left[2] + b3[j] * left[3];
        }
  }
  for (; k < inner; ++k)
    for (int r = 0; r < R; ++r) {
      const T left = a[r * a_row + k];
      T* to = c + r * c_row;
      for (std::int64_t j = 0; j < whole; j += L)
        store(to + j, load(to + j) + load_stored<storage>(b + k * b_row + j) * left);
      if constexpr (sizeof(E) == sizeof(T))
        for (std::int64_t j = whole; j < columns; ++j) to[j] += b[k * b_row + j] * left;
    }
}

constexpr int gemv_row_block = VECTOR_BYTES == 64 ? 4 : 2;

template <Storage storage, class T, class E>
void gemv(const T* a, std::int64_t a_row, const E* b, std::int64_t b_row, T* c, std::int64_t c_row, std::int64_t rows,
          std::int64_t columns, std::int64_t inner) {
  constexpr int R = gemv_row_block;
  for (; rows >= R; rows -= R, a += R * a_row, c += R * c_row)
    gemv_rows<T, R, storage>(a, a_row, b, b_row, c, c_row, columns, inner);
  if (R > 2 && rows >= 2) {
    gemv_rows<T, 2, storage>(a, a_row, b, b_row, c, c_row, columns, inner);
    rows -= 2, a += 2 * a_row, c += 2 * c_row;
  }
  if (rows >= 1) gemv_rows<T, 1, storage>(a, a_row, b, b_row, c, c_row, columns, inner);
}

template <class T>
T dot(const T* x, const T* y, std::int64_t n) {
  constexpr int L = lanes<T>;
  Vec<T> part[2] = {};
  std::int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    part[0] += load(x + i) * load(y + i);
    part[1] += load(x + i + L) * load(y + i + L);
  }
  for (; i < n; i += L) part[0] += load_part<T>(x + i, n - i, 0) * load_part<T>(y + i, n - i, 0);
  return sum<T>(part[0] + part[1]);
}
