// Pairs whose q and k cancel: q is near c and k near -c in every feature. Their scores are far below the error that the
// rounding of e^{-2q} and e^{2k} causes, while the plain layer rounds q + k alone. A row with such a pair takes the
// direct form (math.md, 2.2).

constexpr int probe_group = 8, most_probes = 16;  // the second group is compared where pairs pass the first
constexpr int probes_together = 4;                // a branch after each of them would be mispredicted

// q and k cancel where all terms |w (q + k)| are at most this part of the largest |w|. The centred form multiplies that
// by the largest of all |q| and |k|.
constexpr float small_energy_other = 0.1f, small_energy_centred = 0.15f;
constexpr float small_energy = 0.4f;  // for the first and the last attended key: where both cancel, others probably do

// Cancellation matters where rounding every tanh changes the scores by more than the rounding of the softmax does,
// which is about this.
constexpr double rounding_of_softmax = 1;

// Few pairs of ordinary rows and keys agree in a handful of features of large weight, the probes. The range of a
// probe's terms w k is divided into intervals as wide as the limit. For each of them, bits mark the keys of a tile
// whose term lies in it or in a neighbour. Only keys whose bits are set for all terms -w q of a row are compared in
// every feature.
template <class T>
class Cancellation {
 public:
  static constexpr int TK = tile_keys<T>, L = lanes<T>;
  using Bits = typename Simd<T>::Bits;

  // Takes the normalised weights of an entry, their largest magnitude, and how much rounding every tanh changes scores.
  void begin(const T* weight, std::int64_t features, T most, double rounding_of_scores) {
    w = weight;
    hidden = features;
    largest_weight = most;
    matters = hidden > 0 && rounding_of_scores > rounding_of_softmax;
    probes = 0;
    T above = T(INFINITY);
    for (const T least : {T(0.7) * most, T(0.35) * most, T(0)}) {
      for (std::int64_t h = 0; h < hidden && probes < most_probes && matters; ++h)
        if (std::fabs(w[h]) > least && std::fabs(w[h]) <= above) probe[probes++] = h;
      above = least;
    }
    for (int i = probes; i < most_probes; ++i) probe[i] = 0;
  }

  // Discards what is stored of the rows of another block.
  void begin_rows() {
    for (Screen& screen : screens) screen.width = 0;
  }

  // Begins a tile of keys, which lie key_row apart.
  void tile(const T* first_key, std::int64_t key_row, std::int64_t keys) {
    key = first_key;
    row = key_row;
    count = keys;
    for (Screen& screen : screens) screen.packed = 0;
    for (std::int64_t j = 0; j < count && matters; ++j) gather(0, key + j * row, first_group + j * probe_group);
  }

  // Returns direct if row r has a cancelling pair, else `form`. size: its largest |q|; most: the largest of its |q| and
  // of the |k| that it attends to; attended(j): whether it attends to key j of the tile; attended.whole(): to all keys.
  template <class Attended>
  ALWAYS_INLINE Form row_form(Form form, std::int64_t r, const T* q, Bits size, Bits most, const Attended& attended) {
    if (form == direct || !matters) return form;
    const bool relative = form == centred, whole = attended.whole();
    if (!whole && ends_cancel(q, size, relative, attended)) return direct;
    const T limit = (relative ? small_energy_centred : small_energy_other) * largest_weight;
    Screen& screen = screens[relative];
    screen.prepare(relative ? limit * power_above(as_number<T>(most)) : limit);
    std::uint64_t near[words];
    std::fill(near, near + words, ~std::uint64_t(0));
    for (int group = 0; group * probe_group < probes; ++group)
      if (!screen.narrow(*this, group, r, q, near)) return form;
    if (whole && ends_cancel(q, size, relative, attended)) return direct;
    return any_cancels(near, q, size, limit, relative, attended) ? direct : form;
  }

 private:
  static constexpr int words = (TK + 63) / 64, intervals = 32;
  static constexpr T slack = T(0.999);  // the difference of terms a limit apart may be rounded up
  // Terms within small_energy lie at most so many intervals apart: bits of a tile's first and last key reach so far.
  static constexpr int ends_reach = int(slack * small_energy / std::min(small_energy_other, small_energy_centred)) + 1;

  struct Screen {
    T width = 0, inverse = 0;                            // of the intervals
    int packed = 0;                                      // groups of probes in `near`
    unsigned char known[most_rows];                      // per row: groups of probes in `row_place`
    unsigned char row_place[most_rows][most_probes];     // of a row's interval in `near`
    std::uint64_t near[most_probes][intervals * words];  // [probe][interval][word]

    // Intervals may be wider than the limit.
    void prepare(T limit) {
      if (limit <= width) return;
      width = limit;
      inverse = slack / limit;
      packed = 0;
      std::memset(known, 0, sizeof known);
    }

    // Clears the bits of keys whose terms of this group of probes differ from the row's. Returns
    // whether any are left.
    ALWAYS_INLINE bool narrow(const Cancellation& c, int group, std::int64_t r, const T* q, std::uint64_t* left) {
      if (packed <= group) pack(c, group);
      if (known[r] <= group) place(c, group, r, q);
      for (int i = group * probe_group; i < (group + 1) * probe_group; i += probes_together) {
        std::uint64_t any = 0;
        for (int word = 0; word < words; ++word) {
          for (int n = i; n < i + probes_together; ++n) left[word] &= near[n][row_place[r][n] + word];
          any |= left[word];
        }
        if (!any) return false;
      }
      return true;
    }

    void place(const Cancellation& c, int group, std::int64_t r, const T* q) {
      T x[std::max(L, probe_group)] = {};
      Bits own[std::max(L, probe_group)];
      c.gather(group, q, x);
      find_intervals(c, group, x, 1, -1, own);
      for (int i = 0; i < probe_group; ++i) row_place[r][group * probe_group + i] = own[i] * words;
      known[r] = group + 1;
    }

    void pack(const Cancellation& c, int group) {
      constexpr int size = intervals * words;
      std::uint64_t at[probe_group][size + 2 * words] = {};
      Bits own[TK * probe_group];
      T x[TK * probe_group];
      for (std::int64_t j = 0; j < c.count && group > 0; ++j) c.gather(group, c.key + j * c.row, x + j * probe_group);
      find_intervals(c, group, group > 0 ? x : c.first_group, c.count, 1, own);
      for (std::int64_t j = 0; j < c.count; ++j)
        for (int i = 0; i < probe_group; ++i)
          at[i][(own[j * probe_group + i] + 1) * words + j / 64] |= std::uint64_t(1) << j % 64;
      for (int i = 0; i < probe_group; ++i)
        for (int n = 0; n < size; ++n)
          near[group * probe_group + i][n] = at[i][n] | at[i][n + words] | at[i][n + 2 * words];
      for (const std::int64_t j : {std::int64_t(0), c.count - 1})
        for (int i = 0; i < probe_group; ++i) {
          const int middle = own[j * probe_group + i];
          for (int n = std::max(middle - ends_reach, 0); n <= std::min(middle + ends_reach, intervals - 1); ++n)
            near[group * probe_group + i][n * words + j / 64] |= std::uint64_t(1) << j % 64;
        }
      packed = group + 1;
    }

    // The intervals of `sign` times the terms of x, [row][probe]. The outermost ones include all beyond.
    void find_intervals(const Cancellation& c, int group, const T* x, std::int64_t rows, T sign, Bits* interval) const {
      constexpr T magic = T(3) * T(Bits(1) << (Simd<T>::mantissa - 1));  // x + magic holds x, rounded, in its last bits
      constexpr int run = std::max(L, probe_group);
      T factor[run];
      for (int i = 0; i < run; ++i) {
        const int at = group * probe_group + i % probe_group;
        factor[i] = at < c.probes ? sign * inverse * c.w[c.probe[at]] : T(0);
      }
      for (std::int64_t n = 0; n < rows * probe_group; n += L) {
        const Vec<T> middle = load(x + n) * load(factor + n % run) + T(intervals / 2);
        const UVec<T> rounded =
            as_bits<T>(clamp<T>(middle, 0, intervals - 1) + magic) & Bits(intervals - 1);  // any interval for NaN
        std::memcpy(interval + n, &rounded, sizeof rounded);
      }
    }
  };

  // Copies x[h] of the probes h of a group.
  void gather(int group, const T* x, T* to) const {
    for (int i = 0; i < probe_group; ++i) to[i] = x[probe[group * probe_group + i]];
  }

  static T power_above(T x) {
    int exponent = 0;
    std::frexp(x, &exponent);
    return std::ldexp(T(1), exponent);
  }

  // Whether both the first and the last key that the row attends to cancel with it.
  template <class Attended>
  ALWAYS_INLINE bool ends_cancel(const T* q, Bits q_size, bool relative, const Attended& attended) const {
    const T usual = small_energy * largest_weight;
    std::int64_t from = attended.first(), to = attended.last();
    while (from < to && !attended(from)) ++from;
    if (!cancels(q, q_size, from, usual, relative)) return false;
    while (from < to && !attended(to)) --to;
    return cancels(q, q_size, to, usual, relative);
  }

  // Whether any of these keys cancels with the row.
  template <class Attended>
  bool any_cancels(std::uint64_t* near, const T* q, Bits q_size, T limit, bool relative,
                   const Attended& attended) const {
    for (int word = 0; word < words; ++word)
      for (; near[word]; near[word] &= near[word] - 1) {
        const std::int64_t j = word * 64 + __builtin_ctzll(near[word]);
        if (j < count && attended(j) && cancels(q, q_size, j, limit, relative)) return true;
      }
    return false;
  }

  // Whether all |w (q + k)| of key j are within the limit. Most calls return at the first vector.
  bool cancels(const T* q, Bits q_size, std::int64_t j, T limit, bool relative) const {
    const T* k = key + j * row;
    if (relative) limit *= as_number<T>(std::max(q_size, largest(k, hidden)));
    for (std::int64_t h = 0; h < hidden; h += L) {
      const std::int64_t some = hidden - h;
      const UVec<T> x =
          magnitude<T>(load_part<T>(w + h, some, 0) * (load_part<T>(q + h, some, 0) + load_part<T>(k + h, some, 0)));
      if (any<T>((UVec<T>)(x > ordered_bits<T>(limit)))) return false;
    }
    return true;
  }

  const T *w = nullptr, *key = nullptr;
  std::int64_t hidden = 0, row = 0, count = 0, probe[most_probes];
  int probes = 0;
  bool matters = false;
  T largest_weight = 0;
  T first_group[TK * probe_group] = {};  // [key][probe]
  Screen screens[2];                     // of other forms, and of the centred form
};
