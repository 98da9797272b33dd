// How the pass over features is divided into tasks, and how their sums are combined.

constexpr std::int64_t gradient_keys = strip_keys;              // of a tile in the pass over features
constexpr std::int64_t part_elements = 2 * workspace_elements;  // of dq, over the splits

// Fewer tasks than this leave threads idle: then keys are split into shorter ranges too.
constexpr std::int64_t few_tasks = 4, few_split_keys = 256;

// The pass over features works on two vectors of features at once, which share a reciprocal. It joins factors of a
// single pair (i, j), so no pair depends on another one, not even by rounding.
constexpr int feature_vectors = 2;

// The factors of sums over pairs: G is multiplied by `early` in the direct form, the sums by `late` and then by w, in
// the plain layer's order. An extreme scale is part of `early`. A nonfinite weight has already made G NaN wherever it
// matters; as a factor it is replaced by 0, so that empty sums stay 0.
template <class T>
struct FeatureFactors {
  T early, late;       // G times early, in the direct form alone; dq, dk = late w sum
  double of_weight;    // dw = of_weight sum
  std::int64_t width;  // of a padded row of features
  const T* weight;     // [entry][width]

  FeatureFactors(const Backward<T>& p, const Workspace<T>& ws, std::int64_t padded, Buffer<T>& memory) : width(padded) {
    const T size = std::fabs(p.scale);
    const bool regular = size >= T(0x1p-40) && size <= T(0x1p40);
    early = regular ? T(1) : p.scale;
    late = regular ? T(4) * p.scale : T(4);
    of_weight = regular ? double(p.scale) : 1;
    T* to = memory.get(ws.entries * width);
    for (std::int64_t n = 0; n < ws.entries; ++n)
      for (std::int64_t h = 0; h < width; ++h) {
        const T w = h < p.hidden ? p.weight.at(ws.entry0 + n, 0)[h] : T(0);
        to[n * width + h] = std::isfinite(w) ? w : T(0);
      }
    weight = to;
  }
};

// Tasks are groups of features and, where these are few, ranges of keys, whose shares of dq and dw are added up
// afterwards. They depend on the shape, and on which keys rows may attend to.
template <class T>
struct FeatureTasks {
  std::int64_t pieces, piece;  // of the features
  std::int64_t splits, split;  // of the keys
  std::int64_t width;          // of a padded row of features

  FeatureTasks(const Backward<T>& p, const Workspace<T>& ws) {
    constexpr std::int64_t F = feature_vectors * lanes<T>;
    width = round_up(p.hidden, F);
    piece = ws.rows == 1 ? width : F;
    pieces = width / piece;
    const std::int64_t keys = ws.key_end() - ws.key_begin(), most = part_elements / (ws.entries * ws.rows * width);
    const std::int64_t tasks = ws.entries * pieces, few = ws.rows > 1 ? few_tasks / tasks : 1;
    splits = std::max(std::min(tasks_wanted / tasks, keys / split_keys), std::min(few, keys / few_split_keys));
    splits = std::max<std::int64_t>(1, std::min(splits, most));
    split = round_up((std::max<std::int64_t>(keys, 1) + splits - 1) / splits, gradient_keys);
    splits = (keys + split - 1) / split;
  }
};

// Adds up dq and dw over the ranges of keys, in order; dw accumulates in weight_sum until the last rows are done.
template <class T>
void add_feature_parts(const Backward<T>& p, const Workspace<T>& ws, const FeatureTasks<T>& share,
                       const FeatureFactors<T>& factors, std::int64_t n, const T* part_query, const double* part_weight,
                       double* weight_sum) {
  const T* w = factors.weight + n * share.width;
  for (std::int64_t r = 0; r < ws.rows && p.grad_query; ++r) {
    T* out = p.grad_query + ((ws.entry0 + n) * p.queries + ws.row0 + r) * p.hidden;
    for (std::int64_t h = 0; h < p.hidden; ++h) out[h] = 0;
    for (std::int64_t k = 0; k < share.splits; ++k) {
      const T* part = part_query + ((k * ws.entries + n) * ws.rows + r) * share.width;
      for (std::int64_t h = 0; h < p.hidden; ++h) out[h] += part[h];
    }
    for (std::int64_t h = 0; h < p.hidden; ++h) out[h] = out[h] * factors.late * w[h];
  }
  if (!p.grad_weight) return;
  for (std::int64_t h = 0; h < p.hidden; ++h) {
    double sum = ws.row0 > 0 ? weight_sum[n * share.width + h] : 0;
    for (std::int64_t k = 0; k < share.splits; ++k) sum += part_weight[(k * ws.entries + n) * share.width + h];
    weight_sum[n * share.width + h] = sum;
    if (ws.row0 + ws.rows == p.queries) p.grad_weight[(ws.entry0 + n) * p.hidden + h] = T(sum * factors.of_weight);
  }
}
