// The gradients of a decoder step that the previous step's backward needs: those of the query and of the scores
// (math.md, eq. 9 and 10). P is the weights that the step returned. Nothing of the size of keys or values is written.
//
//     range of keys -> dP, its share of delta        then        range of keys -> G, its share of dq
//
// The ranges are those of the forward: one for each entry unless there are few entries.

template <class T>
class StepPass {
 public:
  static constexpr std::int64_t TK = tile_keys<T>;
  static constexpr int L = lanes<T>;

  explicit StepPass(const StepBackward<T>& problem) : p(problem) {}

  // For keys [key_begin, key_end): stores dP in the place of G, and sums P dP and P.
  void upstream(std::int64_t n, std::int64_t key_begin, std::int64_t key_end, double& delta, double& total) {
    delta = total = 0;
    for (std::int64_t key0 = key_begin; key0 < key_end; key0 += TK) {
      const std::int64_t count = std::min(TK, key_end - key0);
      T* g = p.grad_scores + n * p.keys + key0;
      T* kept = p.kept ? p.kept + n * p.keys + key0 : nullptr;
      if (!find_attended(n, key0, count)) {
        std::fill(g, g + count, T(0));
        if (kept) std::fill(kept, kept + count, T(0));
        continue;
      }
      T weights[TK], grad[TK] = {};
      load_weights(n, key0, count, weights);
      for (std::int64_t j = 0; j < count && p.grad_out; ++j)
        if (attended_[j])
          grad[j] =
              dot(p.grad_out.at(n, 0), stored_row(p.value, n, key0 + j, 0, p.values, value_.get(p.values)), p.values);
      if (p.seed) {
        T keep[TK];
        dropout_factors(p, n, 0, key0, keep);
        for (std::int64_t j = 0; j < count; ++j) {
          grad[j] *= attended_[j] ? keep[j] : T(0);
          kept[j] = keep[j] == T(0) ? T(0) : weights[j] * keep[j];
        }
      }
      if (p.grad_weights) {
        const T* more = p.grad_weights.at(n, 0) + key0;
        for (std::int64_t j = 0; j < count; ++j) grad[j] += attended_[j] ? more[j] : T(0);
      }
      Vec<T> part = {}, total_part = {};
      for (std::int64_t j = 0; j < TK; j += L) {
        part += load(weights + j) * load(grad + j);
        total_part += load(weights + j);
      }
      delta += sum<T>(part);
      total += sum<T>(total_part);
      std::memcpy(g, grad, count * sizeof(T));
    }
  }

  // For the same keys: computes G, and a quarter of sum G (1 - t^2) in sum_query[width].
  void query(std::int64_t n, std::int64_t key_begin, std::int64_t key_end, double delta, T* sum_query) {
    std::memset(sum_query, 0, width() * sizeof(T));
    typename Simd<T>::Bits most = 0;
    for (std::int64_t key0 = key_begin; key0 < key_end; key0 += TK)
      most = std::max(most, scores_gradient(n, key0, std::min(TK, key_end - key0), T(delta)));
    if (most == 0 || p.hidden == 0 || p.location) return;
    // Powers of two keep the products with 1 - t^2 in range, however small or large G is.
    const T size = as_number<T>(most);
    const bool usual = !(size < factored_least<T> || size > factored_most<T>) || std::isinf(size);
    const int shift = usual ? 0 : std::ilogb(size);
    const T* weight = p.weight.at(n, 0);
    query_.begin(weight, T(0), p.hidden, 1, p.prepared);
    query_.take(0, p.query.at(n, 0));
    for (std::int64_t key0 = key_begin; key0 < key_end; key0 += TK) slopes(n, key0, key_end, shift, sum_query);
    for (std::int64_t h = 0; h < width() && shift != 0; ++h) sum_query[h] = std::ldexp(sum_query[h], shift);
  }

  std::int64_t width() const { return round_up(p.hidden, PreparedQueries<T>::width_unit); }

 private:
  bool find_attended(std::int64_t n, std::int64_t key0, std::int64_t count) {
    std::int64_t first, last;
    key_range(p, n, 0, first, last);
    T bias[TK] = {};
    if (p.mask.type != MaskType::none) load_mask(p.mask, n, 0, key0, count, bias);
    bool any = false;
    for (std::int64_t j = 0; j < TK; ++j) {
      attended_[j] = j < count && key0 + j >= first && key0 + j < last && bias[j] != T(-INFINITY);
      any = any || attended_[j];
    }
    return any;
  }

  void load_weights(std::int64_t n, std::int64_t key0, std::int64_t count, T* weights) const {
    const T* from = p.weights.at(n, 0) + key0;
    for (std::int64_t j = 0; j < TK; ++j) weights[j] = j < count && attended_[j] ? from[j] : T(0);
  }

  // Computes G from dP; returns the largest |G|. A nonfinite delta reaches all attended keys, also those with P = 0.
  typename Simd<T>::Bits scores_gradient(std::int64_t n, std::int64_t key0, std::int64_t count, T delta) {
    if (!find_attended(n, key0, count)) return 0;
    T weights[TK], *g = p.grad_scores + n * p.keys + key0;
    load_weights(n, key0, count, weights);
    const bool finite = std::isfinite(delta);
    for (std::int64_t j = 0; j < count; ++j) {
      const bool zero = !attended_[j] || (finite && weights[j] == T(0));
      g[j] = zero ? T(0) : weights[j] * (g[j] - delta);
    }
    return largest(g, count);
  }

  // Sums each tile by itself: long sums in single precision lose digits.
  void slopes(std::int64_t n, std::int64_t key0, std::int64_t key_end, int shift, T* sum_query) {
    const T* g = p.grad_scores + n * p.keys;
    query_.begin_slopes();
    for (std::int64_t j = key0; j < std::min(key0 + TK, key_end); ++j)
      if (g[j] != T(0)) query_.add_slopes(p, n, j, shift == 0 ? g[j] : std::ldexp(g[j], -shift));
    query_.finish_slopes(sum_query);
  }

  const StepBackward<T>& p;
  bool attended_[TK];
  PreparedQueries<T> query_;
  Buffer<T> value_;
};

template <class T>
void finish_query(const StepBackward<T>& p, std::int64_t n, const T* sums, std::int64_t stride, std::int64_t splits) {
  const T* w = p.weight.at(n, 0);
  for (std::int64_t h = 0; h < p.hidden; ++h) {
    double sum = 0;
    for (std::int64_t k = 0; k < splits; ++k) sum += sums[k * stride + h];
    // A nonfinite weight has already made G NaN wherever it matters.
    p.grad_query[n * p.hidden + h] = std::isfinite(w[h]) ? T(sum * 4 * double(p.scale) * double(w[h])) : T(sum * 0);
  }
}

template <class T>
void query_and_scores(const StepBackward<T>& p, const ParallelFor& parallel_for) {
  if (p.keys == 0) return void(std::fill(p.grad_query, p.grad_query + p.batch * p.hidden, T(0)));
  const KeySplits<T> keys(p.batch, p.keys);
  const std::int64_t work = keys.split * (p.hidden + p.values + 16), parts = p.batch * keys.splits;
  const std::int64_t width = StepPass<T>(p).width();
  Buffer<double> sums;
  Buffer<T> query_sums;
  double *delta = sums.get(2 * parts), *total = delta + parts;
  T* sum_query = query_sums.get(parts * width);
  const auto finish = [&](StepPass<T>& pass, std::int64_t n, std::int64_t k) {
    double all = 0, weights = 0;
    for (std::int64_t i = n * keys.splits; i < (n + 1) * keys.splits; ++i) {
      all += delta[i];
      weights += total[i];
    }
    all = weights == 0 ? all : all / weights;
    if (p.grad_lse) all -= *p.grad_lse.at(n, 0);
    pass.query(n, keys.begin(k), keys.end(k), all, sum_query + (n * keys.splits + k) * width);
  };
  parallel_for(parts, work, [&](Tasks& tasks) {
    StepPass<T> pass(p);
    for (std::int64_t task; tasks.take(task);) {
      const std::int64_t n = task / keys.splits, k = task % keys.splits;
      pass.upstream(n, keys.begin(k), keys.end(k), delta[task], total[task]);
      if (keys.splits > 1) continue;
      finish(pass, n, 0);
      finish_query(p, n, sum_query + n * width, width, 1);
    }
  });
  if (keys.splits == 1) return;
  parallel_for(parts, work, [&](Tasks& tasks) {
    StepPass<T> pass(p);
    for (std::int64_t task; tasks.take(task);) finish(pass, task / keys.splits, task % keys.splits);
  });
  for (std::int64_t n = 0; n < p.batch; ++n)
    finish_query(p, n, sum_query + n * keys.splits * width, width, keys.splits);
}

template <class T>
void step_backward(const StepBackward<T>& p, const ParallelFor& parallel_for) {
  query_and_scores(p, parallel_for);
  if (p.location) location_backward(p, parallel_for);  // overwrites the query's gradient
}
