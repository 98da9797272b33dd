// additive_attn::prepare_keys, step and step_backward: a decoder's queries, one at a time.
#include "arguments.h"

namespace additive_attn {
namespace {

template <class T>
Tensor prepare_as(const Tensor& key) {
  const Tensor same = ready(key, key.scalar_type());
  const Sizes batch(same.sizes().begin(), same.sizes().end() - 2);
  const Offsets offsets = batch_offsets(batch, same, 2);
  const Tensor prepared = empty(sizes(key), compute_type(key.scalar_type()));
  PreparedKeys<T> p;
  p.batch = static_cast<int64_t>(offsets.size());
  p.keys = key.size(-2);
  p.hidden = key.size(-1);
  p.key = {static_cast<const T*>(same.const_data_ptr()), offsets.data(), Inputs::row_stride(same)};
  p.prepared = data<T>(prepared);
  kernels().prepare(p, parallel_for);
  return prepared;
}

Tensor prepare_keys(const Tensor& key) {
  STD_TORCH_CHECK(key.dim() >= 2, "key has ", key.dim(), " dims; additive_attn needs at least 2.");
  const ScalarType type = key.scalar_type();
  STD_TORCH_CHECK(is_half(type) || type == ScalarType::Float || type == ScalarType::Double,
                  "key must be float64, float32, bfloat16 or float16.");
  return type == ScalarType::Double ? prepare_as<double>(key) : prepare_as<float>(key);
}

// What both operators check, and the keys' other form.
template <class T>
void fill_step(Problem<T>& p, const Arguments& a, Inputs& inputs, const std::optional<Tensor>& prepared,
               const std::optional<Tensor>& location) {
  STD_TORCH_CHECK(a.query.dim() >= 2 && a.query.size(-2) == 1, "query must be (..., 1, H): a step has one query.");
  STD_TORCH_CHECK(!location, "This build computes no location term; pass None.");
  inputs.fill(p, a);
  // Plain PyTorch prepares nothing, and says so by an empty tensor.
  if (!prepared || (prepared->dim() == 1 && prepared->size(0) == 0) || p.hidden == 0) return;
  STD_TORCH_CHECK(sizes(*prepared) == sizes(a.key), "prepared must have the shape of key: prepare_keys(key).");
  STD_TORCH_CHECK(prepared->scalar_type() == compute_type(inputs.type),
                  "prepared has another dtype than prepare_keys(key).");
  p.prepared = inputs.rows<T>(*prepared, 2, "prepared");
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> step_as(const Arguments& a, Inputs& inputs, const std::optional<Tensor>& prepared,
                                           const std::optional<Tensor>& location) {
  Forward<T> p{};
  fill_step(p, a, inputs, prepared, location);
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
  const Arguments a{query, key, &value, weight, attn_mask, lengths, seed, -1, -1, dropout_p, scale};
  Inputs inputs(a);
  return inputs.type == ScalarType::Double ? step_as<double>(a, inputs, prepared, location)
                                           : step_as<float>(a, inputs, prepared, location);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step_backward_as(const Arguments& a, Inputs& inputs,
                                                                            const std::optional<Tensor>& grad_out,
                                                                            const std::optional<Tensor>& grad_weights,
                                                                            const std::optional<Tensor>& grad_lse,
                                                                            const std::optional<Tensor>& prepared,
                                                                            const std::optional<Tensor>& location,
                                                                            const Tensor& weights, const Tensor& lse) {
  StepBackward<T> p{};
  fill_step(p, a, inputs, prepared, location);
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
  kernels().step_backward(p, parallel_for);
  const Tensor none = empty({0}, compute_type(inputs.type));
  return {cast(query, inputs.type), scores, kept, none, none, none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step_backward(
    const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_weights,
    const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& weight, const std::optional<Tensor>& prepared, const std::optional<Tensor>& location,
    const std::optional<Tensor>& location_weight, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& lengths, const std::optional<Tensor>& seed, double dropout_p, double scale,
    const Tensor& weights, const Tensor& lse, const std::optional<Tensor>& grad_key) {
  const Arguments a{query, key, &value, weight, attn_mask, lengths, seed, -1, -1, dropout_p, scale};
  Inputs inputs(a);
  const auto run = inputs.type == ScalarType::Double ? step_backward_as<double> : step_backward_as<float>;
  return run(a, inputs, grad_out, grad_weights, grad_lse, prepared, location, weights, lse);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(additive_attn, CPU, m) {
  m.impl("prepare_keys", TORCH_BOX(&prepare_keys));
  m.impl("step", TORCH_BOX(&step));
  m.impl("step_backward", TORCH_BOX(&step_backward));
}

}  // namespace additive_attn
