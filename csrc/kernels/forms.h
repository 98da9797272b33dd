// The scores of a block of queries against a tile of keys, without a transcendental per pair.
//
//     score_ij = sum_h w_h t_ijh        t_ijh = tanh(q_ih + k_jh)
//
// Write a = e^{-2q} and b = e^{2k}, which cost O((Lq + Lk) H) exponentials. Then
//
//     t = (b - a) / (b + a) = 1 - 2 a / (a + b)
//
// so that a feature costs one addition, y = b + a, and a quarter of a division: the fractions of four features are
// joined, n0/y0 + n1/y1 = (n0 y1 + n1 y0) / (y0 y1), twice. Joining needs products of four y that neither overflow nor
// underflow, and differences that do not cancel; four forms of numerator and denominator cover every input:
//
//     form        when                  numerator z        denominator y       result
//     centred     |q|, |k| <= 1         w beta - w alpha   beta + (2 + alpha)  sum z/y    alpha = a - 1, beta = b - 1
//     difference  |q|, |k| <= safe      w b - w a          b + a               sum z/y
//     matched     the same              of two features    of two features     sum z/y    (matched.h)
//     direct      otherwise, NaN, Inf   w P(q + k)         Q(q + k)            sum z/y    tanh = P / Q
//
// (math.md, eq. 4 to 7 and 29). All of them keep sums as small as the scores. `matched` is the fastest form for many
// features. With few, or without fused multiply-add, which saves roundings of the joins, `difference` rounds less.
// `centred` keeps the relative error where q and k are small; with many features it is used up to a quarter only.
// `direct` evaluates a tanh per pair, so it keeps the relative error of q + k. It is used beyond the range of the
// others, for NaN and Inf, and where q and k cancel: if q is near c and k near -c in every feature, the errors of the
// other forms would exceed the plain layer's (cancellation.h). The form is chosen per query row and key tile, from
// attended keys alone. So neither masked keys nor the number of threads change a result.
//
// The weights are divided by a power of two so that |w| <= 2 and no numerator overflows. The rounding errors
// of w b add up to one number per key. Those of w a shift all scores of a row equally, which a softmax ignores.
//
// Lanes run over keys: a tile is packed as [block of 2 vectors of keys][h][constant][key], a query row as
// [4 features][constant][feature]; matched.h has its own order.

enum Form { centred, difference, matched, direct };
constexpr int forms = 4;

constexpr int features_cached = 128;         // so many features of a key block stay in the first-level cache
constexpr int difference_max_features = 64;  // up to so many, `difference` rather than `matched`
constexpr int features_per_sum = 32;         // of a partial sum

// Constants per feature of a query row, and of a key.
constexpr int query_constants = 2;
constexpr int key_constants(Form form) { return form == direct ? 1 : 2; }

template <class T>
Form choose_form(typename Simd<T>::Bits query, typename Simd<T>::Bits key, typename Simd<T>::Bits weight,
                 std::int64_t hidden) {
  const auto most = std::max(query, key);
  if (most > ordered_bits<T>(Range<T>::safe) || weight >= ordered_bits<T>(INFINITY)) return direct;
  const bool few = !fused_multiply_add || hidden <= difference_max_features;
  if (most <= ordered_bits<T>(few ? T(1) : T(0.25))) return centred;
  return few ? difference : matched;
}

// 2^-e with 2^e <= largest |w| < 2^(e+1). NaN where a weight is nonfinite: then the plain layer's results are NaN too.
template <class T>
T weight_normaliser(const T* weight, std::int64_t hidden) {
  const auto most = largest(weight, hidden);
  if (most == 0) return 1;
  if (most >= ordered_bits<T>(INFINITY)) return T(NAN);
  const int e = std::ilogb(as_number<T>(most));
  return std::ldexp(T(1), -std::max(std::min(e, Simd<T>::bias - 2), 2 - Simd<T>::bias));
}

// Packs features of a query row in one form, w normalised: for every four features, [constant][feature].
template <class T>
void pack_query(Form form, const T* q, const T* w, std::int64_t hidden, T* packed) {
  constexpr int L = lanes<T>, C = query_constants, run = std::min(L, group);
  for (std::int64_t h0 = 0; h0 < round_up(hidden, group); h0 += L) {
    const Vec<T> x = load_part<T>(q + h0, hidden - h0, 0), u = load_part<T>(w + h0, hidden - h0, 0);
    Vec<T> z = x, y = u;  // of the direct form
    if (form == centred) {
      const Vec<T> alpha = expm1<T>(x * T(-2));
      z = -u * alpha;
      y = alpha + T(2);
    } else if (form == difference) {
      Vec<T> lost = {};  // shifts all scores of the row equally
      exp_and_multiple<T>(x * T(-2), -u, y, z, lost);
    }
    T constant[C][L];
    store(constant[0], z);
    store(constant[1], y);
    for (std::int64_t h = h0; h < std::min<std::int64_t>(h0 + L, round_up(hidden, group)); h += run)
      for (int i = 0; i < C; ++i)
        std::memcpy(packed + (h / group * C + i) * group + h % group, constant[i] + h - h0, run * sizeof(T));
  }
}

// Packs features of a block of keys in one form, w normalised: what is added to their sums, and from K on
// [h][constant][key].
template <class T>
void pack_keys(Form form, const T* key, std::int64_t row, std::int64_t count, const T* w, std::int64_t hidden,
               T* packed) {
  constexpr int L = lanes<T>, K = block_keys<T>;
  const int C = key_constants(form);
  T* to = packed + C * K;  // the last constant of the first feature
  pack_transposed<T>(key, row, count, hidden, to, C * K, Unchanged<T>{});
  for (std::int64_t j = 0; j < K; j += L) {
    Vec<T> lost = {};
    for (std::int64_t h = 0; h < round_up(hidden, group) && j < count && form != direct; ++h) {
      T *y_at = to + h * C * K + j, *z_at = y_at - K;
      const Vec<T> x = load(y_at) * T(2), u = splat<T>(h < hidden ? w[h] : T(0));
      Vec<T> z, y;
      if (form == centred)
        z = u * (y = expm1<T>(x));
      else
        exp_and_multiple<T>(x, u, y, z, lost);
      store(y_at, y);
      store(z_at, z);
    }
    store(packed + j, lost / T(2));
  }
}

// The sum of four fractions.
template <class T>
ALWAYS_INLINE void join_fractions(const Vec<T>* z, const Vec<T>* y, Vec<T>& numerator, Vec<T>& denominator) {
  const Vec<T> z01 = z[0] * y[1] + z[1] * y[0], y01 = y[0] * y[1];
  const Vec<T> z23 = z[2] * y[3] + z[3] * y[2], y23 = y[2] * y[3];
  numerator = z01 * y23 + z23 * y01;
  denominator = y01 * y23;
}

// The packed layout that add_energies reads (of the matched form: matched.h).
template <class T, Form form>
struct Terms {
  static constexpr int query = group * query_constants;                     // numbers of a group of features
  static constexpr int keys = group * block_keys<T> * key_constants(form);  // the same of a block of keys
  static constexpr int gap = 0;                                             // of a query row, between partial sums

  // The sum of a group's terms, z / y, of a query row and a vector of keys.
  static ALWAYS_INLINE void join(const T* q, const T* k, Vec<T>& z, Vec<T>& y) {
    Vec<T> numerator[group], denominator[group];
    for (int f = 0; f < group; ++f)
      fraction(q + f, k + f * block_keys<T> * key_constants(form), numerator[f], denominator[f]);
    join_fractions<T>(numerator, denominator, z, y);
  }

 private:
  static ALWAYS_INLINE void fraction(const T* q, const T* k, Vec<T>& z, Vec<T>& y) {
    if constexpr (form == direct) {
      const Vec<T> x = load(k) + *q;
      tanh_fractions<1>(&x, &z, &y);
      z *= q[group];
    } else {
      z = load(k) + *q;
      y = load(k + block_keys<T>) + q[group];
    }
  }
};

// Scores, [row][key]: `before` loads the sum of earlier features, `set` stores the new sum, times `factor`.
template <class T>
struct ScoreRows {
  T* at;
  std::int64_t row;
  bool first;  // of the features: no sum is stored yet
  T factor;    // of the sum of all features; 1 before the last ones

  Vec<T> before(int r, int j) const { return first ? Vec<T>{} : load(at + r * row + j); }
  void set(int r, int j, Vec<T> sum) const { store(at + r * row + j, sum * factor); }
};

// Adds the terms of a group of features of each row and vector of keys to `part`, and advances to the next one.
template <class T, Form form, bool divides, int R, int V>
inline void add_group(const T*& query, std::int64_t query_row, const T*& keys, Vec<T> (&part)[R][V]) {
#pragma GCC unroll 4
  for (int i = 0; i < R * V; ++i) {
    Vec<T> z, y;
    Terms<T, form>::join(query + i / V * query_row, keys + i % V * lanes<T>, z, y);
    part[i / V][i % V] += divides ? z / y : z * reciprocal(y);
  }
  query += Terms<T, form>::query;
  keys += Terms<T, form>::keys;
}

// Adds sum_h z/y of R query rows, query_row apart, and one block of keys; groups of features [0, groups). Every other
// group of the fast forms divides, which relieves the units that multiply.
template <class T, Form form, int R>
void add_energies(const T* query, std::int64_t query_row, const T* keys, std::int64_t groups,
                  const ScoreRows<T>& scores) {
  constexpr int L = lanes<T>, K = block_keys<T>, V = R > 1 ? 1 : 2, run = features_per_sum / group;
  for (int j = 0; j < K; j += V * L) {
    Vec<T> total[R][V];
#pragma GCC unroll 4
    for (int i = 0; i < R * V; ++i)
      total[i / V][i % V] = scores.before(i / V, j + i % V * L) + load(keys + j + i % V * L);
    const T *q = query, *k = keys + K + j;
    for (std::int64_t left = groups; left > 0; left -= run, q += Terms<T, form>::gap) {
      Vec<T> part[R][V] = {};
      for (std::int64_t g = std::min<std::int64_t>(left, run); g > 0; g -= 2) {
        add_group<T, form, form != direct>(q, query_row, k, part);
        if (g == 1) break;
        asm volatile("" ::: "memory");  // else GCC loads the keys of both groups first, and spills registers
        add_group<T, form, form != direct && !quick_reciprocal>(q, query_row, k, part);
      }
#pragma GCC unroll 4
      for (int i = 0; i < R * V; ++i) total[i / V][i % V] += part[i / V][i % V];
    }
#pragma GCC unroll 4
    for (int i = 0; i < R * V; ++i) scores.set(i / V, j + i % V * L, total[i / V][i % V]);
  }
}

// One score in the direct form with lanes over features: a single query row would use every packed key only once. With
// `located`, location * term is added to the key. `value` and `next_key` are prefetched meanwhile.
template <class T, bool located = false>
T energy(const T* query, const T* key, const T* weight, std::int64_t hidden, T location = 0, const T* term = nullptr,
         Fetch* value = nullptr, Fetch* next_key = nullptr) {
  constexpr int L = lanes<T>;
  Vec<T> total = {};
  for (std::int64_t h = 0; h < hidden; h += group * L) {
    if (value) value->some();
    if (next_key) next_key->some();
    Vec<T> x[group], w[group], z[group], y[group];
    for (int g = 0; g < group; ++g) {
      const std::int64_t at = h + g * L, left = hidden - at;
      const bool whole = left >= L;
      const Vec<T> q = whole ? load(query + at) : load_part<T>(query + at, left, 0);
      Vec<T> k = whole ? load(key + at) : load_part<T>(key + at, left, 0);
      if (located) k += (whole ? load(term + at) : load_part<T>(term + at, left, 0)) * location;
      w[g] = whole ? load(weight + at) : load_part<T>(weight + at, left, 0);
      x[g] = q + k;
    }
    tanh_fractions<group>(x, z, y);
    for (int g = 0; g < group; ++g) z[g] *= w[g];
    Vec<T> numerator, denominator;
    join_fractions<T>(z, y, numerator, denominator);
    total += numerator * reciprocal(denominator);
  }
  return sum<T>(total);
}
