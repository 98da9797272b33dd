// What Python reads of the library itself: the version of its interface, and the instruction set in use.
#include <string>

#include "tensors.h"

namespace {

std::string cpu_isa() { return additive_attn::kernels().name; }
std::string select_cpu_isa(std::string name) { return additive_attn::select_kernels(name).name; }

}  // namespace

// Python reads this before it loads the library: arguments of another interface would crash the process.
extern "C" __attribute__((visibility("default"), used)) const char additive_attn_interface[] =
    "additive_attn interface 4";

STABLE_TORCH_LIBRARY_FRAGMENT(additive_attn, m) {
  m.def("cpu_isa() -> str");
  m.def("select_cpu_isa(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(additive_attn, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("select_cpu_isa", TORCH_BOX(&select_cpu_isa));
}
