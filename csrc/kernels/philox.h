// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011). The word for key j
// of row i of entry n is word j % 4 of counter (j / 4, i, n mod 2^32, n / 2^32) under the seed, on every backend.

typedef std::uint64_t Words __attribute__((vector_size(VECTOR_BYTES)));
constexpr int word_lanes = VECTOR_BYTES / 8;

// The 64-bit products of the low halves of the lanes; the high halves are ignored.
inline Words multiply_low(Words a, std::uint32_t b) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__x86_64__) && VECTOR_BYTES == 32
  return (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__) && VECTOR_BYTES == 16
  return (Words)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// a0 b0 a1 b1 ... in two vectors.
template <int... l>
inline void interleave(Words& a, Words& b, std::integer_sequence<int, l...>) {
  constexpr int n = word_lanes;
#ifdef HAS_SHUFFLEVECTOR
  const Words low = __builtin_shufflevector(a, b, (l / 2 + l % 2 * n)...);
  b = __builtin_shufflevector(a, b, (n / 2 + l / 2 + l % 2 * n)...);
#else
  const Words low = {(l % 2 ? b : a)[l / 2]...};
  b = (Words){(l % 2 ? b : a)[n / 2 + l / 2]...};
#endif
  a = low;
}

// Words of the keys [first, first + 4 * counters), first a multiple of four. Each of a counter's
// four 32-bit parts takes a 64-bit lane, of which only the low half counts, so products need no unpacking.
template <int counters>
void philox(std::uint64_t seed, std::uint64_t entry, std::uint64_t row, std::uint64_t first, std::uint32_t* words) {
  constexpr int n = counters / word_lanes;
  Words c0[n], c1[n], c2[n], c3[n];
  for (int v = 0; v < n; ++v) {
    for (int l = 0; l < word_lanes; ++l) c0[v][l] = first / 4 + v * word_lanes + l;
    c1[v] = Words{} + row;
    c2[v] = Words{} + entry;
    c3[v] = Words{} + (entry >> 32);
  }
  std::uint32_t k0 = std::uint32_t(seed), k1 = std::uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int v = 0; v < n; ++v) {
      const Words p0 = multiply_low(c0[v], 0xD2511F53u), p1 = multiply_low(c2[v], 0xCD9E8D57u);
      c0[v] = (p1 >> 32) ^ c1[v] ^ std::uint64_t(k0);
      c1[v] = p1;
      c2[v] = (p0 >> 32) ^ c3[v] ^ std::uint64_t(k1);
      c3[v] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int v = 0; v < n; ++v) {
    Words even = (c0[v] & 0xFFFFFFFFu) | (c1[v] << 32), odd = (c2[v] & 0xFFFFFFFFu) | (c3[v] << 32);
    interleave(even, odd, std::make_integer_sequence<int, word_lanes>{});
    // Little-endian, as every supported processor is.
    std::memcpy(words + 4 * v * word_lanes, &even, sizeof even);
    std::memcpy(words + (4 * v + 2) * word_lanes, &odd, sizeof odd);
  }
}

// The keep factors, 0 or keep_scale, of a tile of keys.
template <class T>
void dropout_factors(const Problem<T>& p, std::int64_t entry, std::int64_t row, std::int64_t key0, T* factors) {
  std::uint32_t words[tile_keys<T>];
  philox<tile_keys<T> / 4>(std::uint64_t(p.seed[p.seed_offset[entry]]), std::uint64_t(entry), std::uint64_t(row),
                           std::uint64_t(key0), words);
  const std::uint32_t drop_below = p.drop_below;  // copies: to the compiler, the members may alias `factors`
  const T keep_scale = p.keep_scale;
  for (int j = 0; j < tile_keys<T>; ++j) factors[j] = words[j] < drop_below ? T(0) : keep_scale;
}

// Which pairs of all entries are kept.
inline void keep_entries(const KeepEntries& p, const ParallelFor& parallel_for) {
  constexpr int tile = 128;
  parallel_for(p.entries * p.rows, 8 * p.keys, [&](Tasks& tasks) {
    std::uint32_t words[tile];
    for (std::int64_t at; tasks.take(at);) {
      const std::int64_t n = at / p.rows, i = at % p.rows;
      bool* kept = p.kept + at * p.keys;
      for (std::int64_t key0 = 0; key0 < p.keys; key0 += tile) {
        philox<tile / 4>(std::uint64_t(p.seed[n]), std::uint64_t(n), std::uint64_t(i), std::uint64_t(key0), words);
        const std::int64_t count = std::min<std::int64_t>(tile, p.keys - key0);
        for (std::int64_t j = 0; j < count; ++j) kept[key0 + j] = words[j] >= p.drop_below;
      }
    }
  });
}
