// The gradients of a step whose keys have a location term. With E of located_keys.h,
//
//     t_jh = tanh(q_h + E_jh)         dE_jh = scale G_j w_h (1 - t_jh^2)
//     dx_fj = sum_h dE_jh M_fh        dM_fh = sum_j x_fj dE_jh              dk_jh = dE_jh        dq_h = sum_j dE_jh
//
// (math.md, eq. 18). dE takes the place of E in the scratch. dk is added to what earlier steps have left.

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

// How the pass over keys is shared out: by entries and, where these are few, by ranges of keys, whose sums are added up
// afterwards. A function of the shape alone.
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
  static constexpr int L = lanes<T>, J = location_keys, F = feature_vectors * L;

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
    for (std::int64_t h = 0; h < e.width; ++h) part_weight[h] *= of_weight_;
  }

  const StepBackward<T>& p;

 private:
  // Query and weight, padded. A weight that is not finite has made G NaN wherever it matters, and counts as 0.
  void load_row(std::int64_t n) {
    query_ = row_memory_.get(4 * e.width);
    factor_ = query_ + e.width;
    sum_query_ = factor_ + e.width;
    sum_weight_ = sum_query_ + e.width;
    for (std::int64_t h = 0; h < e.width; ++h) {
      const T w = h < p.hidden ? p.weight.at(n, 0)[h] : T(0);
      query_[h] = h < p.hidden ? p.query.at(n, 0)[h] : T(0);
      factor_[h] = std::isfinite(w) ? late_ * w : T(0);
      sum_query_[h] = sum_weight_[h] = 0;
    }
  }

  ALWAYS_INLINE void tile(std::int64_t n, std::int64_t key0, std::int64_t count, const T* g, T* grad_weight) {
    T scaled[J] = {};
    for (std::int64_t j = 0; j < count; ++j) scaled[j] = g[j] * early_;
    if (p.location.features == 1) return one_feature(n, key0, count, scaled, grad_weight);
    T* rows = e.rows(key0, count);
    for (std::int64_t h = 0; h < e.width; h += F) slopes(rows + h, n, key0, h, scaled, count);
    for (std::int64_t j = 0; j < J; ++j) {
      T* row = rows + j * e.row;
      if (j < count && g[j] != T(0)) {
        if (p.grad_key) add_key(row, p.grad_key + (n * p.keys + key0 + j) * p.hidden);
      } else {  // a pair with G = 0 contributes exactly 0, whatever its key and location hold
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

  // From E to dE, in place, of two vectors of features of all keys of the tile.
  ALWAYS_INLINE void slopes(T* rows, std::int64_t n, std::int64_t key0, std::int64_t h, const T* g,
                            std::int64_t count) {
    Vec<T> q[feature_vectors], w[feature_vectors], query[feature_vectors], weight[feature_vectors];
    for (int v = 0; v < feature_vectors; ++v) {
      q[v] = load(query_ + h + v * L);
      w[v] = load(factor_ + h + v * L);
      query[v] = load(sum_query_ + h + v * L);
      weight[v] = load(sum_weight_ + h + v * L);
    }
    for (std::int64_t j = 0; j < count; ++j, rows += e.row) {
      if (g[j] == T(0)) continue;
      // Memory that is asked for in one burst is waited for: the next tile's keys, and dk of this one.
      if (key0 + j + J < p.keys) prefetch_stored(p.key, n, key0 + j + J, F, h);
      if (p.grad_key) prefetch(p.grad_key + (n * p.keys + key0 + j) * p.hidden + h, F);
      Vec<T> x[feature_vectors], t[feature_vectors], s[feature_vectors];
      for (int v = 0; v < feature_vectors; ++v) x[v] = load(rows + v * L) + q[v];
      tanh_slopes<T>(x, t, s);
      for (int v = 0; v < feature_vectors; ++v) {
        const Vec<T> d = s[v] * w[v] * g[j];
        weight[v] += t[v] * g[j];
        query[v] += d;
        store(rows + v * L, d);
      }
    }
    for (int v = 0; v < feature_vectors; ++v) {
      store(sum_query_ + h + v * L, query[v]);
      store(sum_weight_ + h + v * L, weight[v]);
    }
  }

  // A key with one feature.
  struct Located {
    std::int64_t j;
    const T* key;               // without its term
    T* grad_key;                // or null
    const T *next, *next_grad;  // what is asked for in time: of a key to come, or anything
    T g, x;
  };

  // The same where there is one feature, of a few keys at a time: E and dE stay in registers, and memory is read nearly
  // in its own order.
  void one_feature(std::int64_t n, std::int64_t key0, std::int64_t count, const T* g, T* grad_weight) {
    constexpr int R = location_rows;
    const T* keys = e.load_keys(key0, count);
    zero_location(n, key0, count);
    Located some[R];
    int found = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      if (g[i] == T(0)) continue;
      const std::int64_t j = key0 + i;
      T* grad_key = p.grad_key ? p.grad_key + (n * p.keys + j) * p.hidden : nullptr;
      const T *key = keys + i * e.key_row(), *next = key, *next_grad = key;
      if (j + R < p.keys) {
        if (p.key.storage == Storage::computed) next = static_cast<const T*>(p.key.at(n, j + R));
        if (grad_key) next_grad = grad_key + R * p.hidden;
      }
      some[found++] = {j, key, grad_key, next, next_grad, g[i], e.x[i]};
      if (found == R) located_keys<R>(n, some, grad_weight);
      found %= R;
    }
    for (int r = 0; r < found; ++r) located_keys<1>(n, some + r, grad_weight);
  }

  template <int R>
  ALWAYS_INLINE void located_keys(std::int64_t n, const Located* keys, T* grad_weight) {
    Vec<T> of_location[R] = {};
    std::int64_t h = 0;
    for (; h + F <= p.hidden; h += F) one_slopes<R, false>(keys, h, grad_weight, of_location);
    if (h < p.hidden) one_slopes<R, true>(keys, h, grad_weight, of_location);
    for (int r = 0; r < R && p.grad_location; ++r) p.grad_location[n * p.keys + keys[r].j] = sum<T>(of_location[r]);
  }

  template <int R, bool edge>
  ALWAYS_INLINE void one_slopes(const Located* keys, std::int64_t h, T* grad_weight, Vec<T>* of_location) {
    constexpr int V = feature_vectors;
    Vec<T> q[V], w[V], m[V], query[V], weight[V], of_weight[V];
    for (int v = 0; v < V; ++v) {
      q[v] = load(query_ + h + v * L);
      w[v] = load(factor_ + h + v * L);
      m[v] = load(e.weight + h + v * L);
      query[v] = load(sum_query_ + h + v * L);
      weight[v] = load(sum_weight_ + h + v * L);
      of_weight[v] = load(grad_weight + h + v * L);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Located& k = keys[r];
      prefetch(k.next + h, F);
      prefetch(k.next_grad + h, F);
      Vec<T> x[V], t[V], s[V];
      for (int v = 0; v < V; ++v) {
        const std::int64_t at = h + v * L, left = p.hidden - at;
        x[v] = ((edge ? load_part<T>(k.key + at, left, 0) : load(k.key + at)) + m[v] * k.x) + q[v];
      }
      tanh_slopes<T>(x, t, s);
      for (int v = 0; v < V; ++v) {
        const Vec<T> d = s[v] * w[v] * k.g;
        weight[v] += t[v] * k.g;
        query[v] += d;
        of_weight[v] += d * k.x;
        of_location[r] += d * m[v];
        if (!k.grad_key) continue;
        const std::int64_t at = h + v * L, left = p.hidden - at;
        T* to = k.grad_key + at;
        if (edge)
          store_part<T>(to, load_part<T>(to, left, 0) + d, left);
        else
          store(to, load(to) + d);
      }
    }
    for (int v = 0; v < V; ++v) {
      store(sum_query_ + h + v * L, query[v]);
      store(sum_weight_ + h + v * L, weight[v]);
      store(grad_weight + h + v * L, of_weight[v]);
    }
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

  // Single precision is for short sums.
  void flush(T* grad_query, double* part_weight) {
    for (std::int64_t h = 0; h < e.width; ++h) {
      grad_query[h] += sum_query_[h];
      part_weight[h] += sum_weight_[h];
      sum_query_[h] = sum_weight_[h] = 0;
    }
  }

  T early_, late_;
  double of_weight_;
  LocatedKeys<T> e;
  T *query_, *factor_, *sum_query_, *sum_weight_;
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

// The results of entry n, from its ranges of keys.
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
