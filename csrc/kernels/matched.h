// The matched form: two features of about the same weight, a match, share a numerator (math.md, eq. 29).
//
// tanh is odd, so the signs of weights move into q and k: u_0 >= u_1 >= 0. With y = b + a and d = u_0 - u_1,
//
//     u_0 t_0 + u_1 t_1 = (p - c + b_0 g) / (y_0 y_1) - d      p = 2 u_0 b_0 b_1     c = 2 u_1 a_0 a_1     g = 2 d a_1
//
// where p belongs to a key, c and g to a query row. That costs as much as the factored form (eq. 4), and keeps small
// sums exact: p - c is rounded relative to itself, and d is small. Rounding errors of p add up to one number per key.
//
// A feature of far more weight than the next is split into two halves, which match. Features are matched within each
// slab of features_cached. The form relies on fused multiply-add.

// e^x_0, e^x_1 and their product with `factor`, for |x| <= 2 safe; undefined numbers beyond. With `corrected`, adds the
// rounding error of the product, relative to e^{x_0 + x_1}, to `lost`.
template <bool corrected, class T>
inline void exp_product(const Vec<T>* x, Vec<T> factor, Vec<T>* e, Vec<T>& product, Vec<T>& lost) {
  Vec<T> power[2], v[2];  // e^x = power (1 + v)
  for (int i = 0; i < 2; ++i) {
    Vec<T> high, low;
    exp_parts<T>(x[i], power[i], high, low);
    v[i] = high + low;
    e[i] = power[i] * v[i] + power[i];
  }
  const Vec<T> more = v[0] * (v[1] + T(1)) + v[1];
  const Vec<T> scaled = factor * more + factor;
  product = scaled * (power[0] * power[1]);
  if constexpr (!corrected) return;
  const Vec<T> error = factor * more - (scaled - factor);  // fused: exact, but for its own rounding
  lost += error * (more * T(-0.8) + T(1));                 // about error / (1 + more)
}

template <class T>
class Matching {
 public:
  static constexpr int L = lanes<T>, K = block_keys<T>;
  static constexpr int run = features_per_sum / 2;  // matches of a partial sum

  // Matches the features of an entry. w: normalised weights, finite, of this norm; corrects: whether to correct sums.
  void begin(const T* w, std::int64_t hidden, double norm, bool corrects) {
    corrects_ = corrects;
    slabs_ = std::max<std::int64_t>(1, (hidden + features_cached - 1) / features_cached);
    const std::int64_t room = round_up(std::min<std::int64_t>(hidden, features_cached), run);
    unsigned char* memory = memory_.get(slabs_ * (sizeof(Slab) + room * (5 * sizeof(T) + 2)));
    Slab* slab = slab_ = reinterpret_cast<Slab*>(memory);
    T* numbers = reinterpret_cast<T*>(memory + slabs_ * sizeof(Slab));
    unsigned char* members = reinterpret_cast<unsigned char*>(numbers + 5 * slabs_ * room);
    width = most_ = 0;
    for (std::int64_t s = 0; s < slabs_; ++s, ++slab) {
      *slab = {members + 2 * s * room, numbers + 5 * s * room, room, 0, width, 0};
      const std::int64_t h0 = s * features_cached;
      match(w + h0, std::min<std::int64_t>(features_cached, hidden - h0), T(most_excess * norm), *slab);
      width += round_up(slab->count, run) * 4;
      most_ = std::max(most_, slab->count);
    }
  }

  // How many groups of features a slab has: two matches each.
  std::int64_t groups(std::int64_t s) const { return slab_[s].count / 2; }
  std::int64_t place(std::int64_t s) const { return slab_[s].place; }  // of its part of a packed query row
  // Of a packed block of keys, and of memory for its columns.
  std::int64_t key_width() const { return (3 * most_ + 1) * K + features_cached * L; }

  // Packs a query row: of every slab, for every `run` matches, [a_0, a_1, g, c][match].
  void pack_query(const T* q, T* packed) const {
    for (std::int64_t s = 0; s < slabs_; ++s) {
      const Slab& slab = slab_[s];
      const T* x = q + s * features_cached;
      T* to = packed + slab.place;
      T own[2][round_up(features_cached, run)];  // all stores come before the first vector is loaded
      for (int i = 0; i < 2; ++i)
        for (std::int64_t m = 0; m < round_up(slab.count, L); ++m) own[i][m] = x[slab.member(i)[m]];
      for (std::int64_t m = 0; m < slab.count; m += L) {
        Vec<T> exponent[2], a[2], c, lost = {};
        for (int i = 0; i < 2; ++i) exponent[i] = load(own[i] + m) * -load(slab.factor(i) + m);
        exp_product<false, T>(exponent, load(slab.lower() + m), a, c, lost);
        T* at = to + m / run * 4 * run + m % run;
        store(at, a[0]);
        store(at + run, a[1]);
        store(at + 2 * run, load(slab.excess() + m) * a[1]);
        store(at + 3 * run, c);
      }
    }
  }

  // Packs a block of keys of one slab: what is added to the sums of each, and for every match [b_0, b_1, p][key].
  void pack_keys(const T* key, std::int64_t row, std::int64_t count, std::int64_t hidden, std::int64_t s,
                 T* packed) const {
    corrects_ ? pack_keys<true>(key, row, count, hidden, s, packed)
              : pack_keys<false>(key, row, count, hidden, s, packed);
  }
  template <bool corrected>
  void pack_keys(const T* key, std::int64_t row, std::int64_t count, std::int64_t hidden, std::int64_t s,
                 T* packed) const {
    const Slab& slab = slab_[s];
    T* columns = packed + (3 * most_ + 1) * K;
    for (std::int64_t r0 = 0; r0 < count; r0 += L) {
      pack_transposed<T>(key + r0 * row, row, std::min<std::int64_t>(L, count - r0), hidden, columns, L,
                         Unchanged<T>{});
      Vec<T> lost = {};
      T* to = packed + r0 + K;
      for (std::int64_t m = 0; m < slab.count; ++m, to += 3 * K) {
        Vec<T> exponent[2], b[2], p;
        for (int i = 0; i < 2; ++i) exponent[i] = load(columns + slab.member(i)[m] * L) * slab.factor(i)[m];
        exp_product<corrected, T>(exponent, splat<T>(slab.upper()[m]), b, p, lost);
        store(to, b[0]);
        store(to + K, b[1]);
        store(to + 2 * K, p);
      }
      store(packed + r0, lost * T(0.25) - slab.constant);
    }
  }

  std::int64_t width = 0;  // of a packed query row

 private:
  static constexpr T most_excess = T(1) / 64;  // of the norm of the weights: above it a feature is split
  static constexpr int buckets = 128;

  struct Slab {
    unsigned char* members;
    T* numbers;
    std::int64_t room, count, place;  // count: of matches
    T constant;
    unsigned char* member(int i) const { return members + i * room; }  // of the slab's features
    T* factor(int i) const { return numbers + i * room; }              // 2 or -2: of x in the exponents
    T* upper() const { return numbers + 2 * room; }                    // 2 u_0
    T* lower() const { return numbers + 3 * room; }                    // 2 u_1
    T* excess() const { return numbers + 4 * room; }                   // 2 d
  };

  // Sorts features [0, count) roughly by |w|, and matches neighbours.
  static void match(const T* w, std::int64_t count, T limit, Slab& slab) {
    int begin[buckets + 1] = {}, bucket[features_cached];
    unsigned char order[features_cached + 1];
    T size[features_cached + 1];
    for (std::int64_t h = 0; h < count; ++h)
      bucket[h] = buckets - 1 - int(std::min(std::fabs(w[h]) * T(buckets / 2), T(buckets - 1)));
    for (std::int64_t h = 0; h < count; ++h) ++begin[bucket[h] + 1];
    for (int i = 0; i < buckets; ++i) begin[i + 1] += begin[i];
    for (std::int64_t h = 0; h < count; ++h) {
      const int at = begin[bucket[h]]++;
      order[at] = h;
      size[at] = std::fabs(w[h]);
    }
    order[count] = 0;
    size[count] = T(-INFINITY);  // the last feature has no neighbour
    T constant = 0;
    std::int64_t m = 0;
    for (std::int64_t i = 0; i < count; ++m) {
      const bool halves = size[i] - size[i + 1] > limit;
      const int first = order[i], second = order[i + !halves];
      const T share = halves ? T(1) : T(2), upper = share * size[i], lower = share * size[i + !halves];
      slab.member(0)[m] = first;
      slab.member(1)[m] = second;
      slab.factor(0)[m] = std::copysign(T(2), w[first]);
      slab.factor(1)[m] = std::copysign(T(2), w[second]);
      slab.upper()[m] = upper;
      slab.lower()[m] = lower;
      slab.excess()[m] = upper - lower;
      constant += (upper - lower) / 2;
      i += halves ? 1 : 2;
    }
    slab.count = round_up(m, 2);
    slab.constant = constant;
    for (; m < round_up(m, run); ++m) {
      slab.member(0)[m] = slab.member(1)[m] = 0;
      for (int i = 0; i < 5; ++i) slab.numbers[i * slab.room + m] = 0;
    }
  }

  bool corrects_ = true;
  std::int64_t slabs_ = 0, most_ = 0;  // most_: matches of a slab
  Slab* slab_ = nullptr;
  Buffer<unsigned char> memory_;
};

template <class T>
struct Terms<T, matched> {
  static constexpr int K = block_keys<T>, run = Matching<T>::run;
  static constexpr int query = 2, keys = 6 * K, gap = 3 * run;

  // Joins two matches.
  static ALWAYS_INLINE void join(const T* q, const T* k, Vec<T>& z, Vec<T>& y) {
    Vec<T> numerator[2], denominator[2];
    for (int i = 0; i < 2; ++i, ++q, k += 3 * K) {
      const Vec<T> b = load(k);
      denominator[i] = (b + q[0]) * (load(k + K) + q[run]);
      numerator[i] = b * q[2 * run] + (load(k + 2 * K) - q[3 * run]);
    }
    z = numerator[0] * denominator[1] + numerator[1] * denominator[0];
    y = denominator[0] * denominator[1];
  }
};
