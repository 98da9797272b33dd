// P and G of the query rows, from their scores.

// P and G of rows [row0, row0 + rows) of the entries [entry0, entry0 + entries).
template <class T>
struct Workspace {
  std::int64_t entry0, entries, row0, rows;
  std::int64_t keys;    // padded to whole tiles
  std::int64_t blocks;  // of keys
  T *probability, *gradient;
  unsigned char* active;  // per row and key block: is any key unmasked?

  std::int64_t index(std::int64_t n, std::int64_t i) const { return (n - entry0) * rows + i - row0; }
};

template <class T>
class RowPass {
 public:
  static constexpr int K = block_keys<T>, TK = tile_keys<T>;

  RowPass(const Backward<T>& problem, const Workspace<T>& workspace) : p(problem), ws(workspace), s(problem) {}

  void run(std::int64_t n, std::int64_t row0, std::int64_t rows) {
    s.begin(n, row0, rows);
    const std::int64_t at = ws.index(n, row0);
    std::memset(ws.active + at * ws.blocks, 0, rows * ws.blocks);
    const std::int64_t begin = s.first / TK * TK;
    for (std::int64_t key0 = begin; key0 < s.last; key0 += TK)
      if (s.tile(key0)) tile(n, row0, rows, key0);
    for (std::int64_t r = 0; r < rows; ++r) finish_row(n, row0 + r);
  }

 private:
  void tile(std::int64_t n, std::int64_t row0, std::int64_t rows, std::int64_t key0) {
    const std::int64_t at = ws.index(n, row0), block0 = key0 / K;
    T* grad = ws.gradient + at * ws.keys + key0;
    for (std::int64_t r = 0; r < rows; ++r) {
      std::memset(grad + r * ws.keys, 0, TK * sizeof(T));
      for (int b = 0; b < tile_blocks; ++b) ws.active[(at + r) * ws.blocks + block0 + b] = s.active[r][b];
    }
    if (p.grad_out && p.values > 0) {
      const T* v = p.value.at(n, key0);
      if (p.queries < gemm_row_block) {
        for (std::int64_t r = 0; r < rows; ++r)
          for (std::int64_t j = 0; j < s.count; ++j)
            if (s.active[r][j / K])
              grad[r * ws.keys + j] = dot(p.grad_out.at(n, row0 + r), v + j * p.value.row, p.values);
      } else {
        grad_probabilities(n, row0, rows, v, grad);
      }
    }
    for (std::int64_t r = 0; r < rows; ++r) grad_row(n, row0, r, key0, grad + r * ws.keys);
  }

  // dO V^T: the values are turned so that lanes run over keys.
  void grad_probabilities(std::int64_t n, std::int64_t row0, std::int64_t rows, const T* v, T* grad) {
    const std::int64_t panel = round_up(p.values, group) * K;
    T* columns = value_columns.get(tile_blocks * panel);
    for (int b = 0; b * K < s.count; ++b)
      pack_transposed<T>(v + b * K * p.value.row, p.value.row, std::min<std::int64_t>(K, s.count - b * K), p.values,
                         columns + b * panel, K, Unchanged<T>{});
    for (std::int64_t r = 0; r < rows; r += gemm_row_block) {
      const std::int64_t some = std::min<std::int64_t>(gemm_row_block, rows - r);
      for (int b = 0; b < tile_blocks; ++b) {
        bool any = false;
        for (std::int64_t i = r; i < r + some; ++i) any = any || s.active[i][b];
        if (any)
          gemm<T>(p.grad_out.at(n, row0 + r), p.grad_out.row, 1, columns + b * panel, panel,
                  grad + r * ws.keys + b * K, ws.keys, some, K, p.values);
      }
    }
  }

  // P and dP of one row and tile.
  void grad_row(std::int64_t n, std::int64_t row0, std::int64_t r, std::int64_t key0, T* g) {
    constexpr int L = lanes<T>;
    const std::int64_t i = row0 + r;
    T* probability = ws.probability + ws.index(n, i) * ws.keys + key0;
    const T* score = s.scores + r * TK;
    const T lse = p.lse[n * p.queries + i], shift = lse == T(-INFINITY) ? T(0) : lse;
    T keep[TK];
    if (p.seed) {
      dropout_factors(p, n, i, key0, keep);
      for (int j = 0; j < TK; j += L) {
        const Vec<T> factor = load(keep + j);
        store(g + j, factor == T(0) ? (Vec<T>){} : load(g + j) * factor);
      }
    }
    if (p.grad_weights) {
      const T* upstream = p.grad_weights.at(n, i) + key0;
      for (std::int64_t j = 0; j < s.count; ++j) g[j] += upstream[j];
    }
    for (int j = 0; j < TK; j += L) {
      const Vec<T> x = load(score + j);
      const auto masked = x == T(-INFINITY);
      store(probability + j, masked ? (Vec<T>){} : exp<T>(x - shift));
      store(g + j, masked ? (Vec<T>){} : load(g + j));  // whatever a masked value holds
    }
    // The sign remembers what was dropped, until the row is finished.
    if (p.seed)
      for (int j = 0; j < TK; j += L) {
        const Vec<T> x = load(probability + j);
        store(probability + j, load(keep + j) == T(0) ? -x : x);
      }
  }

  void finish_row(std::int64_t n, std::int64_t i) {
    constexpr int L = lanes<T>;
    const std::int64_t at = ws.index(n, i);
    const unsigned char* active = ws.active + at * ws.blocks;
    T* probability = ws.probability + at * ws.keys;
    T* gradient = ws.gradient + at * ws.keys;
    // P sums to 1: dividing by the sum takes out the rounding of lse, which all keys of the row share.
    double delta = 0, total = 0;
    for (std::int64_t b = 0; b < ws.blocks; ++b) {
      if (!active[b]) continue;
      Vec<T> part = {}, total_part = {};
      for (int j = 0; j < K; j += L) {
        const Vec<T> x = load(probability + b * K + j), positive = x < T(0) ? -x : x;
        part += positive * load(gradient + b * K + j);
        total_part += positive;
      }
      delta += sum<T>(part);
      total += sum<T>(total_part);
    }
    const T normaliser = total == 0 ? T(0) : T(1 / total);
    delta = total == 0 ? 0 : delta / total;
    if (p.grad_lse) delta -= *p.grad_lse.at(n, i);
    for (std::int64_t b = 0; b < ws.blocks; ++b) {
      if (!active[b]) continue;
      for (int j = b * K; j < (b + 1) * K; j += L) {
        const Vec<T> raw = load(probability + j), x = raw == T(0) ? raw : raw * normaliser;  // 0 stays 0 beside NaN
        const Vec<T> positive = x < T(0) ? -x : x;
        store(gradient + j, x == T(0) ? (Vec<T>){} : positive * (load(gradient + j) - T(delta)));
        store(probability + j, p.seed ? (x > T(0) ? x : x != x ? x : (Vec<T>){}) * p.keep_scale : x);
      }
    }
  }

  const Backward<T>& p;
  const Workspace<T>& ws;
  ScoreBlock<T> s;
  Buffer<T> value_columns;
};
