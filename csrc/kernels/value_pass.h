// The gradient of the values (math.md, eq. 12).

// dV of keys [key0, key0 + count) += (P o D)^T dO, over runs of rows that attend to any of them.
template <class T>
class ValuePass {
 public:
  static constexpr int K = block_keys<T>;

  ValuePass(const Backward<T>& problem, const Workspace<T>& workspace) : p(problem), ws(workspace) {}

  void run(std::int64_t n, std::int64_t key0, std::int64_t count) {
    constexpr int L = lanes<T>;
    const std::int64_t width = round_up(p.values, panel_columns<T>), blocks = (count + K - 1) / K;
    T* sum = sum_.get(count * width);
    T* out = p.grad_value + (n * p.keys + key0) * p.values;
    std::memset(sum, 0, count * width * sizeof(T));
    if (ws.row0 > 0)
      for (std::int64_t j = 0; j < count; ++j) std::memcpy(sum + j * width, out + j * p.values, p.values * sizeof(T));
    const std::int64_t end = ws.row0 + ws.rows;
    for (std::int64_t i = ws.row0; i < end;) {
      // Rows that attend to the same blocks go together; what a row holds of its other blocks is undefined.
      std::int64_t stop = i + 1;
      while (stop < end && stop - i < most_rows &&
             std::memcmp(attended(n, i, key0), attended(n, stop, key0), blocks) == 0)
        ++stop;
      const T* grad = nullptr;
      for (std::int64_t b = 0; b < blocks; ++b) {
        if (!attended(n, i, key0)[b]) continue;
        if (!grad) grad = pack_panels(p.grad_out.at(n, i), p.grad_out.row, stop - i, p.values, panels);
        const T* weights =
            pack_panels(ws.weights + ws.index(n, i) * ws.keys + key0 + b * K, ws.keys, stop - i, K, weights_);
        const std::int64_t keys = std::min<std::int64_t>(K, count - b * K);
        for (std::int64_t j = 0; j < keys; j += gemm_row_block)
          gemm<T>(weights + j, 1, K, grad, (stop - i) * panel_columns<T>, sum + (b * K + j) * width, width,
                  std::min<std::int64_t>(gemm_row_block, keys - j), width, stop - i);
      }
      i = stop;
    }
    for (std::int64_t j = 0; j < count; ++j)
      for (std::int64_t d = 0; d < p.values; d += L)
        store_part<T>(out + j * p.values + d, load(sum + j * width + d), p.values - d);
  }

 private:
  const unsigned char* attended(std::int64_t n, std::int64_t i, std::int64_t key0) const {
    return ws.attended + ws.index(n, i) * ws.blocks + key0 / K;
  }

  const Backward<T>& p;
  const Workspace<T>& ws;
  Buffer<T> sum_, panels, weights_;
};
