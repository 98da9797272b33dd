// The masked scores of a block of query rows, one tile of keys after the other: what forward and backward share.

constexpr int most_rows = 128;   // query rows of a block

// Fewer rows than most_rows where that is needed to keep every thread busy.
inline std::int64_t rows_per_block(std::int64_t batch, std::int64_t queries, int threads) {
  std::int64_t rows = std::min<std::int64_t>(most_rows, std::max<std::int64_t>(queries, 1));
  while (rows > 16 && batch * ((queries + rows - 1) / rows) < 4 * threads) rows /= 2;
  return rows;
}

template <class T>
void prefetch(const T* row, std::int64_t columns) {
  for (std::int64_t c = 0; c < columns; c += 64 / sizeof(T)) __builtin_prefetch(row + c);
}

template <class T>
class ScoreBlock {
 public:
  static constexpr int K = block_keys<T>, TK = tile_keys<T>;

  explicit ScoreBlock(const Problem<T>& problem) : p(problem), features(round_up(problem.hidden, group)) {}

  // Begins with rows [first_row, first_row + count) of batch entry n.
  void begin(std::int64_t n, std::int64_t first_row, std::int64_t count) {
    entry = n;
    row0 = first_row;
    rows = count;
    first = p.keys;
    last = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t i = row0 + r;
      std::int64_t low = 0, high = p.keys;
      if (p.left >= 0) low = std::max<std::int64_t>(low, i - p.left);
      if (p.right >= 0 && p.right < high - i - 1) high = i + p.right + 1;
      if (p.lengths) high = std::min(high, *p.lengths.at(n, i));
      start[r] = low;
      stop[r] = std::max(low, high);
      if (low < high) {
        first = std::min(first, low);
        last = std::max(last, high);
      }
      query_largest[r] = largest(p.query.at(n, i), p.hidden);
    }
    const T* w = p.weight.at(n, 0);
    weight_largest = largest(w, p.hidden);
    normaliser = weight_normaliser(w, p.hidden);
    T* c = centre_.get(features / features_summed + 1);
    for (std::int64_t h0 = 0; h0 < p.hidden; h0 += features_summed) {
      double sum = 0;
      for (std::int64_t h = h0; h < std::min<std::int64_t>(p.hidden, h0 + features_summed); ++h) sum += w[h] * normaliser;
      c[h0 / features_summed] = T(sum / 2);
    }
    if (p.queries == 1) {
      T* to = weight_.get(p.hidden);
      for (std::int64_t h = 0; h < p.hidden; ++h) to[h] = w[h] * normaliser;
    }
    for (bool& b : query_packed_) b = false;
    scores = scores_.get(rows * TK);
  }

  // Computes scale * score + mask for keys [key0, key0 + TK) into scores[row * TK + key - key0], -Inf where a key is
  // masked or beyond the last. Returns false, and computes nothing, if no row may attend to any of them.
  bool tile(std::int64_t key0) {
    count = std::min<std::int64_t>(TK, p.keys - key0);
    bool block_used[tile_blocks] = {};
    complete = true;
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t low = std::max(start[r], key0) - key0, high = std::min(stop[r], key0 + count) - key0;
      T* bias = nullptr;
      if (p.mask.type != MaskType::none && low < high) {
        bias = bias_.get(rows * TK) + r * TK;
        load_mask(p.mask, entry, row0 + r, key0 + low, high - low, bias + low);
      }
      complete = complete && low == 0 && high == count && !bias;
      for (int b = 0; b < tile_blocks; ++b) {
        const std::int64_t from = std::max<std::int64_t>(low, b * K), to = std::min<std::int64_t>(high, (b + 1) * K);
        bool any = from < to;
        if (any && bias) {
          any = false;
          for (std::int64_t j = from; j < to; ++j) any = any || bias[j] != T(-INFINITY);
        }
        active[r][b] = any;
        block_used[b] = block_used[b] || any;
      }
    }
    if (!(block_used[0] || block_used[1] || block_used[2] || block_used[3])) return false;

    if (p.queries == 1) {
      form[0] = direct;
      for (std::int64_t j = 0; j < count; ++j) {
        if (!active[0][j / K]) continue;
        // Memory would wait for arithmetic here, and arithmetic for memory at the values: these come in meanwhile.
        prefetch(p.value.at(entry, key0 + j), p.values);
        scores[j] = energy(p.query.at(entry, row0), p.key.at(entry, key0 + j), weight_.get(0), p.hidden);
      }
      finish_row(0, key0);
      return true;
    }

    typename Simd<T>::Bits key_largest[TK], tile_largest = 0;
    for (std::int64_t j = 0; j < count; ++j) {
      key_largest[j] = largest(p.key.at(entry, key0 + j), p.hidden);
      tile_largest = std::max(tile_largest, key_largest[j]);
    }
    bool form_used[forms] = {};
    for (std::int64_t r = 0; r < rows; ++r) {
      auto most = tile_largest;
      if (!complete) {  // what a masked key holds must not matter, not even to the form
        most = 0;
        for (std::int64_t j = 0; j < count; ++j)
          if (!masked(r, key0 + j, key0)) most = std::max(most, key_largest[j]);
      }
      form[r] = choose_form<T>(query_largest[r], most, weight_largest, p.hidden);
      form_used[form[r]] = true;
    }
    for (Form f : {centred, difference, factored, direct})
      if (form_used[f]) pack(f, key0, block_used);

    for (std::int64_t h0 = 0; h0 < std::max<std::int64_t>(features, 1); h0 += features_cached) {
      const std::int64_t groups = std::min<std::int64_t>(features - h0, features_cached) / group;
      for (int b = 0; b < tile_blocks; ++b)
        for (std::int64_t r = 0; r < rows; ++r) {
          if (!active[r][b]) continue;
          T* s = scores + r * TK + b * K;
          if (h0 == 0) std::memset(s, 0, K * sizeof(T));
          add(form[r], r, b, h0, groups, s);
        }
    }
    for (std::int64_t r = 0; r < rows; ++r) finish_row(r, key0);
    return true;
  }

  bool masked(std::int64_t r, std::int64_t j, std::int64_t key0) const {
    return j < start[r] || j >= stop[r] ||
           (p.mask.type != MaskType::none && bias_memory()[r * TK + j - key0] == T(-INFINITY));
  }

  const Problem<T>& p;
  const std::int64_t features;
  std::int64_t entry = 0, row0 = 0, rows = 0;
  std::int64_t first = 0, last = 0;                    // keys that any row may attend to, masks aside
  std::int64_t start[most_rows], stop[most_rows];      // keys that each row may attend to, masks aside
  std::int64_t count = 0;                              // keys of the tile
  bool complete = false;                               // no key of the tile is masked for any row
  bool active[most_rows][tile_blocks];                 // blocks with an unmasked key
  T* scores = nullptr;

 private:
  const T* bias_memory() const { return const_cast<Buffer<T>&>(bias_).get(0); }

  void pack(Form f, std::int64_t key0, const bool* block_used) {
    const std::int64_t width = features * constants(f);
    if (!query_packed_[f]) {
      T* to = query_[f].get(rows * width);
      for (std::int64_t r = 0; r < rows; ++r)
        pack_query(f, p.query.at(entry, row0 + r), p.weight.at(entry, 0), normaliser, p.hidden, to + r * width);
      query_packed_[f] = true;
    }
    T* to = key_[f].get(features * TK);
    for (int b = 0; b < tile_blocks; ++b)
      if (block_used[b])
        pack_keys(f, p.key.at(entry, key0 + b * K), p.key.row, std::min<std::int64_t>(K, count - b * K), p.hidden,
                  to + b * K * features);
  }

  void add(Form f, std::int64_t r, int b, std::int64_t h0, std::int64_t groups, T* s) {
    const T* q = query_[f].get(0) + (r * features + h0) * constants(f);
    const T* k = key_[f].get(0) + (b * features + h0) * K;
    const T* c = centre_.get(0) + h0 / features_summed;
    if (f == centred) return add_energies<T, centred>(q, k, groups, c, s);
    if (f == difference) return add_energies<T, difference>(q, k, groups, c, s);
    if (f == factored) return add_energies<T, factored>(q, k, groups, c, s);
    add_energies<T, direct>(q, k, groups, c, s);
  }

  void finish_row(std::int64_t r, std::int64_t key0) {
    const T factor = (form[r] == factored ? T(-2) : T(1)) * p.scale / normaliser;
    const std::int64_t low = start[r] - key0, high = std::min(stop[r], key0 + count) - key0;
    const T* bias = p.mask.type == MaskType::none ? nullptr : bias_.get(0) + r * TK;
    for (int b = 0; b < tile_blocks; ++b) {
      T* s = scores + r * TK + b * K;
      if (!active[r][b]) {
        for (int j = 0; j < K; ++j) s[j] = T(-INFINITY);
        continue;
      }
      for (int j = 0; j < K; ++j) s[j] *= factor;
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

  Form form[most_rows];
  typename Simd<T>::Bits query_largest[most_rows], weight_largest = 0;
  T normaliser = 1;
  bool query_packed_[forms] = {};
  Buffer<T> query_[forms], key_[forms], weight_, centre_, bias_, scores_;
};
