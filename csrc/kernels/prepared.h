// A decoder's queries against prepared keys (prepared_keys.h).

constexpr int rows_together = VECTOR_BYTES == 64 ? 4 : 2;  // queries that are scored against a key at a time

// Queries against one prepared key after the other: several keys at a time would share the queries' constants, but
// memory is read fastest in order.
template <class T>
class PreparedQueries {
 public:
  static constexpr int L = lanes<T>, width_unit = group * L;

  // The weight is normalised; `weight_largest` is its largest magnitude. Unprepared keys need no constants.
  void begin(const T* weight, T weight_largest, std::int64_t features, std::int64_t rows,
             const StoredRows<T>& prepared) {
    hidden = features;
    width = round_up(hidden, width_unit);
    weight_ = weight;
    prepared_ = prepared && hidden > 0;
    narrow_ = sizeof(T) == 4 && prepared.storage != Storage::computed;
    if (!prepared_) return;
    T* to = memory_.get((1 + rows * row_constants) * width);
    for (std::int64_t h = 0; h < width; h += L) store(to + h, load_part<T>(weight + h, hidden - h, 0));
    weight_ = to;
    weight_largest_ = weight_largest;
    first_ = splat<T>(T(1));
    first_[0] = T(1) / lift<T>;
  }
  // Takes the query of a row, after `begin`.
  void take(std::int64_t r, const T* query) {
    Row& row = rows_[r];
    row.query = query;
    if (!prepared_) return;
    T* to = memory_.get(0) + (1 + r * row_constants) * width;
    for (int form : {small, wide}) row.factor[form] = to + form * width;
    Vec<T> lost[2] = {};
    const bool scores = weight_largest_ != 0;
    for (std::int64_t h = 0; h < width; h += L) {
      const Vec<T> q = load_part<T>(query + h, hidden - h, 0), w = load(weight_ + h);
      const Vec<T> exponent = clamp<T>(q * T(-2), Simd<T>::exp_low, Simd<T>::exp_high);
      Vec<T> s, a, error[2];
      tanh_with_error<T>(q, s, error[small]);
      exp_with_error<T>(exponent, a, error[wide]);
      store(to + h, s);
      store(to + width + h, q > -Simd<T>::exp_low / 2 ? (Vec<T>){} : a);
      if (!scores) continue;
      lost[small] += w * error[small] * (s * s * (s * s + T(1)) + T(1));
      lost[wide] -= w * error[wide] * reciprocal(a);
    }
    row.correction[small] = sum<T>(lost[small]);
    row.correction[wide] = sum<T>(lost[wide]) / 2;
    row.wide_fits = largest(query, hidden) <= ordered_bits<T>(Range<T>::safe);
    row.limit[small] = small_energy * weight_largest_ * as_number<T>(largest(row.factor[small], width));
    row.limit[wide] = small_tanh * weight_largest_;
  }

  // sum_h w_h t_h of rows [r, r + count), count <= rows_together, and one key, into to[row * stride].
  void scores(const Problem<T>& p, std::int64_t n, std::int64_t j, std::int64_t r, std::int64_t count, Fetch& fetch,
              T* to, std::int64_t stride) {
    if (count == 2 && some<2>(p, n, j, r, fetch, to, stride)) return;
    if constexpr (rows_together > 2) {
      if (count == 3 && some<3>(p, n, j, r, fetch, to, stride)) return;
      if (count == 4 && some<4>(p, n, j, r, fetch, to, stride)) return;
    }
    for (std::int64_t end = r + count; r < end; ++r, to += stride)
      if (!some<1>(p, n, j, r, fetch, to, stride)) {
        fetch.all();
        *to = energy(rows_[r].query, key_row(p, n, j), weight_, hidden);
      }
  }

  void begin_slopes() {
    T* sums = sums_.get(3 * width);
    std::memset(sums, 0, 3 * width * sizeof(T));
    for (int form = 0; form < 3; ++form) sum_[form] = sums + form * width;
  }
  // Adds G (1 - t^2) of row 0 and one key, without the factors that `finish_slopes` multiplies by.
  void add_slopes(const Problem<T>& p, std::int64_t n, std::int64_t j, T g) {
    if (prepared_) {
      const void* prepared = p.prepared.at(n, j);
      if constexpr (sizeof(T) == 4)
        if (narrow_ && prepared_slopes(static_cast<const Narrow*>(prepared), g)) return;
      if (!narrow_ && prepared_slopes(static_cast<const T*>(prepared), g)) return;
    }
    direct_slopes(key_row(p, n, j), g);
  }
  // Adds a quarter of the sums of G (1 - t^2) to `to`.
  void finish_slopes(T* to) const {
    for (std::int64_t h = 0; h < width; h += L) {
      Vec<T> total = load(to + h) + load(sum_[unprepared] + h);
      if (prepared_) {
        const Vec<T> a = load(rows_[0].factor[wide] + h), r = T(1) / (a + T(1));
        total += load(sum_[small] + h) * (a * r * r);
        if (rows_[0].wide_fits) total += load(sum_[wide] + h) * a;
      }
      store(to + h, total);
    }
  }

  std::int64_t hidden = 0, width = 0;

 private:
  static constexpr int row_constants = 2;
  struct Row {
    const T *query, *factor[2];
    T limit[2], correction[2];  // correction: of the rounding errors of the factors
    bool wide_fits;
  };

  const T* key_row(const Problem<T>& p, std::int64_t n, std::int64_t j) {
    return stored_row(p.key, n, j, 0, hidden, row_.get(width));
  }

  // Returns false, and computes nothing, unless the key has the same form for R rows.
  template <int R>
  bool some(const Problem<T>& p, std::int64_t n, std::int64_t j, std::int64_t r, Fetch& fetch, T* to,
            std::int64_t stride) const {
    if (!prepared_) return false;
    const void* prepared = p.prepared.at(n, j);
    if constexpr (sizeof(T) == 4)
      if (narrow_) return some_of<R>(static_cast<const Narrow*>(prepared), r, fetch, to, stride);
    return some_of<R>(static_cast<const T*>(prepared), r, fetch, to, stride);
  }
  template <int R, class E>
  bool some_of(const E* prepared, std::int64_t r, Fetch& fetch, T* to, std::int64_t stride) const {
    const KeyForm form = clear_form(prepared, rows_[r]);
    bool same = form != unprepared;
    for (int i = 1; i < R && same; ++i) same = clear_form(prepared, rows_[r + i]) == form;
    if (!same) return false;
    if (form == small)
      join<small, R>(prepared, &rows_[r], fetch, to, stride);
    else
      join<wide, R>(prepared, &rows_[r], fetch, to, stride);
    return true;
  }

  template <class E>
  bool prepared_slopes(const E* prepared, T g) {
    const KeyForm form = form_of(prepared, rows_[0]);
    if (form == small) slopes<small>(prepared, g);
    if (form == wide) slopes<wide>(prepared, g);
    return form != unprepared;
  }

  template <class E>
  KeyForm form_of(const E* prepared, const Row& row) const {
    const KeyForm form = key_form(prepared);
    return form == wide && !row.wide_fits ? unprepared : form;
  }

  // `edge`: these are the first features, or those of a last, partial group.
  template <KeyForm form, bool edge, class E>
  ALWAYS_INLINE Vec<T> load_key(const E* x, std::int64_t h) const {
    if (!edge) return load_prepared<form>(x + h);
    if constexpr (sizeof(E) == sizeof(T)) {
      const Vec<T> k = h + L <= hidden ? load(x + h) : load_part<T>(x + h, hidden - h, 0);
      return form == wide && h == 0 ? k * first_ : k;
    } else {
      if (h + L <= hidden) return load_prepared<form>(x + h);
      E part[L] = {};
      if (h < hidden) std::memcpy(part, x + h, (hidden - h) * sizeof(E));
      return load_prepared<form>(part);
    }
  }

  template <KeyForm form>
  ALWAYS_INLINE void fraction(Vec<T> k, const Row& row, std::int64_t h, Vec<T>& z, Vec<T>& y) const {
    const Vec<T> factor = load(row.factor[form] + h);
    z = (form == small ? k + factor : k - factor) * load(weight_ + h);
    y = form == small ? k * factor + T(1) : k + factor;
  }

  // Whether a term w t of this pair is so large that the rounding of its form is negligible. Mostly the first vector
  // decides.
  template <KeyForm form, class E>
  bool is_clear(const E* x, const Row& row) const {
    for (std::int64_t h = 0; h < hidden; h += L) {
      Vec<T> z, y;
      fraction<form>(load_key<form, true>(x, h), row, h, z, y);
      const Vec<T> most = form == small ? splat<T>(row.limit[small]) : y * row.limit[wide];
      if (any<T>((UVec<T>)(magnitude<T>(z) > as_bits<T>(most)))) return true;
    }
    return false;
  }

  template <class E>
  KeyForm clear_form(const E* prepared, const Row& row) const {
    const KeyForm form = form_of(prepared, row);
    const bool clear = form == small ? is_clear<small>(prepared, row) : form == wide && is_clear<wide>(prepared, row);
    return clear ? form : unprepared;
  }

  template <KeyForm form, int R, class E>
  ALWAYS_INLINE void join(const E* x, const Row* row, Fetch& fetch, T* to, std::int64_t stride) const {
    Vec<T> total[R] = {};
    for (std::int64_t h = 0; h < hidden; h += width_unit) {
      fetch.some();
      if (h > 0 && h + width_unit <= hidden)
        add<form, false, R>(x, row, h, total);
      else
        add<form, true, R>(x, row, h, total);
    }
    for (int r = 0; r < R; ++r) to[r * stride] = sum<T>(total[r]) + row[r].correction[form];
  }

  template <KeyForm form, bool edge, int R, class E>
  ALWAYS_INLINE void add(const E* x, const Row* row, std::int64_t h, Vec<T>* total) const {
    Vec<T> z[R][group], y[R][group];
    for (int g = 0; g < group; ++g) {
      const Vec<T> key = load_key<form, edge>(x, h + g * L);
      for (int r = 0; r < R; ++r) fraction<form>(key, row[r], h + g * L, z[r][g], y[r][g]);
    }
    for (int r = 0; r < R; ++r) {
      Vec<T> numerator, denominator;
      join_fractions<T>(z[r], y[r], numerator, denominator);
      total[r] += numerator * reciprocal(denominator);
    }
  }

  template <KeyForm form, class E>
  void slopes(const E* x, T g) {
    pair_of_slopes<form, true>(x, g, 0);
    std::int64_t h = 2 * L;
    for (; h + 2 * L <= hidden; h += 2 * L) pair_of_slopes<form, false>(x, g, h);
    if (h < hidden) pair_of_slopes<form, true>(x, g, h);
  }

  // Two vectors of features share a reciprocal.
  template <KeyForm form, bool edge, class E>
  ALWAYS_INLINE void pair_of_slopes(const E* x, T g, std::int64_t h) {
    T* to = sum_[form] + h;
    Vec<T> k[2], y[2];
    for (int v = 0; v < 2; ++v) {
      const Vec<T> factor = load(rows_[0].factor[form] + h + v * L);
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
      const Vec<T> x = load_part<T>(rows_[0].query + h, hidden - h, 0) + load_part<T>(key + h, hidden - h, 0);
      const Vec<T> e = expm1<T>(clamp<T>(x, -Range<T>::flat, Range<T>::flat) * T(2)), r = reciprocal(e + T(2));
      store(sum_[unprepared] + h, load(sum_[unprepared] + h) + (e + T(1)) * r * r * g);
    }
  }

  bool prepared_ = false, narrow_ = false;
  T weight_largest_ = 0;
  Vec<T> first_ = {};
  const T* weight_ = nullptr;
  Row rows_[most_rows];
  T* sum_[3] = {};  // of the slopes, for each form
  Buffer<T> memory_, sums_, row_;
};
