// additive_attn::pair_scores and pair_gradients: the sums over features in forward mode and second
// derivatives.
#include "tensors.h"

namespace additive_attn {
namespace {

// The data of a tensor, which must be contiguous, of the expected shape and in the dtype of query.
template <class T>
const T* checked(const Tensor& t, const Sizes& expected, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == query.scalar_type(), name,
                  " must be on the CPU, in the dtype of query.");
  STD_TORCH_CHECK(sizes(t) == expected, name, " has another shape than what it belongs to.");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous.");
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
void fill(Pairs<T>& p, const Tensor& query, const Tensor& key, const Tensor& weight, const Tensor& query_tangent,
          const Tensor& key_tangent, const Tensor& weight_tangent) {
  p.batch = query.size(0);
  p.queries = query.size(1);
  p.keys = key.size(1);
  p.hidden = query.size(2);
  const Sizes of_query = sizes(query), of_key{p.batch, p.keys, p.hidden}, of_weight{p.batch, p.hidden};
  p.query = checked<T>(query, of_query, query, "query");
  p.key = checked<T>(key, of_key, query, "key");
  p.weight = checked<T>(weight, of_weight, query, "weight");
  p.query_tangent = checked<T>(query_tangent, of_query, query, "query_tangent");
  p.key_tangent = checked<T>(key_tangent, of_key, query, "key_tangent");
  p.weight_tangent = checked<T>(weight_tangent, of_weight, query, "weight_tangent");
}

bool is_double(const Tensor& query, const Tensor& key) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3, "query and key must be (entries, rows or keys, features).");
  const ScalarType type = query.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "query must be float64 or float32.");
  return type == ScalarType::Double;
}

template <class T>
std::tuple<Tensor, Tensor> scores_as(const Tensor& query, const Tensor& key, const Tensor& weight,
                                     const Tensor& query_tangent, const Tensor& key_tangent,
                                     const Tensor& weight_tangent) {
  Pairs<T> p;
  fill(p, query, key, weight, query_tangent, key_tangent, weight_tangent);
  const Sizes shape{p.batch, p.queries, p.keys};
  const Tensor scores = empty(shape, query.scalar_type()), tangents = empty(shape, query.scalar_type());
  p.scores = data<T>(scores);
  p.tangents = data<T>(tangents);
  kernels().pair_scores(p, parallel_for);
  return {scores, tangents};
}

std::tuple<Tensor, Tensor> scores(const Tensor& query, const Tensor& key, const Tensor& weight,
                                  const Tensor& query_tangent, const Tensor& key_tangent,
                                  const Tensor& weight_tangent) {
  const auto run = is_double(query, key) ? scores_as<double> : scores_as<float>;
  return run(query, key, weight, query_tangent, key_tangent, weight_tangent);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> gradients_as(const Tensor& grad, const Tensor& grad_tangent, const Tensor& query,
                                                const Tensor& key, const Tensor& weight, const Tensor& query_tangent,
                                                const Tensor& key_tangent, const Tensor& weight_tangent,
                                                bool need_query, bool need_key, bool need_weight) {
  PairGradients<T> p;
  fill(p, query, key, weight, query_tangent, key_tangent, weight_tangent);
  const Sizes pairs{p.batch, p.queries, p.keys};
  p.grad = checked<T>(grad, pairs, query, "grad");
  p.grad_tangent = checked<T>(grad_tangent, pairs, query, "grad_tangent");
  const ScalarType type = query.scalar_type();
  const Tensor of_query = empty(need_query ? sizes(query) : Sizes{0}, type);
  const Tensor of_key = empty(need_key ? sizes(key) : Sizes{0}, type);
  const Tensor of_weight = empty(need_weight ? sizes(weight) : Sizes{0}, type);
  p.grad_query = need_query ? data<T>(of_query) : nullptr;
  p.grad_key = need_key ? data<T>(of_key) : nullptr;
  p.grad_weight = need_weight ? data<T>(of_weight) : nullptr;
  kernels().pair_gradients(p, parallel_for);
  return {of_query, of_key, of_weight};
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad, const Tensor& grad_tangent, const Tensor& query,
                                             const Tensor& key, const Tensor& weight, const Tensor& query_tangent,
                                             const Tensor& key_tangent, const Tensor& weight_tangent, bool need_query,
                                             bool need_key, bool need_weight) {
  const auto run = is_double(query, key) ? gradients_as<double> : gradients_as<float>;
  return run(grad, grad_tangent, query, key, weight, query_tangent, key_tangent, weight_tangent, need_query, need_key,
             need_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(additive_attn, CPU, m) {
  m.impl("pair_scores", TORCH_BOX(&scores));
  m.impl("pair_gradients", TORCH_BOX(&gradients));
}

}  // namespace additive_attn
