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

// Rows of memory that are fetched while scores are computed, a few lines at a time: scores are compute-bound, the
// weighted sum is memory-bound.
class Fetch {
 public:
  explicit Fetch(std::int64_t turns) : turns_(turns) {}  // in which `some` is called
  template <class T>
  void add(const StoredRows<T>& rows, std::int64_t n, std::int64_t i, std::int64_t columns) {
    if (columns == 0) return;
    next_[count_] = static_cast<const char*>(rows.at(n, i));
    end_[count_] = next_[count_] + columns * rows.element();
    ++count_;
  }
  // A share of each row: `lines` of 64 bytes in all turns.
  void some(std::int64_t lines) {
    const std::int64_t share = (lines + turns_ - 1) / turns_;
    for (int i = 0; i < count_; ++i)
      for (std::int64_t l = 0; l < share && next_[i] < end_[i]; ++l, next_[i] += 64) __builtin_prefetch(next_[i], 0, 2);
  }
  void all() {
    for (int i = 0; i < count_; ++i)
      for (; next_[i] < end_[i]; next_[i] += 64) __builtin_prefetch(next_[i], 0, 2);
  }

 private:
  const std::int64_t turns_;
  const char *next_[4], *end_[4];
  int count_ = 0;
};

// A query against one prepared key after the other: several at a time would share the query's constants, but memory
// is read fastest in its own order. Of several queries of the same keys, two meet two keys at a time.
template <class T>
class PreparedQueries {
 public:
  static constexpr int L = lanes<T>, width_unit = group * L;

  // The weight is normalised; `weight_largest` is its largest magnitude. Unprepared keys need no constants.
  void begin(const T* weight, T weight_largest, std::int64_t features, std::int64_t rows, bool prepared) {
    hidden = features;
    width = round_up(hidden, width_unit);
    weight_ = weight;
    prepared_ = prepared && hidden > 0;
    if (!prepared_) return;
    T* to = memory_.get((1 + rows * row_constants) * width);
    for (std::int64_t h = 0; h < width; h += L) store(to + h, load_part<T>(weight + h, hidden - h, 0));
    weight_ = to;
    weight_largest_ = weight_largest;
    first_ = splat<T>(T(1));
    first_[0] = T(1) / lift<T>;
  }
  // After `begin`, of each row.
  void take(std::int64_t r, const T* query) {
    Row& row = rows_[r];
    row.query = query;
    if (!prepared_) return;
    T* to = memory_.get(0) + (1 + r * row_constants) * width;
    for (int form : {small, wide}) row.factor[form] = to + form * width;
    for (std::int64_t h = 0; h < width; h += L) {
      const Vec<T> q = load_part<T>(query + h, hidden - h, 0);
      store(to + h, tanh<T>(q));
      store(to + width + h, exp<T>(q * T(-2)));
    }
    row.wide_fits = largest(query, hidden) <= ordered_bits<T>(Range<T>::safe);
    row.limit[small] = small_energy * weight_largest_ * as_number<T>(largest(row.factor[small], width));
    row.limit[wide] = small_tanh * weight_largest_;
  }

  // sum_h w_h t_h of row r and one key.
  void score(const Problem<T>& p, std::int64_t n, std::int64_t j, std::int64_t r, Fetch& fetch, T* to) {
    const T* prepared = prepared_row(p, n, j);
    const Row& row = rows_[r];
    const KeyForm form = clear_form(prepared, row);
    if (form == small) return join<small, 1, 1>(&prepared, &row, fetch, to, 0);
    if (form == wide) return join<wide, 1, 1>(&prepared, &row, fetch, to, 0);
    *to = energy(row.query, key_row(p, n, j), weight_, hidden);
  }
  // The same of rows r, r + 1 and keys j, j + 1, into to[row * stride + key]. False, and nothing is computed, unless all
  // four have the same form.
  bool scores(const Problem<T>& p, std::int64_t n, std::int64_t j, std::int64_t r, Fetch& fetch, T* to,
              std::int64_t stride) {
    if (!prepared_) return false;
    const T* prepared[2] = {prepared_row(p, n, j), prepared_row(p, n, j + 1)};
    const KeyForm form = clear_form(prepared[0], rows_[r]);
    if (form == unprepared || clear_form(prepared[0], rows_[r + 1]) != form) return false;
    if (clear_form(prepared[1], rows_[r]) != form || clear_form(prepared[1], rows_[r + 1]) != form) return false;
    if (form == small)
      join<small, 2, 2>(prepared, rows_ + r, fetch, to, stride);
    else
      join<wide, 2, 2>(prepared, rows_ + r, fetch, to, stride);
    return true;
  }

  void begin_slopes() {
    T* sums = sums_.get(3 * width);
    std::memset(sums, 0, 3 * width * sizeof(T));
    for (int form = 0; form < 3; ++form) sum_[form] = sums + form * width;
  }
  // Of row 0: adds G (1 - t^2) of one key, but for what `finish_slopes` multiplies by.
  void add_slopes(const Problem<T>& p, std::int64_t n, std::int64_t j, T g) {
    const T* prepared = prepared_row(p, n, j);
    const KeyForm form = form_of(prepared, rows_[0]);
    if (form == small) return slopes<small>(prepared, g);
    if (form == wide) return slopes<wide>(prepared, g);
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
    T limit[2];
    bool wide_fits;
  };

  const T* prepared_row(const Problem<T>& p, std::int64_t n, std::int64_t j) {
    return prepared_ ? stored_row(p.prepared, n, j, 0, hidden, row_.get(width)) : nullptr;
  }
  const T* key_row(const Problem<T>& p, std::int64_t n, std::int64_t j) {
    return stored_row(p.key, n, j, 0, hidden, row_.get(width));
  }

  KeyForm form_of(const T* prepared, const Row& row) const {
    const KeyForm form = prepared_ ? key_form(prepared) : unprepared;
    return form == wide && !row.wide_fits ? unprepared : form;
  }

  // With `edge`, at the first features or beyond the last whole group.
  template <KeyForm form, bool edge>
  Vec<T> load_key(const T* x, std::int64_t h) const {
    if (!edge) return load(x + h);
    const Vec<T> k = h + L <= hidden ? load(x + h) : load_part<T>(x + h, hidden - h, 0);
    return form == wide && h == 0 ? k * first_ : k;
  }

  template <KeyForm form>
  void fraction(Vec<T> k, const Row& row, std::int64_t h, Vec<T>& z, Vec<T>& y) const {
    const Vec<T> factor = load(row.factor[form] + h);
    z = (form == small ? k + factor : k - factor) * load(weight_ + h);
    y = form == small ? k * factor + T(1) : k + factor;
  }

  // Is a term w t of this pair so large that the rounding of its form does not show? Mostly the first vector tells.
  template <KeyForm form>
  bool is_clear(const T* x, const Row& row) const {
    for (std::int64_t h = 0; h < hidden; h += L) {
      Vec<T> z, y;
      fraction<form>(load_key<form, true>(x, h), row, h, z, y);
      const Vec<T> most = form == small ? splat<T>(row.limit[small]) : y * row.limit[wide];
      if (any<T>((UVec<T>)(magnitude<T>(z) > as_bits<T>(most)))) return true;
    }
    return false;
  }

  KeyForm clear_form(const T* prepared, const Row& row) const {
    const KeyForm form = form_of(prepared, row);
    const bool clear = form == small ? is_clear<small>(prepared, row) : form == wide && is_clear<wide>(prepared, row);
    return clear ? form : unprepared;
  }

  template <KeyForm form, int K, int R>
  void join(const T* const* x, const Row* row, Fetch& fetch, T* to, std::int64_t stride) const {
    constexpr std::int64_t lines = width_unit * sizeof(T) / 64;
    Vec<T> total[R][K] = {};
    add<form, true>(x, row, 0, total);
    std::int64_t h = width_unit;
    for (; h + width_unit <= hidden; h += width_unit) {
      fetch.some(lines);
      add<form, false>(x, row, h, total);
    }
    if (h < hidden) add<form, true>(x, row, h, total);
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < K; ++k) to[r * stride + k] = sum<T>(total[r][k]);
  }

  template <KeyForm form, bool edge, int K, int R>
  void add(const T* const* x, const Row* row, std::int64_t h, Vec<T> (&total)[R][K]) const {
    Vec<T> z[R][K][group], y[R][K][group];
    for (int g = 0; g < group; ++g)
      for (int k = 0; k < K; ++k) {
        const Vec<T> key = load_key<form, edge>(x[k], h + g * L);
        for (int r = 0; r < R; ++r) fraction<form>(key, row[r], h + g * L, z[r][k][g], y[r][k][g]);
      }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < K; ++k) total[r][k] += joined(z[r][k], y[r][k]);
  }

  // The sum of four fractions.
  static Vec<T> joined(const Vec<T>* z, const Vec<T>* y) {
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

  bool prepared_ = false;
  T weight_largest_ = 0;
  Vec<T> first_ = {};
  const T* weight_ = nullptr;
  Row rows_[most_rows];
  T* sum_[3] = {};  // of the slopes, for each form
  Buffer<T> memory_, sums_, row_;
};
