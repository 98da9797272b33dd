// The SIMD layer: one vector type per element type, and the few operations that the kernels need.
//
// There is no include guard on purpose. Every kernels_<isa>.cpp includes this file once, inside the namespace and under
// the compiler target of its instruction set, after defining VECTOR_BYTES. Arithmetic is that of the GCC/Clang vector
// extensions, so one source serves AVX-512, AVX2, NEON and plain SSE2; a * b + c becomes a fused multiply-add where the
// target has one. Only `reciprocal` names an instruction.

template <class T>
struct Simd;

#if VECTOR_BYTES > 16 || defined(__aarch64__) || defined(__FMA__)
constexpr bool fused_multiply_add = true;
#else
constexpr bool fused_multiply_add = false;
#endif

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef std::uint32_t U __attribute__((vector_size(VECTOR_BYTES)));
  using Bits = std::uint32_t;
  static constexpr int mantissa = 23, bias = 127, exp_degree = 7;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float exp_low = -87.33f, exp_high = 88.f;  // 2^-126 and 2^127: the normal range
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef std::uint64_t U __attribute__((vector_size(VECTOR_BYTES)));
  using Bits = std::uint64_t;
  static constexpr int mantissa = 52, bias = 1023, exp_degree = 13;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double exp_low = -708.39, exp_high = 709.0;
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using UVec = typename Simd<T>::U;
template <class T>
constexpr int lanes = VECTOR_BYTES / sizeof(T);

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // exact for every x, -0 included
}

// The first n lanes from memory, the rest filled.
template <class T>
inline Vec<T> load_part(const T* p, std::int64_t n, T fill) {
  if (n >= lanes<T>) return load(p);
  T buffer[lanes<T>];
  for (int l = 0; l < lanes<T>; ++l) buffer[l] = l < n ? p[l] : fill;
  return load(buffer);
}

template <class T>
inline void store_part(T* p, Vec<T> v, std::int64_t n) {
  if (n >= lanes<T>) return store(p, v);
  T buffer[lanes<T>];
  store(buffer, v);
  for (int l = 0; l < n; ++l) p[l] = buffer[l];
}

template <class T>
inline T sum(Vec<T> v) {
  T s = 0;
  for (int l = 0; l < lanes<T>; ++l) s += v[l];
  return s;
}

template <class T>
inline UVec<T> as_bits(Vec<T> v) {
  return (UVec<T>)v;
}

// The bit pattern of |x|: as unsigned integers these order like the numbers, with Inf and then NaN on top.
template <class T>
inline UVec<T> magnitude(Vec<T> v) {
  return as_bits<T>(v) & ~((UVec<T>){} + (typename Simd<T>::Bits(1) << (8 * sizeof(T) - 1)));
}

// 1 / x for 2^-126 < |x| < 2^126 (fp32; at most 2 ulp) or any x (fp64).
inline Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }
inline Vec<float> reciprocal(Vec<float> x) {
#if VECTOR_BYTES == 64 && defined(__x86_64__)
  Vec<float> r = (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return r * (2.f - x * r);
#else
  return 1.f / x;
#endif
}

// x = n ln 2 + r with |r| <= ln(2)/2: power = 2^n and e^r = 1 + r + low. The Taylor series, with what the rounding of r
// leaves out, so that e^x can be had to little more than its own rounding.
template <class T>
inline void exp_parts(Vec<T> x, Vec<T>& power, Vec<T>& r, Vec<T>& low) {
  using S = Simd<T>;
  constexpr T magic = T(3) * T(typename S::Bits(1) << (S::mantissa - 1));
  const Vec<T> shifted = x * T(1.4426950408889634) + magic;
  const Vec<T> n = shifted - magic;
  const Vec<T> high = x - n * S::ln2_high;
  r = high - n * S::ln2_low;
  const Vec<T> rest = (high - r) - n * S::ln2_low;
  T factorial = 1;
  for (int k = 2; k <= S::exp_degree; ++k) factorial *= T(k);
  Vec<T> p = splat<T>(T(1) / factorial);
#pragma GCC unroll 16
  for (int k = S::exp_degree - 1; k >= 2; --k) {
    factorial /= T(k + 1);
    p = p * r + T(1) / factorial;
  }
  low = p * (r * r) + rest;
  power = (Vec<T>)((as_bits<T>(shifted) << S::mantissa) + (typename S::Bits(S::bias) << S::mantissa));
}

// A constant that the compiler is not to know: GCC sees minimum and maximum instructions in `clamp` for variables only.
template <class T>
inline Vec<T> variable(T x) {
  Vec<T> v = splat<T>(x);
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

template <class T>
inline Vec<T> clamp(Vec<T> x, T low, T high) {  // NaN stays NaN
  const Vec<T> least = variable<T>(low), most = variable<T>(high);
  x = x < least ? least : x;
  return most < x ? most : x;
}

// e^x for exp_low <= x <= exp_high or NaN, and what its rounding leaves out.
template <class T>
inline void exp_and_rest(Vec<T> x, Vec<T>& e, Vec<T>& rest) {
  Vec<T> power, r, low;
  exp_parts<T>(x, power, r, low);
  const Vec<T> u = r + T(1), v = (r - (u - T(1))) + low, scaled = power * u;
  e = power * v + scaled;
  rest = power * v - (e - scaled);
}

// 0 below the normal range, saturated above it; NaN stays NaN.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  Vec<T> e, rest;
  exp_and_rest<T>(clamp<T>(x, Simd<T>::exp_low, Simd<T>::exp_high), e, rest);
  return x < Simd<T>::exp_low ? (Vec<T>){} : e;
}

template <class T>
inline Vec<T> expm1(Vec<T> x) {  // for exp_low <= x <= exp_high or NaN
  Vec<T> power, r, low;
  exp_parts<T>(x, power, r, low);
  return power * (r + low) + (power - T(1));
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLEVECTOR 1
#endif
#endif

// Swaps the off-diagonal halves of every 2s x 2s block in a pair of rows.
template <class T, int s, int... l>
inline void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, l...>) {
#ifdef HAS_SHUFFLEVECTOR
  constexpr int n = lanes<T>;
  const Vec<T> x = __builtin_shufflevector(a, b, ((l & s) ? n + l - s : l)...);
  b = __builtin_shufflevector(a, b, ((l & s) ? n + l : l + s)...);
  a = x;
#else
  const Vec<T> x = {((l & s) ? b[l & s ? l - s : l] : a[l])...};
  b = (Vec<T>){((l & s) ? b[l] : a[l & s ? l : l + s])...};
  a = x;
#endif
}

template <class T, int s = lanes<T> / 2>
inline void transpose(Vec<T>* rows) {
  for (int i = 0; i < lanes<T>; ++i)
    if (!(i & s)) exchange<T, s>(rows[i], rows[i + s], std::make_integer_sequence<int, lanes<T>>{});
  if constexpr (s > 1) transpose<T, s / 2>(rows);
}
