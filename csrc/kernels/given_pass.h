// G of the query rows where the caller passes it (of math.md, only eq. 10 and 11 remain).

// Copies G into the workspace: 0 where a pair is masked, whatever the caller passes there. Blocks without any gradient
// count as masked, so that the later passes skip them.
template <class T>
void given_row(const Backward<T>& p, const Workspace<T>& ws, std::int64_t n, std::int64_t i, T* bias) {
  constexpr int K = block_keys<T>, W = strip_keys;
  const typename Workspace<T>::Row row = ws.row(n, i);
  const T* given = p.grad_scores.at(n, i);
  std::int64_t first, last;
  key_range(p, n, i, first, last);
  typename Simd<T>::Bits most = 0;
  for (std::int64_t key0 = ws.key_begin(); key0 < ws.key_end(); key0 += W) {
    const std::int64_t column = row.column(key0), from = std::max(first, key0), to = std::min(last, key0 + W);
    if (column < 0) continue;
    T* g = row.gradient + column;
    std::fill(g, g + W, T(0));
    if (from < to) std::memcpy(g + from - key0, given + from, (to - from) * sizeof(T));
    if ((p.mask.type != MaskType::none || p.blocks) && from < to) {
      load_terms(p, n, i, from, to - from, bias);
      for (std::int64_t j = from; j < to; ++j) g[j - key0] = bias[j - from] == T(-INFINITY) ? T(0) : g[j - key0];
    }
    for (std::int64_t b = 0; b < W / K; ++b) {
      const auto block_most = largest(g + b * K, K);
      row.attended[column / K + b] = block_most != 0;
      most = std::max(most, block_most);
    }
  }
  ws.largest_gradient[ws.index(n, i)] = as_number<T>(most);
}
