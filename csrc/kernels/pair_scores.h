// w . tanh(q + k) and its tangent, of every pair (math.md, eq. 22 without scale and mask).

// Rows against a tile of keys; lanes run over keys.
template <class T>
class PairScores {
 public:
  static constexpr std::int64_t TK = tile_keys<T>;
  static constexpr int L = lanes<T>;

  explicit PairScores(const Pairs<T>& problem) : p(problem), width(round_up(p.hidden, group)) {}

  void run(std::int64_t n, std::int64_t row0, std::int64_t rows, std::int64_t key0, std::int64_t keys) {
    T* memory = memory_.get(2 * width * TK + 4 * width);
    k = memory;
    moved_k = k + width * TK;
    q = moved_k + width * TK;
    const std::int64_t at = (n * p.keys + key0) * p.hidden, whole = round_up(keys, L);
    pack_transposed<T>(p.key + at, p.hidden, keys, p.hidden, k, TK, Unchanged<T>());
    pack_transposed<T>(p.key_tangent + at, p.hidden, keys, p.hidden, moved_k, TK, Unchanged<T>());
    copy(p.weight + n * p.hidden, q + 2 * width);
    copy(p.weight_tangent + n * p.hidden, q + 3 * width);
    for (std::int64_t i = row0; i < row0 + rows; ++i) {
      copy(p.query + (n * p.queries + i) * p.hidden, q);
      copy(p.query_tangent + (n * p.queries + i) * p.hidden, q + width);
      const std::int64_t to = (n * p.queries + i) * p.keys + key0;
      for (std::int64_t j = 0; j < whole; j += L) {
        Vec<T> score, tangent;
        keys_of_row(j, score, tangent);
        store_part<T>(p.scores + to + j, score, keys - j);
        store_part<T>(p.tangents + to + j, tangent, keys - j);
      }
    }
  }

 private:
  void copy(const T* from, T* to) const {
    std::memcpy(to, from, p.hidden * sizeof(T));
    std::fill(to + p.hidden, to + width, T(0));
  }

  // Adds up sums of a few features: long sums in single precision lose digits.
  void keys_of_row(std::int64_t j, Vec<T>& score, Vec<T>& tangent) const {
    constexpr std::int64_t features_per_sum = 32;
    const T *moved_q = q + width, *w = q + 2 * width, *moved_w = q + 3 * width;
    score = tangent = Vec<T>{};
    for (std::int64_t first = 0; first < width; first += features_per_sum) {
      Vec<T> some = {}, some_moved = {};
      for (std::int64_t h = first; h < std::min(first + features_per_sum, width); h += 2) {
        Vec<T> x[2], t[2], s[2];
        for (int v = 0; v < 2; ++v) x[v] = load(k + (h + v) * TK + j) + q[h + v];
        tanh_slopes<T>(x, t, s);
        for (int v = 0; v < 2; ++v) {
          const Vec<T> moved = (load(moved_k + (h + v) * TK + j) + moved_q[h + v]) * (w[h + v] * T(4));
          some += t[v] * w[h + v];
          some_moved += t[v] * moved_w[h + v] + s[v] * moved;
        }
      }
      score += some;
      tangent += some_moved;
    }
  }

  const Pairs<T>& p;
  const std::int64_t width;
  Buffer<T> memory_;
  T *k = nullptr, *moved_k = nullptr, *q = nullptr;  // [feature][key]; q's tangent, w and w's tangent follow q
};

template <class T>
void pair_scores(const Pairs<T>& p, const ParallelFor& parallel_for) {
  constexpr std::int64_t TK = tile_keys<T>, rows = 64;
  const std::int64_t blocks = (p.queries + rows - 1) / rows, tiles = (p.keys + TK - 1) / TK;
  parallel_for(p.batch * blocks * tiles, rows * TK * p.hidden * 4, [&](Tasks& tasks) {
    PairScores<T> s(p);
    for (std::int64_t task; tasks.take(task);) {
      const std::int64_t k = task % tiles, b = task / tiles % blocks, n = task / tiles / blocks;
      s.run(n, b * rows, std::min(rows, p.queries - b * rows), k * TK, std::min(TK, p.keys - k * TK));
    }
  });
}
