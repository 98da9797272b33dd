// Gradients. With P = exp(S - lse), D the keep factors, and the upstream gradients of out, weights and lse,
//
//     dP = D o (dO V^T) + dWeights    delta_i = sum_j P_ij dP_ij      G = P o (dP - delta + dlse)
//     dV = (P o D)^T dO               dMask = G                       dS = scale G
//     dq_ih = w_h sum_j dS_ij (1 - t^2)    dk_jh = w_h sum_i dS_ij (1 - t^2)    dw_h = sum_ij dS_ij t_ijh
//
// and, in the notation of energy.h with r = 1/(a + b),
//
//     t = (b - a) r        1 - t^2 = 4 a b r^2
//
// so that sum_j G b r^2 (times 4 a_i) gives dq, sum_i G a r^2 (times 4 b_j) gives dk, and one reciprocal serves all three.
//
// P and G are kept for a bounded number of query rows at a time. Three passes over them follow, each of which owns what
// it writes, so that nothing is atomic and every sum has a fixed order:
//     rows -> P, G        keys -> dV        features -> dq, dk, dw (lanes run over features)

constexpr std::int64_t workspace_elements = std::int64_t(1) << 21;  // of P, and as many of G
constexpr std::int64_t gradient_keys = 128;  // keys of a tile in the pass over features
constexpr std::int64_t rows_summed = 64;     // rows of a partial sum there

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

// dV of keys [key0, key0 + count) += (P o D)^T dO, over runs of rows that attend to any of them.
template <class T>
class ValuePass {
 public:
  static constexpr int K = block_keys<T>;

  ValuePass(const Backward<T>& problem, const Workspace<T>& workspace) : p(problem), ws(workspace) {}

  void run(std::int64_t n, std::int64_t key0, std::int64_t count) {
    constexpr int L = lanes<T>;
    const std::int64_t width = round_up(p.values, panel_columns<T>), blocks = (count + K - 1) / K;
    T* sum = sum_.get(blocks * K * width);
    T* out = p.grad_value + (n * p.keys + key0) * p.values;
    std::memset(sum, 0, blocks * K * width * sizeof(T));
    if (ws.row0 > 0)
      for (std::int64_t j = 0; j < count; ++j) std::memcpy(sum + j * width, out + j * p.values, p.values * sizeof(T));
    const std::int64_t end = ws.row0 + ws.rows;
    for (std::int64_t i = ws.row0; i < end;) {
      // Rows that attend to the same blocks go together; what a row holds of its inactive blocks is undefined.
      std::int64_t stop = i + 1;
      while (stop < end && stop - i < most_rows && std::memcmp(active(n, i, key0), active(n, stop, key0), blocks) == 0)
        ++stop;
      const T* grad = nullptr;
      for (std::int64_t b = 0; b < blocks; ++b) {
        if (!active(n, i, key0)[b]) continue;
        if (!grad) grad = pack_panels(p.grad_out.at(n, i), p.grad_out.row, stop - i, p.values, panels);
        const T* probability =
            pack_panels(ws.probability + ws.index(n, i) * ws.keys + key0 + b * K, ws.keys, stop - i, K, probabilities);
        for (int j = 0; j < K; j += gemm_row_block)
          gemm<T>(probability + j, 1, K, grad, (stop - i) * panel_columns<T>, sum + (b * K + j) * width, width,
                  std::min<int>(gemm_row_block, K - j), width, stop - i);
      }
      i = stop;
    }
    for (std::int64_t j = 0; j < count; ++j)
      for (std::int64_t d = 0; d < p.values; d += L)
        store_part<T>(out + j * p.values + d, load(sum + j * width + d), p.values - d);
  }

 private:
  const unsigned char* active(std::int64_t n, std::int64_t i, std::int64_t key0) const {
    return ws.active + ws.index(n, i) * ws.blocks + key0 / K;
  }

  const Backward<T>& p;
  const Workspace<T>& ws;
  Buffer<T> sum_, panels, probabilities;
};

// The pass over features works on two vectors of features at once, which share a reciprocal: it joins factors of a single
// pair (i, j), so no pair depends on what another one holds, not even by rounding.
constexpr int feature_vectors = 2;

template <class T>
inline void reciprocals(const Vec<T>* y, Vec<T>* r) {
  const Vec<T> both = reciprocal(y[0] * y[1]);
  r[0] = both * y[1];
  r[1] = both * y[0];
}

// A query row (a = e^{-2q}) against `count` keys (b = e^{2k}) with their G. Adds G b r^2 to sum_query, for dq = 4 w a
// sum_query; G a r^2 to sum_key, for dk = 4 w b sum_key; and G t to sum_weight.
template <class T>
void row_factored(const T* a, const T* b, const T* g, std::int64_t count, T* sum_query, T* sum_key, T* sum_weight) {
  constexpr int L = lanes<T>;
  Vec<T> query[feature_vectors], weight[feature_vectors];
  for (int v = 0; v < feature_vectors; ++v) {
    query[v] = load(sum_query + v * L);
    weight[v] = load(sum_weight + v * L);
  }
  for (std::int64_t j = 0; j < count; ++j, b += feature_vectors * L, sum_key += feature_vectors * L) {
    Vec<T> y[feature_vectors], r[feature_vectors];
    for (int v = 0; v < feature_vectors; ++v) y[v] = load(b + v * L) + load(a + v * L);
    reciprocals<T>(y, r);
    for (int v = 0; v < feature_vectors; ++v) {
      const Vec<T> u = r[v] * g[j], z = u * r[v];
      weight[v] += u * (load(b + v * L) - load(a + v * L));
      query[v] += z * load(b + v * L);
      store(sum_key + v * L, load(sum_key + v * L) + z * load(a + v * L));
    }
  }
  for (int v = 0; v < feature_vectors; ++v) {
    store(sum_query + v * L, query[v]);
    store(sum_weight + v * L, weight[v]);
  }
}

// Stores e^x, and what its rounding leaves out. The rounding of b and a is alike for all pairs of a key or a row, so that it adds
// up in dw, where t is small above all. But to first order
//
//     t(a + da, b + db) = t + (1 - t^2) / 2 (db / b - da / a)
//
// and sum_i G (1 - t^2) is what dk is made of: adding 2 (db sum_key - da sum_query) to sum_weight takes the errors out,
// at no cost per pair.
template <class T>
inline void store_exp(Vec<T> x, T* to, T* rest) {
  Vec<T> e, left;
  exp_and_rest<T>(clamp<T>(x, -2 * Range<T>::safe, 2 * Range<T>::safe), e, left);
  store(to, e);
  store(rest, left);
}

// The same for one pair of any q and k, z = G (1 - t^2) / 4 is the share of dq and dk, without a or b.
template <class T>
inline void pair_direct(const T* q, const T* k, T g, Vec<T>* z, T* sum_weight) {
  constexpr int L = lanes<T>;
  Vec<T> e[feature_vectors], y[feature_vectors], r[feature_vectors];
  for (int v = 0; v < feature_vectors; ++v) {
    e[v] = expm1<T>(clamp<T>(load(k + v * L) + load(q + v * L), -Range<T>::flat, Range<T>::flat) * T(2));
    y[v] = e[v] + T(2);
  }
  reciprocals<T>(y, r);
  for (int v = 0; v < feature_vectors; ++v) {
    const Vec<T> u = r[v] * g;
    store(sum_weight + v * L, load(sum_weight + v * L) + u * e[v]);
    z[v] = u * r[v] * (e[v] + T(1));
  }
}

// For keys [key_begin, key_end): dk for good, and the keys' share of dq and dw for FeatureSums.
template <class T>
class FeaturePass {
 public:
  static constexpr int K = block_keys<T>, L = lanes<T>, F = feature_vectors * L;

  FeaturePass(const Backward<T>& problem, const Workspace<T>& workspace) : p(problem), ws(workspace) {}

  // Features [first, first + count), padded to whole groups of vectors; part_query is [row][width], part_weight [width].
  void run(std::int64_t n, std::int64_t first, std::int64_t count, std::int64_t key_begin, std::int64_t key_end,
           T* part_query, double* part_weight, std::int64_t width) {
    entry = n;
    for (std::int64_t h = first; h < first + count; h += L) {
      for (std::int64_t r = 0; r < ws.rows; ++r) store(part_query + r * width + h, Vec<T>{});
      for (int l = 0; l < L; ++l) part_weight[h + l] = 0;
    }
    for (std::int64_t key0 = key_begin; key0 < key_end; key0 += gradient_keys) {
      const std::int64_t keys = std::min(gradient_keys, key_end - key0);
      if (ws.rows == 1)
        single_row(first, count, key0, keys, part_query, part_weight);
      else
        for (std::int64_t h = first; h < first + count; h += F) rows(h, key0, keys, part_query, part_weight, width);
    }
  }

 private:
  // Every key is used once: nothing is packed, and memory is read and written in its own order.
  void single_row(std::int64_t first, std::int64_t count, std::int64_t key0, std::int64_t keys, T* part_query,
                  double* part_weight) {
    T* q = a_.get(count);
    T* sum_weight = sum_weight_.get(count);
    for (std::int64_t h = 0; h < count; h += F) load_query(0, first + h, q + h, nullptr);
    std::memset(sum_weight, 0, count * sizeof(T));
    const T* g = gradient(0) + key0;
    for (std::int64_t j = 0; j < keys; ++j) {
      const bool used = active(0)[(key0 + j) / K] && g[j] != T(0);
      for (std::int64_t h = 0; h < count; h += F) {
        Vec<T> z[feature_vectors] = {};
        if (used) {
          T k[F];
          pair_direct<T>(q + h, load_features(p.key.at(entry, key0 + j), first + h, k), g[j], z, sum_weight + h);
          for (int v = 0; v < feature_vectors; ++v)
            store(part_query + first + h + v * L, load(part_query + first + h + v * L) + z[v]);
        }
        if (p.grad_key) add_grad_key(key0 + j, first + h, z, ws.row0 == 0);
      }
    }
    for (std::int64_t h = 0; h < count; ++h) part_weight[first + h] += sum_weight[h];
  }

  void rows(std::int64_t h, std::int64_t key0, std::int64_t keys, T* part_query, double* part_weight,
            std::int64_t width) {
    const std::int64_t blocks = (keys + K - 1) / K;
    bool used = false;
    for (std::int64_t r = 0; r < ws.rows && !used; ++r) used = std::memchr(active(r) + key0 / K, 1, blocks) != nullptr;
    const bool set_grad_key = p.grad_key && ws.row0 == 0;  // the first rows set dk, the others add to it
    if (!used && !set_grad_key) return;
    T *b = b_.get(gradient_keys * F), *b_rest = b_rest_.get(gradient_keys * F);
    T *sum_key = sum_key_.get(2 * gradient_keys * F), *sum_key_rows = sum_key + gradient_keys * F;
    T *a = a_.get(3 * F), *q = a + 2 * F;
    T *sum_weight = sum_weight_.get(2 * F), *correction = sum_weight + F;
    std::memset(sum_key, 0, 2 * gradient_keys * F * sizeof(T));
    std::memset(correction, 0, F * sizeof(T));
    bool special[gradient_keys], any_special = false;  // out of the factored form's range: computed directly
    for (std::int64_t j = 0; j < keys; ++j) {
      T copy[F];
      const T* k = load_features(p.key.at(entry, key0 + j), h, copy);
      special[j] = largest(k, F) > ordered_bits<T>(Range<T>::safe);
      any_special = any_special || special[j];
      for (int v = 0; v < feature_vectors; ++v)
        store_exp<T>(special[j] ? Vec<T>{} : load(k + v * L) * T(2), b + j * F + v * L, b_rest + j * F + v * L);
      if (set_grad_key) {
        const Vec<T> zero[feature_vectors] = {};
        add_grad_key(key0 + j, h, zero, true);
      }
    }
    std::int64_t summed = 0;
    for (std::int64_t r = 0; r < ws.rows; ++r) {
      const unsigned char* on = active(r) + key0 / K;
      if (!std::memchr(on, 1, blocks)) continue;
      const bool row_special = load_query(r, h, q, a);
      const T* g = gradient(r) + key0;
      if (r + 1 < ws.rows) prefetch(gradient(r + 1) + key0, keys);  // rows lie pages apart, which hardware does not foresee
      if (++summed % rows_summed == 0) add_and_clear(sum_key, sum_key_rows, keys * F);
      T sum_query[F] = {};
      std::memset(sum_weight, 0, F * sizeof(T));
      T* part = part_query + r * width + h;
      for (std::int64_t j = 0; j < keys;) {
        if (!on[j / K]) {
          j += K;
          continue;
        }
        std::int64_t end = j + K;
        while (end < keys && on[end / K]) end += K;
        end = std::min(end, keys);
        if (!row_special && !any_special) {
          row_factored(a, b + j * F, g + j, end - j, sum_query, sum_key_rows + j * F, sum_weight);
        } else {
          for (std::int64_t i = j; i < end; ++i)
            if (!row_special && !special[i])
              row_factored(a, b + i * F, g + i, 1, sum_query, sum_key_rows + i * F, sum_weight);
            else if (g[i] != T(0))  // a zero G leaves no trace of its pair, whatever that holds
              direct(q, key0 + i, h, g[i], part, sum_weight);
        }
        j = round_up(end, K);
      }
      for (int l = 0; l < F; ++l) part_weight[h + l] += sum_weight[l];
      if (row_special) continue;
      for (int v = 0; v < feature_vectors; ++v) {
        const Vec<T> s = load(sum_query + v * L);
        store(part + v * L, load(part + v * L) + s * load(a + v * L));
        store(correction + v * L, load(correction + v * L) - s * load(a + F + v * L));
      }
    }
    add_and_clear(sum_key, sum_key_rows, keys * F);
    for (std::int64_t j = 0; j < keys; ++j) {
      if (special[j]) continue;
      Vec<T> z[feature_vectors];
      for (int v = 0; v < feature_vectors; ++v) {
        const Vec<T> s = load(sum_key + j * F + v * L);
        z[v] = s * load(b + j * F + v * L);
        store(correction + v * L, load(correction + v * L) + s * load(b_rest + j * F + v * L));
      }
      if (p.grad_key) add_grad_key(key0 + j, h, z, false);
    }
    for (int l = 0; l < F; ++l) part_weight[h + l] += 2 * correction[l];
  }

  // Sums of sums: single precision is for short ones.
  static void add_and_clear(T* to, T* from, std::int64_t count) {
    for (std::int64_t l = 0; l < count; l += L) {
      store(to + l, load(to + l) + load(from + l));
      store(from + l, Vec<T>{});
    }
  }

  void direct(const T* q, std::int64_t j, std::int64_t h, T g, T* part_query, T* sum_weight) {
    T k[F];
    Vec<T> z[feature_vectors];
    pair_direct<T>(q, load_features(p.key.at(entry, j), h, k), g, z, sum_weight);
    for (int v = 0; v < feature_vectors; ++v) store(part_query + v * L, load(part_query + v * L) + z[v]);
    if (p.grad_key) add_grad_key(j, h, z, false);
  }

  // q, padded, and e^{-2q} with its rest if wanted; true if the factored form does not serve.
  bool load_query(std::int64_t r, std::int64_t h, T* q, T* a) const {
    const T* x = load_features(p.query.at(entry, ws.row0 + r), h, q);
    if (x != q) std::memcpy(q, x, F * sizeof(T));
    for (int v = 0; v < feature_vectors && a; ++v) store_exp<T>(load(x + v * L) * T(-2), a + v * L, a + F + v * L);
    return largest(x, F) > ordered_bits<T>(Range<T>::safe);
  }

  // A group of a row's features: where it lies, or a copy padded with zeros at the end of the row.
  const T* load_features(const T* row, std::int64_t h, T* copy) const {
    if (h + F <= p.hidden) return row + h;
    for (int l = 0; l < F; ++l) copy[l] = h + l < p.hidden ? row[h + l] : T(0);
    return copy;
  }

  void add_grad_key(std::int64_t j, std::int64_t h, const Vec<T>* z, bool overwrite) const {
    T copy[F];
    const T* w = load_features(p.weight.at(entry, 0), h, copy);
    T* out = p.grad_key + (entry * p.keys + j) * p.hidden + h;
    for (int v = 0; v < feature_vectors; ++v) {
      const std::int64_t some = p.hidden - h - v * L;
      if (some <= 0) return;
      const Vec<T> d = z[v] * (load(w + v * L) * (T(4) * p.scale));
      store_part<T>(out + v * L, overwrite ? d : load_part<T>(out + v * L, some, 0) + d, some);
    }
  }

  const unsigned char* active(std::int64_t r) const { return ws.active + ws.index(entry, ws.row0 + r) * ws.blocks; }
  const T* gradient(std::int64_t r) const { return ws.gradient + ws.index(entry, ws.row0 + r) * ws.keys; }

  const Backward<T>& p;
  const Workspace<T>& ws;
  std::int64_t entry = 0;
  Buffer<T> a_, b_, b_rest_, sum_key_, sum_weight_;
};

// How the pass over features is shared out: by groups of features and, where these are few, by ranges of keys, whose
// shares of dq and dw are added up afterwards. A function of the shape alone.
template <class T>
struct FeatureTasks {
  std::int64_t pieces, piece;     // of the features
  std::int64_t splits, split;     // of the keys
  std::int64_t width;             // of a padded row of features

  FeatureTasks(const Backward<T>& p, std::int64_t entries, std::int64_t rows) {
    constexpr std::int64_t F = feature_vectors * lanes<T>;
    width = round_up(p.hidden, F);
    piece = rows == 1 ? width : F;
    pieces = width / piece;
    splits = std::max<std::int64_t>(1, std::min(tasks_wanted / (entries * pieces), p.keys / split_keys));
    split = round_up((std::max<std::int64_t>(p.keys, 1) + splits - 1) / splits, gradient_keys);
    splits = (p.keys + split - 1) / split;
  }
};

// dq = 4 scale w sum, and dw = scale sum, over the ranges of keys in their order.
template <class T>
void add_feature_parts(const Backward<T>& p, const Workspace<T>& ws, const FeatureTasks<T>& share, std::int64_t n,
                       const T* part_query, const double* part_weight) {
  const T* w = p.weight.at(ws.entry0 + n, 0);
  if (p.grad_query)
    for (std::int64_t r = 0; r < ws.rows; ++r) {
      T* out = p.grad_query + ((ws.entry0 + n) * p.queries + ws.row0 + r) * p.hidden;
      for (std::int64_t h = 0; h < p.hidden; ++h) out[h] = 0;
      for (std::int64_t k = 0; k < share.splits; ++k) {
        const T* part = part_query + ((k * ws.entries + n) * ws.rows + r) * share.width;
        for (std::int64_t h = 0; h < p.hidden; ++h) out[h] += part[h];
      }
      for (std::int64_t h = 0; h < p.hidden; ++h) out[h] *= w[h] * (T(4) * p.scale);
    }
  if (p.grad_weight)
    for (std::int64_t h = 0; h < p.hidden; ++h) {
      double sum = 0;
      for (std::int64_t k = 0; k < share.splits; ++k) sum += part_weight[(k * ws.entries + n) * share.width + h];
      p.grad_weight[(ws.entry0 + n) * p.hidden + h] += T(sum) * p.scale;
    }
}

// The mask's gradient is G, summed over what the mask broadcasts; each task owns a range of columns.
template <class T>
void mask_pass(const Backward<T>& p, const Workspace<T>& ws, std::int64_t key0, std::int64_t count) {
  constexpr int K = block_keys<T>;
  for (std::int64_t n = ws.entry0; n < ws.entry0 + ws.entries; ++n)
    for (std::int64_t i = ws.row0; i < ws.row0 + ws.rows; ++i) {
      const std::int64_t at = ws.index(n, i);
      double* out = p.grad_mask + p.grad_mask_offset[n] + i * p.grad_mask_row;
      for (std::int64_t j = key0; j < key0 + count; ++j)
        if (ws.active[at * ws.blocks + j / K]) out[j * p.grad_mask_column] += ws.gradient[at * ws.keys + j];
    }
}

template <class T>
void zero(T* x, std::int64_t n) {
  if (x) std::memset(x, 0, n * sizeof(T));
}

template <class T>
void backward(const Backward<T>& p, const ParallelFor& parallel_for) {
  constexpr int K = block_keys<T>, TK = tile_keys<T>;
  zero<T>(p.grad_weight, p.batch * p.hidden);
  if (!p.grad_out) zero<T>(p.grad_value, p.batch * p.keys * p.values);
  if (p.batch == 0 || p.queries == 0 || p.keys == 0) {
    zero<T>(p.grad_query, p.batch * p.queries * p.hidden);
    zero<T>(p.grad_key, p.batch * p.keys * p.hidden);
    zero<T>(p.grad_value, p.batch * p.keys * p.values);
    return;
  }

  Workspace<T> ws;
  ws.keys = round_up(p.keys, TK);
  ws.blocks = ws.keys / K;
  const std::int64_t most = std::max<std::int64_t>(16, workspace_elements / ws.keys);  // rows that fit
  const std::int64_t entries = std::max<std::int64_t>(1, std::min(p.batch, most / p.queries));
  const std::int64_t chunk = std::min(p.queries, most);
  Buffer<T> probability, gradient, query_parts;
  Buffer<double> weight_parts;
  Buffer<unsigned char> active;
  ws.probability = probability.get(entries * chunk * ws.keys);
  ws.gradient = gradient.get(entries * chunk * ws.keys);
  ws.active = active.get(entries * chunk * ws.blocks);

  const bool features = p.grad_query || p.grad_key || p.grad_weight;
  for (ws.entry0 = 0; ws.entry0 < p.batch; ws.entry0 += entries)
    for (ws.row0 = 0; ws.row0 < p.queries; ws.row0 += chunk) {
      ws.entries = std::min(entries, p.batch - ws.entry0);
      ws.rows = std::min(chunk, p.queries - ws.row0);

      const std::int64_t rows = rows_per_block(ws.entries, ws.rows, p.threads), blocks = (ws.rows + rows - 1) / rows;
      parallel_for(ws.entries * blocks, rows * p.keys * (p.hidden + p.values + 16),
                   [&](Tasks& tasks) {
                     RowPass<T> pass(p, ws);
                     for (std::int64_t task; tasks.take(task);) {
                       const std::int64_t row0 = task % blocks * rows;
                       pass.run(ws.entry0 + task / blocks, ws.row0 + row0, std::min(rows, ws.rows - row0));
                     }
                   });
      if (p.grad_value && p.grad_out && p.values > 0) {
        const std::int64_t pieces = (p.keys + TK - 1) / TK;
        parallel_for(ws.entries * pieces, ws.rows * TK * p.values, [&](Tasks& tasks) {
          ValuePass<T> pass(p, ws);
          for (std::int64_t task; tasks.take(task);) {
            const std::int64_t key0 = task % pieces * TK;
            pass.run(ws.entry0 + task / pieces, key0, std::min<std::int64_t>(TK, p.keys - key0));
          }
        });
      }
      if (features && p.hidden > 0) {
        const FeatureTasks<T> share(p, ws.entries, ws.rows);
        T* part_query = query_parts.get(share.splits * ws.entries * ws.rows * share.width);
        double* part_weight = weight_parts.get(share.splits * ws.entries * share.width);
        parallel_for(ws.entries * share.pieces * share.splits, ws.rows * share.split * share.piece * 4,
                     [&](Tasks& tasks) {
                       FeaturePass<T> pass(p, ws);
                       for (std::int64_t task; tasks.take(task);) {
                         const std::int64_t f = task % share.pieces, k = task / share.pieces % share.splits;
                         const std::int64_t n = task / share.pieces / share.splits, at = k * ws.entries + n;
                         pass.run(ws.entry0 + n, f * share.piece, share.piece, k * share.split,
                                  std::min((k + 1) * share.split, p.keys), part_query + at * ws.rows * share.width,
                                  part_weight + at * share.width, share.width);
                       }
                     });
        parallel_for(ws.entries, ws.rows * share.width * share.splits, [&](Tasks& tasks) {
          for (std::int64_t n; tasks.take(n);) add_feature_parts(p, ws, share, n, part_query, part_weight);
        });
      }
      if (p.grad_mask) {
        const std::int64_t width = p.grad_mask_column ? TK : p.keys, pieces = (p.keys + width - 1) / width;
        parallel_for(pieces, ws.entries * ws.rows * width, [&](Tasks& tasks) {
          for (std::int64_t task; tasks.take(task);)
            mask_pass(p, ws, task * width, std::min(width, p.keys - task * width));
        });
      }
    }
}
