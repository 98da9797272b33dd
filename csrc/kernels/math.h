// Elementary functions of vectors. Each comment states the range and the largest error, in ulp, fp32 | fp64.

// 1 / x for 2^-126 < |x| < 2^126 (fp32) or any x (fp64). 1.5 ulp with AVX-512, else 0.5 | 0.5.
#if VECTOR_BYTES == 64 && defined(__x86_64__)
constexpr bool quick_reciprocal = true;
#else
constexpr bool quick_reciprocal = false;
#endif
inline Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }
inline Vec<float> reciprocal(Vec<float> x) {
#if VECTOR_BYTES == 64 && defined(__x86_64__)
  Vec<float> r = (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return r * (2.f - x * r);
#else
  return 1.f / x;
#endif
}

// (e^r - 1 - r) / r^2 for |r| <= ln(2)/2: the Taylor series.
template <class T, int degree = Simd<T>::exp_degree>
inline Vec<T> series(Vec<T> r) {
  T factorial = 1;
  for (int k = 2; k <= degree; ++k) factorial *= T(k);
  Vec<T> p = splat<T>(T(1) / factorial);
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 2; --k) {
    factorial /= T(k + 1);
    p = p * r + T(1) / factorial;
  }
  return p;
}

// x = n ln 2 + r with |r| <= ln(2)/2: power = 2^n and e^r = 1 + high + low, with high exact, so that e^x can be
// computed with little more than its own rounding error.
template <class T, int degree = Simd<T>::exp_degree>
inline void exp_parts(Vec<T> x, Vec<T>& power, Vec<T>& high, Vec<T>& low) {
  using S = Simd<T>;
  constexpr T magic = T(3) * T(typename S::Bits(1) << (S::mantissa - 1)) + S::bias;
  const Vec<T> shifted = x * T(1.4426950408889634) + magic, n = shifted - magic, rest = n * S::ln2_low;
  high = x - n * S::ln2_high;
  const Vec<T> r = high - rest;
  low = series<T, degree>(r) * (r * r) - rest;
  power = (Vec<T>)(as_bits<T>(shifted) << S::mantissa);
}

// e^x for exp_low <= x <= exp_high or NaN, 0.75 | 0.7 ulp, and its error: together 0.25 | 0.2.
template <class T>
inline void exp_with_error(Vec<T> x, Vec<T>& e, Vec<T>& error) {
  Vec<T> power, high, low;
  exp_parts<T>(x, power, high, low);
  const Vec<T> u = high + T(1), v = (high - (u - T(1))) + low, scaled = power * u;
  e = power * v + scaled;
  error = power * v - (e - scaled);
}

// e^x for any x, 0.75 | 0.7 ulp: 0 below the normal range, saturated above it; NaN stays NaN.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  Vec<T> e, error;
  exp_with_error<T>(clamp<T>(x, Simd<T>::exp_low, Simd<T>::exp_high), e, error);
  return x < Simd<T>::exp_low ? (Vec<T>){} : e;
}

// (2^r - 1) / r for |r| <= 1/2: the polynomial of least relative error of 2^r, 2^-28; the Taylor series.
inline Vec<float> exp2_series(Vec<float> r) {
  constexpr float series[] = {1.5353259e-4f, 1.3399003e-3f, 9.618439e-3f, 5.550332e-2f, 2.4022648e-1f, 6.931472e-1f};
  Vec<float> p = splat<float>(series[0]);
#pragma GCC unroll 5
  for (int c = 1; c < 6; ++c) p = p * r + series[c];
  return p;
}
inline Vec<double> exp2_series(Vec<double> r) {
  constexpr double ln2 = 0.6931471805599453;
  return (series<double>(r * ln2) * (r * ln2) + 1.0) * ln2;
}

// e^x 2^-bits for exp_low + bits ln 2 <= x <= exp_high or NaN, to 1.2 ulp and a third of what half an ulp of x changes.
// It takes half the instructions of exp.
template <class T>
inline Vec<T> exp_in_range(Vec<T> x, int bits) {
  using S = Simd<T>;
  constexpr T magic = T(3) * T(typename S::Bits(1) << (S::mantissa - 1)) + S::bias, log2e = T(1.4426950408889634);
  const T offset = magic - T(bits);
  const Vec<T> shifted = x * log2e + offset, n = shifted - offset;
  Vec<T> r;
  if constexpr (fused_multiply_add)
    r = x * log2e - n;
  else
    r = (x - n * S::ln2_high - n * S::ln2_low) * log2e;
  const Vec<T> e = exp2_series(r) * r;
  const Vec<T> power = (Vec<T>)(as_bits<T>(shifted) << S::mantissa);
  return power * e + power;
}

// The same with bits = 0, and 0 for smaller x.
template <class T>
inline Vec<T> exp_scaled(Vec<T> x) {
  const Vec<T> e = exp_in_range<T>(x, 0);
  return x < Simd<T>::exp_low ? (Vec<T>){} : e;
}

// e^x - 1 for exp_low <= x <= exp_high or NaN, 1.7 | 1.7 ulp.
template <class T>
inline Vec<T> expm1(Vec<T> x) {
  Vec<T> power, high, low;
  exp_parts<T>(x, power, high, low);
  return power * (high + low) + (power - T(1));
}

// The exact rounding error of x y, without fused multiply-add (Dekker 1971).
template <class T>
inline Vec<T> product_error(Vec<T> x, Vec<T> y, Vec<T> product) {
  constexpr T split = T(typename Simd<T>::Bits(1) << (Simd<T>::mantissa / 2 + 1)) + 1;
  const Vec<T> x_scaled = x * split, x_high = x_scaled - (x_scaled - x), x_low = x - x_high;
  const Vec<T> y_scaled = y * split, y_high = y_scaled - (y_scaled - y), y_low = y - y_high;
  return ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low;
}

// y = e^x and z = factor e^x, each 0.75 ulp, for exp_low <= x <= exp_high or NaN. Adds the rounding error of z, divided
// by e^x, to `lost`.
template <class T>
inline void exp_and_multiple(Vec<T> x, Vec<T> factor, Vec<T>& y, Vec<T>& z, Vec<T>& lost) {
  Vec<T> power, high, low;
  exp_parts<T>(x, power, high, low);
  const Vec<T> v = high + low, scaled = factor * v + factor, added = scaled - factor;
  y = power * v + power;
  z = scaled * power;
  Vec<T> error;
  if constexpr (fused_multiply_add) {
    error = factor * v - added;
  } else {
    const Vec<T> product = factor * v;
    error = (product - added) + product_error<T>(factor, v, product);
  }
  lost += error * (v * T(-0.8) + T(1));  // about error / (1 + v)
}

template <class T>
struct Range;
template <>
struct Range<float> {
  // y^4 < 2^120;  tanh(9) rounds to 1;  1 - tanh(20)^2 is negligible, and (e^40)^2 < 2^120
  static constexpr float safe = 10.f, saturated = 9.f, flat = 20.f;
};
template <>
struct Range<double> {
  static constexpr double safe = 80.0, saturated = 20.0, flat = 40.0;
};

// tanh(x) = z / y with 1 <= y < 2^58 for any x, 5.5 | 2.5 ulp with the division; NaN stays NaN. n vectors at a time,
// because the steps of one depend on each other.
template <int n>
inline void tanh_fractions(const Vec<double>* x, Vec<double>* z, Vec<double>* y) {
  for (int i = 0; i < n; ++i) {
    z[i] = expm1<double>(clamp<double>(x[i], -Range<double>::saturated, Range<double>::saturated) * 2.0);
    y[i] = z[i] + 2.0;
  }
}

// The rational function of x^2 with the least relative error on [0, 9], 2^-25; found by linear least squares with
// weights iterated towards the minimax solution (Lawson).
template <int n>
inline void tanh_fractions(const Vec<float>* x, Vec<float>* z, Vec<float>* y) {
  constexpr float numerator[] = {1.3354552e-8f, 2.0609001e-5f, 3.4955831e-3f, 0.13381021f, 1.f};
  constexpr float denominator[] = {7.7765128e-7f, 3.2856266e-4f, 2.5876964e-2f, 0.46714336f, 1.f};
  Vec<float> limited[n], u[n];
  for (int i = 0; i < n; ++i) {
    limited[i] = clamp<float>(x[i], -Range<float>::saturated, Range<float>::saturated);
    u[i] = limited[i] * limited[i];
    z[i] = u[i] * numerator[0] + numerator[1];
    y[i] = u[i] * denominator[0] + denominator[1];
  }
#pragma GCC unroll 3
  for (int c = 2; c < 5; ++c)
    for (int i = 0; i < n; ++i) {
      z[i] = z[i] * u[i] + numerator[c];
      y[i] = y[i] * u[i] + denominator[c];
    }
  for (int i = 0; i < n; ++i) z[i] *= limited[i];
}

// e^{2x} - 1 for 0 <= x <= flat or NaN, 3 | 3 ulp. fp32: r P(r) with 2x = n ln 2 + 2r; P as the polynomials above.
template <int n>
inline void expm1_twice(const Vec<double>* x, Vec<double>* e) {
  for (int i = 0; i < n; ++i) e[i] = expm1<double>(x[i] * 2.0);
}
template <int n>
inline void expm1_twice(const Vec<float>* x, Vec<float>* e) {
  using S = Simd<float>;
  constexpr float series[] = {0.08888879f, 0.26781133f, 0.6666742f, 1.3333205f, 1.9999999f, 2.f};
  constexpr float magic = 3 * 0x1p22f + S::bias;
  Vec<float> shifted[n], r[n], p[n];
  for (int i = 0; i < n; ++i) shifted[i] = x[i] * 2.8853901f + magic;
  for (int i = 0; i < n; ++i) r[i] = x[i] - (shifted[i] - magic) * 0.34657359f;
  for (int i = 0; i < n; ++i) p[i] = r[i] * series[0] + series[1];
#pragma GCC unroll 4
  for (int c = 2; c < 6; ++c)
    for (int i = 0; i < n; ++i) p[i] = p[i] * r[i] + series[c];
  for (int i = 0; i < n; ++i) {
    const Vec<float> power = (Vec<float>)(as_bits<float>(shifted[i]) << S::mantissa);
    e[i] = power * (p[i] * r[i]) + (power - 1.f);
  }
}

constexpr int slopes_together = VECTOR_BYTES == 64 ? 4 : 2;  // vectors at a time, as registers allow

// m = 1 / (e^{2|x|} + 1), and e = e^{2|x|} - 1 with the sign of x, for any x; NaN stays NaN. Then tanh(x) = e m, and
// (1 - tanh(x)^2) / 4 = m - m^2. It takes n vectors at a time, because the steps of one depend on each other. Two of
// them share a reciprocal.
template <int n, class T>
inline void tanh_parts(const Vec<T>* x, Vec<T>* e, Vec<T>* m) {
  constexpr auto sign = typename Simd<T>::Bits(1) << (8 * sizeof(T) - 1);
  Vec<T> size[n];
  for (int i = 0; i < n; ++i) {
    const Vec<T> most = variable<T>(Range<T>::flat);
    size[i] = opaque<T>((Vec<T>)magnitude<T>(x[i]));
    size[i] = most < size[i] ? most : size[i];
  }
  expm1_twice<n>(size, e);
  for (int i = 0; i + 1 < n; i += 2) {
    const Vec<T> y[2] = {e[i] + T(2), e[i + 1] + T(2)}, both = reciprocal(y[0] * y[1]);
    m[i] = both * y[1];
    m[i + 1] = both * y[0];
  }
  if (n % 2) m[n - 1] = reciprocal(e[n - 1] + T(2));
  for (int i = 0; i < n; ++i) e[i] = (Vec<T>)(as_bits<T>(e[i]) | (as_bits<T>(x[i]) & ((UVec<T>){} + sign)));
}

// t = tanh(x) and s = (1 - t^2) / 4, of two vectors.
template <class T>
inline void tanh_slopes(const Vec<T>* x, Vec<T>* t, Vec<T>* s) {
  Vec<T> e[2], m[2];
  tanh_parts<2, T>(x, e, m);
  for (int v = 0; v < 2; ++v) {
    t[v] = e[v] * m[v];
    s[v] = m[v] - m[v] * m[v];
  }
}
