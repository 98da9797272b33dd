// P and G of a bounded number of rows, kept for the keys that the rows may attend to.

constexpr std::int64_t workspace_elements = std::int64_t(1) << 21;  // most of P, and as many of G
constexpr std::int64_t cached_elements = workspace_elements / 4;    // least, where keys are few: caches hold them
constexpr std::int64_t piece_rows = 256;                            // between these limits: each piece reads all keys
constexpr std::int64_t most_piece_rows = 8192;
constexpr std::int64_t most_places = std::int64_t(1) << 18;  // of the strips of all groups
constexpr std::int64_t strip_keys = 128;
constexpr int group_rows = 128;

// A piece: rows [row0, row0 + rows) of the entries [entry0, entry0 + entries). group_rows rows of an entry are a group,
// which keeps the strips of keys that some of its rows may attend to by intervals and block table, one after the other.
template <class T>
class Workspace {
 public:
  static constexpr int K = block_keys<T>, W = strip_keys;
  static_assert(W % tile_keys<T> == 0, "a tile lies in one strip");

  explicit Workspace(const Problem<T>& problem, bool given)
      : p(problem),
        strips((p.keys + W - 1) / W),
        budget_(std::max(std::clamp(piece_rows * strips * W, cached_elements, workspace_elements), 16 * strips * W)),
        most_rows_(std::max(most_piece_rows, budget_ / (strips * W))),
        most_groups_(std::min({most_rows_, std::max<std::int64_t>(16, most_places / strips),
                               p.batch * ((p.queries + group_rows - 1) / group_rows)})),
        given_(given),
        group_(groups_.get(most_groups_)),
        place_(places_.get(most_groups_ * strips)) {}

  // Goes to the first piece, or to the next one; returns false after the last.
  bool next() {
    entry0 += row0 + rows < p.queries ? 0 : entries;
    row0 = row0 + rows < p.queries ? row0 + rows : 0;
    if (entry0 >= p.batch) return false;
    size_ = found_ = 0;
    first_strip_ = strips;
    last_strip_ = 0;
    rows = take(entry0, p.queries - row0, 0);
    entries = 1;
    while (row0 == 0 && rows == p.queries && entry0 + entries < p.batch) {
      const std::int64_t found = found_, size = size_;
      if (take(entry0 + entries, rows, entries * rows) == rows) {
        ++entries;
        continue;
      }
      found_ = found;
      size_ = size;
      break;
    }
    groups = (rows + group_rows - 1) / group_rows;
    weights_ = given_ ? nullptr : weights_memory_.get(size_);
    gradient_ = gradient_memory_.get(size_);
    attended_ = attended_memory_.get(size_ / K);
    largest_gradient = largest_memory_.get(entries * rows);
    return true;
  }

  // Where row i of entry n is kept. place[s]: which of its strips has the keys [s * W, (s + 1) * W); -1 = none.
  struct Row {
    T *weights, *gradient;
    unsigned char* attended;    // per key block: whether it has an attended key
    std::int64_t width;         // keys that are kept, or a block more
    const std::int32_t* place;  // of each strip

    std::int64_t column(std::int64_t j) const { return place[j / W] < 0 ? -1 : place[j / W] * W + j % W; }
  };
  Row row(std::int64_t n, std::int64_t i) const {
    const std::int64_t number = (n - entry0) * groups + (i - row0) / group_rows;
    const Group& group = group_[number];
    const std::int64_t at = group.at + (i - row0) % group_rows * group.width;
    return {weights_ + (given_ ? 0 : at), gradient_ + at, attended_ + at / K, group.width, place_ + number * strips};
  }

  std::int64_t index(std::int64_t n, std::int64_t i) const { return (n - entry0) * rows + i - row0; }
  // The end of the group that row i belongs to.
  std::int64_t group_end(std::int64_t i) const {
    return std::min(row0 + rows, row0 + ((i - row0) / group_rows + 1) * group_rows);
  }
  // Keys that some row of the piece may attend to lie between these, which are bounds of strips.
  std::int64_t key_begin() const { return std::min(first_strip_, last_strip_) * W; }
  std::int64_t key_end() const { return std::min(last_strip_ * W, p.keys); }
  std::int64_t keys_per_row() const { return size_ / std::max<std::int64_t>(entries * rows, 1); }

  std::int64_t entry0 = 0, entries = 0, row0 = 0, rows = 0, groups = 0;
  T* largest_gradient = nullptr;  // per row: the largest |G|, NaN if there is one

 private:
  struct Group {
    std::int64_t at, width;
  };

  // Adds groups of up to `count` rows of entry n, beside `before` rows of others, and returns how many rows fit.
  std::int64_t take(std::int64_t n, std::int64_t count, std::int64_t before) {
    std::int64_t taken = 0;
    while (taken < count && found_ < most_groups_) {
      const std::int64_t i = row0 + taken, wanted = std::min<std::int64_t>(group_rows, count - taken);
      const Group group{size_, spaced(mark(n, i, wanted, place_ + found_ * strips) * W)};
      const std::int64_t fit = group.width ? (budget_ - size_) / group.width : wanted;
      const std::int64_t some = std::min({wanted, fit, most_rows_ - before - taken});
      if (some <= 0) break;
      group_[found_++] = group;
      size_ += some * group.width;
      taken += some;
      if (some < wanted) break;
    }
    return taken;
  }

  // Pads the width: rows that lie a power of two apart map to few sets of a cache.
  static std::int64_t spaced(std::int64_t width) {
    return width + (width > 0 && width * std::int64_t(sizeof(T)) % 2048 == 0 ? K : 0);
  }

  // Finds the strips of `count` rows from i on, and returns their number.
  std::int64_t mark(std::int64_t n, std::int64_t i, std::int64_t count, std::int32_t* place) {
    std::fill(place, place + strips, -1);
    std::int64_t low = 0, high = 0;  // strips that are marked already
    for (std::int64_t r = i; r < i + count; ++r) {
      std::int64_t first, last;
      key_range(p, n, r, first, last);
      if (first == last) continue;
      const std::int64_t from = first / W, to = (last + W - 1) / W;
      if (from >= low && to <= high) continue;
      for (std::int64_t s = from; s < to; ++s) place[s] = 0;
      const bool joined = from <= high && to >= low && low < high;
      low = joined ? std::min(low, from) : from;
      high = joined ? std::max(high, to) : to;
    }
    std::int32_t found = 0;
    for (std::int64_t s = 0; s < strips; ++s) {
      if (place[s] < 0) continue;
      const std::int64_t keys = std::min<std::int64_t>(W, p.keys - s * W);
      const bool kept = !p.blocks || kept_pairs(p.blocks, n, i, count, s * W, keys) != Kept::none;
      place[s] = kept ? found++ : -1;
      if (!kept) continue;
      first_strip_ = std::min(first_strip_, s);
      last_strip_ = std::max(last_strip_, s + 1);
    }
    return found;
  }

  const Problem<T>& p;
  const std::int64_t strips, budget_, most_rows_, most_groups_;
  const bool given_;  // then there is no P
  std::int64_t size_ = 0, found_ = 0, first_strip_ = 0, last_strip_ = 0;
  Buffer<Group> groups_;
  Buffer<std::int32_t> places_;
  Group* const group_;
  std::int32_t* const place_;
  T *weights_ = nullptr, *gradient_ = nullptr;
  unsigned char* attended_ = nullptr;
  Buffer<T> weights_memory_, gradient_memory_, largest_memory_;
  Buffer<unsigned char> attended_memory_;
};
