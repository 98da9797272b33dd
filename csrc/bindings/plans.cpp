// Runs launch plans of calls on a GPU (additive_attn/backends/triton/plans.py) without Python. Triton has compiled the
// kernels, and Python passes their functions. The driver is loaded when the first plan runs, so building this needs no
// part of CUDA.
#include "tensors.h"

#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

#include <array>
#include <memory>
#include <unordered_map>

namespace additive_attn {
namespace {

using Numbers = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

// CUlaunchConfig.
struct Config {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
};

// The functions of the driver that are used; int is its CUresult, 0 for success.
struct Driver {
  int (*launch)(const Config*, void*, void**, void**) = nullptr;
  int (*current)(void**) = nullptr;
  int (*current_device)(int*) = nullptr;
  int (*make_current)(void*) = nullptr;
  int (*device)(int*, int) = nullptr;
  int (*retain)(void**, int) = nullptr;
  int (*text)(int, const char**) = nullptr;

  Driver() {
#if __has_include(<dlfcn.h>)
    void* const library = dlopen("libcuda.so.1", RTLD_LAZY);
    STD_TORCH_CHECK(library != nullptr, "libcuda.so.1, the driver of the GPU, does not load.");
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      STD_TORCH_CHECK(function != nullptr, "libcuda.so.1 has no ", name, ": the driver of the GPU is too old.");
    };
    find(launch, "cuLaunchKernelEx");
    find(current, "cuCtxGetCurrent");
    find(current_device, "cuCtxGetDevice");
    find(make_current, "cuCtxSetCurrent");
    find(device, "cuDeviceGet");
    find(retain, "cuDevicePrimaryCtxRetain");
    find(text, "cuGetErrorString");
#else
    STD_TORCH_CHECK(false, "Launch plans need a system that loads libraries by dlopen.");
#endif
  }

  void check(int result) const {
    if (result == 0) return;
    const char* problem = nullptr;
    text(result, &problem);
    STD_TORCH_CHECK(false, "The driver of the GPU refuses a launch: ", problem ? problem : "for no known reason", ".");
  }

  // A thread has no context before it uses a device, and may have that of another device. A context of
  // this device is kept, whether or not it is the primary one.
  void enter(int number) const {
    void* context = nullptr;
    int handle = 0, entered = 0;
    check(device(&handle, number));
    check(current(&context));
    if (context) {
      check(current_device(&entered));
      if (entered == handle) return;
    }
    check(retain(&context, handle));
    check(make_current(context));
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

// A parameter is a number (then tensor = -1), or the address `value` bytes behind the beginning of a tensor.
struct Parameter {
  int64_t tensor, value;
};

struct Launch {
  void* function;
  unsigned programs, threads, shared;
  std::vector<Parameter> parameters;
};

struct Result {
  int64_t tensor;
  int32_t dtype;
  Sizes size, stride;
};

constexpr int64_t most_parameters = 256, most_plans = 1024;

// Tensors are numbered: the given ones, the shared allocation, the results. `plans._program` writes the format.
struct Plan {
  int64_t given, pool;
  std::vector<Result> results;
  std::vector<Launch> launches;

  Plan(const Numbers& program, int64_t given) : given(given) {
    size_t at = 0;
    const auto next = [&] {
      STD_TORCH_CHECK(at < program.size(), "A launch plan ends early.");
      return program[at++];
    };
    const auto count = [&](int64_t most) {
      const int64_t n = next();
      STD_TORCH_CHECK(n >= 0 && n <= most, "A launch plan counts ", n, " where at most ", most, " can be.");
      return n;
    };
    pool = count(int64_t{1} << 60);
    results.resize(count(16));
    const int64_t tensors = given + 1 + static_cast<int64_t>(results.size());
    for (Result& result : results) {
      result.tensor = count(tensors - 1);
      result.dtype = static_cast<int32_t>(count(127));
      result.size.resize(count(64));
      for (int64_t& n : result.size) n = count(int64_t{1} << 60);
      result.stride.resize(result.size.size());
      for (int64_t& n : result.stride) n = count(int64_t{1} << 60);
    }
    launches.resize(count(4096));
    for (Launch& launch : launches) {
      launch.function = reinterpret_cast<void*>(next());
      launch.programs = static_cast<unsigned>(count(0x7fffffff));
      launch.threads = static_cast<unsigned>(count(1024));
      launch.shared = static_cast<unsigned>(count(228 << 10));
      launch.parameters.resize(count(most_parameters));
      for (Parameter& parameter : launch.parameters) {
        parameter = {next(), next()};
        STD_TORCH_CHECK(parameter.tensor >= -1 && parameter.tensor < tensors, "A launch plan has no tensor ",
                        parameter.tensor, ".");
      }
    }
  }

  std::vector<Tensor> run(const Tensors& tensors, int64_t stream) const {
    std::vector<int64_t> addresses(given + 1 + results.size());
    int64_t* to = addresses.data();
    for (const Tensor& t : tensors) *to++ = reinterpret_cast<int64_t>(t.mutable_data_ptr());
    int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensors[0].get(), &type));
    const int32_t device = type == aoti_torch_device_type_cpu() ? 0 : tensors[0].get_device_index();
    const auto empty = [&](const Sizes& size, const Sizes& stride, int32_t dtype) {
      AtenTensorHandle handle;
      TORCH_ERROR_CODE_CHECK(
          aoti_torch_empty_strided(size.size(), size.data(), stride.data(), dtype, type, device, &handle));
      return Tensor(handle);
    };
    std::vector<Tensor> made;
    made.reserve(results.size());
    for (const Result& result : results) {
      made.push_back(empty(result.size, result.stride, result.dtype));
      addresses[result.tensor] = reinterpret_cast<int64_t>(made.back().mutable_data_ptr());
    }
    std::optional<Tensor> shared;  // after the results, which outlive it
    if (pool) {
      shared = empty({pool}, {1}, aoti_torch_dtype_uint8());
      addresses[given] = reinterpret_cast<int64_t>(shared->mutable_data_ptr());
    }
    driver().enter(device);
    for (const Launch& launch : launches) start(launch, addresses, reinterpret_cast<void*>(stream));
    return made;
  }

  static void start(const Launch& launch, const std::vector<int64_t>& addresses, void* stream) {
    std::array<int64_t, most_parameters + 2> values;
    std::array<void*, most_parameters + 2> places;
    size_t n = 0;
    for (const auto& [tensor, value] : launch.parameters) values[n++] = tensor < 0 ? value : addresses[tensor] + value;
    // Triton's own two parameters follow: pointers to memory that these kernels do not use.
    values[n++] = 0;
    values[n++] = 0;
    for (size_t i = 0; i < n; ++i) places[i] = &values[i];
    const Config config{{launch.programs, 1, 1}, {launch.threads, 1, 1}, launch.shared, stream, nullptr, 0};
    driver().check(driver().launch(&config, launch.function, places.data(), nullptr));
  }
};

// What a plan depends on: all of the tensors but their contents and, up to alignment, their addresses. `state` is
// Python's number for the rest of the call.
Numbers key_of(int64_t state, const Tensors& tensors) {
  Numbers key;
  key.reserve(64);
  key.push_back(state);
  for (const Tensor& t : tensors) {
    const AtenTensorHandle handle = t.get();
    int64_t dim = 0, *size = nullptr, *stride = nullptr;
    int32_t type = 0, device = 0, dtype = 0;
    const void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &size));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &stride));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &data));
    key.insert(key.end(), {dim, type, device, dtype, static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % 16)});
    key.insert(key.end(), size, size + dim);
    key.insert(key.end(), stride, stride + dim);
  }
  return key;
}

struct Hash {
  size_t operator()(const Numbers& key) const {
    uint64_t hash = 0x9e3779b97f4a7c15;
    for (const int64_t n : key) hash = (hash ^ static_cast<uint64_t>(n)) * 0xff51afd7ed558ccd, hash ^= hash >> 29;
    return hash;
  }
};

std::mutex lock;
std::unordered_map<Numbers, std::shared_ptr<const Plan>, Hash> plans;

std::shared_ptr<const Plan> find(int64_t state, const Tensors& tensors) {
  const Numbers key = key_of(state, tensors);
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = plans.find(key);
  return found == plans.end() ? nullptr : found->second;
}

// Runs the plan of the call, and returns its results; returns nothing where there is no plan.
std::vector<Tensor> replay(int64_t state, int64_t stream, Tensors tensors) {
  const auto plan = find(state, tensors);
  return plan ? plan->run(tensors, stream) : std::vector<Tensor>{};
}

// The same for the usual forward: building lists would take a quarter of its time.
using Three = std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;
Three replay_forward(int64_t state, int64_t stream, Tensor query, Tensor key, Tensor value, Tensor weight) {
  const Tensors tensors{std::move(query), std::move(key), std::move(value), std::move(weight)};
  const auto plan = find(state, tensors);
  if (!plan) return {};
  const std::vector<Tensor> results = plan->run(tensors, stream);
  STD_TORCH_CHECK(results.size() == 3, "A forward has 3 results, this launch plan ", results.size(), ".");
  return {results[0], results[1], results[2]};
}

void keep_plan(int64_t state, Tensors tensors, Numbers program) {
  STD_TORCH_CHECK(!tensors.empty(), "A launch plan needs a tensor, which says where it runs.");
  auto plan = std::make_shared<const Plan>(program, static_cast<int64_t>(tensors.size()));
  const std::lock_guard<std::mutex> guard(lock);
  if (plans.size() >= most_plans) plans.clear();
  plans[key_of(state, tensors)] = std::move(plan);
}

void forget_plans() {
  const std::lock_guard<std::mutex> guard(lock);
  plans.clear();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(additive_attn, m) {
  m.def("replay(int state, int stream, Tensor[] tensors) -> Tensor[]");
  m.def(
      "replay_forward(int state, int stream, Tensor query, Tensor key, Tensor value, Tensor weight) -> "
      "(Tensor?, Tensor?, Tensor?)");
  m.def("keep_plan(int state, Tensor[] tensors, int[] program) -> ()");
  m.def("forget_plans() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(additive_attn, CompositeExplicitAutograd, m) {
  m.impl("replay", TORCH_BOX(&replay));
  m.impl("replay_forward", TORCH_BOX(&replay_forward));
  m.impl("keep_plan", TORCH_BOX(&keep_plan));
  m.impl("forget_plans", TORCH_BOX(&forget_plans));
}

}  // namespace additive_attn
