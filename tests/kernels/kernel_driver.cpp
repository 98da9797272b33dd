// Checks the CPU kernels without torch: forward and backward against plain loops in double precision.
//
//     c++ -std=c++17 -O1 -g -fsanitize=address,undefined -Icsrc csrc/dispatch.cpp csrc/targets/*.cpp
//         tests/kernels/kernel_driver.cpp -pthread
//
// ADDITIVE_ATTN_CPU chooses the kernels, as in the package; an argument keeps the families whose names contain it. Every
// buffer has exactly the size of its tensor and begins where the allocator puts it, so that the address sanitizer sees
// any access beyond the end; every case runs alone and on three threads, which must agree in every bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "problem.h"

namespace {

using namespace additive_attn;
using std::int64_t;
using std::size_t;

constexpr double inf = std::numeric_limits<double>::infinity();

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t word() {  // SplitMix64 (Steele, Lea, Flood 2014)
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  double uniform(double low, double high) { return low + (high - low) * double(word() >> 11) * 0x1p-53; }
  int64_t below(int64_t n) { return int64_t(word() % std::uint64_t(n)); }
  bool chance(double p) { return uniform(0, 1) < p; }
  template <class T>
  T pick(const std::vector<T>& from) {
    return from[size_t(below(int64_t(from.size())))];
  }

 private:
  std::uint64_t state_;
};

enum class Lengths { none, per_entry, per_row };
enum class Poison { none, masked_keys, masked_values, a_key, infinite_key };

struct Case {
  std::string family;
  int64_t batch, queries, keys, hidden, values;
  double reach = 2;    // |query| and |key| stay below
  bool mixed = false;  // each row and key has its own magnitude, from 0.1 to reach
  double weight_reach = 1, scale = 1;
  MaskType mask = MaskType::none;
  double masked = 0.3;                                          // share of masked entries
  bool one_entry = false, one_row = false, one_column = false;  // what the mask broadcasts
  bool turned = false;                                          // the mask lies column by column
  Lengths lengths = Lengths::none;
  int64_t left = -1, right = -1;
  double dropout = 0;
  bool weights = false;
  bool grad_out = true, grad_weights = false, grad_lse = false;
  bool query = true, key = true, value = true, weight = true, bias = true;  // which gradients
  bool shared = false;    // key, value and weight serve the whole batch
  bool padded = false;    // rows lie further apart than they are wide
  bool repeated = false;  // all rows of query, value and grad_out are one row (stride 0)
  Poison poison = Poison::none;
};

// (batch, rows, columns) in exactly the memory that its strides reach; no memory at all when it is empty.
template <class T>
struct Tensor {
  std::unique_ptr<T[]> memory;
  int64_t size = 0, row = 0;
  std::vector<int64_t> offset;

  Tensor() = default;
  Tensor(int64_t batch, int64_t rows, int64_t columns, bool shared = false, bool padded = false, bool repeated = false)
      : row(repeated ? 0 : columns + (padded ? 3 : 0)), offset(size_t(batch), 0) {
    const int64_t entry = rows == 0 || columns == 0 ? 0 : (rows - 1) * row + columns;
    for (int64_t n = 0; n < batch; ++n) offset[size_t(n)] = shared ? 0 : n * entry;
    size = (shared ? (batch > 0) : batch) * entry;
    if (size > 0) memory.reset(new T[size_t(size)]);
  }
  T* at(int64_t n, int64_t i) const { return memory.get() + offset[size_t(n)] + i * row; }
  Rows<const T> view() const { return {memory.get(), offset.data(), row}; }
};

template <class T>
std::vector<T> garbage(int64_t n) {
  return std::vector<T>(size_t(n), T(12345.678));
}

// The value of a random mask entry and its encoding.
struct Entry {
  double value;
  std::uint16_t half, bfloat;
};
constexpr Entry entries[] = {{0, 0, 0},
                             {-1.5, 0xbe00, 0xbfc0},
                             {2, 0x4000, 0x4000},
                             {0.25, 0x3400, 0x3e80},
                             {-0x1p-24, 0x8001, 0xb380},  // a subnormal half
                             {-100, 0xd640, 0xc2c8}};
constexpr Entry forbidden = {-inf, 0xfc00, 0xff80};

struct MaskData {
  int64_t batch = 1, rows = 1, columns = 1;
  std::unique_ptr<unsigned char[]> memory;
  std::vector<int64_t> offset, gradient_offset;
  Mask mask;

  void fill(const Case& c, Random& random, std::vector<double>& bias) {
    mask.type = c.mask;
    if (c.mask == MaskType::none) return;
    batch = c.one_entry ? std::min<int64_t>(c.batch, 1) : c.batch;
    rows = c.one_row ? 1 : c.queries;
    columns = c.one_column ? 1 : c.keys;
    const std::map<MaskType, int64_t> sizes = {{MaskType::boolean, 1},
                                               {MaskType::float16, 2},
                                               {MaskType::bfloat16, 2},
                                               {MaskType::float32, 4},
                                               {MaskType::float64, 8}};
    const int64_t size = sizes.at(c.mask), count = batch * rows * columns;
    if (count > 0) memory.reset(new unsigned char[size_t(count * size)]);
    const int64_t row = c.turned ? 1 : columns, column = c.turned ? rows : 1;
    mask.data = memory.get();
    mask.row = rows == 1 ? 0 : row;
    mask.column = columns == 1 ? 0 : column;
    std::vector<double> value(static_cast<size_t>(count));
    for (int64_t n = 0; n < batch; ++n)
      for (int64_t i = 0; i < rows; ++i) {
        const bool nothing = random.chance(0.1);
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t at = n * rows * columns + i * row + j * column;
          const Entry e = nothing || random.chance(c.masked)
                              ? forbidden
                              : entries[c.mask == MaskType::boolean ? 0 : random.below(6)];
          value[size_t(at)] = e.value;
          unsigned char* to = memory.get() + at * size;
          const float single = float(e.value);
          switch (c.mask) {
            case MaskType::none:
              break;
            case MaskType::boolean:
              *to = e.value == 0;
              break;
            case MaskType::float16:
              std::memcpy(to, &e.half, 2);
              break;
            case MaskType::bfloat16:
              std::memcpy(to, &e.bfloat, 2);
              break;
            case MaskType::float32:
              std::memcpy(to, &single, 4);
              break;
            case MaskType::float64:
              std::memcpy(to, &e.value, 8);
              break;
          }
        }
      }
    for (int64_t n = 0; n < c.batch; ++n) {
      offset.push_back(batch == 1 ? 0 : n * rows * columns);
      for (int64_t i = 0; i < c.queries; ++i)
        for (int64_t j = 0; j < c.keys; ++j)
          bias[size_t((n * c.queries + i) * c.keys + j)] +=
              value[size_t(offset.back() + i * mask.row + j * mask.column)];
    }
    gradient_offset = offset;
    mask.offset = offset.data();
  }
};

// Philox4x32-10, one counter at a time; the word of key j.
std::uint32_t philox_word(std::uint64_t seed, std::uint64_t entry, std::uint64_t row, std::uint64_t j) {
  std::uint32_t c[4] = {std::uint32_t(j / 4), std::uint32_t(row), std::uint32_t(entry), std::uint32_t(entry >> 32)};
  std::uint32_t k[2] = {std::uint32_t(seed), std::uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t(0xD2511F53u) * c[0], b = std::uint64_t(0xCD9E8D57u) * c[2];
    const std::uint32_t next[4] = {std::uint32_t(b >> 32) ^ c[1] ^ k[0], std::uint32_t(b),
                                   std::uint32_t(a >> 32) ^ c[3] ^ k[1], std::uint32_t(a)};
    std::memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return c[j % 4];
}

template <class T>
struct Inputs {
  Tensor<T> query, key, value, weight, grad_out, grad_weights, grad_lse;
  Tensor<int64_t> lengths;
  MaskData mask;
  std::vector<double> bias;  // (batch, queries, keys): everything that masks, -Inf where masked
  std::vector<int64_t> seed, seed_offset;
  std::uint32_t drop_below = 0;

  Inputs(const Case& c, Random& random)
      : query(c.batch, c.queries, c.hidden, false, c.padded, c.repeated),
        key(c.batch, c.keys, c.hidden, c.shared, c.padded),
        value(c.batch, c.keys, c.values, c.shared, c.padded, c.repeated),
        weight(c.batch, 1, c.hidden, c.shared),
        grad_out(c.batch, c.queries, c.values, false, c.padded, c.repeated),
        grad_weights(c.batch, c.queries, c.keys, false, c.padded),
        grad_lse(c.batch, c.queries, 1),
        lengths(c.batch, c.lengths == Lengths::per_row ? c.queries : 1, 1),
        bias(size_t(c.batch * c.queries * c.keys), 0.0) {
    magnitudes(c, random, query, c.queries);
    magnitudes(c, random, key, c.keys);
    fill(random, value, 1);
    fill(random, weight, c.weight_reach);
    fill(random, grad_out, 1);
    fill(random, grad_weights, 1);
    fill(random, grad_lse, 1);
    if (c.hidden > 2 && weight.size > 0) weight.memory[1] = 0;
    mask.fill(c, random, bias);
    if (c.lengths == Lengths::per_entry) lengths.row = 0;
    for (int64_t k = 0; k < lengths.size; ++k) lengths.memory[size_t(k)] = random.below(c.keys + 3) - 1;
    for (int64_t n = 0; n < c.batch; ++n)
      for (int64_t i = 0; i < c.queries; ++i)
        for (int64_t j = 0; j < c.keys; ++j)
          if ((c.left >= 0 && i - j > c.left) || (c.right >= 0 && j - i > c.right) ||
              (c.lengths != Lengths::none && j >= *lengths.at(n, i)))
            bias[size_t((n * c.queries + i) * c.keys + j)] = -inf;
    for (int64_t n = 0; n < c.batch; ++n) {
      seed.push_back(int64_t(random.word()));
      seed_offset.push_back(c.shared ? 0 : n);
    }
    drop_below = std::uint32_t(std::min(std::floor(c.dropout * 4294967296.0), 4294967295.0));
  }

  static void fill(Random& random, Tensor<T>& t, double reach) {
    for (int64_t k = 0; k < t.size; ++k) t.memory[size_t(k)] = T(random.uniform(-reach, reach));
  }

  static void magnitudes(const Case& c, Random& random, Tensor<T>& t, int64_t rows) {
    fill(random, t, c.reach);
    if (!c.mixed || t.size == 0) return;
    for (int64_t n = 0; n < c.batch; ++n)
      for (int64_t i = 0; i < rows; ++i) {
        const double reach = std::exp(random.uniform(std::log(0.1), std::log(c.reach)));
        for (int64_t h = 0; h < c.hidden; ++h) t.at(n, i)[h] = T(random.uniform(-reach, reach));
      }
  }

  bool attends(const Case& c, int64_t n, int64_t i, int64_t j) const {
    return bias[size_t((n * c.queries + i) * c.keys + j)] != -inf;
  }
};

template <class T>
struct Results {
  std::vector<T> out, lse, weights, query, key, value, weight, bias;

  template <class F>
  void each(F f) {
    f("out", &Results::out), f("lse", &Results::lse), f("weights", &Results::weights);
    f("grad_query", &Results::query), f("grad_key", &Results::key), f("grad_value", &Results::value);
    f("grad_weight", &Results::weight), f("grad_mask", &Results::bias);
  }
};

ParallelFor on_threads(int threads) {
  return [threads](int64_t count, int64_t, const Body& body) {
    Tasks tasks(count);
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([&] { body(tasks); });
    body(tasks);
    for (std::thread& t : others) t.join();
  };
}

template <class T>
void fill(Problem<T>& p, const Case& c, const Inputs<T>& in, int threads) {
  p.batch = c.batch, p.queries = c.queries, p.keys = c.keys, p.hidden = c.hidden, p.values = c.values;
  p.threads = threads;
  p.query = in.query.view(), p.weight = in.weight.view();
  const auto stored = [](const Rows<const T>& x) { return StoredRows<T>{x.data, x.offset, x.row}; };
  p.key = stored(in.key.view()), p.value = stored(in.value.view());
  p.mask = in.mask.mask;
  p.lengths = c.lengths == Lengths::none ? Rows<const int64_t>{} : in.lengths.view();
  p.left = c.left, p.right = c.right;
  p.seed = c.dropout > 0 ? in.seed.data() : nullptr;
  p.seed_offset = in.seed_offset.data();
  p.drop_below = in.drop_below;
  p.keep_scale = c.dropout < 1 ? T(1 / (1 - c.dropout)) : T(0);
  p.scale = T(c.scale);
}

template <class T>
Results<T> run(const Case& c, const Inputs<T>& in, int threads) {
  Results<T> r;
  r.out = garbage<T>(c.batch * c.queries * c.values);
  r.lse = garbage<T>(c.batch * c.queries);
  r.weights = garbage<T>(c.weights ? c.batch * c.queries * c.keys : 0);
  Forward<T> f;
  fill(f, c, in, threads);
  f.out = r.out.data(), f.lse = r.lse.data(), f.weights = c.weights ? r.weights.data() : nullptr;
  kernels().forward(f, on_threads(threads));

  Backward<T> b;
  fill(b, c, in, threads);
  b.lse = r.lse.data();
  if (c.grad_out) b.grad_out = in.grad_out.view();
  if (c.grad_weights) b.grad_weights = in.grad_weights.view();
  if (c.grad_lse) b.grad_lse = in.grad_lse.view();
  const auto gradient = [](bool needed, int64_t size, std::vector<T>& to) {
    to = garbage<T>(needed ? size : 0);
    return needed ? to.data() : nullptr;
  };
  b.grad_query = gradient(c.query, c.batch * c.queries * c.hidden, r.query);
  b.grad_key = gradient(c.key, c.batch * c.keys * c.hidden, r.key);
  b.grad_value = gradient(c.value, c.batch * c.keys * c.values, r.value);
  b.grad_weight = gradient(c.weight, c.batch * c.hidden, r.weight);
  const bool bias = c.bias && c.mask != MaskType::none && c.mask != MaskType::boolean;
  const MaskData& m = in.mask;
  std::vector<double> grad_mask(bias ? m.batch * m.rows * m.columns : 0);
  b.grad_mask = bias ? grad_mask.data() : nullptr;
  b.grad_mask_offset = m.gradient_offset.data();
  b.grad_mask_row = m.rows == 1 ? 0 : m.columns;
  b.grad_mask_column = m.columns == 1 ? 0 : 1;
  kernels().backward(b, on_threads(threads));
  r.bias.assign(grad_mask.begin(), grad_mask.end());
  return r;
}

// What should come out, and how far rounding may move it: `bound` is the sum of the magnitudes of the terms, to be
// multiplied by the error of a score. A bound of zero demands exactly the expected value.
struct Expected {
  Results<double> value, bound;
};

template <class T>
Expected reference(const Case& c, const Inputs<T>& in, const Results<T>& sizes) {
  Expected e;
  const auto like = [](Results<double>& r, const Results<T>& s) {
    r.out.resize(s.out.size()), r.lse.resize(s.lse.size()), r.weights.resize(s.weights.size());
    r.query.resize(s.query.size()), r.key.resize(s.key.size()), r.value.resize(s.value.size());
    r.weight.resize(s.weight.size()), r.bias.resize(s.bias.size());
  };
  like(e.value, sizes), like(e.bound, sizes);
  const auto add = [&](std::vector<double> Results<double>::* which, int64_t at, double value, double bound) {
    if ((e.value.*which).empty()) return;
    (e.value.*which)[size_t(at)] += value;
    (e.bound.*which)[size_t(at)] += bound;
  };
  using R = Results<double>;
  const double eps = std::numeric_limits<T>::epsilon();
  const T keep_scale = c.dropout < 1 ? T(1 / (1 - c.dropout)) : T(0);
  std::vector<double> t(size_t(c.keys * c.hidden)), s(size_t(c.keys)), keep(size_t(c.keys)), dp(size_t(c.keys)),
      dp_bound(size_t(c.keys));
  for (int64_t n = 0; n < c.batch; ++n) {
    const T* w = in.weight.at(n, 0);
    double weight_sum = 0;
    for (int64_t h = 0; h < c.hidden; ++h) weight_sum += std::fabs(double(w[h]));
    for (int64_t i = 0; i < c.queries; ++i) {
      const int64_t row = n * c.queries + i;
      const T* q = in.query.at(n, i);
      double most = -inf, sum = 0;
      bool empty = true;
      for (int64_t j = 0; j < c.keys; ++j) {
        s[size_t(j)] = in.bias[size_t(row * c.keys + j)];
        if (s[size_t(j)] == -inf) continue;
        empty = false;
        const T* k = in.key.at(n, j);
        for (int64_t h = 0; h < c.hidden; ++h) {
          const double x = t[size_t(j * c.hidden + h)] = std::tanh(double(q[h]) + double(k[h]));
          s[size_t(j)] += c.scale * double(w[h]) * x;
        }
        most = s[size_t(j)] > most ? s[size_t(j)] : most;
      }
      for (int64_t j = 0; j < c.keys && !empty; ++j)
        if (s[size_t(j)] != -inf) sum += std::exp(s[size_t(j)] - most);
      const double lse = empty ? -inf : most + std::log(sum);
      // In units of a rounding: a score sums weights times values of about one, and a mask of up to 100; sums over
      // many keys lose more.
      const double unit = eps * (1 + c.scale * weight_sum + std::sqrt(double(c.keys)) / 4 +
                                 (c.mask == MaskType::none || c.mask == MaskType::boolean ? 0 : 100));
      e.value.lse[size_t(row)] = lse;
      e.bound.lse[size_t(row)] = empty ? 0 : unit + eps * std::fabs(lse);
      if (empty) continue;

      double delta = 0, delta_bound = 0;
      for (int64_t j = 0; j < c.keys; ++j) {
        if (s[size_t(j)] == -inf) continue;
        const double p = s[size_t(j)] = std::exp(s[size_t(j)] - lse);
        const auto word = c.dropout > 0 ? philox_word(std::uint64_t(in.seed[size_t(in.seed_offset[size_t(n)])]),
                                                      std::uint64_t(n), std::uint64_t(i), std::uint64_t(j))
                                        : 0;
        keep[size_t(j)] = c.dropout > 0 ? (word < in.drop_below ? 0.0 : double(keep_scale)) : 1.0;
        add(&R::weights, row * c.keys + j, p, p * unit);
        double g = 0, g_bound = 0;
        const T* v = in.value.at(n, j);
        for (int64_t d = 0; d < c.values; ++d) {
          const double x = v[d], up = c.grad_out ? double(in.grad_out.at(n, i)[d]) : 0;
          add(&R::out, row * c.values + d, p * keep[size_t(j)] * x, p * keep[size_t(j)] * std::fabs(x) * unit);
          add(&R::value, (n * c.keys + j) * c.values + d, p * keep[size_t(j)] * up,
              p * keep[size_t(j)] * std::fabs(up) * unit);
          g += up * x;
          g_bound += std::fabs(up * x);
        }
        g = keep[size_t(j)] == 0 ? 0 : g * keep[size_t(j)];
        g_bound *= keep[size_t(j)];
        if (c.grad_weights) {
          g += double(in.grad_weights.at(n, i)[j]);
          g_bound += std::fabs(double(in.grad_weights.at(n, i)[j]));
        }
        dp[size_t(j)] = g, dp_bound[size_t(j)] = g_bound;
        delta += p * g;
        delta_bound += p * g_bound;
      }
      if (c.grad_lse) {
        delta -= double(*in.grad_lse.at(n, i));
        delta_bound += std::fabs(double(*in.grad_lse.at(n, i)));
      }
      for (int64_t j = 0; j < c.keys; ++j) {
        const double p = s[size_t(j)];
        if (p == -inf) continue;
        const double g = p * (dp[size_t(j)] - delta), bound = p * (dp_bound[size_t(j)] + delta_bound) * unit;
        const MaskData& m = in.mask;
        if (!e.value.bias.empty())
          add(&R::bias, m.gradient_offset[size_t(n)] + (m.rows == 1 ? 0 : i * m.columns) + (m.columns == 1 ? 0 : j), g,
              bound);
        for (int64_t h = 0; h < c.hidden; ++h) {
          const double x = t[size_t(j * c.hidden + h)], slope = c.scale * double(w[h]) * (1 - x * x);
          const double slope_bound = c.scale * std::fabs(double(w[h])) * bound;
          add(&R::query, row * c.hidden + h, g * slope, slope_bound);
          add(&R::key, (n * c.keys + j) * c.hidden + h, g * slope, slope_bound);
          add(&R::weight, n * c.hidden + h, c.scale * g * x, c.scale * bound);
        }
      }
    }
  }
  return e;
}

struct Tally {
  int passed = 0, failed = 0;
  double worst = 0;  // error in units of what is allowed
};

constexpr double roundings = 4;  // of a score

template <class T>
bool close(const Case& c, const char* what, const std::vector<T>& got, const std::vector<double>& want,
           const std::vector<double>& bound, Tally& tally) {
  for (size_t k = 0; k < want.size(); ++k) {
    const double x = got[k], y = want[k];
    if (std::isnan(y) ? std::isnan(x) : x == y) continue;
    const double tiny = 1e5 * double(std::numeric_limits<T>::min());  // exponentials below the normal range become zero
    const double limit = bound[k] > 0 ? roundings * bound[k] + tiny : 0;
    const double error = std::fabs(x - y);
    if (error <= limit) {
      tally.worst = std::max(tally.worst, error / limit);
      continue;
    }
    std::printf(
        "  FAILED %s, %s, batch %ld queries %ld keys %ld hidden %ld values %ld: %s[%zu] is %.9g, not %.9g +- %.2g\n",
        c.family.c_str(), sizeof(T) == 4 ? "float" : "double", long(c.batch), long(c.queries), long(c.keys),
        long(c.hidden), long(c.values), what, k, x, y, limit);
    return false;
  }
  return true;
}

template <class T>
bool same_bits(const Case& c, const char* why, const Results<T>& a, const Results<T>& b) {
  bool same = true;
  Results<T>().each([&](const char* what, std::vector<T> Results<T>::* which) {
    const std::vector<T>&x = a.*which, &y = b.*which;
    if (!same || x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0) return;
    size_t k = 0;
    while (std::memcmp(&x[k], &y[k], sizeof(T)) == 0) ++k;
    std::printf(
        "  FAILED %s, %s, batch %ld queries %ld keys %ld hidden %ld values %ld: %s: %s[%zu] is %.9g, not %.9g\n",
        c.family.c_str(), sizeof(T) == 4 ? "float" : "double", long(c.batch), long(c.queries), long(c.keys),
        long(c.hidden), long(c.values), why, what, k, double(y[k]), double(x[k]));
    same = false;
  });
  return same;
}

// NaN or Inf into keys or values. Returns false if the case offers no place for it.
template <class T>
bool poison(const Case& c, Inputs<T>& in) {
  const T bad[] = {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                   -std::numeric_limits<T>::infinity()};
  bool done = false;
  for (int64_t n = 0; n < c.batch; ++n)
    for (int64_t j = 0; j < c.keys; ++j) {
      bool attended = false;
      for (int64_t m = 0; m < c.batch; ++m)
        for (int64_t i = 0; i < c.queries && (m == n || c.shared); ++i) attended = attended || in.attends(c, m, i, j);
      const T x = bad[j % 3];
      if (c.poison == Poison::masked_keys && !attended)
        for (int64_t h = 0; h < c.hidden; ++h) in.key.at(n, j)[h] = x, done = true;
      if (c.poison == Poison::masked_values && !attended)
        for (int64_t d = 0; d < c.values; ++d) in.value.at(n, j)[d] = x, done = true;
      if ((c.poison == Poison::a_key || c.poison == Poison::infinite_key) && attended && !done && c.hidden > 0)
        in.key.at(n, j)[c.hidden / 2] = bad[c.poison == Poison::a_key ? 0 : 1 + j % 2], done = true;
    }
  return done;
}

template <class T>
bool check(const Case& c, std::uint64_t seed, Tally& tally) {
  Random random(seed);
  Inputs<T> in(c, random);
  Results<T> got = run(c, in, 1);
  bool good = same_bits(c, "three threads differ", got, run(c, in, 3));
  if (c.poison != Poison::none) {
    if (!poison(c, in)) return true;
    const Results<T> poisoned = run(c, in, 1);
    if (c.poison == Poison::masked_keys || c.poison == Poison::masked_values)
      good = same_bits(c, "masked entries change the result", got, poisoned) && good;
    got = poisoned;
  }
  Expected expected = reference(c, in, got);
  expected.value.each([&](const char* what, std::vector<double> Results<double>::* which) {
    const std::map<std::string, std::vector<T>*> results = {
        {"out", &got.out},      {"lse", &got.lse},          {"weights", &got.weights},    {"grad_query", &got.query},
        {"grad_key", &got.key}, {"grad_value", &got.value}, {"grad_weight", &got.weight}, {"grad_mask", &got.bias}};
    good = close(c, what, *results.at(what), expected.value.*which, expected.bound.*which, tally) && good;
  });
  return good;
}

std::vector<Case> table() {
  std::vector<Case> cases;
  const auto add = [&](const char* family, std::vector<int64_t> shape, const std::function<void(Case&)>& with = {}) {
    Case c{};
    c.family = family;
    c.batch = shape[0], c.queries = shape[1], c.keys = shape[2], c.hidden = shape[3], c.values = shape[4];
    if (with) with(c);
    cases.push_back(c);
  };

  // A vector holds 2 to 16 elements, a key block two vectors, a tile four blocks.
  for (const int64_t keys : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257}) {
    add("keys", {1, 1, keys, 5, 3});
    add("keys", {2, 3, keys, 6, 7});
    add("keys", {1, 5, keys, 3, 9}, [](Case& c) { c.weights = c.grad_weights = true; });
  }
  for (const int64_t hidden :
       {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 131, 257}) {
    add("features", {1, 1, 9, hidden, 4});
    add("features", {1, 4, 17, hidden, 4});
    add("features", {2, 3, 6, hidden, 2}, [](Case& c) { c.padded = true; });
  }
  for (const int64_t values : {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65}) {
    add("values", {1, 1, 9, 4, values});
    add("values", {2, 6, 35, 4, values});
  }
  for (const int64_t queries : {0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 127, 128, 129, 257}) {
    add("queries", {1, queries, 19, 5, 3});
    add("queries", {2, queries, 6, 4, 5}, [](Case& c) { c.right = 0; });
  }
  for (const auto& shape : std::vector<std::vector<int64_t>>{{0, 3, 4, 5, 6},
                                                             {2, 0, 4, 5, 6},
                                                             {2, 3, 0, 5, 6},
                                                             {2, 3, 4, 0, 6},
                                                             {2, 3, 4, 5, 0},
                                                             {0, 0, 0, 0, 0},
                                                             {1, 3, 4, 0, 0},
                                                             {1, 1, 1, 1, 1}})
    for (const bool weights : {false, true})
      add("empty", shape, [&](Case& c) { c.weights = c.grad_weights = c.grad_lse = weights; });

  for (const double reach : {1e-3, 0.1, 0.9, 1.1, 9.9, 10.5, 30.0, 90.0, 200.0})
    for (const bool mixed : {false, true})
      for (const int64_t queries : {1, 2, 21}) {
        if (mixed && reach < 0.5) continue;
        add("ranges", {2, queries, 150, 13, 5}, [&](Case& c) { c.reach = reach, c.mixed = mixed; });
        add("ranges", {1, queries, 70, 37, 4}, [&](Case& c) {
          c.reach = reach, c.mixed = mixed, c.mask = MaskType::boolean, c.lengths = Lengths::per_row,
          c.weights = c.grad_weights = true;
        });
      }
  for (const double reach : {0.0, 1e-30, 1e-3, 30.0, 1e4})
    for (const int64_t queries : {1, 5})
      add("weight sizes", {2, queries, 40, 11, 4},
          [&](Case& c) { c.weight_reach = reach, c.scale = reach > 100 ? 1e-3 : 1.7; });

  for (const MaskType type :
       {MaskType::boolean, MaskType::float16, MaskType::bfloat16, MaskType::float32, MaskType::float64})
    for (int how = 0; how < 16; ++how)
      add("masks", {how & 1 ? 2 : 3, how % 3 ? 7 : 1, how % 5 ? 41 : 131, 6, 5}, [&](Case& c) {
        c.mask = type, c.one_entry = how & 1, c.one_row = how & 2, c.one_column = how & 4, c.turned = how & 8;
        c.masked = how % 2 ? 0.3 : 0.95, c.weights = how % 3 == 0, c.grad_weights = how % 4 == 0,
        c.grad_lse = how % 5 == 0;
        c.bias = how != 9;
      });
  for (const Lengths lengths : {Lengths::per_entry, Lengths::per_row})
    for (const int64_t queries : {1, 6, 40})
      for (const int64_t keys : {5, 66, 300})
        add("lengths", {4, queries, keys, 6, 5}, [&](Case& c) { c.lengths = lengths, c.grad_lse = true; });
  for (const int64_t left : {int64_t(-1), int64_t(0), int64_t(3), int64_t(70), std::numeric_limits<int64_t>::max()})
    for (const int64_t right : {int64_t(-1), int64_t(0), int64_t(2), int64_t(90), std::numeric_limits<int64_t>::max()})
      add("windows", {1, 140, 150, 3, 5}, [&](Case& c) { c.left = left, c.right = right, c.weights = right == 2; });
  for (const int64_t keys : {1, 20, 200})
    add("windows", {2, 60, keys, 3, 4}, [](Case& c) { c.left = 4, c.right = 0, c.lengths = Lengths::per_entry; });

  for (const double dropout : {0.1, 0.5, 0.97, 1.0})
    for (const int64_t queries : {1, 3, 20})
      add("dropout", {3, queries, 77, 6, 5}, [&](Case& c) {
        c.dropout = dropout, c.grad_weights = c.weights = queries != 3, c.grad_lse = queries == 1,
        c.shared = queries == 20;
        c.lengths = queries == 3 ? Lengths::per_entry : Lengths::none, c.right = queries == 20 ? 5 : -1;
      });
  for (int upstream = 0; upstream < 8; ++upstream)
    for (int needed = 0; needed < 32; needed += 1 + upstream)
      add("gradients", {2, upstream & 1 ? 1 : 5, 37, 9, 6}, [&](Case& c) {
        c.grad_out = upstream & 1, c.grad_weights = upstream & 2, c.grad_lse = upstream & 4, c.weights = needed & 1;
        c.query = needed & 1, c.key = needed & 2, c.value = needed & 4, c.weight = needed & 8, c.bias = needed & 16;
        c.mask = needed & 16 ? MaskType::float32 : MaskType::none;
      });
  for (const int64_t queries : {1, 2, 9})
    for (int how = 0; how < 8; ++how)
      add("strides", {3, queries, 35, 10, 11},
          [&](Case& c) { c.shared = how & 1, c.padded = how & 2, c.repeated = how & 4; });

  // From 4096 keys on, keys are split when there are few rows; from 2^21 weights on, backward takes the rows in pieces.
  for (const int64_t keys : {4095, 4096, 4097, 6200, 9001})
    add("split keys", {1, 1, keys, 4, 5}, [](Case& c) { c.weights = c.grad_weights = c.grad_lse = true; });
  add("split keys", {2, 3, 5000, 3, 2}, [](Case& c) { c.lengths = Lengths::per_row, c.dropout = 0.3; });
  add("split keys", {1, 2, 20011, 5, 3},
      [](Case& c) { c.mask = MaskType::boolean, c.one_row = true, c.weights = true; });
  add("split keys", {1, 1, 33000, 2, 1}, [](Case& c) { c.mask = MaskType::float16, c.masked = 0.999; });
  add("split keys", {1, 3, 17000, 4, 5},
      [](Case& c) { c.lengths = Lengths::per_entry, c.mixed = true, c.reach = 100; });
  add("workspace pieces", {1, 17, 131073, 1, 1}, [](Case& c) { c.left = 7000, c.right = 60000; });
  add("workspace pieces", {3, 9, 110000, 1, 1}, [](Case& c) { c.right = 900, c.value = false; });

  for (const Poison poison : {Poison::masked_keys, Poison::masked_values, Poison::a_key, Poison::infinite_key})
    for (const int64_t queries : {1, 3, 18})
      for (int how = 0; how < 6; ++how)
        add("NaN and Inf", {2, queries, how & 1 ? 39 : 140, 10, 9}, [&](Case& c) {
          c.poison = poison, c.weights = how & 1, c.grad_weights = how & 1;
          if (how < 2) c.lengths = Lengths::per_entry;
          if (how == 2 || how == 3) c.mask = MaskType::boolean, c.one_row = c.one_entry = true, c.shared = true;
          if (how > 3)
            c.mask = MaskType::float32, c.one_row = true, c.dropout = how == 5 ? 0.4 : 0, c.mixed = true, c.reach = 30;
        });

  Random random(2015);
  const std::vector<int64_t> small = {1, 2, 3, 4, 5, 8}, rows = {1, 1, 2, 3, 4, 7, 16, 17, 33, 130},
                             keys = {1, 5, 8, 15, 31, 33, 64, 65, 100, 129, 200},
                             features = {1, 3, 4, 6, 8, 16, 17, 24, 32, 33, 40};
  for (int k = 0; k < 120; ++k)
    add("random",
        {random.pick(small), random.pick(rows), random.pick(keys), random.pick(features), random.pick(features)},
        [&](Case& c) {
          if (c.queries > 100) c.batch = 1;
          c.reach = random.pick<double>({0.5, 3, 12, 150}), c.mixed = random.chance(0.5),
          c.scale = random.pick<double>({1, 0.3});
          c.mask = random.pick<MaskType>({MaskType::none, MaskType::boolean, MaskType::float16, MaskType::bfloat16,
                                          MaskType::float32, MaskType::float64});
          c.masked = random.pick<double>({0.1, 0.6, 0.97});
          c.one_entry = random.chance(0.3), c.one_row = random.chance(0.3), c.one_column = random.chance(0.1),
          c.turned = random.chance(0.3);
          c.lengths = random.pick<Lengths>({Lengths::none, Lengths::per_entry, Lengths::per_row});
          c.left = random.pick<int64_t>({-1, -1, 0, 9, 50}), c.right = random.pick<int64_t>({-1, -1, 0, 6, 40});
          c.dropout = random.pick<double>({0, 0, 0.25}), c.weights = random.chance(0.4);
          c.grad_out = random.chance(0.8), c.grad_weights = random.chance(0.4), c.grad_lse = random.chance(0.4);
          c.query = random.chance(0.8), c.key = random.chance(0.8), c.value = random.chance(0.8),
          c.weight = random.chance(0.8);
          c.shared = random.chance(0.3), c.padded = random.chance(0.4), c.repeated = random.chance(0.2);
        });
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  Tally all;
  // Random123's published answer to an all-zero counter and key.
  ++(philox_word(0, 0, 0, 0) == 0x6627e8d5u && philox_word(0, 0, 0, 3) == 0x9b00dbd8u ? all.passed : all.failed);
  std::printf("kernels: %s\n", kernels().name);
  const std::vector<Case> cases = table();
  bool ran = false;
  for (size_t begin = 0, end; begin < cases.size(); begin = end) {
    Tally tally;
    for (end = begin; end < cases.size() && cases[end].family == cases[begin].family; ++end) {
      if (cases[end].family.find(wanted) == std::string::npos) continue;
      ++(check<float>(cases[end], end, tally) ? tally.passed : tally.failed);
      ++(check<double>(cases[end], end, tally) ? tally.passed : tally.failed);
    }
    if (tally.passed + tally.failed == 0) continue;
    ran = true;
    std::printf("%s: %d passed, %d failed, largest error %.2f of the bound\n", cases[begin].family.c_str(),
                tally.passed, tally.failed, tally.worst);
    all.passed += tally.passed;
    all.failed += tally.failed;
  }
  if (!ran) {
    std::fprintf(stderr, "No family's name contains '%s'. The families:", wanted.c_str());
    for (size_t k = 0; k < cases.size(); ++k)
      if (k == 0 || cases[k].family != cases[k - 1].family) std::fprintf(stderr, " %s,", cases[k].family.c_str());
    std::fprintf(stderr, " or no argument for all.\n");
    return 2;
  }
  std::printf("%d passed, %d failed\n", all.passed, all.failed);
  return all.failed > 0;
}
