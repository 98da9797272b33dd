// additive_attn::forward and backward. The schemas and the shapes for tracing are in additive_attn/ops/schemas.py.
#include "arguments.h"

namespace additive_attn {
namespace {

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_as(const Arguments& a, Inputs& inputs, bool need_weights) {
  Forward<T> p;
  inputs.fill(p, a);
  const Tensor out = inputs.output(true, {p.queries, p.values}, p.out);
  const Tensor lse = inputs.output(true, {p.queries}, p.lse);
  const Tensor weights = inputs.output(need_weights, {p.queries, p.keys}, p.weights);
  kernels().forward(p, parallel_for);
  return {cast(out, inputs.type), cast(weights, inputs.type), lse};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Tensor& weight, const std::optional<Tensor>& attn_mask,
                                           const std::optional<Tensor>& lengths, const std::optional<Tensor>& starts,
                                           const std::optional<Tensor>& block_table,
                                           const std::optional<Tensor>& block_tiles, int64_t left, int64_t right,
                                           const std::optional<Tensor>& seed, double dropout_p, double scale,
                                           bool need_weights) {
  const Arguments a{
      query, key,     &value,  weight,        attn_mask,          lengths,           seed, left, right, dropout_p,
      scale, nullptr, nullptr, given(starts), given(block_table), given(block_tiles)};
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
  Backward<T> p;
  inputs.fill(p, a);
  const ScalarType type = compute_type(inputs.type);
  const Sizes lse_size = with(inputs.batch, {p.queries});
  STD_TORCH_CHECK(sizes(lse) == lse_size, "lse has another shape than the output that it belongs to.");
  const Tensor same = cast(lse, type), saved = same.is_contiguous() ? same : torch::stable::contiguous(same);
  p.lse = static_cast<const T*>(saved.const_data_ptr());
  p.grad_out = p.grad_weights = p.grad_lse = p.grad_scores = {};
  if (grad_out) p.grad_out = inputs.whole<T>(*grad_out, with(inputs.batch, {p.queries, p.values}), 2, "grad_out");
  if (grad_weights)
    p.grad_weights = inputs.whole<T>(*grad_weights, with(inputs.batch, {p.queries, p.keys}), 2, "grad_weights");
  if (grad_lse) {
    p.grad_lse = inputs.whole<T>(*grad_lse, lse_size, 1, "grad_lse");
    p.grad_lse.row = 1;
  }
  const Tensor query = inputs.output(need_query, {p.queries, p.hidden}, p.grad_query);
  const Tensor key = inputs.output(need_key, {p.keys, p.hidden}, p.grad_key);
  const Tensor value = inputs.output(need_value, {p.keys, p.values}, p.grad_value);
  const Tensor weight = inputs.output(need_weight, {p.hidden}, p.grad_weight);
  const Tensor mask = inputs.mask_gradient(p, a.attn_mask, need_mask);
  kernels().backward(p, parallel_for);
  return {cast(query, inputs.type), cast(key, inputs.type), cast(value, inputs.type), weight,
          cast(mask, need_mask ? a.attn_mask->scalar_type() : inputs.type)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_weights,
    const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& weight, const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& starts, const std::optional<Tensor>& block_table,
    const std::optional<Tensor>& block_tiles, int64_t left, int64_t right, const std::optional<Tensor>& seed,
    double dropout_p, double scale, const Tensor& lse, bool need_query, bool need_key, bool need_value,
    bool need_weight, bool need_mask) {
  const Arguments a{
      query, key,     &value,  weight,        attn_mask,          lengths,           seed, left, right, dropout_p,
      scale, nullptr, nullptr, given(starts), given(block_table), given(block_tiles)};
  Inputs inputs(a);
  const auto run = inputs.type == ScalarType::Double ? backward_as<double> : backward_as<float>;
  return run(a, inputs, grad_out, grad_weights, grad_lse, lse, need_query, need_key, need_value, need_weight,
             need_mask);
}

Tensor keep(const Tensor& seed, int64_t rows, int64_t keys, double dropout_p) {
  STD_TORCH_CHECK(seed.is_cpu() && seed.scalar_type() == ScalarType::Long && seed.dim() == 1,
                  "seed must be int64 on the CPU, one for each entry.");
  STD_TORCH_CHECK(rows >= 0 && keys >= 0 && dropout_p >= 0 && dropout_p <= 1,
                  "rows and keys must be sizes, and dropout_p a probability.");
  const Tensor each = torch::stable::contiguous(seed);
  const Tensor kept = torch::stable::new_empty(each, Sizes{each.size(0), rows, keys}, ScalarType::Bool);
  const KeepEntries p{each.size(0),
                      rows,
                      keys,
                      static_cast<const int64_t*>(each.const_data_ptr()),
                      keep_threshold(dropout_p),
                      static_cast<bool*>(kept.mutable_data_ptr())};
  kernels().keep_entries(p, parallel_for);
  return kept;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(additive_attn, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("keep_entries", TORCH_BOX(&keep));
}

}  // namespace additive_attn
