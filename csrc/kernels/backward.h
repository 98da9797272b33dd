// Gradients. With P = exp(S - lse), D the keep factors, and the upstream gradients of out, weights and lse,
//
//     dP = D o (dO V^T) + dWeights    delta_i = sum_j P_ij dP_ij      G = P o (dP - delta + dlse)
//     dV = (P o D)^T dO               dMask = G                       dS = scale G
//     dq_ih = w_h sum_j dS_ij (1 - t^2)    dk_jh = w_h sum_i dS_ij (1 - t^2)    dw_h = sum_ij dS_ij t_ijh
//
// and, in the notation of forms.h with r = 1/(a + b),
//
//     t = (b - a) r        1 - t^2 = 4 a b r^2
//
// so that sum_j G b r^2 (times 4 a_i) gives dq, sum_i G a r^2 (times 4 b_j) gives dk, and all share one reciprocal
// (math.md, eq. 9 to 13).
//
// P and G are kept for a bounded number of query rows at a time. Three passes over them follow, each of which owns what
// it writes, so that nothing is atomic and every sum has a fixed order:
//     rows -> P, G        keys -> dV        features -> dq, dk, dw (lanes run over features)
// Where the caller passes G, only the last of them runs.

// The mask's gradient is G, summed over the dims that the mask broadcasts; each task owns a range of columns.
template <class T>
void mask_pass(const Backward<T>& p, const Workspace<T>& ws, std::int64_t key0, std::int64_t count) {
  constexpr int K = block_keys<T>;
  for (std::int64_t n = ws.entry0; n < ws.entry0 + ws.entries; ++n)
    for (std::int64_t i = ws.row0; i < ws.row0 + ws.rows; ++i) {
      const typename Workspace<T>::Row row = ws.row(n, i);
      double* out = p.grad_mask + p.grad_mask_offset[n] + i * p.grad_mask_row;
      for (std::int64_t j = key0; j < key0 + count; ++j) {
        const std::int64_t column = row.column(j);
        if (column >= 0 && row.attended[column / K]) out[j * p.grad_mask_column] += row.gradient[column];
      }
    }
}

template <class T>
void zero(T* x, std::int64_t n) {
  if (x) std::memset(x, 0, n * sizeof(T));
}

// The three passes over one piece of the workspace.
template <class T>
class BackwardPiece {
 public:
  BackwardPiece(const Backward<T>& problem, Workspace<T>& workspace, const ParallelFor& parallel)
      : p(problem), ws(workspace), parallel_for(parallel) {}

  void run() {
    if (ws.row0 == 0) clear_others();
    p.grad_scores ? given_to_gradients() : rows_to_weights();
    if (p.grad_value && p.grad_out && p.values > 0) keys_to_values();
    if ((p.grad_query || p.grad_key || p.grad_weight) && p.hidden > 0) features_to_gradients();
    if (p.grad_mask) to_mask();
  }

 private:
  static constexpr std::int64_t TK = tile_keys<T>;

  // Zeroes the gradients of keys that no row of their entries' first piece may attend to: later pieces add to them.
  void clear_others() {
    for (std::int64_t n = ws.entry0; n < ws.entry0 + ws.entries; ++n)
      for (const auto& [begin, end] : {std::pair(std::int64_t(0), ws.key_begin()), std::pair(ws.key_end(), p.keys)}) {
        if (p.grad_key) zero<T>(p.grad_key + (n * p.keys + begin) * p.hidden, (end - begin) * p.hidden);
        if (p.grad_value) zero<T>(p.grad_value + (n * p.keys + begin) * p.values, (end - begin) * p.values);
      }
  }

  void rows_to_weights() {
    const std::int64_t rows = rows_per_block(p, ws.entries, ws.rows), blocks = (ws.rows + rows - 1) / rows;
    parallel_for(ws.entries * blocks, rows * ws.keys_per_row() * (p.hidden + p.values + 16), [&](Tasks& tasks) {
      RowPass<T> pass(p, ws);
      for (std::int64_t task; tasks.take(task);) {
        const std::int64_t row0 = task % blocks * rows;
        pass.run(ws.entry0 + task / blocks, ws.row0 + row0, std::min(rows, ws.rows - row0));
      }
    });
  }

  void given_to_gradients() {
    parallel_for(ws.entries * ws.rows, 2 * ws.keys_per_row(), [&](Tasks& tasks) {
      Buffer<T> bias;
      for (std::int64_t task; tasks.take(task);)
        given_row(p, ws, ws.entry0 + task / ws.rows, ws.row0 + task % ws.rows, bias.get(strip_keys));
    });
  }

  void keys_to_values() {
    const std::int64_t begin = ws.key_begin(), pieces = (ws.key_end() - begin + TK - 1) / TK;
    parallel_for(ws.entries * pieces, ws.rows * TK * p.values, [&](Tasks& tasks) {
      ValuePass<T> pass(p, ws);
      for (std::int64_t task; tasks.take(task);) {
        const std::int64_t key0 = begin + task % pieces * TK;
        pass.run(ws.entry0 + task / pieces, key0, std::min(TK, p.keys - key0));
      }
    });
  }

  void features_to_gradients() {
    const FeatureTasks<T> share(p, ws);
    const FeatureFactors<T> factors(p, ws, share.width, weight_factors);
    T* part_query = query_parts.get(share.splits * ws.entries * ws.rows * share.width);
    double* part_weight = weight_parts.get(share.splits * ws.entries * share.width);
    double* weight_sum = weight_sums.get(ws.entries * share.width);
    parallel_for(ws.entries * share.pieces * share.splits, ws.rows * share.split * share.piece * 4, [&](Tasks& tasks) {
      FeaturePass<T> pass(p, ws, factors);
      for (std::int64_t task; tasks.take(task);) {
        const std::int64_t f = task % share.pieces, k = task / share.pieces % share.splits;
        const std::int64_t n = task / share.pieces / share.splits, at = k * ws.entries + n;
        pass.run(ws.entry0 + n, f * share.piece, share.piece, ws.key_begin() + k * share.split,
                 std::min(ws.key_begin() + (k + 1) * share.split, ws.key_end()),
                 part_query + at * ws.rows * share.width, part_weight + at * share.width, share.width);
      }
    });
    parallel_for(ws.entries, ws.rows * share.width * share.splits, [&](Tasks& tasks) {
      for (std::int64_t n; tasks.take(n);)
        add_feature_parts(p, ws, share, factors, n, part_query, part_weight, weight_sum);
    });
  }

  void to_mask() {
    const std::int64_t width = p.grad_mask_column ? TK : p.keys, pieces = (p.keys + width - 1) / width;
    parallel_for(pieces, ws.entries * ws.rows * width, [&](Tasks& tasks) {
      for (std::int64_t task; tasks.take(task);) mask_pass(p, ws, task * width, std::min(width, p.keys - task * width));
    });
  }

  const Backward<T>& p;
  Workspace<T>& ws;
  const ParallelFor& parallel_for;
  Buffer<T> query_parts, weight_factors;
  Buffer<double> weight_parts, weight_sums;
};

template <class T>
void backward(const Backward<T>& p, const ParallelFor& parallel_for) {
  if (!p.grad_out) zero<T>(p.grad_value, p.batch * p.keys * p.values);
  if (p.batch == 0 || p.queries == 0 || p.keys == 0) {
    zero<T>(p.grad_weight, p.batch * p.hidden);
    zero<T>(p.grad_query, p.batch * p.queries * p.hidden);
    zero<T>(p.grad_key, p.batch * p.keys * p.hidden);
    zero<T>(p.grad_value, p.batch * p.keys * p.values);
    return;
  }

  Workspace<T> ws(p, bool(p.grad_scores));
  BackwardPiece<T> piece(p, ws, parallel_for);
  while (ws.next()) piece.run();
}
