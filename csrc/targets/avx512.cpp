// The kernels for AVX-512.
#include "targets.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define VECTOR_BYTES 64
#define KERNELS_NAME "avx512"

BEGIN_TARGET("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
namespace additive_attn {
namespace avx512 {
#include "all.inc"
}  // namespace avx512
}  // namespace additive_attn
END_TARGET

namespace additive_attn {
const Kernels* avx512_kernels() {
  const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return supported ? &avx512::table : nullptr;
}
}  // namespace additive_attn

#else

namespace additive_attn {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace additive_attn

#endif
