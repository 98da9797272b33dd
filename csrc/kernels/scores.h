// The masked scores of a block of query rows, one tile of keys after the other: what forward and backward share.

// Fewer rows than most_rows where that is needed to keep every thread busy.
inline std::int64_t rows_per_block(std::int64_t batch, std::int64_t queries, int threads) {
  std::int64_t rows = std::min<std::int64_t>(most_rows, std::max<std::int64_t>(queries, 1));
  while (rows > 16 && batch * ((queries + rows - 1) / rows) < 4 * threads) rows /= 2;
  return rows;
}

constexpr double most_bound = 16;  // of scores whose exponentials need no maximum taken off

template <class T>
class ScoreBlock {
 public:
  static constexpr int K = block_keys<T>, TK = tile_keys<T>;

  // With `sharing` above 1, so many entries of one query each have the same keys, values and weight: they are the rows
  // of a block, whose number `begin` takes as the entry.
  explicit ScoreBlock(const Problem<T>& problem, std::int64_t sharing = 1)
      : p(problem),
        sharing(sharing),
        features(round_up(problem.hidden, group)),
        slab(std::min<std::int64_t>(features, features_cached)),
        located_(problem.key, problem.location, problem.hidden) {}

  // Begins with rows [first_row, first_row + count) of entry n.
  void begin(std::int64_t n, std::int64_t first_row, std::int64_t count) {
    entry = n * sharing;
    row0 = first_row;
    rows = count;
    first = p.keys;
    last = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      key_range(p, entry_of(r), row_of(r), start[r], stop[r]);
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
    scores = scores_.get(rows * TK);
  }

  // Computes scale * score + mask for keys [key0, key0 + TK) into scores[row * TK + key - key0], -Inf where a key is
  // masked or beyond the last. Returns false, and computes nothing, if every key is masked for every row.
  bool tile(std::int64_t key0) {
    bool block_attended[tile_blocks] = {};
    count = std::min<std::int64_t>(TK, p.keys - key0);
    kept_ = p.blocks ? kept_pairs(p.blocks, entry, row0, rows, key0, count) : Kept::all;
    if (kept_ == Kept::none) return false;
    find_attended(key0, block_attended);
    if (!(block_attended[0] || block_attended[1] || block_attended[2] || block_attended[3])) return false;
    if (p.queries == 1) {
      p.location ? located_row(key0) : single_rows(key0);
      return true;
    }
    bool form_used[forms] = {};
    keys_ = key_reader_.read(p.key, entry, key0, count, p.hidden);
    choose_forms(key0, form_used);
    for (const Form f : {centred, difference, matched, direct})
      if (form_used[f] && !query_packed_[f]) pack_queries(f);
    for (std::int64_t h0 = 0; h0 < std::max<std::int64_t>(features, 1); h0 += features_cached) {
      const std::int64_t groups = std::min(features - h0, slab) / group;
      for (int b = 0; b < tile_blocks; ++b) {
        if (!block_attended[b]) continue;
        for (const Form f : {centred, difference, matched, direct})
          if (form_used[f]) pack_block(f, b, h0);
        for (std::int64_t r = 0; r < rows; ++r) {
          if (!attended[r][b]) continue;
          T* s = scores + r * TK + b * K;
          if (h0 == 0) std::memset(s, 0, K * sizeof(T));
          add(form_[r], r, h0, groups, s);
        }
      }
    }
    for (std::int64_t r = 0; r < rows; ++r)
      if (reached[r])
        finish_row(r, key0);
      else
        std::fill(scores + r * TK, scores + (r + 1) * TK, T(-INFINITY));
    return true;
  }

  // Is key j masked for row r? `masked` answers for the present tile, which begins at key0, `attends` for any key.
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
  T* scores = nullptr;

 private:
  void prepare_weight() {
    const T* w = prepared_ = p.weight.at(entry, 0);
    weight_largest_ = largest(w, p.hidden);
    normaliser_ = weight_normaliser(w, p.hidden);
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
  void find_attended(std::int64_t key0, bool* block_attended) {
    complete = true;
    bias_rows_ = p.mask.type == MaskType::none && kept_ == Kept::all ? nullptr : bias_.get(rows * TK);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t low = std::max(start[r], key0) - key0, high = std::min(stop[r], key0 + count) - key0;
      const T* bias = nullptr;
      if (bias_rows_ && low < high) {
        load_terms(p, entry_of(r), row_of(r), key0 + low, high - low, bias_rows_ + r * TK + low);
        bias = bias_rows_ + r * TK;
      }
      complete = complete && low == 0 && high == count && !bias;
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
        block_attended[b] = block_attended[b] || any;
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
          single_queries_.scores(p, entry, key0 + j, r, end - r, value, scores + r * TK + j, TK);
        else
          ++end;
        r = end;
      }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      form_[r] = direct;
      finish_row(r, key0);
    }
  }

  // A single row where keys have a location term. Meanwhile the values are fetched, and the keys to come: those of the
  // next tile where a tile is read at once. Memory that is asked for in one burst is waited for.
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
        scores[i] = one ? energy<T, true>(query, rows, weight_.get(0), p.hidden, located_.x[i - j], located_.weight,
                                          &value, &key)
                        : energy<T>(query, rows, weight_.get(0), p.hidden, 0, nullptr, &value, &key);
      }
    }
    finish_row(0, key0);
  }

  struct Attended {  // (not a lambda, which would not be compiled for the instruction set everywhere)
    const ScoreBlock& s;
    std::int64_t r, key0;
    bool operator()(std::int64_t j) const { return s.complete || !s.masked(r, key0 + j, key0); }
    std::int64_t first() const { return std::max<std::int64_t>(s.start[r] - key0, 0); }
    std::int64_t last() const { return std::min(s.stop[r] - key0, s.count) - 1; }
  };

  // The form of each row. A masked key must not matter, not even to the form.
  void choose_forms(std::int64_t key0, bool* form_used) {
    typename Simd<T>::Bits key_largest[TK], tile_largest = 0;
    cancellation_.tile(keys_, key_reader_.row, count, key_largest);
    for (std::int64_t j = 0; j < count; ++j) {
      key_largest[j] = largest(keys_ + j * key_reader_.row, p.hidden);
      tile_largest = std::max(tile_largest, key_largest[j]);
      cancellation_.take_key(j);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      if (!reached[r]) continue;
      const Attended attends{*this, r, key0};
      auto most = tile_largest;
      if (!complete) {
        most = 0;
        for (std::int64_t j = attends.first(); j <= attends.last(); ++j)
          if (!bias_rows_ || attends(j)) most = std::max(most, key_largest[j]);
      }
      form_[r] = choose_form<T>(query_largest_[r], most, weight_largest_, p.hidden);
      form_[r] = cancellation_.row_form(form_[r], r, p.query.at(entry, row0 + r), query_largest_[r],
                                        std::max(query_largest_[r], most), attends);
      form_used[form_[r]] = true;
    }
  }

  void pack_queries(Form f) {
    if (f == matched && !matching_known_) {
      matching_.begin(weight_.get(0), p.hidden, norm_, rounding_ > rounding_of_softmax);
      matching_known_ = true;
    }
    const std::int64_t width = f == matched ? matching_.width : features * constants(f);
    T* to = query_[f].get(rows * width);
    for (std::int64_t r = 0; r < rows; ++r, to += width)
      if (f == matched)
        matching_.pack_query(p.query.at(entry, row0 + r), to);
      else
        pack_query(f, p.query.at(entry, row0 + r), weight_.get(0), p.hidden, to);
    query_packed_[f] = true;
  }

  // Features [h0, h0 + slab) of a block of keys, which then are in the first-level cache.
  void pack_block(Form f, int b, std::int64_t h0) {
    const T* k = keys_ + b * K * key_reader_.row + h0;
    const std::int64_t keys = std::min<std::int64_t>(K, count - b * K), some = std::min(p.hidden - h0, slab);
    if (f == matched)
      matching_.pack_keys(k, key_reader_.row, keys, some, h0 / features_cached, key_[f].get(matching_.key_width()));
    else
      pack_keys(f, k, key_reader_.row, keys, some, key_[f].get(K * slab));
  }

  void add(Form f, std::int64_t r, std::int64_t h0, std::int64_t groups, T* s) {
    const T* k = key_[f].get(0);
    if (f == matched) {
      const std::int64_t i = h0 / features_cached;
      return add_matched(query_[f].get(0) + r * matching_.width + matching_.place(i), k, matching_.groups(i), s);
    }
    const T* q = query_[f].get(0) + (r * features + h0) * constants(f);
    if (f == centred) return add_energies<T, centred>(q, k, groups, s);
    if (f == difference) return add_energies<T, difference>(q, k, groups, s);
    add_energies<T, direct>(q, k, groups, s);
  }

  void finish_row(std::int64_t r, std::int64_t key0) {
    const T unit = T(1) / normaliser_;
    // Together they may overflow although neither does with the energy.
    const bool together = std::isnormal(unit * p.scale);
    const T factor = together ? unit * p.scale : unit;
    const std::int64_t low = start[r] - key0, high = std::min(stop[r], key0 + count) - key0;
    const T* bias = bias_rows_ ? bias_rows_ + r * TK : nullptr;
    for (int b = 0; b < tile_blocks; ++b) {
      T* s = scores + r * TK + b * K;
      if (!attended[r][b]) {
        for (int j = 0; j < K; ++j) s[j] = T(-INFINITY);
        continue;
      }
      for (int j = 0; j < K; ++j) s[j] *= factor;
      for (int j = 0; j < K && !together; ++j) s[j] *= p.scale;
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

  const T* keys_ = nullptr;  // of the tile
  StoredReader<T> key_reader_;
  Form form_[most_rows];
  typename Simd<T>::Bits query_largest_[most_rows], weight_largest_ = 0;
  const T* prepared_ = nullptr;  // weights
  T normaliser_ = 1;
  PreparedQueries<T> single_queries_;
  LocatedKeys<T> located_;
  Matching<T> matching_;
  bool matching_known_ = false;
  double norm_ = 0, rounding_ = 0;  // of the normalised weights; of scores by a rounding of every tanh
  Cancellation<T> cancellation_;
  Kept kept_ = Kept::all;   // by the block table, of the tile
  T* bias_rows_ = nullptr;  // the mask's terms of the tile, [row][key]
  bool query_packed_[forms] = {};
  Buffer<T> query_[forms], key_[forms], weight_, bias_, scores_;
};
