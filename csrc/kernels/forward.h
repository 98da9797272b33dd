// out_i = sum_j p_ij value_j with an online softmax over tiles of keys (Milakov and Gimelshein 2018; Rabe and Staats
// 2021). Few query rows leave threads idle: then the keys are split too, and the parts are merged by their lse, in
// order.

constexpr std::int64_t values_widened = 16;  // keys whose values are widened at a time
constexpr std::int64_t tasks_wanted = 64;    // split the keys when there are fewer blocks of rows than this...
constexpr std::int64_t split_keys = 2048;    // ...but into no shorter pieces than this

// The ranges of keys that blocks of rows are split into. Their number determines the order of additions, so it
// depends on the shape alone.
template <class T>
struct KeySplits {
  std::int64_t keys, splits = 1, split;

  KeySplits(std::int64_t row_blocks, std::int64_t keys) : keys(keys), split(std::max<std::int64_t>(keys, 1)) {
    if (row_blocks <= 0 || row_blocks >= tasks_wanted) return;
    splits = std::max<std::int64_t>(1, std::min(tasks_wanted / row_blocks, keys / split_keys));
    split = round_up((split + splits - 1) / splits, tile_keys<T>);
    splits = std::max<std::int64_t>(1, (keys + split - 1) / split);
  }
  std::int64_t begin(std::int64_t k) const { return k * split; }
  std::int64_t end(std::int64_t k) const { return std::min((k + 1) * split, keys); }
};

// Values are summed with weights below 2^-k, 2^k >= Lk: a sum overflows only if it does with the normalised weights.
inline int value_bits(std::int64_t keys) { return int(std::ceil(std::log2(double(std::max<std::int64_t>(keys, 1))))); }

// One block of rows over one range of keys: unnormalised out, running maximum and running sum. A row whose attended
// scores are all -Inf has a sum of 1, an empty row one of 0. Where energy weights bound the scores, the maximum is 0.
template <class T>
class ForwardBlock {
 public:
  static constexpr int K = block_keys<T>, TK = tile_keys<T>;

  ForwardBlock(const Forward<T>& problem, std::int64_t sharing, bool bounded)
      : p(problem), width(round_up(problem.values, panel_columns<T>)), bounded(bounded), s(problem, sharing) {}

  void run(std::int64_t n, std::int64_t row0, std::int64_t rows, std::int64_t key_begin, std::int64_t key_end, T* out,
           T* maximum, double* sum) {
    s.begin(n, row0, rows);
    bits = bounded && s.bound_bits > 0 ? s.bound_bits + value_bits(p.keys) : 0;
    std::fill(out, out + rows * width, T(0));
    for (std::int64_t r = 0; r < rows; ++r) {
      maximum[r] = T(-INFINITY);
      sum[r] = 0;
    }
    key_begin = std::max(key_begin, s.first / TK * TK);
    key_end = std::min(key_end, s.last);
    for (std::int64_t key0 = key_begin; key0 < key_end; key0 += TK) {
      if (!s.tile(key0)) continue;
      for (std::int64_t r = 0, end; r < rows; r = end) {
        end = s.compute(r);
        if (r == 0) read_values(key0);
        for (std::int64_t i = r; i < end && p.weights; ++i)
          if (s.reached[i]) keep_scores(i, key0, s.row(i));
        if (bits > 0) bounded_rows(r, end, maximum, sum);
        for (std::int64_t i = r; i < end; ++i)
          if (!s.reached[i])
            std::fill(s.row(i), s.row(i) + TK, T(0));
          else if (bits == 0)
            softmax_row(i, out + i * width, maximum[i], sum[i]);
        for (std::int64_t i = r; i < end && p.seed; ++i)
          if (s.reached[i]) drop(i, key0, s.row(i));
        add_values(key0, r, end, out);
      }
    }
  }

  const Forward<T>& p;
  const std::int64_t width;
  int bits = 0;  // above 0: no maximum is computed, and the sums are those of e^score 2^-bits

 private:
  const bool bounded;  // rows of several tiles, not split: bounds may replace maxima
  const T scale_of_values = std::ldexp(T(1), -value_bits(p.keys));

  // Replaces the scores of rows [begin, end) by their exponentials, without a maximum.
  void bounded_rows(std::int64_t begin, std::int64_t end, T* maximum, double* sum_) {
    constexpr int L = lanes<T>;
    const bool masked = !s.complete || s.count % L != 0;
    const std::int64_t last = round_up(s.count, L);  // scores beyond the last key are -Inf
    const int less = bits;                           // a member would be read again for every vector
    for (std::int64_t r = begin; r < end; ++r) {
      if (!s.reached[r]) continue;
      T* row = s.row(r);
      Vec<T> total = {};
      for (std::int64_t j = 0; j < last; j += L) {
        const Vec<T> x = load(row + j), e = exp_in_range<T>(x, less);
        const Vec<T> attended = masked ? (x == T(-INFINITY) ? (Vec<T>){} : e) : e;
        total += attended;
        store(row + j, attended);
      }
      maximum[r] = 0;
      sum_[r] += sum<T>(total);
    }
  }

  void softmax_row(std::int64_t r, T* out, T& maximum, double& sum_) {
    constexpr int L = lanes<T>;
    T* row = s.row(r);
    const int end = int(round_up(s.count, L));  // scores beyond the last key are -Inf
    Vec<T> most = load(row);
    for (int j = L; j < end; j += L) {
      const Vec<T> x = load(row + j);
      most = x > most ? x : most;
    }
    T m = maximum;
    for (int l = 0; l < L; ++l) m = most[l] > m ? most[l] : m;
    const T shift = m == T(-INFINITY) ? T(0) : m;
    if (m != maximum) {
      const T shrink = std::exp(maximum - shift);
      for (std::int64_t d = 0; d < width; d += L) store(out + d, load(out + d) * shrink);
      sum_ *= shrink;
      maximum = m;
    }
    Vec<T> total = {};
    for (int j = 0; j < end; j += L) {
      const Vec<T> e = exp<T>(load(row + j) - shift);
      total += e;
      store(row + j, e * scale_of_values);
    }
    sum_ += sum<T>(total);
    if (s.may_overflow && m == T(-INFINITY) && sum_ == 0)
      for (const bool any : s.attended[r]) sum_ = any ? 1 : sum_;
  }

  void drop(std::int64_t r, std::int64_t key0, T* row) const {
    T keep[TK];
    dropout_factors(p, s.entry_of(r), s.row_of(r), key0, keep);
    for (std::int64_t j = 0; j < s.count; j += lanes<T>) store(row + j, load(row + j) * load(keep + j));
  }

  // Stores the scores in `weights` until the row's lse is known; an attended -Inf as NaN, to distinguish it from a
  // masked one.
  void keep_scores(std::int64_t r, std::int64_t key0, const T* row) {
    T* to = p.weights + ((s.entry_of(r) * p.queries + s.row_of(r)) * p.keys + key0);
    std::memcpy(to, row, s.count * sizeof(T));
    for (std::int64_t j = 0; j < s.count && s.may_overflow; ++j)
      if (row[j] == T(-INFINITY) && !s.masked(r, key0 + j, key0)) to[j] = T(NAN);
  }

  // Reads the values of a tile in the layout that add_values uses.
  void read_values(std::int64_t key0) {
    narrow = s.complete && p.queries < gemm_row_block && p.value.storage != Storage::computed;
    if (p.values == 0 || narrow) return;
    v = reader.read(p.value, s.entry, key0, s.count, p.values);
    shielding = !s.complete && !all_finite(v, reader.row, s.count, p.values);
    if (!shielding && p.queries >= gemm_row_block) v = pack_panels(v, reader.row, s.count, p.values, panels);
  }

  void add_values(std::int64_t key0, std::int64_t begin, std::int64_t end, T* out) {
    if (p.values == 0) return;
    if (narrow) return add_narrow(key0, out);
    if (!shielding) return add_rows(begin, end - begin, v, reader.row, out);
    // 0 * NaN is NaN: each row reads a copy in which the values of its masked keys are 0, and is summed like others.
    for (std::int64_t r = begin; r < end; ++r) {
      T* copy = shielded.get(s.count * p.values);
      for (std::int64_t j = 0; j < s.count; ++j)
        for (std::int64_t d = 0; d < p.values; ++d)
          copy[j * p.values + d] = s.masked(r, key0 + j, key0) ? T(0) : v[j * reader.row + d];
      const bool packs = p.queries >= gemm_row_block;
      add_rows(r, 1, packs ? pack_panels(copy, p.values, s.count, p.values, panels) : copy, p.values, out);
    }
  }

  // The same for few rows and a complete tile of values in 16 bits. They are widened in registers, or, where Dv is no
  // multiple of a vector, into a copy in the cache.
  void add_narrow(std::int64_t key0, T* out) {
    T* tile = p.keys <= TK ? out : sums.get(s.rows * width);
    if (tile != out) std::fill(tile, tile + s.rows * width, T(0));
    const bool widened = p.values % lanes<T> != 0;
    for (std::int64_t j = 0; j < s.count; j += values_widened) {
      const std::int64_t count = std::min(values_widened, s.count - j);
      if constexpr (sizeof(T) == 4) {
        const auto* v = static_cast<const std::uint16_t*>(p.value.at(s.entry, key0 + j));
        if (!widened && p.value.storage == Storage::bfloat16)
          gemv<Storage::bfloat16>(s.row(0) + j, TK, v, p.value.row, tile, width, s.rows, p.values, count);
        else if (!widened)
          gemv<Storage::float16>(s.row(0) + j, TK, v, p.value.row, tile, width, s.rows, p.values, count);
      }
      if (!widened) continue;
      const T* v = reader.read(p.value, s.entry, key0 + j, count, p.values);
      gemv<Storage::computed>(s.row(0) + j, TK, v, reader.row, tile, width, s.rows, p.values, count);
    }
    for (std::int64_t d = 0; d < s.rows * width && tile != out; d += lanes<T>)
      store(out + d, load(out + d) + load(tile + d));
  }

  // Adds P V of rows [first, first + rows) of the tile. Each tile is summed apart: long sums in one float lose digits.
  void add_rows(std::int64_t first, std::int64_t rows, const T* v, std::int64_t v_row, T* out) {
    if (p.queries < gemm_row_block) {  // not `rows`: no order of additions may depend on the number of threads
      const auto [from, to] = attended_keys(first, rows);
      const bool only = p.keys <= TK;
      T *total = out + first * width, *tile = only ? total : sums.get(rows * width);
      if (!only) std::fill(tile, tile + rows * width, T(0));
      gemv<Storage::computed>(s.row(first) + from, TK, v + from * v_row, v_row, tile, width, rows, p.values, to - from);
      for (std::int64_t d = 0; d < rows * width && !only; d += lanes<T>)
        store(total + d, load(total + d) + load(tile + d));
      return;
    }
    for (std::int64_t r = first; r < first + rows; r += gemm_row_block) {
      const std::int64_t some = std::min<std::int64_t>(gemm_row_block, first + rows - r);
      if (const auto [from, to] = attended_keys(r, some); from < to)
        gemm<T>(s.row(r) + from, TK, 1, v + from * panel_columns<T>, s.count * panel_columns<T>, out + r * width, width,
                some, p.values, to - from);
    }
  }

  // The keys of the tile, in whole blocks, that some of these rows attend to lie within [first, second).
  std::pair<std::int64_t, std::int64_t> attended_keys(std::int64_t row, std::int64_t rows) const {
    std::int64_t from = s.count, to = 0;
    for (std::int64_t b = 0; b < tile_blocks; ++b)
      for (std::int64_t r = row; r < row + rows; ++r)
        if (s.attended[r][b]) {
          from = std::min(from, b * K);
          to = std::min<std::int64_t>((b + 1) * K, s.count);
        }
    return {from, to};
  }

  ScoreBlock<T> s;
  const T* v = nullptr;                    // the tile's values, in panels where gemm reads them
  bool narrow = false, shielding = false;  // values are read in 16 bits; from copies
  Buffer<T> panels, shielded, sums;
  StoredReader<T> reader;
};

// Writes the results of row `at` of all; `out` has been summed over all keys.
template <class T>
void write_row(const Forward<T>& p, std::int64_t at, const T* out, T maximum, double sum, int bits = 0) {
  constexpr int L = lanes<T>;
  const bool none = maximum == T(-INFINITY), empty = none && sum == 0;
  const T inverse = empty ? T(0) : none ? T(NAN) : T(std::ldexp(1 / sum, -bits));
  const int scaled = bits > 0 ? 0 : value_bits(p.keys);  // `out` is scaled, the sum is not
  const T share = empty ? T(0) : none ? T(NAN) : T(std::ldexp(1 / sum, scaled));
  p.lse[at] = empty ? T(-INFINITY) : T(double(maximum) + std::log(std::ldexp(sum, bits)));
  for (std::int64_t d = 0; d < p.values; d += L)
    store_part<T>(p.out + at * p.values + d, load(out + d) * share, p.values - d);
  if (!p.weights) return;
  T* w = p.weights + at * p.keys;
  const T shift = none ? T(0) : maximum;
  const bool regular = !none && sum == sum;  // then NaN among the scores is an attended -Inf
  for (std::int64_t j = 0; j < p.keys; j += L) {
    const Vec<T> x = load_part<T>(w + j, p.keys - j, T(-INFINITY));
    Vec<T> e = exp<T>(x - shift) * inverse;
    if (regular) e = x == x ? e : (Vec<T>){};
    store_part<T>(w + j, x == T(-INFINITY) ? (Vec<T>){} : e, p.keys - j);
  }
}

// How many consecutive entries share keys, values and weight, as the beams of a sequence do: these are then read once
// for all of them.
template <class T>
std::int64_t entries_sharing(const Forward<T>& p) {
  if (p.queries != 1 || p.location || p.blocks || p.batch < 2) return 1;
  std::int64_t sharing = p.batch;
  for (const std::int64_t* offset : {p.key.offset, p.value.offset, p.weight.offset, p.prepared.offset}) {
    if (!offset) continue;
    std::int64_t same = 1;  // entries up to the first that differs
    while (same < sharing && offset[same] == offset[0]) ++same;
    sharing = same;
  }
  if (sharing == 1 || p.batch % sharing != 0) return 1;
  for (const std::int64_t* offset : {p.key.offset, p.value.offset, p.weight.offset, p.prepared.offset})
    for (std::int64_t n = 0; offset && n < p.batch; ++n)
      if (offset[n] != offset[n / sharing * sharing]) return 1;
  return sharing;
}

template <class T>
void forward(const Forward<T>& p, const ParallelFor& parallel_for) {
  const std::int64_t sharing = entries_sharing(p), queries = p.queries * sharing, batch = p.batch / sharing;
  const std::int64_t width = round_up(p.values, panel_columns<T>);
  const KeySplits<T> keys(p.batch * ((p.queries + usual_rows - 1) / usual_rows), p.keys);
  const std::int64_t splits = keys.splits;
  std::int64_t rows = rows_per_block(p, batch, queries);
  while (sharing > 1 && rows > 1 && batch * splits * ((queries + rows - 1) / rows) < p.threads) rows = (rows + 1) / 2;
  const std::int64_t blocks = (queries + rows - 1) / rows;
  if (p.weights)
    for (std::int64_t x = 0; x < p.batch * p.queries * p.keys; ++x) p.weights[x] = T(-INFINITY);

  // Per (split, batch entry, row): out, maximum, sum. Only split keys need the memory beyond one block.
  const std::int64_t all_rows = p.batch * p.queries;
  Buffer<T> part_out, part_maximum;
  Buffer<double> part_sum;
  if (splits > 1) {
    part_out.get(splits * all_rows * width);
    part_maximum.get(splits * all_rows);
    part_sum.get(splits * all_rows);
  }
  const std::int64_t work = rows * keys.split * (p.hidden + p.values + 16);
  parallel_for(batch * blocks * splits, work, [&](Tasks& tasks) {
    ForwardBlock<T> block(p, sharing, splits == 1 && p.keys > tile_keys<T>);
    Buffer<T> own_out;
    T own_maximum[most_rows];
    double own_sum[most_rows];
    for (std::int64_t task; tasks.take(task);) {
      const std::int64_t k = task % splits, b = task / splits % blocks, n = task / splits / blocks;
      const std::int64_t row0 = b * rows, count = std::min(rows, queries - row0), first = n * queries + row0;
      const std::int64_t at = k * all_rows + first;
      T* out = splits > 1 ? part_out.get(0) + at * width : own_out.get(rows * width);
      T* maximum = splits > 1 ? part_maximum.get(0) + at : own_maximum;
      double* sum = splits > 1 ? part_sum.get(0) + at : own_sum;
      block.run(n, row0, count, keys.begin(k), keys.end(k), out, maximum, sum);
      if (splits == 1)
        for (std::int64_t r = 0; r < count; ++r)
          write_row(p, first + r, out + r * width, maximum[r], sum[r], block.bits);
    }
  });
  if (splits == 1) return;
  parallel_for(all_rows, splits * width, [&](Tasks& tasks) {
    Buffer<T> memory;
    T* out = memory.get(width);
    for (std::int64_t at; tasks.take(at);) {
      T maximum = T(-INFINITY);
      double total = 0;
      for (std::int64_t k = 0; k < splits; ++k) {
        const T m = part_maximum.get(0)[k * all_rows + at];
        maximum = m > maximum ? m : maximum;
      }
      std::fill(out, out + width, T(0));
      for (std::int64_t k = 0; k < splits; ++k) {
        const T factor = maximum == T(-INFINITY) ? T(1) : std::exp(part_maximum.get(0)[k * all_rows + at] - maximum);
        total += part_sum.get(0)[k * all_rows + at] * factor;
        const T* from = part_out.get(0) + (k * all_rows + at) * width;
        for (std::int64_t d = 0; d < width; ++d) out[d] += from[d] * factor;
      }
      write_row(p, at, out, maximum, total);
    }
  });
}
