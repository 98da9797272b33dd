// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011). The word for key j of
// row i of batch entry n is word j % 4 of counter (j / 4, i, n mod 2^32, n / 2^32) under the seed, on every backend.

// Words of the keys [first, first + 4 * counters): first is a multiple of four. Plain loops over counters, which the
// compiler turns into vectors.
template <int counters>
void philox(std::uint64_t seed, std::uint64_t entry, std::uint64_t row, std::uint64_t first, std::uint32_t* words) {
  std::uint32_t c0[counters], c1[counters], c2[counters], c3[counters];
  for (int l = 0; l < counters; ++l) {
    c0[l] = std::uint32_t(first / 4 + l);
    c1[l] = std::uint32_t(row);
    c2[l] = std::uint32_t(entry);
    c3[l] = std::uint32_t(entry >> 32);
  }
  std::uint32_t k0 = std::uint32_t(seed), k1 = std::uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < counters; ++l) {
      const std::uint64_t p0 = std::uint64_t(0xD2511F53u) * c0[l], p1 = std::uint64_t(0xCD9E8D57u) * c2[l];
      c0[l] = std::uint32_t(p1 >> 32) ^ c1[l] ^ k0;
      c1[l] = std::uint32_t(p1);
      c2[l] = std::uint32_t(p0 >> 32) ^ c3[l] ^ k1;
      c3[l] = std::uint32_t(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int l = 0; l < counters; ++l) {
    words[4 * l] = c0[l];
    words[4 * l + 1] = c1[l];
    words[4 * l + 2] = c2[l];
    words[4 * l + 3] = c3[l];
  }
}
