// additive_attn::location_features and location_features_backward: features made of a decoder's earlier
// weights.
#include "tensors.h"

namespace additive_attn {
namespace {

// A tensor (entry, row, key) in the computing type, with stride 1 along the keys.
template <class T>
struct Planes {
  Tensor held;
  Offsets offset;
  Rows<const T> rows;

  Planes(const Tensor& t, ScalarType type, const char* name) : held(ready(t, type)) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type, name, " must be on the CPU, in the dtype of filters.");
    for (int64_t n = 0; n < held.size(0); ++n) offset.push_back(n * held.stride(0));
    rows = {static_cast<const T*>(held.const_data_ptr()), offset.data(), held.stride(1)};
  }
};

ScalarType checked_type(const Tensor& inputs, const Tensor& filters) {
  STD_TORCH_CHECK(inputs.dim() == 3 && filters.dim() == 3 && inputs.size(1) == filters.size(1),
                  "inputs must be (B, C, Lk) and filters (F, C, width), with the same C.");
  STD_TORCH_CHECK(filters.size(2) % 2 == 1, "The width of filters is ", filters.size(2), "; it must be odd.");
  const ScalarType type = filters.scalar_type();
  STD_TORCH_CHECK(is_half(type) || type == ScalarType::Float || type == ScalarType::Double,
                  "filters must be float64, float32, bfloat16 or float16.");
  STD_TORCH_CHECK(filters.is_cpu(), "filters is not on the CPU, but inputs is.");
  return type;
}

template <class T>
void fill(LocationFeatures<T>& p, const Tensor& inputs, const Planes<T>& planes, const Tensor& filters) {
  p.batch = inputs.size(0);
  p.channels = inputs.size(1);
  p.keys = inputs.size(2);
  p.filters = filters.size(0);
  p.width = filters.size(2);
  p.inputs = planes.rows;
  p.filter = static_cast<const T*>(filters.const_data_ptr());
}

template <class T>
Tensor features_as(const Tensor& inputs, const Tensor& filters, ScalarType type) {
  const Planes<T> planes(inputs, type, "inputs");
  const Tensor taps = torch::stable::contiguous(cast(filters, compute_type(type)));
  LocationFeatures<T> p;
  fill(p, inputs, planes, taps);
  const Tensor out = empty({p.batch, p.filters, p.keys}, compute_type(type));
  p.out = data<T>(out);
  kernels().location_features(p, parallel_for);
  return cast(out, type);
}

Tensor features(const Tensor& inputs, const Tensor& filters) {
  const ScalarType type = checked_type(inputs, filters);
  const auto run = type == ScalarType::Double ? features_as<double> : features_as<float>;
  return run(inputs, filters, type);
}

template <class T>
std::tuple<Tensor, Tensor> features_backward_as(const Tensor& grad, const Tensor& inputs, const Tensor& filters,
                                                ScalarType type, bool need_inputs, bool need_filters) {
  const Planes<T> planes(inputs, type, "inputs"), upstream(grad, type, "grad");
  const Tensor taps = torch::stable::contiguous(cast(filters, compute_type(type)));
  LocationFeaturesBackward<T> p;
  fill(p, inputs, planes, taps);
  p.grad = upstream.rows;
  const Tensor grad_inputs = empty(need_inputs ? sizes(inputs) : Sizes{0}, compute_type(type));
  const Tensor grad_filters = empty(need_filters ? sizes(filters) : Sizes{0}, compute_type(type));
  p.grad_inputs = need_inputs ? data<T>(grad_inputs) : nullptr;
  p.grad_filters = need_filters ? data<T>(grad_filters) : nullptr;
  kernels().location_features_backward(p, parallel_for);
  return {cast(grad_inputs, type), cast(grad_filters, type)};
}

std::tuple<Tensor, Tensor> features_backward(const Tensor& grad, const Tensor& inputs, const Tensor& filters,
                                             bool need_inputs, bool need_filters) {
  const ScalarType type = checked_type(inputs, filters);
  STD_TORCH_CHECK(sizes(grad) == Sizes({inputs.size(0), filters.size(0), inputs.size(2)}),
                  "grad has another shape than the features that it belongs to.");
  const auto run = type == ScalarType::Double ? features_backward_as<double> : features_backward_as<float>;
  return run(grad, inputs, filters, type, need_inputs, need_filters);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(additive_attn, CPU, m) {
  m.impl("location_features", TORCH_BOX(&features));
  m.impl("location_features_backward", TORCH_BOX(&features_backward));
}

}  // namespace additive_attn
