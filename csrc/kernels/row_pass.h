// P and G of the query rows, from their scores (math.md, eq. 9).

constexpr std::int64_t rows_ahead = 4;  // prefetch distance: P and G of rows lie pages apart

template <class T>
class RowPass {
 public:
  static constexpr int K = block_keys<T>, TK = tile_keys<T>;

  RowPass(const Backward<T>& problem, const Workspace<T>& workspace) : p(problem), ws(workspace), s(problem) {}

  void run(std::int64_t n, std::int64_t row0, std::int64_t rows) {
    s.begin(n, row0, rows);
    for (std::int64_t r = 0; r < rows; ++r) {
      row_[r] = ws.row(n, row0 + r);
      delta_[r] = total_[r] = 0;
      if (row_[r].width > 0) std::memset(row_[r].attended, 0, row_[r].width / K);
    }
    const std::int64_t begin = s.first / TK * TK;
    for (std::int64_t key0 = begin; key0 < s.last; key0 += TK)
      if (s.tile(key0)) tile(n, row0, rows, key0);
    for (std::int64_t r = 0; r < rows; ++r) finish_row(n, row0 + r);
  }

 private:
  void tile(std::int64_t n, std::int64_t row0, std::int64_t rows, std::int64_t key0) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t column = row_[r].column(key0);
      weights_[r] = grad_[r] = nullptr;  // no row of the group attends to the tile
      if (column < 0) continue;
      weights_[r] = row_[r].weights + column;
      grad_[r] = row_[r].gradient + column;
      if (r + rows_ahead < rows) prefetch(row_[r + rows_ahead].gradient + column, TK);
      for (int j = 0; j < TK; j += lanes<T>) store(grad_[r] + j, Vec<T>{});
      for (int b = 0; b < tile_blocks; ++b) row_[r].attended[column / K + b] = s.attended[r][b];
    }
    if (p.grad_out && p.values > 0) {
      const T* v = value_reader.read(p.value, n, key0, s.count, p.values);
      if (p.queries < gemm_row_block) {
        for (std::int64_t r = 0; r < rows; ++r)
          for (std::int64_t j = 0; j < s.count; ++j)
            if (s.attended[r][j / K]) grad_[r][j] = dot(p.grad_out.at(n, row0 + r), v + j * value_reader.row, p.values);
      } else {
        for (std::int64_t d0 = 0; d0 < p.values; d0 += values_cached)
          add_products(n, row0, rows, v, d0, std::min(values_cached, p.values - d0));
      }
    }
    for (std::int64_t r = 0, end; r < rows; r = end) {
      end = s.compute(r);
      for (std::int64_t i = r; i < end; ++i) {
        if (i + rows_ahead < rows && weights_[i + rows_ahead]) prefetch(weights_[i + rows_ahead], TK);
        if (s.reached[i]) grad_row(n, row0, i, key0, weights_[i], grad_[i]);
      }
    }
  }

  // dO V^T over values [d0, d0 + count): these are transposed, so that lanes run over keys.
  void add_products(std::int64_t n, std::int64_t row0, std::int64_t rows, const T* v, std::int64_t d0,
                    std::int64_t count) {
    const std::int64_t panel = round_up(count, group) * K;
    T* columns = value_columns.get(tile_blocks * panel);
    for (int b = 0; b * K < s.count; ++b)
      pack_transposed<T>(v + b * K * value_reader.row + d0, value_reader.row,
                         std::min<std::int64_t>(K, s.count - b * K), count, columns + b * panel, K, Unchanged<T>{});
    for (std::int64_t r = 0, some; r < rows; r += some) {
      some = std::min<std::int64_t>({gemm_row_block, rows - r, ws.group_end(row0 + r) - row0 - r});
      for (int b = 0; b < tile_blocks; ++b) {
        bool any = false;
        for (std::int64_t i = r; i < r + some; ++i) any = any || s.attended[i][b];
        if (any)
          gemm<T>(p.grad_out.at(n, row0 + r) + d0, p.grad_out.row, 1, columns + b * panel, panel, grad_[r] + b * K,
                  row_[r].width, some, K, count);
      }
    }
  }

  // P and dP of one row and tile; both are 0 where a key is masked.
  void grad_row(std::int64_t n, std::int64_t row0, std::int64_t r, std::int64_t key0, T* weights, T* g) {
    constexpr int L = lanes<T>;
    const std::int64_t i = row0 + r;
    const T* score = s.row(r);
    const T lse = p.lse[n * p.queries + i];
    T keep[TK];
    if (p.seed) {
      dropout_factors(p, n, i, key0, keep);
      for (int j = 0; j < TK; j += L) store(g + j, load(g + j) * load(keep + j));
    }
    if (p.grad_weights) {
      const T* upstream = p.grad_weights.at(n, i) + key0;
      for (std::int64_t j = 0; j < s.count; ++j) g[j] += upstream[j];
    }
    const int end = int(round_up(s.count, K));  // finish_row reads whole blocks
    for (int j = 0; j < end && s.may_overflow; ++j) {
      const bool masked = j >= s.count || s.masked(r, key0 + j, key0);
      weights[j] = masked ? T(0) : std::exp(score[j] - lse);
      g[j] = masked ? T(0) : g[j];
    }
    Vec<T> part = {}, total = {};
    for (int j = 0; j < end; j += L) {
      Vec<T> w, upstream = load(g + j);
      if (s.may_overflow) {
        w = load(weights + j);
      } else {
        const Vec<T> x = load(score + j);
        const auto masked = x == T(-INFINITY);
        store(weights + j, w = masked ? (Vec<T>){} : exp_scaled<T>(x - lse));
        store(g + j, upstream = masked ? (Vec<T>){} : upstream);  // whatever a masked value is
      }
      part += w * upstream;
      total += w;
    }
    delta_[r] += sum<T>(part);
    total_[r] += sum<T>(total);
    // Dropped entries are marked by the sign bit until finish_row.
    if (p.seed)
      for (int j = 0; j < end; j += L) {
        const Vec<T> x = load(weights + j);
        store(weights + j, load(keep + j) == T(0) ? -x : x);
      }
  }

  void finish_row(std::int64_t n, std::int64_t i) {
    constexpr int L = lanes<T>;
    const typename Workspace<T>::Row& row = row_[i - s.row0];
    const auto [weights, gradient, attended, width, place] = row;
    const std::int64_t blocks = width / K;
    // P sums to 1: dividing by the sum removes the rounding error of lse, which all keys of the row share.
    const double total = total_[i - s.row0];
    double delta = delta_[i - s.row0];
    const T normaliser = total == 0 ? T(0) : T(1 / total);
    delta = total == 0 ? delta : delta / total;
    if (p.grad_lse) delta -= *p.grad_lse.at(n, i);
    const bool finite = std::isfinite(delta);
    if (!finite) spread_nonfinite(row, i - s.row0, T(delta));
    UVec<T> most = {};
    for (std::int64_t b = 0; b < blocks; ++b) {
      if (!attended[b]) continue;
      for (int j = b * K; j < (b + 1) * K; j += L) {
        const Vec<T> raw = load(weights + j), x = raw == T(0) ? raw : raw * normaliser;  // 0 * NaN must stay 0
        const Vec<T> positive = x < T(0) ? -x : x;
        if (finite) store(gradient + j, x == T(0) ? (Vec<T>){} : positive * (load(gradient + j) - T(delta)));
        const UVec<T> size = magnitude<T>(load(gradient + j));
        most = size > most ? size : most;
        store(weights + j, p.seed ? (x > T(0) ? x : x != x ? x : (Vec<T>){}) * p.keep_scale : x);
      }
    }
    ws.largest_gradient[ws.index(n, i)] = as_number<T>(largest_lane<T>(most));
  }

  // Computes G where delta is NaN or Inf, which all attended keys of the row get, also those with P = 0; masked keys do
  // not.
  void spread_nonfinite(const typename Workspace<T>::Row& row, std::int64_t r, T delta) {
    for (std::int64_t j = 0; j < round_up(p.keys, K); ++j) {
      const std::int64_t column = row.column(j);
      if (column < 0 || !row.attended[column / K]) continue;
      T& g = row.gradient[column];
      g = j < p.keys && s.attends(r, j) ? std::fabs(row.weights[column]) * (g - delta) : T(0);
    }
  }

  const Backward<T>& p;
  const Workspace<T>& ws;
  ScoreBlock<T> s;
  typename Workspace<T>::Row row_[most_rows];
  T *weights_[most_rows], *grad_[most_rows];    // of the tile
  double delta_[most_rows], total_[most_rows];  // sums of P dP and of P
  Buffer<T> value_columns;
  StoredReader<T> value_reader;
};
