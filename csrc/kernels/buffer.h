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
      memory_ = static_cast<T*>(std::aligned_alloc(64, round_up(n * std::int64_t(sizeof(T)), 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = n;
    }
    return memory_;
  }

 private:
  T* memory_ = nullptr;
  std::int64_t size_ = 0;
};
