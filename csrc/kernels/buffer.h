constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Memory for one thread's pieces of work; grows, never shrinks, and is not initialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  T* get(std::int64_t n) {
    if (n > size_) {
      std::free(memory_);
      size_ = 0;
      // malloc caches small blocks, aligned_alloc does not.
      const std::int64_t bytes = round_up(n * std::int64_t(sizeof(T)), alignment);
      const bool small = bytes <= small_bytes;
      memory_ = small ? std::malloc(bytes + alignment) : std::aligned_alloc(alignment, bytes);
      if (!memory_) throw std::bad_alloc();
      const auto at = reinterpret_cast<std::uintptr_t>(memory_);
      begin_ = reinterpret_cast<T*>(small ? (at + alignment - 1) / alignment * alignment : at);
      size_ = n;
    }
    return begin_;
  }

 private:
  static constexpr std::int64_t alignment = 64, small_bytes = 896;

  void* memory_ = nullptr;
  T* begin_ = nullptr;
  std::int64_t size_ = 0;
};
