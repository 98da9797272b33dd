// The kernels for AVX2.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define VECTOR_BYTES 32
#define KERNELS_NAME "avx2"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace additive_attn {
namespace avx2 {
#include "kernels.inc"
}  // namespace avx2
}  // namespace additive_attn

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace additive_attn {
const Kernels* avx2_kernels() {
  const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported ? &avx2::table : nullptr;
}
}  // namespace additive_attn

#else

namespace additive_attn {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace additive_attn

#endif
