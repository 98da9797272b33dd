// Keys and values in the computing type. Those stored in 16 bits are converted a few rows at a time, into memory that
// stays in the cache.

#if VECTOR_BYTES > 16 && defined(__x86_64__)
inline Vec<float> widen_half(const std::uint16_t* x) {
#if VECTOR_BYTES == 64
  // GCC 12 warns of the plain conversion's undefined register.
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#else
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#endif
}
#endif

inline UVec<float> load_bits(const std::uint16_t* x) {
#if VECTOR_BYTES == 64 && defined(__x86_64__)
  return (UVec<float>)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif VECTOR_BYTES == 32 && defined(__x86_64__)
  return (UVec<float>)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  typedef std::uint16_t Narrow __attribute__((vector_size(VECTOR_BYTES / 2)));
  Narrow bits;
  std::memcpy(&bits, x, sizeof bits);
  return __builtin_convertvector(bits, UVec<float>);
#endif
}

template <Storage storage>
inline Vec<float> widen(const std::uint16_t* x) {
  if constexpr (storage == Storage::bfloat16) return (Vec<float>)(load_bits(x) << 16);
#if VECTOR_BYTES > 16 && defined(__x86_64__)
  return widen_half(x);
#else
  const UVec<float> bits = load_bits(x), number = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const UVec<float> finite = (UVec<float>)((Vec<float>)number * 0x1p112f), other = number | 0x70000000u;  // Inf, NaN
  return (Vec<float>)((number >= 0x0f800000u ? other : finite) | sign);
#endif
}

template <Storage storage>
inline void widen_row(const std::uint16_t* from, std::int64_t count, float* to) {
  constexpr int L = lanes<float>;
  std::int64_t i = 0;
  for (; i + L <= count; i += L) store<float>(to + i, widen<storage>(from + i));
  if (i == count) return;
  std::uint16_t rest[L] = {};
  std::memcpy(rest, from + i, (count - i) * sizeof *from);
  store_part<float>(to + i, widen<storage>(rest), count - i);
}

// Points to columns [first, first + count) of row i, or to their conversion in `copy`.
template <class T>
inline const T* stored_row(const StoredRows<T>& rows, std::int64_t n, std::int64_t i, std::int64_t first,
                           std::int64_t count, T* copy) {
  if (rows.storage == Storage::computed) return static_cast<const T*>(rows.at(n, i)) + first;
  if constexpr (sizeof(T) == 4) {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(rows.at(n, i)) + first;
    if (rows.storage == Storage::bfloat16)
      widen_row<Storage::bfloat16>(from, count, copy);
    else
      widen_row<Storage::float16>(from, count, copy);
  }
  return copy;
}

// Reads whole rows [i, i + count), `row` apart.
template <class T>
class StoredReader {
 public:
  const T* read(const StoredRows<T>& rows, std::int64_t n, std::int64_t i, std::int64_t count, std::int64_t columns) {
    row = rows.row;
    if (rows.storage == Storage::computed || count <= 0) return static_cast<const T*>(rows.at(n, i));
    row = round_up(columns, lanes<T>);
    T* copy = memory_.get(std::max<std::int64_t>(count * row, 1));
    for (std::int64_t j = 0; j < count; ++j) stored_row(rows, n, i + j, 0, columns, copy + j * row);
    return copy;
  }

  std::int64_t row = 0;

 private:
  Buffer<T> memory_;
};

// Prefetches columns [first, first + columns) of row i.
template <class T>
ALWAYS_INLINE void prefetch_stored(const StoredRows<T>& rows, std::int64_t n, std::int64_t i, std::int64_t columns,
                                   std::int64_t first = 0) {
  prefetch(static_cast<const char*>(rows.at(n, i)) + first * rows.element(), columns * rows.element());
}

// Prefetches a row of memory while scores are computed, a few lines of 64 bytes at a time: scores are
// compute-bound, the weighted sum is memory-bound.
class Fetch {
 public:
  // Divides a row of so many bytes over so many calls of `some`.
  Fetch(std::int64_t bytes, std::int64_t times)
      : bytes_(bytes), share_(64 * ((bytes + 64 * times - 1) / std::max<std::int64_t>(64 * times, 1))) {}
  void begin(const void* row) {
    next_ = static_cast<const char*>(row);
    end_ = next_ + bytes_;
  }
  void some() { to(end_ - next_ > share_ ? next_ + share_ : end_); }
  void all() { to(end_); }

 private:
  void to(const char* end) {
    for (; next_ < end; next_ += 64) __builtin_prefetch(next_);
  }

  const std::int64_t bytes_, share_;
  const char *next_ = nullptr, *end_ = nullptr;
};
