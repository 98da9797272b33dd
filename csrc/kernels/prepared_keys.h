// What a decoder step reads in place of its keys, prepared once for all steps: no exponential per pair is left, and
// lanes run over features, so that memory is read once and in order.
//
//     form    keys            prepared      t                              1 - t^2
//     small   all |k| <= 1/4  c = tanh k    (c + s) / (1 + c s), s = tanh q   (1 - c^2) (1 - s^2) / (1 + c s)^2
//     wide    |k| <= safe     b = e^{2k}    (b - a) / (b + a), a = e^{-2q}    4 a b / (a + b)^2
//     direct  otherwise       NaN           tanh(q + k) from the key itself
//
// (math.md, eq. 6, 7 and 21.) `small` keeps the relative error of small energies, whatever the query is. The
// first feature encodes the form of a key: |c| < 1, and b is multiplied there by `lift`, which makes it more than 1. A
// pair also takes the direct form where the query is out of the range of `wide`, and where query and key cancel. So the
// form depends on this pair alone.
//
// What rounding adds to the scores of small energies is the same for all queries, sum_h w_h rho_h / 2 (eq. 8). If the
// weight is known, some features are rounded the other way, until little of that is left. For any other weight the key
// is as exact as if all had been rounded to the nearest.
//
// Keys of 16 bits are prepared in 16 bits, with 11 binary digits, small up to 1. c is a half-precision number, after a
// multiplication with 2^16 that keeps it normal. b has no sign and 6 bits of exponent, 2^-32 to 2^31. The lowest bit of
// the first feature is 0 for small and 1 for wide.

template <class T>
constexpr T lift = T(sizeof(T) == 4 ? 0x1p30 : 0x1p240);
constexpr float small_tanh = 0.38f;  // tanh(small_energy)

enum KeyForm { small, wide, unprepared };
template <class T>
KeyForm key_form(const T* prepared) {
  return *prepared != *prepared ? unprepared : std::fabs(*prepared) < T(1) ? small : wide;
}

typedef std::uint16_t Narrow;
constexpr Narrow narrow_unprepared = 0x7e00;  // NaN
constexpr float narrow_least = 0x1p-12f;      // a small key whose features are all below this is not prepared
constexpr float narrow_scale = 0x1p16f;
constexpr std::uint32_t narrow_bias = 127 - 32;

inline KeyForm key_form(const Narrow* prepared) {
  return *prepared & 1 ? wide : *prepared == narrow_unprepared ? unprepared : small;
}

template <class T>
inline Vec<T> tanh(Vec<T> x) {
  const Vec<T> e = expm1<T>(clamp<T>(x, -Range<T>::flat, Range<T>::flat) * T(2));
  return e / (e + T(2));
}

// c - a b, exact where it is small.
template <class T>
inline Vec<T> left_of_product(Vec<T> c, Vec<T> a, Vec<T> b) {
  if constexpr (fused_multiply_add) return c - a * b;
  constexpr auto upper = ~((typename Simd<T>::Bits(1) << (Simd<T>::mantissa / 2 + 1)) - 1);
  const Vec<T> a1 = (Vec<T>)(as_bits<T>(a) & ((UVec<T>){} + upper)),
               b1 = (Vec<T>)(as_bits<T>(b) & ((UVec<T>){} + upper));
  return ((c - a1 * b1) - a1 * (b - b1)) - (a - a1) * b;
}

// tanh x and, for |x| <= 1/2, what its rounding leaves out; for larger x the error is 0.
template <class T>
inline void tanh_with_error(Vec<T> x, Vec<T>& t, Vec<T>& error) {
  Vec<T> power, high, low;
  // One more term, because an error that all features share does not average out as their roundings do.
  exp_parts<T, Simd<T>::exp_degree + 1>(clamp<T>(x, -Range<T>::flat, Range<T>::flat) * T(2), power, high, low);
  const Vec<T> one = power - T(1), sum = power * high + one;
  low = power * low + (power * high - (sum - one));  // e^{2x} - 1 = sum + low
  const Vec<T> e = sum + low, y = e + T(2);
  t = e / y;
  const Vec<T> e_error = (sum - e) + low, y_error = (e - (y - T(2))) + e_error;
  // 1 / y = (1 - t) / 2
  const Vec<T> left = (left_of_product<T>(e, t, y) + (e_error - t * y_error)) * (T(0.5) - t * T(0.5));
  error = magnitude<T>(x) <= as_bits<T>(splat<T>(T(0.5))) ? left : (Vec<T>){};
}

// A vector of prepared features, without the lift.
template <KeyForm form, class T>
inline Vec<T> load_prepared(const T* x) {
  return load(x);
}
template <KeyForm form>
inline Vec<float> load_prepared(const Narrow* x) {
  if constexpr (form == small) return widen<Storage::float16>(x) * (1 / narrow_scale);
  return (Vec<float>)((load_bits(x) << 13) + (narrow_bias << 23));
}

template <class T>
inline void store_prepared(KeyForm, Vec<T> x, std::int64_t count, T* to) {
  store_part<T>(to, x, count);
}
// Rounded to the nearest.
inline void store_prepared(KeyForm form, Vec<float> x, std::int64_t count, Narrow* to) {
  if (form == small) x *= narrow_scale;
  const UVec<float> size = magnitude<float>(x), sign = (as_bits<float>(x) >> 16) & 0x8000u;
  const std::uint32_t bias = form == small ? 127 - 15 : narrow_bias;
  UVec<float> bits = ((size + 0xfffu + ((size >> 13) & 1u)) >> 13) - (bias << 10);
  const UVec<float> subnormal = as_bits<float>((Vec<float>)size + 0.5f) - 0x3f000000u;
  if (form == small) bits = (size < 0x38800000u ? subnormal : bits) | sign;
  std::uint32_t buffer[lanes<float>];
  std::memcpy(buffer, &bits, sizeof bits);
  for (std::int64_t l = 0; l < std::min<std::int64_t>(count, lanes<float>); ++l) to[l] = Narrow(buffer[l]);
}

// Takes the neighbour on the other side of x where the lowest bit is not that of the form.
inline void mark_form(KeyForm form, float x, Narrow* prepared) {
  if ((*prepared & 1) == (form == wide)) return;
  Narrow all[lanes<float>] = {*prepared};
  const float stored = form == small ? load_prepared<small>(all)[0] : load_prepared<wide>(all)[0];
  const bool up = std::fabs(stored) < std::fabs(x) || (*prepared & 0x7fff) == 0;
  *prepared = Narrow(up ? *prepared + 1 : *prepared - 1);
}

// The prepared features of k. Adds what their rounding leaves out of the scores of small energies to `lost`. unit: by
// how much these scores grow with a unit in the last place.
template <class T>
inline Vec<T> prepare_features(KeyForm form, Vec<T> k, Vec<T> weight, Vec<T>& lost, Vec<T>& unit) {
  Vec<T> x, error, growth;
  if (form == small) {
    tanh_with_error<T>(k, x, error);
    growth = weight * (x * x * (x * x + T(1)) + T(1));
  } else {
    exp_with_error<T>(k * T(2), x, error);
    growth = weight * (reciprocal(x) * T(0.5));
  }
  lost += growth * error;
  constexpr auto above_mantissa = ~((typename Simd<T>::Bits(1) << Simd<T>::mantissa) - 1);
  unit = (Vec<T>)(as_bits<T>(x) & ((UVec<T>){} + above_mantissa)) * (growth * std::numeric_limits<T>::epsilon());
  return x;
}

constexpr int most_turned = 32;  // so many features may be rounded the other way

// Of some keys: by how much a unit in the last place of each of the first features changes the scores (`unit`), and
// what the roundings of all features leave out of them (`lost`).
template <class T>
struct Roundings {
  static constexpr int L = lanes<T>;
  typedef typename Simd<T>::Bits Bits;

  alignas(64) T unit[L][most_turned] = {}, lost[L] = {};

  // Changes features of the keys, `row` apart, by a unit in the last place, until the scores have changed by what is
  // lost: feature after feature, with lanes over keys, and without branches, which would be mispredicted.
  void turn(std::int64_t keys, std::int64_t count, std::int64_t hidden, T* prepared, std::int64_t row) const {
    Vec<T> left = load(lost);
    for (std::int64_t h0 = 0; h0 < count; h0 += L) {
      Vec<T> units[L], x[L];
      for (std::int64_t l = 0; l < L; ++l) {
        units[l] = load(unit[l] + h0);
        x[l] = l < keys ? load_part<T>(prepared + l * row + h0, hidden - h0, 0) : Vec<T>{};
      }
      transpose<T>(units);
      transpose<T>(x);
      for (std::int64_t h = 0; h < std::min<std::int64_t>(L, count - h0); ++h) turn_feature(units[h], left, x[h]);
      transpose<T>(x);
      for (std::int64_t l = 0; l < keys; ++l) store_part<T>(prepared + l * row + h0, x[l], hidden - h0);
    }
  }

 private:
  static ALWAYS_INLINE void turn_feature(Vec<T> unit, Vec<T>& left, Vec<T>& x) {
    constexpr Bits sign = Bits(1) << (8 * sizeof(T) - 1);
    const UVec<T> size = magnitude<T>(unit), up = as_bits<T>(left) & sign;
    const UVec<T> turns = (UVec<T>)(size > 0) & (UVec<T>)((Vec<T>)size < (Vec<T>)magnitude<T>(left) * T(2));
    const UVec<T> down = (as_bits<T>(unit) ^ up) / sign;  // 0 or 1
    left -= (Vec<T>)((size | up) & turns);
    x = (Vec<T>)(as_bits<T>(x) + (turns & (1 - 2 * down)));
  }
};

// E is T, or Narrow; the weight is that of `normalised_copy`. Stores the roundings as those of key l.
template <class T, class E>
KeyForm prepare_key(const T* key, const T* weight, std::int64_t hidden, std::int64_t turned, E* prepared,
                    std::int64_t l, Roundings<T>& roundings) {
  constexpr bool narrow = sizeof(E) < sizeof(T);
  const auto most = largest(key, hidden);
  const bool tiny = narrow && most > 0 && most < ordered_bits<T>(narrow_least);
  if (most > ordered_bits<T>(Range<T>::safe) || tiny) {
    std::fill(prepared, prepared + hidden, narrow ? E(narrow_unprepared) : E(NAN));
    std::memset(roundings.unit[l], 0, sizeof roundings.unit[l]);
    return unprepared;
  }
  const KeyForm form = most <= ordered_bits<T>(narrow ? T(1) : T(0.25)) ? small : wide;
  Vec<T> lost = {};
  for (std::int64_t h = 0; h < hidden; h += lanes<T>) {
    Vec<T> x, units;
    const Vec<T> k = load_part<T>(key + h, hidden - h, 0);
    if constexpr (narrow)
      x = form == small ? tanh<T>(k) : exp<T>(k * T(2));
    else
      x = prepare_features<T>(form, k, load(weight + h), lost, units);
    if (!narrow && h < turned) store(roundings.unit[l] + h, units);
    store_prepared(form, x, hidden - h, prepared + h);
    if constexpr (narrow)
      if (h == 0) mark_form(form, x[0], prepared);
  }
  roundings.lost[l] = sum<T>(lost);
  return form;
}

// Prepares up to as many keys as there are lanes, `row` apart.
template <class T, class E>
void prepare_some(const T* key, std::int64_t row, std::int64_t keys, const T* weight, std::int64_t hidden,
                  E* prepared) {
  constexpr bool narrow = sizeof(E) < sizeof(T);
  if (hidden == 0) return;
  // With more features, more are turned: `lost` grows with the square root of their number.
  const std::int64_t turned = std::min<std::int64_t>({hidden, most_turned, 4 + hidden / 24});
  Roundings<T> roundings;
  KeyForm form[lanes<T>];
  for (std::int64_t l = 0; l < keys; ++l)
    form[l] = prepare_key(key + l * row, weight, hidden, turned, prepared + l * hidden, l, roundings);
  if constexpr (!narrow) {
    roundings.turn(keys, turned, hidden, prepared, hidden);
    for (std::int64_t l = 0; l < keys; ++l)
      if (form[l] == wide) prepared[l * hidden] *= lift<T>;
  }
}

// A normalised and padded copy; zeros without a weight, or where it is nonfinite.
template <class T>
const T* normalised_copy(const T* weight, std::int64_t hidden, Buffer<T>& memory) {
  const std::int64_t width = round_up(hidden, lanes<T>);
  T* to = memory.get(width);
  std::memset(to, 0, width * sizeof(T));
  const T factor = weight ? weight_normaliser(weight, hidden) : T(NAN);
  for (std::int64_t h = 0; h < hidden && factor == factor; ++h) to[h] = weight[h] * factor;
  return to;
}

template <class T>
void prepare_keys(const PreparedKeys<T>& p, const ParallelFor& parallel_for) {
  constexpr std::int64_t some = 64;
  const std::int64_t pieces = (p.keys + some - 1) / some;
  parallel_for(p.batch * pieces, some * p.hidden * 16, [&](Tasks& tasks) {
    StoredReader<T> reader;
    Buffer<T> normalised;
    for (std::int64_t task; tasks.take(task);) {
      const std::int64_t n = task / pieces, key0 = task % pieces * some;
      const T* weight = normalised_copy(p.weight ? p.weight.at(n, 0) : nullptr, p.hidden, normalised);
      for (std::int64_t j = key0, end; j < std::min(key0 + some, p.keys); j = end) {
        end = std::min<std::int64_t>(j + lanes<T>, p.keys);
        const T* key = reader.read(p.key, n, j, end - j, p.hidden);
        const std::int64_t at = (n * p.keys + j) * p.hidden;
        if constexpr (sizeof(T) == 4)
          if (p.narrow) {
            prepare_some(key, reader.row, end - j, weight, p.hidden, p.narrow + at);
            continue;
          }
        prepare_some(key, reader.row, end - j, weight, p.hidden, p.prepared + at);
      }
    }
  });
}
