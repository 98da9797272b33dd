// Which kernels run on this machine.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "problem.h"

namespace additive_attn {
namespace {

const Kernels* choose() {
  const char* variable = std::getenv("ADDITIVE_ATTN_CPU");
  const std::string wanted = variable ? variable : "";
  for (const Kernels* candidate : {avx512_kernels(), avx2_kernels(), baseline_kernels()})
    if (candidate && (wanted.empty() || wanted == candidate->name ||
                      (candidate == baseline_kernels() && wanted == "baseline")))
      return candidate;
  if (wanted != "avx512" && wanted != "avx2")
    throw std::runtime_error("ADDITIVE_ATTN_CPU is \"" + wanted +
                             "\"; it accepts avx512, avx2, baseline or pytorch. Unset it to use the best kernels that "
                             "this processor can run.");
  throw std::runtime_error("ADDITIVE_ATTN_CPU asks for the " + wanted +
                           " kernels, which this processor or this build lacks. Unset it, or set it to baseline.");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace additive_attn
