// The gradients of a step whose keys have a location term. With E of located_keys.h,
//
//     t_jh = tanh(q_h + E_jh)         dE_jh = scale G_j w_h (1 - t_jh^2)
//     dx_fj = sum_h dE_jh M_fh        dM_fh = sum_j x_fj dE_jh              dk_jh = dE_jh        dq_h = sum_j dE_jh
//
// (math.md, eq. 18). dE replaces E in the scratch. dk accumulates over steps.

// How the pass over keys is divided into tasks: entries and, where these are few, ranges of keys, whose sums are added
// up afterwards. It depends on the shape alone.
template <class T>
struct LocationTasks {
  std::int64_t splits, split;  // of the keys
  std::int64_t part;           // numbers of one task: dM, dq

  LocationTasks(const StepBackward<T>& p, std::int64_t width, std::int64_t row) {
    constexpr std::int64_t least = 128, wanted = 16;  // keys of a range; tasks
    splits = std::max<std::int64_t>(1, std::min((wanted + p.batch - 1) / p.batch, p.keys / least));
    split = round_up((std::max<std::int64_t>(p.keys, 1) + splits - 1) / splits, location_keys);
    splits = (std::max<std::int64_t>(p.keys, 1) + split - 1) / split;
    part = p.location.features * row + width;
  }
};

template <class T>
class LocationPass {
 public:
  static constexpr int L = lanes<T>, J = location_keys;

  explicit LocationPass(const StepBackward<T>& problem) : p(problem), e(problem.key, problem.location, problem.hidden) {
    const T size = std::fabs(p.scale);
    const bool regular = size >= T(0x1p-40) && size <= T(0x1p40);  // see FeatureFactors
    early_ = regular ? T(1) : p.scale;
    late_ = regular ? T(4) * p.scale : T(4);
    of_weight_ = regular ? double(p.scale) : 1;
  }

  // Keys [begin, end) of entry n; adds dM and dq to `part`, dw to part_weight.
  void run(std::int64_t n, std::int64_t begin, std::int64_t end, T* part, double* part_weight) {
    e.begin(n);
    // Where all G are tiny, a power of two keeps their products with m in range.
    const T most = early_ * as_number<T>(largest(p.grad_scores + n * p.keys + begin, end - begin));
    const bool tiny = most != T(0) && std::fabs(most) < T(0x1p-30);
    unit_ = tiny ? std::ldexp(T(1), std::min(100, -std::ilogb(most))) : T(1);
    load_row(n);
    T *grad_weight = part, *grad_query = part + p.location.features * e.row;
    std::fill(part, grad_query + e.width, T(0));
    std::fill(part_weight, part_weight + e.width, 0.0);
    std::int64_t tiles = 0;
    for (std::int64_t key0 = begin; key0 < end; key0 += J) {
      const std::int64_t count = std::min<std::int64_t>(J, end - key0);
      const T* g = p.grad_scores + n * p.keys + key0;
      if (largest(g, count) == 0) {
        zero_location(n, key0, count);
        continue;
      }
      if (++tiles % (rows_summed / J) == 0) flush(grad_query, part_weight);
      tile(n, key0, count, g, grad_weight);
    }
    flush(grad_query, part_weight);
    for (std::int64_t h = 0; h < e.width; ++h) part_weight[h] *= of_weight_ / unit_;
  }

  const StepBackward<T>& p;

 private:
  // Loads query and weight, padded. A nonfinite weight has already made G NaN wherever it matters: 0 replaces it.
  void load_row(std::int64_t n) {
    query_ = row_memory_.get(5 * e.width);
    factor_ = query_ + e.width;
    sum_query_ = factor_ + e.width;
    sum_weight_ = sum_query_ + e.width;
    unwanted_ = sum_weight_ + e.width;
    for (std::int64_t h = 0; h < e.width; ++h) {
      const T w = h < p.hidden ? p.weight.at(n, 0)[h] : T(0);
      query_[h] = h < p.hidden ? p.query.at(n, 0)[h] : T(0);
      factor_[h] = std::isfinite(w) ? late_ * w / unit_ : T(0);
      sum_query_[h] = sum_weight_[h] = unwanted_[h] = 0;
    }
  }

  ALWAYS_INLINE void tile(std::int64_t n, std::int64_t key0, std::int64_t count, const T* g, T* grad_weight) {
    T scaled[J] = {};
    for (std::int64_t j = 0; j < count; ++j) scaled[j] = g[j] * unit_ * early_;
    if (p.location.features == 1) return one_feature(n, key0, count, scaled, grad_weight);
    T* rows = e.rows(key0, count);
    int found[J], some = 0;
    for (int j = 0; j < count; ++j)
      if (scaled[j] != T(0)) found[some++] = j;
    for (std::int64_t h = 0; h < e.width; h += L) slopes(rows + h, n, key0, h, scaled, found, some);
    for (std::int64_t j = 0; j < J; ++j) {
      T* row = rows + j * e.row;
      if (j < count && g[j] != T(0)) {
        if (p.grad_key) add_key(row, p.grad_key + (n * p.keys + key0 + j) * p.hidden);
      } else {  // a pair with G = 0 contributes exactly 0, whatever its key and location are
        std::fill(row, row + e.width, T(0));
        for (std::int64_t f = 0; f < p.location.features; ++f) e.x[f * J + j] = 0;
      }
    }
    if (p.grad_location) {
      T* to = location_memory_.get(round_up(p.location.features, location_rows) * J);
      dots(e.weight, e.row, p.location.features, rows, e.row, e.width, to, std::int64_t(J));
      for (std::int64_t f = 0; f < p.location.features; ++f)
        for (std::int64_t j = 0; j < count; ++j)
          p.grad_location[(n * p.location.features + f) * p.keys + key0 + j] = g[j] == T(0) ? T(0) : to[f * J + j];
    }
    add_products(e.x, std::int64_t(J), 1, rows, e.row, grad_weight, e.row, p.location.features, count, e.width);
  }

  // Replaces E by dE in a vector of features of the tile's keys with G != 0, a few keys at a time.
  ALWAYS_INLINE void slopes(T* rows, std::int64_t n, std::int64_t key0, std::int64_t h, const T* g, const int* found,
                            int count) {
    constexpr int S = slopes_together;
    const Vec<T> q = load(query_ + h), w = load(factor_ + h);
    Vec<T> query = load(sum_query_ + h), weight = load(sum_weight_ + h);
    int i = 0;
    for (; i + S <= count; i += S) slopes_of<S>(rows, n, key0, h, g, found + i, q, w, query, weight);
    for (; i < count; ++i) slopes_of<1>(rows, n, key0, h, g, found + i, q, w, query, weight);
    store(sum_query_ + h, query);
    store(sum_weight_ + h, weight);
  }

  template <int S>
  ALWAYS_INLINE void slopes_of(T* rows, std::int64_t n, std::int64_t key0, std::int64_t h, const T* g, const int* some,
                               Vec<T> q, Vec<T> w, Vec<T>& query, Vec<T>& weight) {
    Vec<T> x[S], z[S], m[S];
    for (int i = 0; i < S; ++i) {
      const std::int64_t j = key0 + some[i];
      // Prefetches the next tile's keys and this tile's dk little by little: one burst would stall.
      if (j + J < p.keys) prefetch_stored(p.key, n, j + J, L, h);
      if (p.grad_key) prefetch(p.grad_key + (n * p.keys + j) * p.hidden + h, L);
      x[i] = load(rows + some[i] * e.row) + q;
    }
    tanh_parts<S, T>(x, z, m);
    for (int i = 0; i < S; ++i) {
      const Vec<T> scaled = m[i] * g[some[i]], d = (scaled - m[i] * scaled) * w;
      weight += z[i] * scaled;
      query += d;
      store(rows + some[i] * e.row, d);
    }
  }

  // A key with one feature.
  struct Located {
    std::int64_t j;
    const T* key;  // without its term
    T* grad_key;
    const T *next, *next_grad;  // prefetched: of a later key, or any address
    T g, x;
  };

  // The same for a location of one feature, a few keys at a time: E and dE stay in registers, and memory is read nearly
  // in order.
  void one_feature(std::int64_t n, std::int64_t key0, std::int64_t count, const T* g, T* grad_weight) {
    constexpr int R = location_rows;
    const T* keys = e.load_keys(key0, count);
    zero_location(n, key0, count);
    Located some[R];
    int found = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      if (g[i] == T(0)) continue;
      const std::int64_t j = key0 + i;
      T* grad_key = p.grad_key ? p.grad_key + (n * p.keys + j) * p.hidden : unwanted_;
      const T *key = keys + i * e.key_row(), *next = key, *next_grad = key;
      if (j + R < p.keys) {
        if (p.key.storage == Storage::computed) next = static_cast<const T*>(p.key.at(n, j + R));
        if (p.grad_key) next_grad = grad_key + R * p.hidden;
      }
      some[found++] = {j, key, grad_key, next, next_grad, g[i], e.x[i]};
      if (found == R) located_keys<R>(n, some, grad_weight);
      found %= R;
    }
    for (int r = 0; r < found; ++r) located_keys<1>(n, some + r, grad_weight);
  }

  // What all keys share. These copies lie on the stack, so the compiler knows that no store changes them.
  struct Columns {
    const T *query, *factor, *weight;
    T *sum_query, *sum_weight, *grad_weight;
  };

  template <int R>
  ALWAYS_INLINE void located_keys(std::int64_t n, const Located* keys, T* grad_weight) {
    const Columns c = {query_, factor_, e.weight, sum_query_, sum_weight_, grad_weight};
    const std::int64_t hidden = p.hidden;
    Located own[R];
    std::copy(keys, keys + R, own);
    Vec<T> of_location[R] = {};
    std::int64_t h = 0;
    for (; h + L <= hidden; h += L) one_slopes<R, false>(own, h, L, c, of_location);
    if (h < hidden) one_slopes<R, true>(own, h, hidden - h, c, of_location);
    for (int r = 0; r < R && p.grad_location; ++r) p.grad_location[n * p.keys + keys[r].j] = sum<T>(of_location[r]);
  }

  template <int R, bool edge>
  ALWAYS_INLINE void one_slopes(const Located* keys, std::int64_t h, std::int64_t left, const Columns& c,
                                Vec<T>* of_location) {
    constexpr int S = R < slopes_together ? R : slopes_together;
    const Vec<T> q = load(c.query + h), w = load(c.factor + h), weight = load(c.weight + h);
    Vec<T> query = load(c.sum_query + h), sum_weight = load(c.sum_weight + h), of_weight = load(c.grad_weight + h);
#pragma GCC unroll 4
    for (int r = 0; r < R; r += S) {
      const Located* k = keys + r;
      Vec<T> x[S], z[S], m[S];
      for (int i = 0; i < S; ++i) {
        prefetch(k[i].next + h, L);
        prefetch(k[i].next_grad + h, L);
        x[i] = ((edge ? load_part<T>(k[i].key + h, left, 0) : load(k[i].key + h)) + weight * k[i].x) + q;
      }
      tanh_parts<S, T>(x, z, m);
      for (int i = 0; i < S; ++i) {
        const Vec<T> scaled = m[i] * k[i].g, d = (scaled - m[i] * scaled) * w;
        sum_weight += z[i] * scaled;
        query += d;
        of_weight += d * k[i].x;
        of_location[r + i] += d * weight;
        T* to = k[i].grad_key + h;
        if (edge)
          store_part<T>(to, load_part<T>(to, left, 0) + d, left);
        else
          store(to, load(to) + d);
      }
    }
    store(c.sum_query + h, query);
    store(c.sum_weight + h, sum_weight);
    store(c.grad_weight + h, of_weight);
  }

  void add_key(const T* row, T* to) {
    const std::int64_t whole = p.hidden / L * L;
    for (std::int64_t h = 0; h < whole; h += L) store(to + h, load(to + h) + load(row + h));
    for (std::int64_t h = whole; h < p.hidden; ++h) to[h] += row[h];
  }

  void zero_location(std::int64_t n, std::int64_t key0, std::int64_t count) {
    for (std::int64_t f = 0; f < p.location.features && p.grad_location; ++f)
      std::memset(p.grad_location + (n * p.location.features + f) * p.keys + key0, 0, count * sizeof(T));
  }

  // Long sums in single precision lose digits.
  void flush(T* grad_query, double* part_weight) {
    for (std::int64_t h = 0; h < e.width; ++h) {
      grad_query[h] += sum_query_[h];
      part_weight[h] += sum_weight_[h];
      sum_query_[h] = sum_weight_[h] = 0;
    }
  }

  T early_, late_, unit_;
  double of_weight_;
  LocatedKeys<T> e;
  T *query_, *factor_, *sum_query_, *sum_weight_, *unwanted_;  // the last receives dk where no grad_key is wanted
  Buffer<T> row_memory_, location_memory_;
};

// out = the sum of `splits` rows that are `step` apart, in their order.
template <class T, class S>
void add_rows(const S* rows, std::int64_t step, std::int64_t splits, std::int64_t count, T* out) {
  if (splits == 1) return void(std::copy(rows, rows + count, out));
  for (std::int64_t h = 0; h < count; ++h) {
    S total = rows[h];
    for (std::int64_t k = 1; k < splits; ++k) total += rows[k * step + h];
    out[h] = T(total);
  }
}

// Adds up the results of entry n over its ranges of keys.
template <class T>
void add_location_parts(const StepBackward<T>& p, const LocationTasks<T>& share, std::int64_t n, const T* part,
                        const double* part_weight, std::int64_t width, std::int64_t row) {
  const std::int64_t features = p.location.features, splits = share.splits;
  for (std::int64_t f = 0; f < features; ++f)
    add_rows(part + f * row, share.part, splits, p.hidden, p.grad_location_weight + (n * features + f) * p.hidden);
  add_rows(part + features * row, share.part, splits, p.hidden, p.grad_query + n * p.hidden);
  add_rows(part_weight, width, splits, p.hidden, p.grad_weight + n * p.hidden);
}

template <class T>
void location_backward(const StepBackward<T>& p, const ParallelFor& parallel_for) {
  if (p.batch == 0) return;
  const std::int64_t width = round_up(p.hidden, 2 * lanes<T>), row = width + lanes<T>;
  const LocationTasks<T> share(p, width, row);
  const std::int64_t splits = share.splits, work = share.split * p.hidden * (3 * p.location.features + 32);
  Buffer<T> all;
  Buffer<double> all_weights;
  if (splits > 1) {
    all.get(p.batch * splits * share.part);
    all_weights.get(p.batch * splits * width);
  }
  parallel_for(p.batch * splits, work, [&](Tasks& tasks) {
    LocationPass<T> pass(p);
    Buffer<T> own;
    Buffer<double> own_weight;
    for (std::int64_t task; tasks.take(task);) {
      const std::int64_t n = task / splits, key0 = task % splits * share.split;
      T* part = splits > 1 ? all.get(0) + task * share.part : own.get(share.part);
      double* part_weight = splits > 1 ? all_weights.get(0) + task * width : own_weight.get(width);
      pass.run(n, key0, std::min(key0 + share.split, p.keys), part, part_weight);
      if (splits == 1) add_location_parts(p, share, n, part, part_weight, width, row);
    }
  });
  if (splits == 1) return;
  parallel_for(p.batch, splits * share.part, [&](Tasks& tasks) {
    for (std::int64_t n; tasks.take(n);)
      add_location_parts(p, share, n, all.get(0) + n * splits * share.part, all_weights.get(0) + n * splits * width,
                         width, row);
  });
}
