// The masked scores of a block of query rows, one tile of keys after the other: what forward and backward share.

constexpr int usual_rows = 128;        // of a block
constexpr int few_features = 64;       // up to so many features, most_rows rows share a packed tile
constexpr int few_features_rows = 32;  // of these, so many are computed at a time: the cache holds their scores
constexpr int score_rows = VECTOR_BYTES == 64 ? 4 : 1;  // rows whose scores are computed together, of the fast forms
constexpr double most_bound = 16;                       // of scores whose exponentials need no maximum subtracted

// Rows of a block: fewer where that is needed to keep every thread busy, or where masks may exclude keys of some rows.
template <class T>
std::int64_t rows_per_block(const Problem<T>& p, std::int64_t batch, std::int64_t queries) {
  const bool masked = p.blocks || p.starts || p.left >= 0 || p.right >= 0 || p.mask.type != MaskType::none;
  std::int64_t rows = p.hidden <= few_features && p.queries > 1 && !masked ? most_rows : usual_rows;
  rows = std::min<std::int64_t>(rows, std::max<std::int64_t>(queries, 1));
  while (rows > 16 && batch * ((queries + rows - 1) / rows) < 4 * p.threads) rows /= 2;
  return rows;
}

template <class T>
class ScoreBlock {
 public:
  static constexpr int K = block_keys<T>, TK = tile_keys<T>;

  // With `sharing` above 1, so many consecutive entries of one query share keys, values and weight. They are rows of
  // blocks, and `begin` takes the number of their group as the entry.
  explicit ScoreBlock(const Problem<T>& problem, std::int64_t sharing = 1)
      : p(problem),
        sharing(sharing),
        features(round_up(problem.hidden, group)),
        slab(std::clamp<std::int64_t>(features, group, features_cached)),
        slab_width_(slab * query_constants),
        query_width_((std::max<std::int64_t>(features, 1) + slab - 1) / slab * slab_width_),
        located_(problem.key, problem.location, problem.hidden) {}

  // Begins rows [first_row, first_row + count) of entry n.
  void begin(std::int64_t n, std::int64_t first_row, std::int64_t count) {
    entry = n * sharing;
    row0 = first_row;
    rows = count;
    first = first_stop_ = p.keys;
    last = last_start_ = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      key_range(p, entry_of(r), row_of(r), start[r], stop[r]);
      last_start_ = std::max(last_start_, start[r]);
      first_stop_ = std::min(first_stop_, stop[r]);
      if (start[r] < stop[r]) {
        first = std::min(first, start[r]);
        last = std::max(last, stop[r]);
      }
    }
    if (!prepared_ || p.weight.at(entry, 0) != prepared_) prepare_weight();
    cancellation_.begin_rows();
    if (p.location)
      located_.begin(n);
    else if (p.queries == 1)
      begin_single_queries();
    else
      for (std::int64_t r = 0; r < rows; ++r) query_largest_[r] = largest(p.query.at(n, row0 + r), p.hidden);
    for (bool& packed : query_packed_) packed = false;
    scores_.get(std::min(rows, rows_at_once()) * TK);
  }

  // Prepares keys [key0, key0 + TK). Returns false if every key is masked for every row.
  bool tile(std::int64_t key0) {
    first_key_ = key0;
    std::fill(block_attended_, block_attended_ + tile_blocks, false);
    count = std::min<std::int64_t>(TK, p.keys - key0);
    kept_ = p.blocks ? kept_pairs(p.blocks, entry, row0, rows, key0, count) : Kept::all;
    if (kept_ == Kept::none) return false;
    find_attended(key0);
    if (!(block_attended_[0] || block_attended_[1] || block_attended_[2] || block_attended_[3])) return false;
    if (p.queries == 1) return true;
    std::fill(form_used_, form_used_ + forms, false);
    keys_ = key_reader_.read(p.key, entry, key0, count, p.hidden);
    choose_forms(key0);
    for (const Form f : {centred, difference, matched, direct})
      if (form_used_[f] && !query_packed_[f]) pack_queries(f);
    for (int b = 0; b < tile_blocks && few(); ++b) pack_block(b, 0);
    return true;
  }

  // Computes scale * score + mask of the tile for rows from `begin` to the end that it returns, -Inf where a key
  // is masked or beyond the last.
  std::int64_t compute(std::int64_t begin) {
    computed_ = begin;
    const std::int64_t end = std::min(begin + rows_at_once(), rows);
    if (p.queries == 1) {
      p.location ? located_row(first_key_) : single_rows(first_key_);
      return end;
    }
    for (std::int64_t h0 = 0; h0 < std::max<std::int64_t>(features, 1); h0 += features_cached)
      for (int b = 0; b < tile_blocks; ++b) {
        if (!block_attended_[b]) continue;
        if (!few()) pack_block(b, h0);
        for (std::int64_t r = begin; r < end;) r += attended[r][b] ? add(r, end, b, h0) : 1;
      }
    const bool finished = complete && count == TK && !scale_last_;
    for (std::int64_t r = begin; r < end && !finished; ++r)
      if (reached[r])
        finish_row(r, first_key_, 1);
      else
        std::fill(row(r), row(r) + TK, T(-INFINITY));
    return end;
  }

  // The last computed scores of row r; those of the next row follow after TK.
  T* row(std::int64_t r) { return scores_.get(0) + (r - computed_) * TK; }

  // `masked`: key j of the present tile, which begins at key0, is masked for row r. `attends`: any key j is not.
  bool masked(std::int64_t r, std::int64_t j, std::int64_t key0) const {
    return j < start[r] || j >= stop[r] || (bias_rows_ && bias_rows_[r * TK + j - key0] == T(-INFINITY));
  }
  bool attends(std::int64_t r, std::int64_t j) const {
    T bias;
    load_terms(p, entry_of(r), row_of(r), j, 1, &bias);
    return j >= start[r] && j < stop[r] && bias != T(-INFINITY);
  }

  std::int64_t entry_of(std::int64_t r) const { return sharing > 1 ? entry + row0 + r : entry; }
  std::int64_t row_of(std::int64_t r) const { return sharing > 1 ? 0 : row0 + r; }

  const Problem<T>& p;
  const std::int64_t sharing;
  const std::int64_t features;  // padded
  const std::int64_t slab;      // of the features, packed at a time
  std::int64_t entry = 0, row0 = 0, rows = 0;
  std::int64_t first = 0, last = 0;                // keys that any row may attend to, masks aside
  std::int64_t start[most_rows], stop[most_rows];  // keys that each row may attend to, masks aside
  std::int64_t count = 0;                          // keys of the tile
  bool complete = false;                           // no key of the tile is masked for any row
  bool attended[most_rows][tile_blocks];           // blocks with an attended key
  bool reached[most_rows];                         // rows with such a block
  bool raw = false;                                // scores are results: no softmax rounds them
  bool may_overflow = false;                       // an attended score may be -Inf too
  int bound_bits = 0;                              // above 0: every |score| < bound_bits ln 2

 private:
  bool few() const { return p.queries > 1 && features <= few_features; }
  std::int64_t rows_at_once() const { return few() ? few_features_rows : most_rows; }

  void prepare_weight() {
    const T* w = prepared_ = p.weight.at(entry, 0);
    weight_largest_ = largest(w, p.hidden);
    normaliser_ = weight_normaliser(w, p.hidden);
    // The scale is applied later if the product is not normal, although neither factor overflows with the energy.
    factor_ = T(1) / normaliser_ * p.scale;
    scale_last_ = !std::isnormal(factor_);
    if (scale_last_) factor_ = T(1) / normaliser_;
    T* normalised = weight_.get(p.hidden);
    double reach = 0, squares = 0, total = 0;
    for (std::int64_t h = 0; h < p.hidden; ++h) {
      normalised[h] = w[h] * normaliser_;
      total += normalised[h];
      reach += std::fabs(normalised[h]);
      squares += double(normalised[h]) * normalised[h];
    }
    // Beside this bound, a finite mask value cannot overflow either: the score is less than its rounding.
    constexpr double bound = double(std::numeric_limits<T>::max() * std::numeric_limits<T>::epsilon() / 8);
    const double unit = std::fabs(double(p.scale)) / double(normaliser_);
    rounding_ = raw ? INFINITY : std::sqrt(squares) * unit;
    if (p.queries > 1 && normaliser_ == normaliser_)
      cancellation_.begin(normalised, p.hidden, as_number<T>(weight_largest_) * normaliser_,
                          std::max(rounding_, std::fabs(total) * unit));
    norm_ = std::sqrt(squares);
    matching_known_ = false;
    may_overflow = !(reach * unit < bound);
    const bool added = p.mask.type != MaskType::none && p.mask.type != MaskType::boolean;
    bound_bits = reach * unit <= most_bound && !added && !p.location ? 1 + int(reach * unit * 1.4427) : 0;
  }

  // Loads the masks of the tile, and finds the blocks of keys to compute, for each row and for any.
  void find_attended(std::int64_t key0) {
    bias_rows_ = p.mask.type == MaskType::none && kept_ == Kept::all ? nullptr : bias_.get(rows * TK);
    complete = !bias_rows_ && key0 >= last_start_ && key0 + count <= first_stop_;
    if (complete) {
      for (std::int64_t r = 0; r < rows; ++r) {
        reached[r] = true;
        for (int b = 0; b < tile_blocks; ++b) attended[r][b] = b * K < count;
      }
      return std::copy_n(attended[0], tile_blocks, block_attended_), void();
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t low = std::max(start[r], key0) - key0, high = std::min(stop[r], key0 + count) - key0;
      const T* bias = nullptr;
      if (bias_rows_ && low < high) {
        load_terms(p, entry_of(r), row_of(r), key0 + low, high - low, bias_rows_ + r * TK + low);
        bias = bias_rows_ + r * TK;
      }
      reached[r] = false;
      for (int b = 0; b < tile_blocks; ++b) {
        const std::int64_t from = std::max<std::int64_t>(low, b * K), to = std::min<std::int64_t>(high, (b + 1) * K);
        bool any = from < to;
        if (any && bias) {
          any = false;
          for (std::int64_t j = from; j < to; ++j) any = any || bias[j] != T(-INFINITY);
        }
        attended[r][b] = any;
        reached[r] = reached[r] || any;
        block_attended_[b] = block_attended_[b] || any;
      }
    }
  }

  void begin_single_queries() {
    single_queries_.begin(weight_.get(0), as_number<T>(weight_largest_) * normaliser_, p.hidden, rows, p.prepared);
    for (std::int64_t r = 0; r < rows; ++r) single_queries_.take(r, p.query.at(entry_of(r), 0));
  }

  void single_rows(std::int64_t key0) {
    const std::int64_t turns = (rows + rows_together - 1) / rows_together, some = (rows + turns - 1) / turns;
    Fetch value(p.values * p.value.element(), single_queries_.width / single_queries_.width_unit * turns);
    for (std::int64_t j = 0; j < count; ++j) {
      if (p.values > 0) value.begin(p.value.at(entry, key0 + j));
      for (std::int64_t r = 0; r < rows;) {
        std::int64_t end = r;
        while (end < std::min(r + some, rows) && attended[end][j / K]) ++end;
        if (r < end)
          single_queries_.scores(p, entry, key0 + j, r, end - r, value, row(r) + j, TK);
        else
          ++end;
        r = end;
      }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      form_[r] = direct;
      finish_row(r, key0, factor_);
    }
  }

  // A single row whose keys have a location term. Values and later keys are prefetched meanwhile, keys of the next tile
  // where a tile is read at once: one burst of loads would stall.
  void located_row(std::int64_t key0) {
    form_[0] = direct;
    const bool one = p.location.features == 1;
    const std::int64_t ahead = one && p.key.storage == Storage::computed ? location_rows : location_keys;
    const std::int64_t groups = (p.hidden + group * lanes<T> - 1) / (group * lanes<T>);
    Fetch value(p.values * p.value.element(), groups), key(p.hidden * p.key.element(), groups);
    const T* query = p.query.at(entry, row0);
    for (std::int64_t j = 0; j < count; j += location_keys) {
      const std::int64_t end = std::min<std::int64_t>(j + location_keys, count);
      bool any = false;
      for (std::int64_t b = j / K; b * K < end; ++b) any = any || attended[0][b];
      if (!any) continue;
      const T* rows = one ? located_.load_keys(key0 + j, end - j) : located_.rows(key0 + j, end - j);
      for (std::int64_t i = j; i < end; ++i, rows += one ? located_.key_row() : located_.row) {
        if (p.values > 0) value.begin(p.value.at(entry, key0 + i));
        if (key0 + i + ahead < p.keys) key.begin(p.key.at(entry, key0 + i + ahead));
        row(0)[i] = one ? energy<T, true>(query, rows, weight_.get(0), p.hidden, located_.x[i - j], located_.weight,
                                          &value, &key)
                        : energy<T>(query, rows, weight_.get(0), p.hidden, 0, nullptr, &value, &key);
      }
    }
    finish_row(0, key0, factor_);
  }

  struct Attended {  // (not every compiler compiles a lambda for the instruction set)
    const ScoreBlock& s;
    std::int64_t r, key0;
    bool operator()(std::int64_t j) const { return s.complete || !s.masked(r, key0 + j, key0); }
    std::int64_t first() const { return std::max<std::int64_t>(s.start[r] - key0, 0); }
    std::int64_t last() const { return std::min(s.stop[r] - key0, s.count) - 1; }
    bool whole() const { return s.complete; }
  };

  // Chooses the form of each row. No masked key may change a result, not even by the form.
  void choose_forms(std::int64_t key0) {
    const T* k = keys_;
    const std::int64_t row = key_reader_.row;
    typename Simd<T>::Bits key_largest[TK], tile_largest = 0;
    if (complete)
      tile_largest = largest(k, p.hidden, count, row);
    else
      for (std::int64_t j = 0; j < count; ++j) key_largest[j] = largest(k + j * row, p.hidden);
    cancellation_.tile(k, row, count);
    for (std::int64_t r = 0; r < rows; ++r) {
      if (!reached[r]) continue;
      const Attended attends{*this, r, key0};
      auto most = tile_largest;
      for (std::int64_t j = attends.first(); j <= attends.last() && !complete; ++j)
        if (!bias_rows_ || attends(j)) most = std::max(most, key_largest[j]);
      form_[r] = choose_form<T>(query_largest_[r], most, weight_largest_, p.hidden);
      form_[r] = cancellation_.row_form(form_[r], r, p.query.at(entry, row0 + r), query_largest_[r],
                                        std::max(query_largest_[r], most), attends);
      form_used_[form_[r]] = true;
    }
  }

  void pack_queries(Form f) {
    if (f == matched && !matching_known_) {
      matching_.begin(weight_.get(0), p.hidden, norm_, rounding_ > rounding_of_softmax);
      matching_known_ = true;
    }
    const std::int64_t width = f == matched ? matching_.width : query_width_;
    T* to = query_[f].get(rows * width);
    for (std::int64_t r = 0; r < rows; ++r, to += width) {
      const T* q = p.query.at(entry, row0 + r);
      if (f == matched) matching_.pack_query(q, to);
      for (std::int64_t h = 0; h < std::max<std::int64_t>(features, 1) && f != matched; h += slab)
        pack_query(f, q + h, weight_.get(0) + h, std::min(p.hidden - h, slab), to + h / slab * slab_width_);
    }
    query_packed_[f] = true;
  }

  // Packs features [h0, h0 + slab) of a block of keys, in the forms in use. They stay in the cache.
  void pack_block(int b, std::int64_t h0) {
    if (!block_attended_[b]) return;
    const T* k = keys_ + b * K * key_reader_.row + h0;
    const std::int64_t keys = std::min<std::int64_t>(K, count - b * K), some = std::min(p.hidden - h0, slab);
    for (const Form f : {centred, difference, direct})
      if (form_used_[f]) pack_keys(f, k, key_reader_.row, keys, weight_.get(0) + h0, some, packed_block(f, b));
    if (form_used_[matched])
      matching_.pack_keys(k, key_reader_.row, keys, some, h0 / features_cached, packed_block(matched, b));
  }
  T* packed_block(Form f, int b) {
    const std::int64_t width = f == matched ? matching_.key_width() : K + key_constants(f) * K * slab;
    return key_[f].get((few() ? tile_blocks : 1) * width) + (few() ? b * width : 0);
  }

  // Adds features [h0, h0 + slab) of row r and of next rows before `end` that attend to the block in the same form.
  // Returns the number of rows.
  int add(std::int64_t r, std::int64_t end, int b, std::int64_t h0) {
    const Form f = form_[r];
    const T* k = packed_block(f, b);
    const std::int64_t some = std::min(features - h0, slab), groups = some / group, i = h0 / features_cached;
    const ScoreRows<T> to{row(r) + b * K, TK, h0 == 0, h0 + some == features ? factor_ : T(1)};
    const std::int64_t width = f == matched ? matching_.width : query_width_;
    const T* q = query_[f].get(0) + r * width + (f == matched ? matching_.place(i) : i * slab_width_);
    if (f == direct) return add_energies<T, direct, 1>(q, width, k, groups, to), 1;
    int same = 1;
    while (same < score_rows && r + same < end && attended[r + same][b] && form_[r + same] == f) ++same;
    if (f == matched) return add_rows<matched>(same, q, width, k, matching_.groups(i), to);
    return add_rows<difference>(same, q, width, k, groups, to);
  }
  template <Form form>
  static int add_rows(int same, const T* q, std::int64_t width, const T* k, std::int64_t groups,
                      const ScoreRows<T>& to) {
    if (same < score_rows) return add_energies<T, form, 1>(q, width, k, groups, to), 1;
    return add_energies<T, form, score_rows>(q, width, k, groups, to), score_rows;
  }

  // Multiplies the row's scores by `first`, then by the scale where it comes last, and adds the masks' terms.
  void finish_row(std::int64_t r, std::int64_t key0, T first) {
    const std::int64_t low = start[r] - key0, high = std::min(stop[r], key0 + count) - key0;
    const T* bias = bias_rows_ ? bias_rows_ + r * TK : nullptr;
    for (int b = 0; b < tile_blocks; ++b) {
      T* s = row(r) + b * K;
      if (!attended[r][b]) {
        for (int j = 0; j < K; ++j) s[j] = T(-INFINITY);
        continue;
      }
      for (int j = 0; j < K && first != T(1); ++j) s[j] *= first;
      for (int j = 0; j < K && scale_last_; ++j) s[j] *= p.scale;
      const bool whole = low <= b * K && high >= (b + 1) * K;  // else some keys are masked or were never computed
      if (whole && !bias) continue;
      for (int j = 0; j < K; ++j) {
        const std::int64_t column = b * K + j;
        if (column < low || column >= high)
          s[j] = T(-INFINITY);
        else if (bias)
          s[j] = bias[column] == T(-INFINITY) ? T(-INFINITY) : s[j] + bias[column];
      }
    }
  }

  std::int64_t last_start_ = 0, first_stop_ = 0;  // all rows may attend to keys between them, masks aside
  const std::int64_t slab_width_, query_width_;   // of a packed query row
  const T* keys_ = nullptr;                       // of the tile
  StoredReader<T> key_reader_;
  Form form_[most_rows];
  typename Simd<T>::Bits query_largest_[most_rows], weight_largest_ = 0;
  const T* prepared_ = nullptr;    // weights
  T normaliser_ = 1, factor_ = 1;  // of the weights; of scores of normalised weights
  bool scale_last_ = false;        // the scale is not part of factor_
  PreparedQueries<T> single_queries_;
  LocatedKeys<T> located_;
  Matching<T> matching_;
  bool matching_known_ = false;
  double norm_ = 0, rounding_ = 0;  // of the normalised weights; of scores by a rounding of every tanh
  Cancellation<T> cancellation_;
  Kept kept_ = Kept::all;                                // by the block table, of the tile
  T* bias_rows_ = nullptr;                               // the mask's terms of the tile, [row][key]
  std::int64_t first_key_ = 0, computed_ = 0;            // of the tile; the first row of the scores
  bool block_attended_[tile_blocks], form_used_[forms];  // of the tile, by any row
  bool query_packed_[forms] = {};
  Buffer<T> query_[forms], key_[forms], weight_, bias_, scores_;
};
