// The gradients of query, key and weight from G.

constexpr std::int64_t gradient_keys = 128;  // keys of a tile in the pass over features
constexpr std::int64_t rows_summed = 64;     // rows of a partial sum there

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
