// The kernels for what the compiler targets by default: SSE2 on x86-64, NEON on AArch64.
#include "targets.h"

#define VECTOR_BYTES 16
#if defined(__aarch64__)
#define KERNELS_NAME "neon"
#else
#define KERNELS_NAME "baseline"
#endif

namespace additive_attn {
namespace baseline {
#include "all.inc"
}  // namespace baseline

const Kernels* baseline_kernels() { return &baseline::table; }
}  // namespace additive_attn
