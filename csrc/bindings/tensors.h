// What every binding needs of torch's stable ABI: broadcasting, allocation, casts, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../problem.h"

namespace additive_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using Offsets = std::vector<int64_t>;

inline void parallel_for(int64_t count, int64_t work, const Body& body) {
  constexpr int64_t worth_a_thread = 1 << 17;  // multiply-adds that take about as long as waking a thread
  if (count <= 0) return;
  Tasks tasks(count);
  const int64_t useful = work >= worth_a_thread ? count : count * std::max<int64_t>(work, 1) / worth_a_thread;
  const int64_t workers = std::min<int64_t>({count, useful, torch::stable::get_num_threads()});
  if (workers <= 1) return body(tasks);
  std::exception_ptr error;
  std::mutex error_lock;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    try {
      for (; begin < end; ++begin) body(tasks);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(error_lock);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

inline Sizes sizes(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }

// Broadcasts all but the last `own` dims of t into `batch`.
inline void broadcast(Sizes& batch, const Tensor& t, int64_t own, const char* name) {
  const int64_t leading = t.dim() - own;
  STD_TORCH_CHECK(leading >= 0, name, " has ", t.dim(), " dims; additive_attn needs at least ", own, ".");
  if (leading > static_cast<int64_t>(batch.size())) batch.insert(batch.begin(), leading - batch.size(), 1);
  for (int64_t d = 0; d < leading; ++d) {
    int64_t& to = batch[batch.size() - leading + d];
    const int64_t from = t.size(d);
    STD_TORCH_CHECK(to == from || to == 1 || from == 1, "The leading dims of ", name,
                    " do not broadcast with those of the other arguments: ", from, " against ", to, ".");
    if (to == 1) to = from;
  }
}

// Where each batch entry begins in a tensor with these leading sizes and strides, in elements.
inline Offsets batch_offsets(const Sizes& batch, const int64_t* size, const int64_t* stride, int64_t leading) {
  int64_t count = 1;
  for (const int64_t n : batch) count *= n;
  Offsets offsets(count, 0);
  int64_t repeat = 1;  // entries per step of this dim
  for (int64_t d = static_cast<int64_t>(batch.size()) - 1, own = leading - 1; d >= 0; --d, --own) {
    if (own >= 0 && size[own] != 1 && stride[own] != 0)
      for (int64_t n = 0; n < count; ++n) offsets[n] += n / repeat % batch[d] * stride[own];
    repeat *= batch[d];
  }
  return offsets;
}

inline Offsets batch_offsets(const Sizes& batch, const Tensor& t, int64_t own) {
  return batch_offsets(batch, t.sizes().data(), t.strides().data(), t.dim() - own);
}

inline bool is_half(ScalarType type) { return type == ScalarType::Half || type == ScalarType::BFloat16; }

inline ScalarType compute_type(ScalarType type) { return is_half(type) ? ScalarType::Float : type; }

// The system provides large memory page by page, which can take longer than computing what is written there. This
// requests huge pages.
inline void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t large = 1 << 23;  // malloc mostly reuses memory of smaller sizes
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  // If madvise fails, nothing changes.
  if (memory && bytes >= large) madvise(reinterpret_cast<void*>(begin), bytes - page, MADV_HUGEPAGE);
#endif
}

// Bypasses the dispatcher, whose cost shows in small decoder steps.
inline Tensor empty(const Sizes& size, ScalarType type) {
  Sizes stride(size.size());
  int64_t step = 1;
  for (size_t d = size.size(); d-- > 0; step *= std::max<int64_t>(size[d], 1)) stride[d] = step;
  const int32_t dtype = type == ScalarType::Double     ? aoti_torch_dtype_float64()
                        : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(size.size(), size.data(), stride.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor t(handle);
  prefer_large_pages(t.mutable_data_ptr(), step * (type == ScalarType::Double ? 8 : 4));
  return t;
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// In the computing type, with stride 1 along the last dim.
inline Tensor ready(const Tensor& t, ScalarType type) {
  const Tensor same = cast(t, compute_type(type));
  return same.dim() == 0 || same.size(-1) <= 1 || same.stride(-1) == 1 ? same : torch::stable::contiguous(same);
}

inline Sizes with(Sizes batch, std::initializer_list<int64_t> more) {
  batch.insert(batch.end(), more);
  return batch;
}

}  // namespace additive_attn
