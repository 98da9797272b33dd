// The features of a location, x_fj = sum_cd filter_fcd input_c(j + d - K/2), and their gradients (math.md, eq. 19, 20).
// All three are correlations, out_r(j) += sum_m taps_r(m) in(j + m): of the inputs with the filters, of the gradient
// with the filters reversed, and of the inputs with the gradient.

constexpr int correlate_rows = 4;  // outputs side by side in registers
constexpr int correlate_vectors = VECTOR_BYTES == 64 ? 4 : 2;
constexpr std::int64_t taps_summed = 256;  // of a partial sum
constexpr std::int64_t filter_parts = 16;  // partial sums over entries of the filters' gradient

// Columns of a block of vectors: rows of outputs are whole blocks, and their inputs are read as far.
template <class T>
constexpr std::int64_t correlate_columns = correlate_vectors * lanes<T>;

template <class T>
struct Taps {
  const T* data;  // tap m of row r lies at data[r * row + m * step]
  std::int64_t row, step;
};

// R outputs in S phases: output r takes every S-th tap of row r / S, from tap r % S on.
template <class T, int R, int S, int V>
inline void correlate_block(const T* in, Taps<T> taps, std::int64_t count, T* out, std::int64_t out_row) {
  constexpr int L = lanes<T>;
  Vec<T> sum[R][V] = {};
  const T* tap = taps.data;
  for (std::int64_t m = 0; m < count; ++m, in += S, tap += S * taps.step) {
    Vec<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load(in + v * L);
    for (int r = 0; r < R; ++r) {
      const T factor = tap[r / S * taps.row + r % S * taps.step];
      for (int v = 0; v < V; ++v) sum[r][v] += x[v] * factor;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * out_row + v * L, load(out + r * out_row + v * L) + sum[r][v]);
}

template <class T, int R, int S>
void correlate_all(const T* in, Taps<T> taps, std::int64_t count, T* out, std::int64_t out_row, std::int64_t length) {
  constexpr int L = lanes<T>, V = correlate_vectors;
  for (std::int64_t m = 0; m < count; m += taps_summed) {
    const std::int64_t some = std::min(taps_summed, count - m);
    const Taps<T> from = {taps.data + m * S * taps.step, taps.row, taps.step};
    std::int64_t j = 0;
    for (; j + V / 2 * L < length; j += V * L)
      correlate_block<T, R, S, V>(in + m * S + j, from, some, out + j, out_row);
    if (j < length) correlate_block<T, R, S, V / 2>(in + m * S + j, from, some, out + j, out_row);
  }
}

// Adds up to correlate_rows rows of outputs to `sums`. One or two rows alone would load a vector for every one or two
// multiply-adds: they are computed in four or two phases. Phase s has its part of output j at column j + s;
// store_outputs adds the phases.
template <class T>
void correlate(const T* in, Taps<T> taps, std::int64_t rows, std::int64_t count, T* sums, std::int64_t row,
               std::int64_t length) {
  if (rows == 4) return correlate_all<T, 4, 1>(in, taps, count, sums, row, length);
  if (rows == 3) return correlate_all<T, 3, 1>(in, taps, count, sums, row, length);
  const std::int64_t S = correlate_rows / rows, rest = count % S, end = length + S - 1;
  if (rows == 2) correlate_all<T, 4, 2>(in, taps, count / S, sums, row, end);
  if (rows == 1) correlate_all<T, 4, 4>(in, taps, count / S, sums, row, end);
  // Taps are not padded with zeros: NaN times zero would reach outputs that do not depend on the NaN.
  in += count - rest;
  taps.data += (count - rest) * taps.step;
  if (rows == 2 && rest == 1) correlate_all<T, 2, 1>(in, taps, 1, sums, 2 * row, end);
  if (rows == 1 && rest == 1) correlate_all<T, 1, 4>(in, taps, 1, sums, row, end);
  if (rows == 1 && rest == 2) correlate_all<T, 2, 4>(in, taps, 1, sums, row, end);
  if (rows == 1 && rest == 3) correlate_all<T, 3, 4>(in, taps, 1, sums, row, end);
}

template <class T>
void store_outputs(const T* sums, std::int64_t row, std::int64_t rows, T* out, std::int64_t out_row,
                   std::int64_t length) {
  const std::int64_t S = rows > 2 ? 1 : correlate_rows / rows;
  for (std::int64_t r = 0; r < rows; ++r, sums += S * row, out += out_row)
    for (std::int64_t j = 0; j < length; j += lanes<T>) {
      Vec<T> total = load(sums + j);
      for (std::int64_t s = 1; s < S; ++s) total += load(sums + s * row + j + s);
      store_part<T>(out + j, total, length - j);
    }
}

// A copy of a row between zeros: `before` of them, and behind it as many as correlate may read.
template <class T>
class PaddedRow {
 public:
  const T* fill(const T* x, std::int64_t count, std::int64_t before) {
    const std::int64_t behind = before + 2 * correlate_columns<T> + correlate_rows;
    T* to = memory_.get(before + count + behind);
    std::fill(to, to + before, T(0));
    std::copy(x, x + count, to + before);
    std::fill(to + before + count, to + before + count + behind, T(0));
    return to;
  }

 private:
  Buffer<T> memory_;
};

template <class T>
std::int64_t output_row(std::int64_t length) {
  return round_up(length + correlate_rows, correlate_columns<T>) + lanes<T>;
}

template <class T>
void location_features(const LocationFeatures<T>& p, const ParallelFor& parallel_for) {
  const std::int64_t blocks = (p.filters + correlate_rows - 1) / correlate_rows, row = output_row<T>(p.keys);
  const std::int64_t taps = p.channels * p.width;
  parallel_for(p.batch * blocks, correlate_rows * taps * p.keys, [&](Tasks& tasks) {
    PaddedRow<T> padded;
    Buffer<T> memory;
    T* sums = memory.get(correlate_rows * row);
    for (std::int64_t task; tasks.take(task);) {
      const std::int64_t n = task / blocks, f0 = task % blocks * correlate_rows;
      const std::int64_t some = std::min<std::int64_t>(correlate_rows, p.filters - f0);
      std::fill(sums, sums + correlate_rows * row, T(0));
      for (std::int64_t c = 0; c < p.channels; ++c) {
        const T* in = padded.fill(p.inputs.at(n, c), p.keys, p.width / 2);
        const Taps<T> filter = {p.filter + f0 * taps + c * p.width, taps, 1};
        correlate(in, filter, some, p.width, sums, row, p.keys);
      }
      store_outputs(sums, row, some, p.out + (n * p.filters + f0) * p.keys, p.keys, p.keys);
    }
  });
}

// The gradient of channels [c0, c0 + some) of entry n.
template <class T>
void inputs_gradient(const LocationFeaturesBackward<T>& p, std::int64_t n, std::int64_t c0, std::int64_t some,
                     PaddedRow<T>& padded, T* sums, std::int64_t row) {
  std::fill(sums, sums + correlate_rows * row, T(0));
  for (std::int64_t f = 0; f < p.filters; ++f) {
    const T* in = padded.fill(p.grad.at(n, f), p.keys, p.width / 2);
    const Taps<T> reversed = {p.filter + (f * p.channels + c0 + 1) * p.width - 1, p.width, -1};
    correlate(in, reversed, some, p.width, sums, row, p.keys);
  }
  store_outputs(sums, row, some, p.grad_inputs + (n * p.channels + c0) * p.keys, p.keys, p.keys);
}

// Entries [first, last)'s share of the gradient of filters [f0, f0 + some), channel c, into `sums`.
template <class T>
void filters_gradient(const LocationFeaturesBackward<T>& p, std::int64_t first, std::int64_t last, std::int64_t f0,
                      std::int64_t some, std::int64_t c, PaddedRow<T>& padded, T* sums, std::int64_t row) {
  std::fill(sums, sums + correlate_rows * row, T(0));
  for (std::int64_t n = first; n < last; ++n) {
    const T* in = padded.fill(p.inputs.at(n, c), p.keys, p.width / 2);
    const Taps<T> grad = {p.grad.at(n, f0), p.grad.row, 1};
    correlate(in, grad, some, p.keys, sums, row, p.width);
  }
}

template <class T>
void location_features_backward(const LocationFeaturesBackward<T>& p, const ParallelFor& parallel_for) {
  constexpr std::int64_t R = correlate_rows;
  const std::int64_t taps = p.channels * p.width, all_taps = p.filters * taps;
  if (p.grad_inputs) {
    const std::int64_t blocks = (p.channels + R - 1) / R, row = output_row<T>(p.keys);
    parallel_for(p.batch * blocks, p.filters * p.width * p.keys, [&](Tasks& tasks) {
      PaddedRow<T> padded;
      Buffer<T> memory;
      for (std::int64_t task; tasks.take(task);) {
        const std::int64_t c0 = task % blocks * R;
        inputs_gradient(p, task / blocks, c0, std::min(R, p.channels - c0), padded, memory.get(R * row), row);
      }
    });
  }
  if (!p.grad_filters) return;
  const std::int64_t parts = std::min(p.batch, filter_parts), part = parts ? (p.batch + parts - 1) / parts : 0;
  const std::int64_t blocks = (p.filters + R - 1) / R, row = output_row<T>(p.width);
  Buffer<T> parts_memory;
  T* sum = parts_memory.get(parts * all_taps);
  parallel_for(parts * blocks * p.channels, part * R * p.width * p.keys, [&](Tasks& tasks) {
    PaddedRow<T> padded;
    Buffer<T> memory;
    T* sums = memory.get(R * row);
    for (std::int64_t task; tasks.take(task);) {
      const std::int64_t c = task % p.channels, f0 = task / p.channels % blocks * R, k = task / p.channels / blocks;
      const std::int64_t some = std::min(R, p.filters - f0);
      filters_gradient(p, k * part, std::min((k + 1) * part, p.batch), f0, some, c, padded, sums, row);
      store_outputs(sums, row, some, sum + k * all_taps + f0 * taps + c * p.width, taps, p.width);
    }
  });
  std::fill(p.grad_filters, p.grad_filters + all_taps, T(0));
  for (std::int64_t k = 0; k < parts; ++k)
    for (std::int64_t at = 0; at < all_taps; ++at) p.grad_filters[at] += sum[k * all_taps + at];
}
