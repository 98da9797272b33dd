// The tangents of dq, dk and dw from dS and its tangent (math.md, eq. 26 and 27). With s = (1 - t^2) / 4,
//
//     Y = 4 s (w (dS' - 2 dS t x') + w' dS)        dq' = sum_j Y    dk' = sum_i Y    dw' = sum_ij dS' t + 4 dS s x'
//
// where a prime marks a tangent.

// Two vectors of features, for all rows and keys of an entry; lanes run over features.
template <class T>
class PairGradientsPass {
 public:
  static constexpr int L = lanes<T>, F = feature_vectors * L;

  explicit PairGradientsPass(const PairGradients<T>& problem) : p(problem) {}

  void run(std::int64_t n, std::int64_t h) {
    entry = n;
    first = h;
    some = std::min<std::int64_t>(F, p.hidden - h);
    copy(p.weight + n * p.hidden, w);
    copy(p.weight_tangent + n * p.hidden, moved_w);
    T* memory = memory_.get((4 * gradient_keys + p.queries) * F);
    k = memory;
    moved_k = k + gradient_keys * F;
    sum_key = k + 2 * gradient_keys * F;
    sum_query = k + 4 * gradient_keys * F;
    std::memset(sum_query, 0, p.queries * F * sizeof(T));
    double sum_weight[F] = {};
    for (std::int64_t key0 = 0; key0 < p.keys; key0 += gradient_keys)
      tile(key0, std::min(gradient_keys, p.keys - key0), sum_weight);
    for (std::int64_t i = 0; i < p.queries && p.grad_query; ++i)
      finish(sum_query + i * F, p.grad_query + (n * p.queries + i) * p.hidden);
    for (std::int64_t l = 0; l < some && p.grad_weight; ++l) p.grad_weight[n * p.hidden + h + l] = T(sum_weight[l]);
  }

 private:
  void tile(std::int64_t key0, std::int64_t keys, double* sum_weight) {
    for (std::int64_t j = 0; j < keys; ++j) {
      copy(p.key + (entry * p.keys + key0 + j) * p.hidden, k + j * F);
      copy(p.key_tangent + (entry * p.keys + key0 + j) * p.hidden, moved_k + j * F);
    }
    std::memset(sum_key, 0, 2 * gradient_keys * F * sizeof(T));
    for (std::int64_t i = 0; i < p.queries; ++i) {
      if (i && i % rows_summed == 0) flush(keys);
      row(i, key0, keys, sum_weight);
    }
    flush(keys);
    for (std::int64_t j = 0; j < keys && p.grad_key; ++j)
      finish(sum_key + j * F, p.grad_key + (entry * p.keys + key0 + j) * p.hidden);
  }

  void row(std::int64_t i, std::int64_t key0, std::int64_t keys, double* sum_weight) {
    alignas(64) T q[F], moved_q[F];
    copy(p.query + (entry * p.queries + i) * p.hidden, q);
    copy(p.query_tangent + (entry * p.queries + i) * p.hidden, moved_q);
    const T* grad = p.grad + (entry * p.queries + i) * p.keys + key0;
    const T* moved_grad = p.grad_tangent + (entry * p.queries + i) * p.keys + key0;
    Vec<T> query[feature_vectors] = {}, weight[feature_vectors] = {};
    T* of_key = sum_key + gradient_keys * F;
    for (std::int64_t j = 0; j < keys; ++j) {
      const T g = grad[j], moved_g = moved_grad[j];
      if (g == T(0) && moved_g == T(0)) continue;  // contributes exactly 0, whatever the pair holds
      Vec<T> x[feature_vectors], t[feature_vectors], s[feature_vectors];
      for (int v = 0; v < feature_vectors; ++v) x[v] = load(k + j * F + v * L) + load(q + v * L);
      tanh_slopes<T>(x, t, s);
      for (int v = 0; v < feature_vectors; ++v) {
        const Vec<T> moved = load(moved_k + j * F + v * L) + load(moved_q + v * L), curved = t[v] * moved;
        const Vec<T> y = s[v] * (load(w + v * L) * (moved_g - curved * (2 * g)) + load(moved_w + v * L) * g);
        query[v] += y;
        store(of_key + j * F + v * L, load(of_key + j * F + v * L) + y);
        weight[v] += t[v] * moved_g + s[v] * moved * (4 * g);
      }
    }
    for (int v = 0; v < feature_vectors; ++v) {
      T* to = sum_query + i * F + v * L;
      store(to, load(to) + query[v]);
      for (int l = 0; l < L; ++l) sum_weight[v * L + l] += weight[v][l];
    }
  }

  // Adds the sums over rows_summed rows to those over all rows: long sums in single precision lose digits.
  void flush(std::int64_t keys) {
    for (std::int64_t l = 0; l < keys * F; l += L) {
      T* from = sum_key + gradient_keys * F + l;
      store(sum_key + l, load(sum_key + l) + load(from));
      store(from, Vec<T>{});
    }
  }

  void copy(const T* from, T* to) const {
    for (int v = 0; v < feature_vectors; ++v) store(to + v * L, load_some(from + first + v * L, some - v * L));
  }

  static Vec<T> load_some(const T* from, std::int64_t count) {
    return count > 0 ? load_part<T>(from, count, 0) : Vec<T>{};
  }

  void finish(const T* sum, T* to) const {
    for (std::int64_t l = 0; l < some; l += L) store_part<T>(to + first + l, load(sum + l) * T(4), some - l);
  }

  const PairGradients<T>& p;
  std::int64_t entry = 0, first = 0, some = 0;
  alignas(64) T w[F], moved_w[F];
  T *k = nullptr, *moved_k = nullptr;          // [key][F]
  T *sum_key = nullptr, *sum_query = nullptr;  // [all rows, the last rows][key][F]; [row][F]
  Buffer<T> memory_;
};

template <class T>
void pair_gradients(const PairGradients<T>& p, const ParallelFor& parallel_for) {
  constexpr std::int64_t F = feature_vectors * lanes<T>;
  const std::int64_t groups = (p.hidden + F - 1) / F;
  parallel_for(p.batch * groups, p.queries * p.keys * F * 4, [&](Tasks& tasks) {
    PairGradientsPass<T> pass(p);
    for (std::int64_t task; tasks.take(task);) pass.run(task / groups, task % groups * F);
  });
}
