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
// Where the caller gives G, only the last one is left.

constexpr std::int64_t workspace_elements = std::int64_t(1) << 21;  // of P, and as many of G

// The mask's gradient is G, summed over what the mask broadcasts; each task owns a range of columns.
template <class T>
void mask_pass(const Backward<T>& p, const Workspace<T>& ws, std::int64_t key0, std::int64_t count) {
  constexpr int K = block_keys<T>;
  for (std::int64_t n = ws.entry0; n < ws.entry0 + ws.entries; ++n)
    for (std::int64_t i = ws.row0; i < ws.row0 + ws.rows; ++i) {
      const std::int64_t at = ws.index(n, i);
      double* out = p.grad_mask + p.grad_mask_offset[n] + i * p.grad_mask_row;
      for (std::int64_t j = key0; j < key0 + count; ++j)
        if (ws.attended[at * ws.blocks + j / K]) out[j * p.grad_mask_column] += ws.gradient[at * ws.keys + j];
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
    p.grad_scores ? given_to_gradients() : rows_to_weights();
    if (p.grad_value && p.grad_out && p.values > 0) keys_to_values();
    if ((p.grad_query || p.grad_key || p.grad_weight) && p.hidden > 0) features_to_gradients();
    if (p.grad_mask) to_mask();
  }

 private:
  static constexpr std::int64_t TK = tile_keys<T>;

  void rows_to_weights() {
    const std::int64_t rows = rows_per_block(ws.entries, ws.rows, p.threads), blocks = (ws.rows + rows - 1) / rows;
    parallel_for(ws.entries * blocks, rows * p.keys * (p.hidden + p.values + 16), [&](Tasks& tasks) {
      RowPass<T> pass(p, ws);
      for (std::int64_t task; tasks.take(task);) {
        const std::int64_t row0 = task % blocks * rows;
        pass.run(ws.entry0 + task / blocks, ws.row0 + row0, std::min(rows, ws.rows - row0));
      }
    });
  }

  void given_to_gradients() {
    parallel_for(ws.entries * ws.rows, 2 * p.keys, [&](Tasks& tasks) {
      Buffer<T> bias;
      for (std::int64_t task; tasks.take(task);)
        given_row(p, ws, ws.entry0 + task / ws.rows, ws.row0 + task % ws.rows, bias.get(p.keys));
    });
  }

  void keys_to_values() {
    const std::int64_t pieces = (p.keys + TK - 1) / TK;
    parallel_for(ws.entries * pieces, ws.rows * TK * p.values, [&](Tasks& tasks) {
      ValuePass<T> pass(p, ws);
      for (std::int64_t task; tasks.take(task);) {
        const std::int64_t key0 = task % pieces * TK;
        pass.run(ws.entry0 + task / pieces, key0, std::min(TK, p.keys - key0));
      }
    });
  }

  void features_to_gradients() {
    const FeatureTasks<T> share(p, ws.entries, ws.rows);
    const FeatureFactors<T> factors(p, ws, share.width, weight_factors);
    T* part_query = query_parts.get(share.splits * ws.entries * ws.rows * share.width);
    double* part_weight = weight_parts.get(share.splits * ws.entries * share.width);
    double* weight_sum = weight_sums.get(ws.entries * share.width);
    parallel_for(ws.entries * share.pieces * share.splits, ws.rows * share.split * share.piece * 4, [&](Tasks& tasks) {
      FeaturePass<T> pass(p, ws, factors);
      for (std::int64_t task; tasks.take(task);) {
        const std::int64_t f = task % share.pieces, k = task / share.pieces % share.splits;
        const std::int64_t n = task / share.pieces / share.splits, at = k * ws.entries + n;
        pass.run(ws.entry0 + n, f * share.piece, share.piece, k * share.split, std::min((k + 1) * share.split, p.keys),
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

  Workspace<T> ws;
  ws.keys = round_up(p.keys, tile_keys<T>);
  ws.blocks = ws.keys / block_keys<T>;
  const std::int64_t most = std::max<std::int64_t>(16, workspace_elements / ws.keys);  // rows that fit
  const std::int64_t entries = std::max<std::int64_t>(1, std::min(p.batch, most / p.queries));
  const std::int64_t rows = std::min(p.queries, most);
  Buffer<T> weights, gradient, largest_gradient;
  Buffer<unsigned char> attended;
  ws.weights = p.grad_scores ? nullptr : weights.get(entries * rows * ws.keys);
  ws.gradient = gradient.get(entries * rows * ws.keys);
  ws.attended = attended.get(entries * rows * ws.blocks);
  ws.largest_gradient = largest_gradient.get(entries * rows);

  BackwardPiece<T> piece(p, ws, parallel_for);
  for (ws.entry0 = 0; ws.entry0 < p.batch; ws.entry0 += entries)
    for (ws.row0 = 0; ws.row0 < p.queries; ws.row0 += rows) {
      ws.entries = std::min(entries, p.batch - ws.entry0);
      ws.rows = std::min(rows, p.queries - ws.row0);
      piece.run();
    }
}
