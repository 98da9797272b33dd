// additive_attn::scores and scores_backward: the masked scores, without a softmax.
#include "arguments.h"

namespace additive_attn {
namespace {

const std::optional<Tensor> no_seed;

template <class T>
Tensor scores_as(const Arguments& a, Inputs& inputs) {
  Scores<T> p;
  inputs.fill(p, a);
  const Tensor scores = inputs.output(true, {p.queries, p.keys}, p.scores);
  kernels().scores(p, parallel_for);
  return cast(scores, inputs.type);
}

Tensor scores(const Tensor& query, const Tensor& key, const Tensor& weight, const std::optional<Tensor>& attn_mask,
              const std::optional<Tensor>& lengths, const std::optional<Tensor>& starts,
              const std::optional<Tensor>& block_table, const std::optional<Tensor>& block_tiles, int64_t left,
              int64_t right, double scale) {
  const Arguments a{
      query, key,     nullptr, weight,        attn_mask,          lengths,           no_seed, left, right, 0.0,
      scale, nullptr, nullptr, given(starts), given(block_table), given(block_tiles)};
  Inputs inputs(a);
  return inputs.type == ScalarType::Double ? scores_as<double>(a, inputs) : scores_as<float>(a, inputs);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> scores_backward_as(const Arguments& a, Inputs& inputs,
                                                              const Tensor& grad_scores, bool need_query, bool need_key,
                                                              bool need_weight, bool need_mask) {
  Backward<T> p{};
  inputs.fill(p, a);
  p.grad_scores = inputs.whole<T>(grad_scores, with(inputs.batch, {p.queries, p.keys}), 2, "grad_scores");
  const Tensor query = inputs.output(need_query, {p.queries, p.hidden}, p.grad_query);
  const Tensor key = inputs.output(need_key, {p.keys, p.hidden}, p.grad_key);
  const Tensor weight = inputs.output(need_weight, {p.hidden}, p.grad_weight);
  const Tensor mask = inputs.mask_gradient(p, a.attn_mask, need_mask);
  kernels().backward(p, parallel_for);
  return {cast(query, inputs.type), cast(key, inputs.type), weight,
          cast(mask, need_mask ? a.attn_mask->scalar_type() : inputs.type)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scores_backward(
    const Tensor& grad_scores, const Tensor& query, const Tensor& key, const Tensor& weight,
    const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& lengths, const std::optional<Tensor>& starts,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& block_tiles, int64_t left, int64_t right,
    double scale, bool need_query, bool need_key, bool need_weight, bool need_mask) {
  const Arguments a{
      query, key,     nullptr, weight,        attn_mask,          lengths,           no_seed, left, right, 0.0,
      scale, nullptr, nullptr, given(starts), given(block_table), given(block_tiles)};
  Inputs inputs(a);
  const auto run = inputs.type == ScalarType::Double ? scores_backward_as<double> : scores_backward_as<float>;
  return run(a, inputs, grad_scores, need_query, need_key, need_weight, need_mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(additive_attn, CPU, m) {
  m.impl("scores", TORCH_BOX(&scores));
  m.impl("scores_backward", TORCH_BOX(&scores_backward));
}

}  // namespace additive_attn
