// The SIMD layer: one vector type per element type, and the few operations that the kernels need.
//
// No file of kernels/ has an include guard: every file of targets/ includes each once, inside the namespace and under
// the compiler target of its instruction set, after defining VECTOR_BYTES. Arithmetic is that of the GCC/Clang vector
// extensions, so one source serves AVX-512, AVX2, NEON and plain SSE2; a * b + c becomes a fused multiply-add where the
// target has one. Intrinsics are used only where the compiler's code is slow: `reciprocal`, parts of vectors, `any`.

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

#if VECTOR_BYTES == 64
inline unsigned first_lanes(std::int64_t n) { return n > 0 ? (1u << n) - 1 : 0; }
#endif

// Loads the first n lanes, and fills the rest.
template <class T>
inline Vec<T> load_part(const T* p, std::int64_t n, T fill) {
  if (n >= lanes<T>) return load(p);
#if VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_mask_loadu_ps((__m512)splat<T>(fill), first_lanes(n), p);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_mask_loadu_pd((__m512d)splat<T>(fill), first_lanes(n), p);
#endif
  T buffer[lanes<T>];
  for (int l = 0; l < lanes<T>; ++l) buffer[l] = l < n ? p[l] : fill;
  return load(buffer);
}

template <class T>
inline void store_part(T* p, Vec<T> v, std::int64_t n) {
  if (n >= lanes<T>) return store(p, v);
#if VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, first_lanes(n), (__m512d)v);
#endif
  T buffer[lanes<T>];
  store(buffer, v);
  for (int l = 0; l < n; ++l) p[l] = buffer[l];
}

// Adds the two halves, then the halves of the result, and so on.
template <class T>
inline T sum(Vec<T> v) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_add_pd((__m512d)v);
#endif
  T s[lanes<T>];
  store(s, v);
  for (int half = lanes<T> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) s[l] += s[l + half];
  return s[0];
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

// Hides where the value comes from, so that GCC emits minimum and maximum instructions.
template <class T>
inline Vec<T> opaque(Vec<T> v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}
template <class T>
inline Vec<T> variable(T x) {
  return opaque<T>(splat<T>(x));
}

template <class T>
inline Vec<T> clamp(Vec<T> x, T low, T high) {  // NaN stays NaN
  const Vec<T> least = variable<T>(low), most = variable<T>(high);
  x = x < least ? least : x;
  return most < x ? most : x;
}

template <class T>
inline typename Simd<T>::Bits largest_lane(UVec<T> x) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_epu32((__m512i)x);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_max_epu64((__m512i)x);
#endif
  typename Simd<T>::Bits result = 0;
  for (int l = 0; l < lanes<T>; ++l) result = std::max(result, x[l]);
  return result;
}

// The largest |x| of rows, as ordered bits; NaN is larger than everything.
template <class T>
typename Simd<T>::Bits largest(const T* x, std::int64_t n, std::int64_t rows = 1, std::int64_t row = 0) {
  UVec<T> most = {};
  for (std::int64_t r = 0; r < rows; ++r, x += row) {
    std::int64_t h = 0;
    for (; h + lanes<T> <= n; h += lanes<T>) {
      const UVec<T> m = magnitude<T>(load(x + h));
      most = m > most ? m : most;
    }
    if (h < n) {
      const UVec<T> m = magnitude<T>(load_part<T>(x + h, n - h, 0));
      most = m > most ? m : most;
    }
  }
  return largest_lane<T>(most);
}

template <class T>
typename Simd<T>::Bits ordered_bits(T x) {
  typename Simd<T>::Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class T>
inline bool any(UVec<T> mask) {
#if VECTOR_BYTES == 64
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif VECTOR_BYTES == 32
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#endif
  std::uint64_t words[VECTOR_BYTES / 8], all = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (const std::uint64_t word : words) all |= word;
  return all != 0;
}

template <class T>
T as_number(typename Simd<T>::Bits bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Always inlined: GCC takes it for a function without effects, and drops calls that it has not inlined early.
template <class T>
ALWAYS_INLINE void prefetch(const T* row, std::int64_t columns) {
  for (std::int64_t c = 0; c < columns; c += 64 / sizeof(T)) __builtin_prefetch(row + c);
}

template <class T>
bool all_finite(const T* x, std::int64_t row, std::int64_t count, std::int64_t columns) {
  for (std::int64_t r = 0; r < count; ++r)
    if (largest(x + r * row, columns) >= ordered_bits<T>(INFINITY)) return false;
  return true;
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
