// additive_attn::prepare_keys, step and step_backward: a decoder's queries, one at a time.
#include "arguments.h"

namespace additive_attn {
namespace {

// Where each entry's weight begins; nothing where an entry of keys has several weights.
std::optional<Offsets> weight_offsets(const Sizes& batch, const Tensor& weight) {
  const int64_t leading = weight.dim() - 1, missing = static_cast<int64_t>(batch.size()) - leading;
  for (int64_t d = 0; d < leading; ++d)
    if (weight.size(d) != 1 && (d + missing < 0 || batch[d + missing] != weight.size(d))) return std::nullopt;
  return batch_offsets(batch, weight, 1);
}

template <class T>
Tensor prepare_as(const Tensor& key, const std::optional<Tensor>& weight) {
  // Keys of 16 bits are not converted.
  const bool dense = key.size(-1) <= 1 || key.stride(-1) == 1;
  const Tensor same = dense ? key : torch::stable::contiguous(key);
  const Storage storage = key.scalar_type() == ScalarType::Half       ? Storage::float16
                          : key.scalar_type() == ScalarType::BFloat16 ? Storage::bfloat16
                                                                      : Storage::computed;
  const Sizes batch(same.sizes().begin(), same.sizes().end() - 2);
  const Offsets offsets = batch_offsets(batch, same, 2);
  const Tensor prepared = empty(sizes(key), key.scalar_type());
  PreparedKeys<T> p{};
  p.batch = static_cast<int64_t>(offsets.size());
  p.keys = key.size(-2);
  p.hidden = key.size(-1);
  p.key = {same.const_data_ptr(), offsets.data(), Inputs::row_stride(same), storage};
  std::optional<Tensor> same_weight;
  std::optional<Offsets> at_weight;
  if (is_half(key.scalar_type())) {
    p.narrow = data<std::uint16_t>(prepared);
  } else {
    p.prepared = data<T>(prepared);
    if (weight) same_weight = ready(*weight, key.scalar_type());
    if (weight) at_weight = weight_offsets(batch, *same_weight);
    if (at_weight) p.weight = {data<T>(*same_weight), at_weight->data(), 0};
  }
  kernels().prepare(p, parallel_for);
  return prepared;
}

Tensor prepare_keys(const Tensor& key, const std::optional<Tensor>& weight) {
  STD_TORCH_CHECK(key.dim() >= 2, "key has ", key.dim(), " dims; additive_attn needs at least 2.");
  const ScalarType type = key.scalar_type();
  STD_TORCH_CHECK(is_half(type) || type == ScalarType::Float || type == ScalarType::Double,
                  "key must be float64, float32, bfloat16 or float16.");
  STD_TORCH_CHECK(!weight || (weight->is_cpu() && weight->dim() >= 1 && weight->size(-1) == key.size(-1)),
                  "weight must be (..., ", key.size(-1), "), as the keys' last dim, on the CPU.");
  return type == ScalarType::Double ? prepare_as<double>(key, weight) : prepare_as<float>(key, weight);
}

template <class T>
void fill_location(Problem<T>& p, const Arguments& a, Inputs& inputs) {
  const Tensor &x = *a.location, &weight = *a.location_weight;
  STD_TORCH_CHECK(x.size(-1) == p.keys && weight.size(-1) == p.hidden && x.size(-2) == weight.size(-2),
                  "location must be (..., F, ", p.keys, ") and location_weight (..., F, ", p.hidden,
                  "), with the same F.");
  p.location.features = x.size(-2);
  p.location.x = inputs.rows<T>(x, 2, "location");
  p.location.weight = inputs.rows<T>(weight, 2, "location_weight");
}

// Checks what both operators check, and fills in the location or the prepared keys.
template <class T>
void fill_step(Problem<T>& p, const Arguments& a, Inputs& inputs, const std::optional<Tensor>& prepared) {
  STD_TORCH_CHECK(a.query.dim() >= 2 && a.query.size(-2) == 1, "query must be (..., 1, H): a step has one query.");
  STD_TORCH_CHECK(!a.location == !a.location_weight, "location and location_weight go together; one is missing.");
  inputs.fill(p, a);
  if (a.location) return fill_location(p, a, inputs);
  // Plain PyTorch prepares nothing: there the tensor is empty.
  if (!prepared || (prepared->dim() == 1 && prepared->size(0) == 0) || p.hidden == 0) return;
  STD_TORCH_CHECK(sizes(*prepared) == sizes(a.key), "prepared must have the shape of key: prepare_keys(key).");
  const bool narrow = is_half(a.key.scalar_type()) && sizeof(T) == sizeof(float);
  STD_TORCH_CHECK(prepared->scalar_type() == (narrow ? a.key.scalar_type() : compute_type(inputs.type)),
                  "prepared has another dtype than prepare_keys(key).");
  p.prepared = inputs.stored<T>(*prepared, "prepared");
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> step_as(const Arguments& a, Inputs& inputs, const std::optional<Tensor>& prepared) {
  Forward<T> p{};
  fill_step(p, a, inputs, prepared);
  const Tensor out = inputs.output(true, {1, p.values}, p.out);
  const Tensor weights = inputs.output(true, {1, p.keys}, p.weights);
  const Tensor lse = inputs.output(true, {1}, p.lse);
  kernels().forward(p, parallel_for);
  return {cast(out, inputs.type), cast(weights, inputs.type), lse};
}

std::tuple<Tensor, Tensor, Tensor> step(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const Tensor& weight, const std::optional<Tensor>& prepared,
                                        const std::optional<Tensor>& location,
                                        const std::optional<Tensor>& location_weight,
                                        const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& lengths,
                                        const std::optional<Tensor>& seed, double dropout_p, double scale) {
  const Arguments a{query,
                    key,
                    &value,
                    weight,
                    attn_mask,
                    lengths,
                    seed,
                    -1,
                    -1,
                    dropout_p,
                    scale,
                    given(location),
                    given(location_weight)};
  Inputs inputs(a);
  return inputs.type == ScalarType::Double ? step_as<double>(a, inputs, prepared) : step_as<float>(a, inputs, prepared);
}

// The data of grad_key, which is added to in place.
template <class T>
T* buffer(const Tensor& t, const Sizes& expected, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == compute_type(type) && sizes(t) == expected && t.is_contiguous(),
                  "grad_key must be contiguous, with all leading dims, in the dtype of lse.");
  return data<T>(t);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step_backward_as(const Arguments& a, Inputs& inputs,
                                                                            const std::optional<Tensor>& grad_out,
                                                                            const std::optional<Tensor>& grad_weights,
                                                                            const std::optional<Tensor>& grad_lse,
                                                                            const std::optional<Tensor>& prepared,
                                                                            const Tensor& weights, const Tensor& lse,
                                                                            const std::optional<Tensor>& grad_key) {
  StepBackward<T> p{};
  fill_step(p, a, inputs, prepared);
  const Sizes out_size = with(inputs.batch, {1, p.values}), pairs = with(inputs.batch, {1, p.keys});
  const Sizes rows = with(inputs.batch, {1});
  p.weights = inputs.whole<T>(weights, pairs, 2, "weights");
  STD_TORCH_CHECK(sizes(lse) == rows, "lse has another shape than the output that it belongs to.");
  if (grad_out) p.grad_out = inputs.whole<T>(*grad_out, out_size, 2, "grad_out");
  if (grad_weights) p.grad_weights = inputs.whole<T>(*grad_weights, pairs, 2, "grad_weights");
  if (grad_lse) p.grad_lse = inputs.whole<T>(*grad_lse, rows, 1, "grad_lse");
  const Tensor query = inputs.output(true, {1, p.hidden}, p.grad_query);
  const Tensor scores = inputs.output(true, {1, p.keys}, p.grad_scores);
  const Tensor kept = inputs.output(p.seed != nullptr, {1, p.keys}, p.kept);
  const int64_t features = std::max<int64_t>(p.location.features, 0);
  const Tensor x = inputs.output(bool(p.location), {features, p.keys}, p.grad_location);
  const Tensor weight_x = inputs.output(bool(p.location), {features, p.hidden}, p.grad_location_weight);
  const Tensor weight = inputs.output(bool(p.location), {p.hidden}, p.grad_weight);
  if (grad_key && p.location) p.grad_key = buffer<T>(*grad_key, with(inputs.batch, {p.keys, p.hidden}), inputs.type);
  kernels().step_backward(p, parallel_for);
  return {cast(query, inputs.type), scores, kept, x, weight_x, weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step_backward(
    const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_weights,
    const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& weight, const std::optional<Tensor>& prepared, const std::optional<Tensor>& location,
    const std::optional<Tensor>& location_weight, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& lengths, const std::optional<Tensor>& seed, double dropout_p, double scale,
    const Tensor& weights, const Tensor& lse, const std::optional<Tensor>& grad_key) {
  const Arguments a{query,
                    key,
                    &value,
                    weight,
                    attn_mask,
                    lengths,
                    seed,
                    -1,
                    -1,
                    dropout_p,
                    scale,
                    given(location),
                    given(location_weight)};
  Inputs inputs(a);
  const auto run = inputs.type == ScalarType::Double ? step_backward_as<double> : step_backward_as<float>;
  return run(a, inputs, grad_out, grad_weights, grad_lse, prepared, weights, lse, grad_key);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(additive_attn, CPU, m) {
  m.impl("prepare_keys", TORCH_BOX(&prepare_keys));
  m.impl("step", TORCH_BOX(&step));
  m.impl("step_backward", TORCH_BOX(&step_backward));
}

}  // namespace additive_attn
