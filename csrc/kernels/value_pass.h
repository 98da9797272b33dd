// The gradient of the values (math.md, eq. 12).

// dV of keys [key0, key0 + count) += (P o D)^T dO, over runs of rows that attend to any of them.
template <class T>
class ValuePass {
 public:
  static constexpr int K = block_keys<T>;

  ValuePass(const Backward<T>& problem, const Workspace<T>& workspace) : p(problem), ws(workspace) {}

  void run(std::int64_t n, std::int64_t key0, std::int64_t count) {
    constexpr int L = lanes<T>;
    const std::int64_t width = round_up(p.values, panel_columns<T>);
    T* sum = sum_.get(count * width);
    T* out = p.grad_value + (n * p.keys + key0) * p.values;
    std::memset(sum, 0, count * width * sizeof(T));
    if (ws.row0 > 0)
      for (std::int64_t j = 0; j < count; ++j) std::memcpy(sum + j * width, out + j * p.values, p.values * sizeof(T));
    for (std::int64_t i = ws.row0, end; i < ws.row0 + ws.rows; i = end) {
      end = ws.group_end(i);
      add_group(n, i, end, key0, count, width, sum);
    }
    for (std::int64_t j = 0; j < count; ++j)
      for (std::int64_t d = 0; d < p.values; d += L)
        store_part<T>(out + j * p.values + d, load(sum + j * width + d), p.values - d);
  }

 private:
  // Rows [i, end) of one group.
  void add_group(std::int64_t n, std::int64_t i, std::int64_t end, std::int64_t key0, std::int64_t count,
                 std::int64_t width, T* sum) {
    const typename Workspace<T>::Row first = ws.row(n, i);
    const std::int64_t column = first.column(key0), blocks = (count + K - 1) / K;
    if (column < 0) return;
    const unsigned char* on = first.attended + column / K;
    const T* kept = first.weights + column;
    for (std::int64_t stop; i < end; i = stop) {
      // Rows that attend to the same blocks go together; P of a row's other blocks is undefined.
      const unsigned char* next = on;
      for (stop = i; stop < end && std::memcmp(on, next, blocks) == 0; ++stop) next += first.width / K;
      const T* grad = nullptr;
      for (std::int64_t b = 0; b < blocks; ++b) {
        if (!on[b]) continue;
        if (!grad) grad = pack_panels(p.grad_out.at(n, i), p.grad_out.row, stop - i, p.values, panels);
        const T* weights = pack_panels(kept + b * K, first.width, stop - i, K, weights_);
        const std::int64_t keys = std::min<std::int64_t>(K, count - b * K);
        for (std::int64_t j = 0; j < keys; j += gemm_row_block)
          gemm<T>(weights + j, 1, K, grad, (stop - i) * panel_columns<T>, sum + (b * K + j) * width, width,
                  std::min<std::int64_t>(gemm_row_block, keys - j), p.values, stop - i);
      }
      kept += (stop - i) * first.width;
      on += (stop - i) * (first.width / K);
    }
  }

  const Backward<T>& p;
  const Workspace<T>& ws;
  Buffer<T> sum_, panels, weights_;
};
