// The gradients of query, key and weight from G.

constexpr std::int64_t rows_summed = 64;  // rows of a partial sum
constexpr std::int64_t keys_ahead = 8;    // prefetch distance of keys and queries: few features of each lie together

template <class T>
inline void reciprocals(const Vec<T>* y, Vec<T>* r) {
  const Vec<T> both = reciprocal(y[0] * y[1]);
  r[0] = both * y[1];
  r[1] = both * y[0];
}

// A query row (a = e^{-2q}) against keys [begin, end) (b = e^{2k}): adds G b r^2 to sum_query (dq = 4 w a sum_query),
// G a r^2 to sum_key (dk = 4 w b sum_key), G t to sum_weight. Some reciprocals divide: that relieves multiply units.
template <int vectors, class T>
void row_factored(const T* a, const T* b, const T* g, std::int64_t begin, std::int64_t end, T* sum_query, T* sum_key,
                  T* sum_weight) {
  constexpr int L = lanes<T>;
  Vec<T> query[vectors], weight[vectors];
  for (int v = 0; v < vectors; ++v) {
    query[v] = load(sum_query + v * L);
    weight[v] = load(sum_weight + v * L);
  }
#pragma GCC unroll 2
  for (std::int64_t j = begin; j < end; ++j) {
    const T* key = b + j * vectors * L;
    T* to = sum_key + j * vectors * L;
    Vec<T> y[vectors], r[vectors];
    for (int v = 0; v < vectors; ++v) y[v] = load(key + v * L) + load(a + v * L);
    if constexpr (vectors == 1) {
      r[0] = j % 2 ? reciprocal(y[0]) : T(1) / y[0];
    } else if (!quick_reciprocal || sizeof(T) > 4 || j % 2) {
      reciprocals<T>(y, r);
    } else {
      r[0] = T(1) / y[0];
      r[1] = reciprocal(y[1]);
    }
    for (int v = 0; v < vectors; ++v) {
      const Vec<T> u = r[v] * g[j], z = u * r[v];
      weight[v] += u * (load(key + v * L) - load(a + v * L));
      query[v] += z * load(key + v * L);
      store(to + v * L, load(to + v * L) + z * load(a + v * L));
    }
  }
  for (int v = 0; v < vectors; ++v) {
    store(sum_query + v * L, query[v]);
    store(sum_weight + v * L, weight[v]);
  }
}

// Stores e^x and its error. The rounding of b and a is the same for all pairs of a key or a row, so it accumulates in
// dw, above all where t is small. To first order
//
//     t(a + da, b + db) = t + (1 - t^2) / 2 (db / b - da / a)
//
// and dk is made of sum_i G (1 - t^2): adding 2 (db sum_key - da sum_query) to sum_weight removes the errors, without a
// cost per pair.
template <class T>
inline void store_exp(Vec<T> x, T* to, T* error) {
  Vec<T> e, lost;
  exp_with_error<T>(clamp<T>(x, -2 * Range<T>::safe, 2 * Range<T>::safe), e, lost);
  store(to, e);
  store(error, lost);
}

// The same for one pair of any q and k, without a or b. Its share of dq and dk is z = G (1 - t^2) / 4.
template <class T>
inline void pair_direct(const T* q, const T* k, T g, Vec<T>* z, T* sum_weight) {
  constexpr int L = lanes<T>;
  Vec<T> e[feature_vectors], y[feature_vectors], r[feature_vectors];
  for (int v = 0; v < feature_vectors; ++v) {
    e[v] = expm1<T>(clamp<T>(load(k + v * L) + load(q + v * L), -Range<T>::flat, Range<T>::flat) * T(2));
    y[v] = e[v] + T(2);
  }
  reciprocals<T>(y, r);
  // G is multiplied last: with large exponentials, the product of the other factors is small, but not each of them.
  for (int v = 0; v < feature_vectors; ++v) {
    store(sum_weight + v * L, load(sum_weight + v * L) + r[v] * e[v] * g);
    z[v] = (e[v] + T(1)) * r[v] * r[v] * g;
  }
}

// row_factored loses nothing of |G| between these: products with r^2 neither underflow nor overflow.
template <class T>
constexpr T factored_least = T(sizeof(T) == 4 ? 0x1p-60 : 0x1p-400);
template <class T>
constexpr T factored_most = T(sizeof(T) == 4 ? 0x1p50 : 0x1p400);

// dw is computed again where its square times this is below the sum of `slopes_`: then tanh is below 1 / 128.
constexpr double cancelling = 0x1p10;

// Computes dk of keys [key_begin, key_end), and their share of dq and dw, which add_feature_parts adds up.
template <class T>
class FeaturePass {
 public:
  static constexpr int K = block_keys<T>, L = lanes<T>, F = feature_vectors * L;

  FeaturePass(const Backward<T>& problem, const Workspace<T>& workspace, const FeatureFactors<T>& factors)
      : p(problem), ws(workspace), factors(factors) {}

  // Features [first, first + count), padded to whole groups of vectors; part_query: [row][width], part_weight: [width].
  void run(std::int64_t n, std::int64_t first, std::int64_t count, std::int64_t key_begin, std::int64_t key_end,
           T* part_query, double* part_weight, std::int64_t width) {
    entry = n;
    for (std::int64_t h = first; h < first + count; h += L) {
      for (std::int64_t r = 0; r < ws.rows; ++r) store(part_query + r * width + h, Vec<T>{});
      for (int l = 0; l < L; ++l) part_weight[h + l] = 0;
    }
    if (ws.rows > 1) std::memset(known_.get(ws.rows), 0, ws.rows);
    for (std::int64_t key0 = key_begin; key0 < key_end; key0 += gradient_keys) {
      const std::int64_t keys = std::min(gradient_keys, key_end - key0);
      if (ws.rows == 1)
        single_row(first, count, key0, keys, part_query, part_weight);
      else
        rows(first, key0, keys, part_query, part_weight, width);
    }
  }

 private:
  // Every key is used once, so nothing is packed, and memory is read and written in order.
  void single_row(std::int64_t first, std::int64_t count, std::int64_t key0, std::int64_t keys, T* part_query,
                  double* part_weight) {
    T *q = a_.get(3 * count), *sum_query = q + count, *sum_weight = sum_query + count;
    for (std::int64_t h = 0; h < count; h += F) load_query(0, first + h, q + h, nullptr);
    std::memset(sum_query, 0, 2 * count * sizeof(T));
    const typename Workspace<T>::Row row = ws.row(entry, ws.row0);
    const std::int64_t column = row.column(key0);
    const T* g = row.gradient + column;
    for (std::int64_t j = 0; j < keys; ++j) {
      const bool contributes = column >= 0 && row.attended[(column + j) / K] && g[j] != T(0);
      for (std::int64_t h = 0; h < count; h += F) {
        Vec<T> z[feature_vectors] = {};
        if (contributes) {
          T k[F];
          pair_direct<T>(q + h, load_key(key0 + j, first + h, k), g[j] * factors.early, z, sum_weight + h);
          for (int v = 0; v < feature_vectors; ++v) store(sum_query + h + v * L, load(sum_query + h + v * L) + z[v]);
        }
        if (p.grad_key) add_grad_key(key0 + j, first + h, z, ws.row0 == 0);
      }
    }
    for (std::int64_t h = 0; h < count; h += L)
      store(part_query + first + h, load(part_query + first + h) + load(sum_query + h));
    for (std::int64_t h = 0; h < count; ++h) part_weight[first + h] += sum_weight[h];
  }

  // Many rows against a tile of keys; F features.
  void rows(std::int64_t h, std::int64_t key0, std::int64_t keys, T* part_query, double* part_weight,
            std::int64_t width) {
    used_ = p.hidden - h <= L ? 1 : feature_vectors;
    find_rows(key0, keys);
    if (found_ == 0) return clear_keys(h, key0, keys);
    load_keys(h, key0, keys);
    for (std::int64_t f = 0; f < found_; ++f) {
      // Rows lie pages apart, and hardware prefetchers do not cross pages.
      if (f + 1 < found_) prefetch(rows_.get(0)[f + 1].gradient, keys);
      if (f + keys_ahead < found_) prefetch(p.query.at(entry, ws.row0 + rows_.get(0)[f + keys_ahead].r) + h, F);
      if ((f + 1) % rows_summed == 0) flush_rows(keys);
      const TileRow& tile_row = rows_.get(0)[f];
      row(tile_row, h, key0, keys, part_query + tile_row.r * width + h);
    }
    flush_rows(keys);
    finish_keys(h, key0, keys);
    if (weight_cancels(h)) direct_weight(h, key0, keys);
    for (int l = 0; l < F; ++l) part_weight[h + l] += weight_[l];
  }

  // A row that attends to the tile and has a G other than 0: its workspace, from the tile on.
  struct TileRow {
    std::int64_t r;
    const T* gradient;
    const unsigned char* attended;
  };

  void find_rows(std::int64_t key0, std::int64_t keys) {
    TileRow* found = rows_.get(ws.rows);
    found_ = 0;
    for (std::int64_t begin = 0, end; begin < ws.rows; begin = end) {
      end = ws.group_end(ws.row0 + begin) - ws.row0;
      const typename Workspace<T>::Row group = ws.row(entry, ws.row0 + begin);
      const std::int64_t column = group.column(key0);
      if (column < 0) continue;
      TileRow row{begin, group.gradient + column, group.attended + column / K};
      for (; row.r < end; ++row.r, row.gradient += group.width, row.attended += group.width / K)
        if (std::memchr(row.attended, 1, (keys + K - 1) / K) &&
            ws.largest_gradient[ws.index(entry, ws.row0 + row.r)] != T(0))
          found[found_++] = row;
    }
  }

  // Zeroes the gradient of keys without such a row.
  void clear_keys(std::int64_t h, std::int64_t key0, std::int64_t keys) const {
    const Vec<T> nothing[feature_vectors] = {};
    for (std::int64_t j = 0; j < keys && p.grad_key && ws.row0 == 0; ++j) add_grad_key(key0 + j, h, nothing, true);
  }

  // Computes the exponentials of keys within the factored form's range, and zeroes the sums.
  void load_keys(std::int64_t h, std::int64_t key0, std::int64_t keys) {
    const std::int64_t size = gradient_keys * used_ * L;
    b_ = keys_.get(6 * size);
    b_error_ = b_ + size;
    sum_key_ = b_ + 2 * size;
    sum_direct_ = b_ + 4 * size;
    std::memset(sum_key_, 0, 2 * size * sizeof(T));
    std::memset(correction_, 0, sizeof correction_);
    std::memset(slopes_, 0, sizeof slopes_);
    std::memset(weight_, 0, sizeof weight_);
    any_direct_ = any_direct_pair_ = false;
    for (std::int64_t j = 0; j < keys; ++j) {
      T copy[F];
      if (j + keys_ahead < keys) prefetch_stored(p.key, entry, key0 + j + keys_ahead, F, h);
      const T* k = load_key(key0 + j, h, copy);
      direct_j_[j] = out_of_range(k);
      any_direct_ = any_direct_ || direct_j_[j];
      for (std::int64_t v = 0, at = j * used_ * L; v < used_; ++v, at += L)
        store_exp<T>(direct_j_[j] ? Vec<T>{} : load(k + v * L) * T(2), b_ + at, b_error_ + at);
    }
  }

  void row(const TileRow& tile_row, std::int64_t h, std::int64_t key0, std::int64_t keys, T* part_query) {
    const auto [r, g, on] = tile_row;
    // Aligned, because row_factored reads them for every key.
    alignas(64) T q[F], sum_query[F] = {}, sum_query_direct[F] = {}, sum_weight[F] = {};
    T* a = a_.get(ws.rows * 2 * F) + r * 2 * F;
    unsigned char& known = known_.get(0)[r];
    if (!known) known = load_query(r, h, q, a) ? 2 : 1;
    const T size = ws.largest_gradient[ws.index(entry, ws.row0 + r)];
    const bool direct_i =
        known == 2 || factors.early != T(1) || !(size >= factored_least<T> && size <= factored_most<T>);
    if (direct_i || any_direct_) load_query(r, h, q, nullptr);
    for (std::int64_t j = 0; j < keys;) {
      if (!on[j / K]) {
        j += K;
        continue;
      }
      std::int64_t end = j + K;
      while (end < keys && on[end / K]) end += K;
      end = std::min(end, keys);
      if (!direct_i && !any_direct_) {
        factored(a, j, end, g, sum_query, sum_weight);
      } else {
        for (std::int64_t i = j; i < end; ++i)
          if (!direct_i && !direct_j_[i])
            factored(a, i, i + 1, g, sum_query, sum_weight);
          else if (g[i] != T(0))  // pairs with G = 0 contribute exactly 0
            pair(q, key0, i, h, g[i] * factors.early, sum_query_direct, sum_weight);
      }
      j = round_up(end, K);
    }
    for (int l = 0; l < used_ * L; ++l) weight_[l] += sum_weight[l];
    for (int v = 0; v < used_; ++v) {
      const Vec<T> s = load(sum_query + v * L);
      const Vec<T> factored = direct_i ? Vec<T>{} : s * load(a + v * L);
      store(slopes_ + v * L, load(slopes_ + v * L) + factored * factored);
      store(part_query + v * L, load(part_query + v * L) + (factored + load(sum_query_direct + v * L)));
      if (!direct_i) store(correction_ + v * L, load(correction_ + v * L) - s * load(a + F + v * L));
    }
  }

  // Keys [j, end). Features that only pad the second vector are left out.
  void factored(const T* a, std::int64_t j, std::int64_t end, const T* g, T* sum_query, T* sum_weight) {
    const auto run = used_ == 1 ? row_factored<1, T> : row_factored<feature_vectors, T>;
    run(a, b_, g, j, end, sum_query, sum_rows(), sum_weight);
  }

  void pair(const T* q, std::int64_t key0, std::int64_t j, std::int64_t h, T g, T* sum_query, T* sum_weight) {
    T k[F];
    Vec<T> z[feature_vectors];
    if (!any_direct_pair_) std::memset(sum_direct_, 0, 2 * gradient_keys * used_ * L * sizeof(T));
    any_direct_pair_ = true;
    pair_direct<T>(q, load_key(key0 + j, h, k), g, z, sum_weight);
    T* sum_key = sum_direct_ + (gradient_keys + j) * used_ * L;
    for (int v = 0; v < used_; ++v) {
      store(sum_query + v * L, load(sum_query + v * L) + z[v]);
      store(sum_key + v * L, load(sum_key + v * L) + z[v]);
    }
  }

  void finish_keys(std::int64_t h, std::int64_t key0, std::int64_t keys) {
    Vec<T> slopes[feature_vectors] = {};
    for (std::int64_t j = 0; j < keys; ++j) {
      Vec<T> z[feature_vectors] = {};
      for (int v = 0; v < used_; ++v) {
        const std::int64_t at = (j * used_ + v) * L;
        const Vec<T> s = load(sum_key_ + at);
        z[v] = s * load(b_ + at);
        slopes[v] += z[v] * z[v];
        if (any_direct_pair_) z[v] += load(sum_direct_ + at);
        store(correction_ + v * L, load(correction_ + v * L) + s * load(b_error_ + at));
      }
      if (p.grad_key) add_grad_key(key0 + j, h, z, ws.row0 == 0);  // the first rows set dk, the others add to it
    }
    for (int v = 0; v < used_; ++v) store(slopes_ + v * L, load(slopes_ + v * L) + slopes[v]);
    for (int l = 0; l < F; ++l) weight_[l] += 2 * correction_[l];
  }

  // Whether this tile's share of dw is so small beside its sums of G (1 - t^2) that what the correction leaves of the
  // errors of a and b would show. It is below 1 / 16 ulp, and less for small q and so for the k that cancel with them.
  bool weight_cancels(std::int64_t h) {
    const int some = int(std::min<std::int64_t>(F, p.hidden - h));
    double share = 0, all = 0, limited = 0;
    for (int l = 0; l < some; ++l) {
      share += weight_[l] * weight_[l];
      all += slopes_[l];
    }
    if (!(all > cancelling * share)) return false;
    alignas(64) T q[F], most[F] = {};
    for (std::int64_t f = 0; f < found_; ++f)
      if (!load_query(rows_.get(0)[f].r, h, q, nullptr))
        for (int v = 0; v < F; v += L) {
          const Vec<T> x = load(q + v) * load(q + v), y = load(most + v);
          store(most + v, x > y ? x : y);
        }
    for (int l = 0; l < some; ++l) {
      const double part = std::min(1.0, 32.0 * most[l]);
      limited += part * part * slopes_[l];
    }
    return limited > cancelling * share;
  }

  // Computes the tile's share of dw again, from q + k.
  void direct_weight(std::int64_t h, std::int64_t key0, std::int64_t keys) {
    std::memset(weight_, 0, sizeof weight_);
    for (std::int64_t f = 0; f < found_; ++f) {
      const auto [r, g, on] = rows_.get(0)[f];
      alignas(64) T q[F], k[F], sum_weight[F] = {};
      load_query(r, h, q, nullptr);
      for (std::int64_t j = 0; j < keys; ++j) {
        Vec<T> z[feature_vectors];
        if (on[j / K] && g[j] != T(0)) pair_direct<T>(q, load_key(key0 + j, h, k), g[j] * factors.early, z, sum_weight);
      }
      for (int l = 0; l < F; ++l) weight_[l] += sum_weight[l];
    }
  }

  // Adds the keys' sums over rows_summed rows to those over all rows: long sums in single precision lose digits.
  T* sum_rows() const { return sum_key_ + gradient_keys * used_ * L; }
  void flush_rows(std::int64_t keys) {
    for (T* sum : {sum_key_, any_direct_pair_ ? sum_direct_ : nullptr})
      for (std::int64_t l = 0; sum && l < keys * used_ * L; l += L) {
        T* from = sum + gradient_keys * used_ * L + l;
        store(sum + l, load(sum + l) + load(from));
        store(from, Vec<T>{});
      }
  }

  // Loads q, padded, and e^{-2q} with its error unless a is null; returns whether q is out of the factored range.
  bool load_query(std::int64_t r, std::int64_t h, T* q, T* a) const {
    const T* x = load_features(p.query.at(entry, ws.row0 + r), h, q);
    if (x != q) std::memcpy(q, x, F * sizeof(T));
    for (int v = 0; v < feature_vectors && a; ++v) store_exp<T>(load(x + v * L) * T(-2), a + v * L, a + F + v * L);
    return out_of_range(x);
  }

  // Whether any of these F features is out of the factored form's range.
  static bool out_of_range(const T* x) {
    const UVec<T> m0 = magnitude<T>(load(x)), m1 = magnitude<T>(load(x + L));
    return any<T>((UVec<T>)((m0 > m1 ? m0 : m1) > ordered_bits<T>(Range<T>::safe)));
  }

  // Points to F features of a row, or at its end to a copy padded with zeros.
  const T* load_features(const T* row, std::int64_t h, T* copy) const {
    if (h + F <= p.hidden) return row + h;
    for (std::int64_t v = 0, left = p.hidden - h; v < F; v += L, left -= L)
      store(copy + v, left > 0 ? load_part<T>(row + h + v, left, 0) : Vec<T>{});
    return copy;
  }

  const T* load_key(std::int64_t j, std::int64_t h, T* copy) const {
    if (p.key.storage == Storage::computed) return load_features(static_cast<const T*>(p.key.at(entry, j)), h, copy);
    for (int l = 0; l < F; ++l) copy[l] = 0;
    return stored_row(p.key, entry, j, h, std::min<std::int64_t>(F, p.hidden - h), copy);
  }

  void add_grad_key(std::int64_t j, std::int64_t h, const Vec<T>* z, bool overwrite) const {
    const T* w = factors.weight + (entry - ws.entry0) * factors.width + h;
    T* out = p.grad_key + (entry * p.keys + j) * p.hidden + h;
    for (int v = 0; v < feature_vectors; ++v) {
      const std::int64_t some = p.hidden - h - v * L;
      if (some <= 0) return;
      const Vec<T> d = z[v] * factors.late * load(w + v * L);
      store_part<T>(out + v * L, overwrite ? d : load_part<T>(out + v * L, some, 0) + d, some);
    }
  }

  const Backward<T>& p;
  const Workspace<T>& ws;
  const FeatureFactors<T>& factors;
  std::int64_t entry = 0;
  bool direct_j_[gradient_keys], any_direct_ = false;  // keys out of the factored form's range
  bool any_direct_pair_ = false;
  alignas(64) T correction_[F], slopes_[F];       // of dw; sums over rows and keys of (sum of G (1 - t^2) / 4)^2
  alignas(64) double weight_[F];                  // the tile's share of dw
  std::int64_t used_ = feature_vectors;           // vectors that are not only padding
  T *b_ = nullptr, *b_error_ = nullptr;           // [key][used_ L]
  T *sum_key_ = nullptr, *sum_direct_ = nullptr;  // [all rows, the last rows][key][used_ L]
  Buffer<T> a_, keys_;                            // a_: [row][a, its error][F]
  Buffer<unsigned char> known_;  // of a_, per row: 0 unknown, 1 known, 2 known and out of the factored form's range
  Buffer<TileRow> rows_;
  std::int64_t found_ = 0;  // of them
};
