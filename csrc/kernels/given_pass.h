// G of the query rows where the caller gives it (math.md, eq. 10 and 11 alone).

// Copies G into the workspace: 0 where a pair is masked, whatever is given there. Blocks without any gradient count as
// masked, so that the later passes leave them out.
template <class T>
void given_row(const Backward<T>& p, const Workspace<T>& ws, std::int64_t n, std::int64_t i, T* bias) {
  constexpr int K = block_keys<T>;
  const std::int64_t at = ws.index(n, i);
  T* to = ws.gradient + at * ws.keys;
  unsigned char* attended = ws.attended + at * ws.blocks;
  const T* given = p.grad_scores.at(n, i);
  std::int64_t first, last;
  key_range(p, n, i, first, last);
  std::fill(to, to + ws.keys, T(0));
  if (first < last) std::memcpy(to + first, given + first, (last - first) * sizeof(T));
  if ((p.mask.type != MaskType::none || p.blocks) && first < last) {
    load_terms(p, n, i, first, last - first, bias);
    for (std::int64_t j = first; j < last; ++j) to[j] = bias[j - first] == T(-INFINITY) ? T(0) : to[j];
  }
  typename Simd<T>::Bits most = 0;
  for (std::int64_t b = 0; b < ws.blocks; ++b) {
    const auto block_most = largest(to + b * K, K);
    attended[b] = block_most != 0;
    most = std::max(most, block_most);
  }
  ws.largest_gradient[at] = as_number<T>(most);
}
