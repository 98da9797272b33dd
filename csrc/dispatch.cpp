// Chooses the instruction set whose kernels run.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "problem.h"

namespace additive_attn {
namespace {

std::atomic<const Kernels*> selected{nullptr};

// The fastest kernels that this processor can run, or those of this name; null where there are none.
const Kernels* find(const std::string& name) {
  for (const Kernels* candidate : {avx512_kernels(), avx2_kernels(), baseline_kernels()})
    if (candidate &&
        (name.empty() || name == candidate->name || (candidate == baseline_kernels() && name == "baseline")))
      return candidate;
  return nullptr;
}

bool is_instruction_set(const std::string& name) {
  return name == "avx512" || name == "avx2" || name == "baseline" || name == baseline_kernels()->name;
}

const Kernels* find_by_environment() {
  const char* variable = std::getenv("ADDITIVE_ATTN_CPU");
  const std::string name = variable ? variable : "";
  if (const Kernels* kernels = find(name)) return kernels;
  if (is_instruction_set(name))
    throw std::runtime_error("ADDITIVE_ATTN_CPU asks for the " + name +
                             " kernels, which this processor or this build lacks. Unset it, or set it to baseline.");
  if (name == "pytorch" || name == "triton")
    throw std::runtime_error(
        "ADDITIVE_ATTN_CPU is '" + name +
        "', but the compiled kernels are loaded already. Set it before additive_attn is imported.");
  throw std::runtime_error("ADDITIVE_ATTN_CPU is '" + name +
                           "', which names no CPU path. Set it to one of avx512, avx2, baseline, pytorch, triton, or "
                           "unset it to let the package choose.");
}

}  // namespace

const Kernels& kernels() {
  const Kernels* current = selected.load(std::memory_order_acquire);
  if (!current) selected.store(current = find_by_environment(), std::memory_order_release);
  return *current;
}

const Kernels& select_kernels(const std::string& name) {
  const Kernels* wanted = name.empty() ? find_by_environment() : find(name);
  if (!wanted)
    throw std::runtime_error(is_instruction_set(name)
                                 ? "The " + name + " kernels were asked for, which this processor or this build lacks."
                                 : "'" + name + "' names no instruction set; there are avx512, avx2 and baseline.");
  selected.store(wanted, std::memory_order_release);
  return *wanted;
}

}  // namespace additive_attn
