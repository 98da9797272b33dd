// Masks of any type, as terms that are added to the scores.

inline float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16, number = std::uint32_t(bits & 0x7fff) << 13;
  float x;
  if (number >= 0x0f800000u) {  // Inf and NaN
    const std::uint32_t nonfinite = sign | 0x70000000u | number;
    std::memcpy(&x, &nonfinite, sizeof x);
    return x;
  }
  std::memcpy(&x, &number, sizeof x);
  x *= 0x1p112f;
  return sign ? -x : x;
}

inline float bfloat_to_float(std::uint16_t bits) {
  const std::uint32_t wide = std::uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// Loads columns [first, first + count) of a mask row as terms that are added to the scores; false becomes -Inf.
template <class T>
void load_mask(const Mask& mask, std::int64_t n, std::int64_t i, std::int64_t first, std::int64_t count, T* bias) {
  const std::int64_t base = mask.offset[n] + i * mask.row + first * mask.column, step = mask.column;
  switch (mask.type) {
    case MaskType::none:
      break;
    case MaskType::boolean:
      for (std::int64_t j = 0; j < count; ++j)
        bias[j] = static_cast<const unsigned char*>(mask.data)[base + j * step] ? T(0) : T(-INFINITY);
      break;
    case MaskType::float16:
      for (std::int64_t j = 0; j < count; ++j)
        bias[j] = T(half_to_float(static_cast<const std::uint16_t*>(mask.data)[base + j * step]));
      break;
    case MaskType::bfloat16:
      for (std::int64_t j = 0; j < count; ++j)
        bias[j] = T(bfloat_to_float(static_cast<const std::uint16_t*>(mask.data)[base + j * step]));
      break;
    case MaskType::float32:
      for (std::int64_t j = 0; j < count; ++j) bias[j] = T(static_cast<const float*>(mask.data)[base + j * step]);
      break;
    case MaskType::float64:
      for (std::int64_t j = 0; j < count; ++j) bias[j] = T(static_cast<const double*>(mask.data)[base + j * step]);
      break;
  }
}

// Whether the block table keeps all pairs of rows [row0, row0 + rows) and keys [first, first + count), some or none.
enum class Kept { none, some, all };

inline Kept kept_pairs(const BlockTable& blocks, std::int64_t n, std::int64_t row0, std::int64_t rows,
                       std::int64_t first, std::int64_t count) {
  bool any = false, all = true;
  for (std::int64_t i = row0 / blocks.rows; i * blocks.rows < row0 + rows; ++i)
    for (std::int64_t j = first / blocks.keys; j * blocks.keys < first + count; ++j) {
      const std::int64_t code = blocks.of_block(n, i, j);
      any = any || code != 0;
      all = all && code == 1;
    }
  return all ? Kept::all : any ? Kept::some : Kept::none;
}

// Sets the terms of keys [first, first + count) of row i to -Inf where the block table keeps no pair.
template <class T>
void narrow_by_blocks(const BlockTable& blocks, std::int64_t n, std::int64_t i, std::int64_t first, std::int64_t count,
                      T* bias) {
  for (std::int64_t j = first; j < first + count;) {
    const std::int64_t block = j / blocks.keys, end = std::min((block + 1) * blocks.keys, first + count);
    const std::int64_t code = blocks.of_block(n, i / blocks.rows, block);
    if (code == 0) std::fill(bias + j - first, bias + end - first, T(-INFINITY));
    if (code > 1) {
      const unsigned char* row = blocks.tiles + ((code - 2) * blocks.rows + i % blocks.rows) * blocks.keys;
      for (std::int64_t k = j; k < end; ++k)
        if (!row[k - block * blocks.keys]) bias[k - first] = T(-INFINITY);
    }
    j = end;
  }
}

// Loads the terms of a row's mask and block table together.
template <class T>
void load_terms(const Problem<T>& p, std::int64_t n, std::int64_t i, std::int64_t first, std::int64_t count, T* bias) {
  if (p.mask.type == MaskType::none)
    std::fill(bias, bias + count, T(0));
  else
    load_mask(p.mask, n, i, first, count, bias);
  if (p.blocks) narrow_by_blocks(p.blocks, n, i, first, count, bias);
}

// Keys [first, last) that row i of entry n may attend to by its interval.
template <class T>
void key_range(const Problem<T>& p, std::int64_t n, std::int64_t i, std::int64_t& first, std::int64_t& last) {
  first = p.left >= 0 ? std::max<std::int64_t>(0, i - p.left) : 0;
  last = p.right >= 0 && p.right < p.keys - i - 1 ? i + p.right + 1 : p.keys;
  if (p.lengths) last = std::min(last, *p.lengths.at(n, i));
  if (p.starts) first = std::max(first, std::min(last, *p.starts.at(n, i)));
  last = std::max(first, last);
}
