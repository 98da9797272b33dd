// The kernels for AVX2.
#include "targets.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define VECTOR_BYTES 32
#define KERNELS_NAME "avx2"

BEGIN_TARGET("avx2,fma,f16c")  // every processor with AVX2 has F16C
namespace additive_attn {
namespace avx2 {
#include "all.inc"
}  // namespace avx2
}  // namespace additive_attn
END_TARGET

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
