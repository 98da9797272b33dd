// What a decoder step reads in place of its keys, prepared once for all steps: no exponential per pair is left, and
// lanes run over features, so that memory is read once and in order.
//
//     form    keys            prepared      t                              1 - t^2
//     small   all |k| <= 1    c = tanh k    (c + s) / (1 + c s), s = tanh q   (1 - c^2) (1 - s^2) / (1 + c s)^2
//     wide    |k| <= safe     b = e^{2k}    (b - a) / (b + a), a = e^{-2q}    4 a b / (a + b)^2
//     direct  otherwise       NaN           tanh(q + k) from the key itself
//
// (math.md, eq. 6, 7 and 21.) `small` keeps the relative error of small energies, whatever the query is. The form of
// a key shows in its first feature: |c| < 1, and b is multiplied there by `lift`, which makes it more than 1. A pair
// takes the direct form too where the query is out of the range of `wide`, and where query and key cancel. So the form
// depends on this pair alone.

template <class T>
constexpr T lift = T(sizeof(T) == 4 ? 0x1p30 : 0x1p240);
constexpr float small_tanh = 0.38f;  // tanh(small_energy)

enum KeyForm { small, wide, unprepared };
template <class T>
KeyForm key_form(const T* prepared) {
  return *prepared != *prepared ? unprepared : std::fabs(*prepared) < T(1) ? small : wide;
}

template <class T>
inline Vec<T> tanh(Vec<T> x) {
  const Vec<T> e = expm1<T>(clamp<T>(x, -Range<T>::flat, Range<T>::flat) * T(2));
  return e / (e + T(2));
}

template <class T>
void prepare_key(const T* key, std::int64_t hidden, T* prepared) {
  if (hidden == 0) return;
  const auto most = largest(key, hidden);
  if (most > ordered_bits<T>(Range<T>::safe)) return void(std::fill(prepared, prepared + hidden, T(NAN)));
  const bool is_small = most <= ordered_bits<T>(1);
  for (std::int64_t h = 0; h < hidden; h += lanes<T>) {
    const Vec<T> k = load_part<T>(key + h, hidden - h, 0);
    store_part<T>(prepared + h, is_small ? tanh<T>(k) : exp<T>(k * T(2)), hidden - h);
  }
  if (!is_small) *prepared *= lift<T>;
}

template <class T>
void prepare_keys(const PreparedKeys<T>& p, const ParallelFor& parallel_for) {
  constexpr std::int64_t some = 64;
  const std::int64_t pieces = (p.keys + some - 1) / some;
  parallel_for(p.batch * pieces, some * p.hidden * 16, [&](Tasks& tasks) {
    Buffer<T> copy;
    for (std::int64_t task; tasks.take(task);) {
      const std::int64_t n = task / pieces, key0 = task % pieces * some;
      for (std::int64_t j = key0; j < std::min(key0 + some, p.keys); ++j)
        prepare_key(stored_row(p.key, n, j, 0, p.hidden, copy.get(p.hidden)), p.hidden,
                    p.prepared + (n * p.keys + j) * p.hidden);
    }
  });
}

// The query against one prepared key after the other: several at a time would share the query's constants, but memory
// is read fastest in its own order.
template <class T>
class PreparedQuery {
 public:
  static constexpr int L = lanes<T>, width_unit = group * L;

  // The weight is normalised; `weight_largest` is its largest magnitude. Unprepared keys need no constants.
  void begin(const T* query, const T* weight, T weight_largest, std::int64_t features, bool prepared) {
    hidden = features;
    width = round_up(hidden, width_unit);
    query_ = query;
    weight_ = weight;
    prepared_ = prepared && hidden > 0;
    if (!prepared_) return;
    T* to = memory_.get(5 * width);
    weight_ = to;
    factor_[small] = to + width;
    offset_[small] = to + 2 * width;
    factor_[wide] = to + 3 * width;
    offset_[wide] = to + 4 * width;
    for (std::int64_t h = 0; h < width; h += L) {
      const Vec<T> q = load_part<T>(query + h, hidden - h, 0), w = load_part<T>(weight + h, hidden - h, 0);
      const Vec<T> s = tanh<T>(q), a = exp<T>(q * T(-2));
      store(to + h, w);
      store(to + width + h, s);
      store(to + 2 * width + h, w * s);
      store(to + 3 * width + h, a);
      store(to + 4 * width + h, -w * a);
    }
    wide_fits_ = largest(query, hidden) <= ordered_bits<T>(Range<T>::safe);
    limit_[small] = small_energy * weight_largest * as_number<T>(largest(factor_[small], width));
    limit_[wide] = small_tanh * weight_largest;
    first_ = splat<T>(T(1));
    first_[0] = T(1) / lift<T>;
  }

  // sum_h w_h t_h of one key. Scores are compute-bound, the weighted sum is memory-bound: the value is fetched meanwhile,
  // beside a prepared key a few lines at a time.
  T score(const Problem<T>& p, std::int64_t n, std::int64_t j) {
    const char* value = p.values > 0 ? static_cast<const char*>(p.value.at(n, j)) : nullptr;
    const std::int64_t bytes = p.values > 0 ? p.values * p.value.element() : 0;
    const T* prepared = prepared_row(p, n, j);
    const KeyForm form = form_of(prepared);
    if (form == small && is_clear<small>(prepared)) return join<small>(prepared, value, bytes);
    if (form == wide && is_clear<wide>(prepared)) return join<wide>(prepared, value, bytes);
    prefetch(value, bytes);
    return energy(query_, key_row(p, n, j), weight_, hidden);
  }

  void begin_slopes() {
    T* sums = sums_.get(3 * width);
    std::memset(sums, 0, 3 * width * sizeof(T));
    for (int form = 0; form < 3; ++form) sum_[form] = sums + form * width;
  }
  // Adds G (1 - t^2) of one key, but for what `finish_slopes` multiplies by.
  void add_slopes(const Problem<T>& p, std::int64_t n, std::int64_t j, T g) {
    const T* prepared = prepared_row(p, n, j);
    const KeyForm form = form_of(prepared);
    if (form == small) return slopes<small>(prepared, g);
    if (form == wide) return slopes<wide>(prepared, g);
    direct_slopes(key_row(p, n, j), g);
  }
  // Adds a quarter of the sums of G (1 - t^2) to `to`.
  void finish_slopes(T* to) const {
    for (std::int64_t h = 0; h < width; h += L) {
      Vec<T> total = load(to + h) + load(sum_[unprepared] + h);
      if (prepared_) {
        const Vec<T> a = load(factor_[wide] + h), r = T(1) / (a + T(1));
        total += load(sum_[small] + h) * (a * r * r);
        if (wide_fits_) total += load(sum_[wide] + h) * a;
      }
      store(to + h, total);
    }
  }

  std::int64_t hidden = 0, width = 0;

 private:
  const T* prepared_row(const Problem<T>& p, std::int64_t n, std::int64_t j) {
    return prepared_ ? stored_row(p.prepared, n, j, 0, hidden, row_.get(width)) : nullptr;
  }
  const T* key_row(const Problem<T>& p, std::int64_t n, std::int64_t j) {
    return stored_row(p.key, n, j, 0, hidden, row_.get(width));
  }

  KeyForm form_of(const T* prepared) const {
    const KeyForm form = prepared_ ? key_form(prepared) : unprepared;
    return form == wide && !wide_fits_ ? unprepared : form;
  }

  // With `edge`, at the first features or beyond the last whole group.
  template <KeyForm form, bool edge>
  Vec<T> load_key(const T* x, std::int64_t h) const {
    if (!edge) return load(x + h);
    const Vec<T> k = h + L <= hidden ? load(x + h) : load_part<T>(x + h, hidden - h, 0);
    return form == wide && h == 0 ? k * first_ : k;
  }

  template <KeyForm form>
  void fraction(Vec<T> k, std::int64_t h, Vec<T>& z, Vec<T>& y) const {
    const Vec<T> factor = load(factor_[form] + h);
    z = k * load(weight_ + h) + load(offset_[form] + h);
    y = form == small ? k * factor + T(1) : k + factor;
  }

  // Is a term w t of this pair so large that the rounding of its form does not show? Mostly the first vector tells.
  template <KeyForm form>
  bool is_clear(const T* x) const {
    for (std::int64_t h = 0; h < hidden; h += L) {
      Vec<T> z, y;
      fraction<form>(load_key<form, true>(x, h), h, z, y);
      const Vec<T> most = form == small ? splat<T>(limit_[small]) : y * limit_[wide];
      if (any<T>((UVec<T>)(magnitude<T>(z) > as_bits<T>(most)))) return true;
    }
    return false;
  }

  template <KeyForm form>
  T join(const T* x, const char* value, std::int64_t bytes) const {
    const std::int64_t some = round_up(bytes * width_unit / width, 64);
    const char* end = value + bytes;
    Vec<T> total = add<form, true>(x, 0);
    std::int64_t h = width_unit;
    for (; h + width_unit <= hidden; h += width_unit, value += some) {
      if (value < end) prefetch(value, std::min<std::int64_t>(some, end - value));
      total += add<form, false>(x, h);
    }
    if (value < end) prefetch(value, end - value);
    if (h < hidden) total += add<form, true>(x, h);
    return sum<T>(total);
  }

  template <KeyForm form, bool edge>
  Vec<T> add(const T* x, std::int64_t h) const {
    Vec<T> z[group], y[group];
    for (int g = 0; g < group; ++g) fraction<form>(load_key<form, edge>(x, h + g * L), h + g * L, z[g], y[g]);
    const Vec<T> z01 = z[0] * y[1] + z[1] * y[0], y01 = y[0] * y[1];
    const Vec<T> z23 = z[2] * y[3] + z[3] * y[2], y23 = y[2] * y[3];
    return (z01 * y23 + z23 * y01) * reciprocal(y01 * y23);
  }

  template <KeyForm form>
  void slopes(const T* x, T g) {
    pair_of_slopes<form, true>(x, g, 0);
    std::int64_t h = 2 * L;
    for (; h + 2 * L <= hidden; h += 2 * L) pair_of_slopes<form, false>(x, g, h);
    if (h < hidden) pair_of_slopes<form, true>(x, g, h);
  }

  // Two vectors of features share a reciprocal.
  template <KeyForm form, bool edge>
  void pair_of_slopes(const T* x, T g, std::int64_t h) {
    T* to = sum_[form] + h;
    Vec<T> k[2], y[2];
    for (int v = 0; v < 2; ++v) {
      const Vec<T> factor = load(factor_[form] + h + v * L);
      k[v] = load_key<form, edge>(x, h + v * L);
      y[v] = form == small ? k[v] * factor + T(1) : k[v] + factor;
    }
    const Vec<T> both = reciprocal(y[0] * y[1]);
    for (int v = 0; v < 2; ++v) {
      const Vec<T> r = both * y[1 - v];
      store(to + v * L, load(to + v * L) + (form == small ? T(1) - k[v] * k[v] : k[v]) * r * r * g);
    }
  }

  void direct_slopes(const T* key, T g) {
    for (std::int64_t h = 0; h < hidden; h += L) {
      const Vec<T> x = load_part<T>(query_ + h, hidden - h, 0) + load_part<T>(key + h, hidden - h, 0);
      const Vec<T> e = expm1<T>(clamp<T>(x, -Range<T>::flat, Range<T>::flat) * T(2)), r = reciprocal(e + T(2));
      store(sum_[unprepared] + h, load(sum_[unprepared] + h) + (e + T(1)) * r * r * g);
    }
  }

  bool prepared_ = false, wide_fits_ = false;
  T limit_[2] = {};
  Vec<T> first_ = {};
  const T *query_ = nullptr, *weight_ = nullptr, *factor_[2] = {}, *offset_[2] = {};
  T* sum_[3] = {};  // of the slopes, for each form
  Buffer<T> memory_, sums_, row_;
};
