// The scores of a block of queries against a tile of keys, without a transcendental per pair.
//
//     score_ij = sum_h w_h t_ijh        t_ijh = tanh(q_ih + k_jh)
//
// Write a = e^{-2q} and b = e^{2k}, which cost O((Lq + Lk) H) exponentials. Then
//
//     t = (b - a) / (b + a) = 1 - 2 a / (a + b)
//
// so that a feature costs one addition, y = b + a, and a share of one division: the fractions of four features are
// joined, n0/y0 + n1/y1 = (n0 y1 + n1 y0) / (y0 y1), twice. Joining needs products of four y that neither overflow nor
// underflow, and differences that do not cancel; four forms of numerator and denominator cover every input:
//
//     form        when                  numerator z        denominator y       result
//     centred     |q|, |k| <= 1         w beta - w alpha   beta + (2 + alpha)  sum z/y    alpha = a - 1, beta = b - 1
//     difference  |q|, |k| <= safe      w (b - a)          b + a               sum z/y
//     matched     the same              of two features    of two features     sum z/y    (matched.h)
//     direct      otherwise, NaN, Inf   w P(q + k)         Q(q + k)            sum z/y    tanh = P / Q
//
// (math.md, eq. 4 to 7 and 29). All of them keep sums as small as the scores. `matched` is the fastest for many features.
// With few of them, or without fused multiply-add, which spares the joining its roundings, `difference` rounds less.
// `centred` keeps the relative error where q and k are small, and with many features serves up to a quarter alone.
// `direct` evaluates a tanh per pair, so it keeps the relative error of q + k. It serves beyond the range of the others,
// for NaN and Inf, and where q and k cancel: if q is near c and k near -c for all pairs, the errors of the other forms
// would exceed the plain layer's (cancellation.h). The form is chosen per query row and key tile, from attended keys
// alone. So neither masked keys nor the number of threads change a result.
//
// The weights are divided by a power of two so that |w| <= 2 and no numerator overflows.
//
// Lanes run over keys: a tile is packed as [block of 2 vectors of keys][h][key], a query row as [4 features][constant];
// matched.h has its own order.

enum Form { centred, difference, matched, direct };
constexpr int forms = 4;

constexpr int features_cached = 128;         // so many features of a key block stay in the first-level cache
constexpr int difference_max_features = 64;  // up to so many, `difference` rather than `matched`
constexpr int features_per_sum = 32;         // of a partial sum

// Constants per feature of a query row.
constexpr int constants(Form form) { return form == centred ? 3 : 2; }

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

// A query row in one form, w normalised: for every four features [constant][feature].
template <class T>
void pack_query(Form form, const T* q, const T* w, std::int64_t hidden, T* packed) {
  const int c = constants(form);
  constexpr int L = lanes<T>;
  for (std::int64_t h0 = 0; h0 < round_up(hidden, group); h0 += L) {
    const Vec<T> x = load_part<T>(q + h0, hidden - h0, 0), u = load_part<T>(w + h0, hidden - h0, 0);
    T constant[3][L] = {};
    if (form == centred) {
      const Vec<T> alpha = expm1<T>(x * T(-2));
      store(constant[0], u);
      store(constant[1], -u * alpha);
      store(constant[2], alpha + T(2));
    } else if (form != direct) {
      const Vec<T> a = exp<T>(x * T(-2));
      store(constant[0], a);
      store(constant[1], u);
    } else {
      store(constant[0], x);
      store(constant[1], u);
    }
    constexpr int run = std::min(L, group);
    for (std::int64_t h = h0; h < std::min<std::int64_t>(h0 + L, round_up(hidden, group)); h += run)
      for (int i = 0; i < c; ++i)
        std::memcpy(packed + (h / group * c + i) * group + h % group, constant[i] + h - h0, run * sizeof(T));
  }
}

// What is packed of a value k.
template <class T>
struct KeyConstant {
  Form form;
  Vec<T> operator()(Vec<T> k) const {
    return form == direct ? k : form == centred ? expm1<T>(k * T(2)) : exp<T>(k * T(2));
  }
};

// A block of keys in one form, [h][key].
template <class T>
void pack_keys(Form form, const T* key, std::int64_t row, std::int64_t count, std::int64_t hidden, T* packed) {
  pack_transposed<T>(key, row, count, hidden, packed, block_keys<T>, KeyConstant<T>{form});
}

template <class T, Form form>
inline void fraction(const T* constant, int feature, Vec<T> k, Vec<T>& z, Vec<T>& y) {
  const T *c0 = constant + feature, *c1 = c0 + group, *c2 = c1 + group;
  if constexpr (form == centred) {
    z = k * *c0 + *c1;
    y = k + *c2;
  } else if constexpr (form == difference) {
    z = (k - *c0) * *c1;
    y = k + *c0;
  } else {
    const Vec<T> x = k + *c0;
    tanh_fractions<1>(&x, &z, &y);
    z *= *c1;
  }
}

// Adds sum_h z/y of one query row and one block of keys to scores[2 L]; groups of features [0, groups).
template <class T, Form form>
void add_energies(const T* query, const T* keys, std::int64_t groups, T* scores) {
  constexpr int L = lanes<T>, K = block_keys<T>;
  Vec<T> total[2] = {load(scores), load(scores + L)};
  while (groups > 0) {
    const std::int64_t some = std::min<std::int64_t>(groups, features_per_sum / group);
    Vec<T> part[2] = {};
    for (std::int64_t g = 0; g < some; ++g) {
      for (int v = 0; v < 2; ++v) {
        const T* k = keys + v * L;
        Vec<T> z0, z1, z2, z3, y0, y1, y2, y3;
        fraction<T, form>(query, 0, load(k), z0, y0);
        fraction<T, form>(query, 1, load(k + K), z1, y1);
        fraction<T, form>(query, 2, load(k + 2 * K), z2, y2);
        fraction<T, form>(query, 3, load(k + 3 * K), z3, y3);
        const Vec<T> z01 = z0 * y1 + z1 * y0, y01 = y0 * y1;
        const Vec<T> z23 = z2 * y3 + z3 * y2, y23 = y2 * y3;
        part[v] += (z01 * y23 + z23 * y01) * reciprocal(y01 * y23);
      }
      query += group * constants(form);
      keys += group * K;
    }
    for (int v = 0; v < 2; ++v) total[v] += part[v];
    groups -= some;
  }
  store(scores, total[0]);
  store(scores + L, total[1]);
}

// One score in the direct form with lanes over features: a single query row would use every packed key only once. With
// `located`, location * term is added to the key. Meanwhile memory is fetched.
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
    const Vec<T> z01 = z[0] * y[1] + z[1] * y[0], y01 = y[0] * y[1];
    const Vec<T> z23 = z[2] * y[3] + z[3] * y[2], y23 = y[2] * y[3];
    total += (z01 * y23 + z23 * y01) * reciprocal(y01 * y23);
  }
  return sum<T>(total);
}
