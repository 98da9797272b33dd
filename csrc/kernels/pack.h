// Transposes rows of memory, so that lanes run over rows.

constexpr int group = 4;        // features that share a division
constexpr int tile_blocks = 4;  // key blocks of a tile
constexpr int most_rows = 512;  // query rows of a block

template <class T>
constexpr int block_keys = 2 * lanes<T>;
template <class T>
constexpr int tile_keys = tile_blocks * block_keys<T>;

// The identity, as a function object: not every compiler compiles a lambda for the instruction set.
template <class T>
struct Unchanged {
  Vec<T> operator()(Vec<T> x) const { return x; }
};

// Stores `count` rows of x as columns: packed[c * ld + row], for `columns` columns (padded with zeros up to a multiple
// of `group`) and whole vectors of rows (padded with zeros).
template <class T, class Function>
void pack_transposed(const T* x, std::int64_t row, std::int64_t count, std::int64_t columns, T* packed, std::int64_t ld,
                     Function function) {
  constexpr int L = lanes<T>;
  for (std::int64_t r0 = 0; r0 < count; r0 += L)
    for (std::int64_t c0 = 0; c0 < round_up(columns, group); c0 += L) {
      Vec<T> square[L];
      for (int r = 0; r < L; ++r)
        square[r] = function(r0 + r < count ? load_part<T>(x + (r0 + r) * row + c0, columns - c0, 0) : Vec<T>{});
      transpose<T>(square);
      const std::int64_t end = std::min<std::int64_t>(L, round_up(columns, group) - c0);
      for (std::int64_t c = 0; c < end; ++c) store(packed + (c0 + c) * ld + r0, square[c]);
    }
}
