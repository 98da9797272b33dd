// The masked scores themselves, without a softmax.

// Tiles are independent: tasks are blocks of rows and, where rows are few, ranges of keys.
template <class T>
void scores(const Scores<T>& p, const ParallelFor& parallel_for) {
  constexpr std::int64_t TK = tile_keys<T>;
  if (p.keys == 0) return;
  const std::int64_t rows = rows_per_block(p, p.batch, p.queries), blocks = (p.queries + rows - 1) / rows;
  const std::int64_t wanted = std::max<std::int64_t>(1, 4 * p.threads / std::max<std::int64_t>(1, p.batch * blocks));
  const std::int64_t split = round_up((p.keys + wanted - 1) / wanted, TK), splits = (p.keys + split - 1) / split;
  parallel_for(p.batch * blocks * splits, rows * split * (p.hidden + 1), [&](Tasks& tasks) {
    ScoreBlock<T> s(p);
    s.raw = true;
    for (std::int64_t task; tasks.take(task);) {
      const std::int64_t k = task % splits, b = task / splits % blocks, n = task / splits / blocks;
      const std::int64_t row0 = b * rows, count = std::min(rows, p.queries - row0);
      s.begin(n, row0, count);
      for (std::int64_t key0 = k * split; key0 < std::min((k + 1) * split, p.keys); key0 += TK) {
        const bool any = key0 < s.last && key0 + TK > s.first && s.tile(key0);
        const std::int64_t keys = std::min(TK, p.keys - key0);
        for (std::int64_t r = 0, end; r < count; r = end) {
          end = any ? s.compute(r) : count;
          for (std::int64_t i = r; i < end; ++i) {
            T* to = p.scores + (n * p.queries + row0 + i) * p.keys + key0;
            if (any)
              std::memcpy(to, s.row(i), keys * sizeof(T));
            else
              std::fill(to, to + keys, T(-INFINITY));
          }
        }
      }
    }
  });
}
