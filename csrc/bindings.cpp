// The torch side: tensors of additive_attn::forward and backward to raw pointers, against torch's stable ABI. The
// schemas and the shapes for tracing stand in additive_attn/ops/schemas.py. additive_attn/ops/checks.py has checked the
// arguments; what could harm the process is checked again here, since the operators are public.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "problem.h"

namespace {

using additive_attn::Mask;
using additive_attn::MaskType;
using additive_attn::Problem;
using additive_attn::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using Offsets = std::vector<int64_t>;

void parallel_for(int64_t count, int64_t work, const additive_attn::Body& body) {
  constexpr int64_t worth_a_thread = 1 << 17;  // multiply-adds that take about as long as waking a thread
  if (count <= 0) return;
  additive_attn::Tasks tasks(count);
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

Sizes sizes(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }

// Broadcasts all but the last `own` dims of t into `batch`.
void broadcast(Sizes& batch, const Tensor& t, int64_t own, const char* name) {
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
Offsets batch_offsets(const Sizes& batch, const int64_t* size, const int64_t* stride, int64_t leading) {
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

Offsets batch_offsets(const Sizes& batch, const Tensor& t, int64_t own) {
  return batch_offsets(batch, t.sizes().data(), t.strides().data(), t.dim() - own);
}

bool is_half(ScalarType type) { return type == ScalarType::Half || type == ScalarType::BFloat16; }

ScalarType compute_type(ScalarType type) { return is_half(type) ? ScalarType::Float : type; }

// Bypasses the dispatcher, whose cost shows in small decoder steps.
Tensor empty(const Sizes& size, ScalarType type) {
  Sizes stride(size.size());
  int64_t step = 1;
  for (size_t d = size.size(); d-- > 0; step *= std::max<int64_t>(size[d], 1)) stride[d] = step;
  const int32_t dtype = type == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(size.size(), size.data(), stride.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor cast(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

// In the computing type, with neighbouring elements along the last dim.
Tensor ready(const Tensor& t, ScalarType type) {
  const Tensor same = cast(t, compute_type(type));
  return same.dim() == 0 || same.size(-1) <= 1 || same.stride(-1) == 1 ? same : torch::stable::contiguous(same);
}

Sizes with(Sizes batch, std::initializer_list<int64_t> more) {
  batch.insert(batch.end(), more);
  return batch;
}

struct Arguments {
  const Tensor &query, &key, &value, &weight;
  const std::optional<Tensor>&attn_mask, &lengths, &seed;
  int64_t left, right;
  double dropout_p, scale;
};

// The arguments in computing form, which must outlive the Problem that points into them.
struct Inputs {
  ScalarType type;
  Sizes batch;
  int64_t entries = 1;
  std::vector<Tensor> held;
  std::vector<Offsets> offsets;

  explicit Inputs(const Arguments& a) : type(a.query.scalar_type()) {
    STD_TORCH_CHECK(is_half(type) || type == ScalarType::Float || type == ScalarType::Double,
                    "query must be float64, float32, bfloat16 or float16.");
    broadcast(batch, a.query, 2, "query");
    broadcast(batch, a.key, 2, "key");
    broadcast(batch, a.value, 2, "value");
    broadcast(batch, a.weight, 1, "weight");
    if (a.attn_mask && a.attn_mask->dim() > 2) broadcast(batch, *a.attn_mask, 2, "attn_mask");
    if (a.lengths && a.lengths->dim() > 1) broadcast(batch, *a.lengths, 1, "lengths");
    if (a.seed) broadcast(batch, *a.seed, 0, "seed");
    for (const int64_t n : batch) entries *= n;
    held.reserve(16);
    offsets.reserve(16);
  }

  template <class T>
  Rows<const T> rows(const Tensor& t, int64_t own, const char* name) {
    STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU, but query is.");
    held.push_back(ready(t, type));
    const Tensor& u = held.back();
    STD_TORCH_CHECK(u.scalar_type() == compute_type(type), name, " has another dtype than query.");
    offsets.push_back(batch_offsets(batch, u, own));
    return {static_cast<const T*>(u.const_data_ptr()), offsets.back().data(), own == 2 ? row_stride(u) : 0};
  }

  static int64_t row_stride(const Tensor& t) { return t.size(-2) == 1 ? 0 : t.stride(-2); }

  // A tensor of rank two or less is aligned at its end, as broadcasting does.
  static int64_t stride_or_zero(const Tensor& t, int64_t from_end) {
    return t.dim() < from_end || t.size(-from_end) == 1 ? 0 : t.stride(-from_end);
  }

  template <class T>
  void fill(Problem<T>& p, const Arguments& a) {
    p.batch = entries;
    p.queries = a.query.size(-2);
    p.keys = a.key.size(-2);
    p.hidden = a.query.size(-1);
    p.values = a.value.size(-1);
    STD_TORCH_CHECK(a.key.size(-1) == p.hidden && a.weight.size(-1) == p.hidden,
                    "The last dims of query, key and weight must agree; they are ", p.hidden, ", ", a.key.size(-1),
                    " and ", a.weight.size(-1), ".");
    STD_TORCH_CHECK(a.value.size(-2) == p.keys, "value has ", a.value.size(-2), " rows for ", p.keys, " keys.");
    p.threads = static_cast<int>(torch::stable::get_num_threads());
    p.query = rows<T>(a.query, 2, "query");
    p.key = rows<T>(a.key, 2, "key");
    p.value = rows<T>(a.value, 2, "value");
    p.weight = rows<T>(a.weight, 1, "weight");
    if (a.attn_mask) p.mask = mask(*a.attn_mask, p.queries, p.keys);
    p.lengths = {};
    if (a.lengths) {
      const Tensor& t = *a.lengths;
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_cpu(), "lengths must be int64 on the CPU.");
      STD_TORCH_CHECK(t.dim() == 0 || t.size(-1) == 1 || t.size(-1) == p.queries, "The last dim of lengths is ",
                      t.dim() ? t.size(-1) : 1, "; it must be 1 or the number of query rows, ", p.queries, ".");
      held.push_back(t);
      offsets.push_back(batch_offsets(batch, t, std::min<int64_t>(t.dim(), 1)));
      p.lengths = {static_cast<const int64_t*>(t.const_data_ptr()), offsets.back().data(), stride_or_zero(t, 1)};
    }
    p.left = a.left;
    p.right = a.right;
    p.seed = nullptr;
    p.seed_offset = nullptr;
    STD_TORCH_CHECK(a.seed.has_value() || a.dropout_p == 0, "dropout_p is ", a.dropout_p, " but there is no seed.");
    if (a.seed && a.dropout_p > 0) {
      STD_TORCH_CHECK(a.seed->scalar_type() == ScalarType::Long && a.seed->is_cpu(), "seed must be int64 on the CPU.");
      held.push_back(*a.seed);
      offsets.push_back(batch_offsets(batch, *a.seed, 0));
      p.seed = static_cast<const int64_t*>(a.seed->const_data_ptr());
      p.seed_offset = offsets.back().data();
    }
    p.drop_below = static_cast<uint32_t>(std::min(std::floor(a.dropout_p * 4294967296.0), 4294967295.0));
    p.keep_scale = a.dropout_p < 1 ? T(1 / (1 - a.dropout_p)) : T(0);
    p.scale = T(a.scale);
  }

 private:
  Mask mask(const Tensor& t, int64_t queries, int64_t keys) {
    STD_TORCH_CHECK(t.is_cpu(), "attn_mask is not on the CPU, but query is.");
    STD_TORCH_CHECK((t.dim() < 1 || t.size(-1) == 1 || t.size(-1) == keys) &&
                        (t.dim() < 2 || t.size(-2) == 1 || t.size(-2) == queries),
                    "attn_mask must broadcast to (..., ", queries, ", ", keys, ").");
    Mask m;
    switch (t.scalar_type()) {
      case ScalarType::Bool:
        m.type = MaskType::boolean;
        break;
      case ScalarType::Half:
        m.type = MaskType::float16;
        break;
      case ScalarType::BFloat16:
        m.type = MaskType::bfloat16;
        break;
      case ScalarType::Float:
        m.type = MaskType::float32;
        break;
      case ScalarType::Double:
        m.type = MaskType::float64;
        break;
      default:
        STD_TORCH_CHECK(false, "attn_mask must be bool or floating point.");
    }
    held.push_back(t);
    offsets.push_back(batch_offsets(batch, t, std::min<int64_t>(t.dim(), 2)));
    m.data = t.const_data_ptr();
    m.offset = offsets.back().data();
    m.row = stride_or_zero(t, 2);
    m.column = stride_or_zero(t, 1);
    return m;
  }
};

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_as(const Arguments& a, Inputs& inputs, bool need_weights) {
  additive_attn::Forward<T> p;
  inputs.fill(p, a);
  const ScalarType type = compute_type(inputs.type);
  const Tensor out = empty(with(inputs.batch, {p.queries, p.values}), type);
  const Tensor lse = empty(with(inputs.batch, {p.queries}), type);
  const Tensor weights = empty(need_weights ? with(inputs.batch, {p.queries, p.keys}) : Sizes{0}, type);
  p.out = data<T>(out);
  p.lse = data<T>(lse);
  p.weights = need_weights ? data<T>(weights) : nullptr;
  additive_attn::kernels().forward(p, parallel_for);
  return {cast(out, inputs.type), cast(weights, inputs.type), lse};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Tensor& weight, const std::optional<Tensor>& attn_mask,
                                           const std::optional<Tensor>& lengths, int64_t left, int64_t right,
                                           const std::optional<Tensor>& seed, double dropout_p, double scale,
                                           bool need_weights) {
  const Arguments a{query, key, value, weight, attn_mask, lengths, seed, left, right, dropout_p, scale};
  Inputs inputs(a);
  return inputs.type == ScalarType::Double ? forward_as<double>(a, inputs, need_weights)
                                           : forward_as<float>(a, inputs, need_weights);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_as(const Arguments& a, Inputs& inputs,
                                                               const std::optional<Tensor>& grad_out,
                                                               const std::optional<Tensor>& grad_weights,
                                                               const std::optional<Tensor>& grad_lse, const Tensor& lse,
                                                               bool need_query, bool need_key, bool need_value,
                                                               bool need_weight, bool need_mask) {
  additive_attn::Backward<T> p;
  inputs.fill(p, a);
  const ScalarType type = compute_type(inputs.type);
  const auto upstream = [&](const Tensor& t, const Sizes& expected, const char* name) {
    STD_TORCH_CHECK(sizes(t) == expected, name, " has another shape than the output that it belongs to.");
  };
  const Sizes lse_size = with(inputs.batch, {p.queries});
  upstream(lse, lse_size, "lse");
  const Tensor same = cast(lse, type), saved = same.is_contiguous() ? same : torch::stable::contiguous(same);
  p.lse = static_cast<const T*>(saved.const_data_ptr());
  p.grad_out = p.grad_weights = p.grad_lse = {};
  if (grad_out) {
    upstream(*grad_out, with(inputs.batch, {p.queries, p.values}), "grad_out");
    p.grad_out = inputs.rows<T>(*grad_out, 2, "grad_out");
  }
  if (grad_weights) {
    upstream(*grad_weights, with(inputs.batch, {p.queries, p.keys}), "grad_weights");
    p.grad_weights = inputs.rows<T>(*grad_weights, 2, "grad_weights");
  }
  if (grad_lse) {
    upstream(*grad_lse, lse_size, "grad_lse");
    p.grad_lse = inputs.rows<T>(*grad_lse, 1, "grad_lse");
    p.grad_lse.row = 1;
  }
  const auto gradient = [&](bool needed, std::initializer_list<int64_t> own, T*& to) {
    const Tensor t = empty(needed ? with(inputs.batch, own) : Sizes{0}, type);
    to = needed ? data<T>(t) : nullptr;
    return t;
  };
  const Tensor query = gradient(need_query, {p.queries, p.hidden}, p.grad_query);
  const Tensor key = gradient(need_key, {p.keys, p.hidden}, p.grad_key);
  const Tensor value = gradient(need_value, {p.keys, p.values}, p.grad_value);
  const Tensor weight = gradient(need_weight, {p.hidden}, p.grad_weight);

  need_mask = need_mask && a.attn_mask && a.attn_mask->scalar_type() != ScalarType::Bool;
  Tensor mask = empty(need_mask ? sizes(*a.attn_mask) : Sizes{0}, ScalarType::Double);
  if (need_mask) mask = torch::stable::zero_(mask);
  p.grad_mask = need_mask ? data<double>(mask) : nullptr;
  Offsets mask_offsets;
  if (need_mask) {
    mask_offsets = batch_offsets(inputs.batch, mask, std::min<int64_t>(mask.dim(), 2));
    p.grad_mask_offset = mask_offsets.data();
    p.grad_mask_row = Inputs::stride_or_zero(mask, 2);
    p.grad_mask_column = Inputs::stride_or_zero(mask, 1);
  }
  additive_attn::kernels().backward(p, parallel_for);
  return {cast(query, inputs.type), cast(key, inputs.type), cast(value, inputs.type), weight,
          cast(mask, need_mask ? a.attn_mask->scalar_type() : inputs.type)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_weights,
    const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& weight, const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& lengths, int64_t left,
    int64_t right, const std::optional<Tensor>& seed, double dropout_p, double scale, const Tensor& lse,
    bool need_query, bool need_key, bool need_value, bool need_weight, bool need_mask) {
  const Arguments a{query, key, value, weight, attn_mask, lengths, seed, left, right, dropout_p, scale};
  Inputs inputs(a);
  const auto run = inputs.type == ScalarType::Double ? backward_as<double> : backward_as<float>;
  return run(a, inputs, grad_out, grad_weights, grad_lse, lse, need_query, need_key, need_value, need_weight,
             need_mask);
}

std::string cpu_isa() { return additive_attn::kernels().name; }
std::string select_cpu_isa(std::string name) { return additive_attn::select_kernels(name).name; }

}  // namespace

// Python reads this before it loads the library: arguments of another interface would crash the process.
extern "C" __attribute__((visibility("default"), used)) const char additive_attn_interface[] =
    "additive_attn interface 2";

STABLE_TORCH_LIBRARY_FRAGMENT(additive_attn, m) {
  m.def("cpu_isa() -> str");
  m.def("select_cpu_isa(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(additive_attn, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("select_cpu_isa", TORCH_BOX(&select_cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(additive_attn, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}
