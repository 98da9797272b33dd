// The arguments that all operators share, converted for the kernels. additive_attn/ops/checks.py has checked them; what
// could crash the process is checked again here, since the operators are public.
#pragma once

#include "tensors.h"

namespace additive_attn {

// The smallest random word that keeps a weight.
inline uint32_t keep_threshold(double dropout_p) {
  return static_cast<uint32_t>(std::min(std::floor(dropout_p * 4294967296.0), 4294967295.0));
}

struct Arguments {
  const Tensor &query, &key;
  const Tensor* value;  // null where only scores are asked for
  const Tensor& weight;
  const std::optional<Tensor>&attn_mask, &lengths, &seed;
  int64_t left, right;
  double dropout_p, scale;
  const Tensor *location = nullptr, *location_weight = nullptr;  // of a step
  const Tensor *starts = nullptr, *block_table = nullptr, *block_tiles = nullptr;
};

inline const Tensor* given(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// The converted arguments, which must outlive the Problem that points into them.
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
    if (a.value) broadcast(batch, *a.value, 2, "value");
    broadcast(batch, a.weight, 1, "weight");
    if (a.attn_mask && a.attn_mask->dim() > 2) broadcast(batch, *a.attn_mask, 2, "attn_mask");
    if (a.lengths && a.lengths->dim() > 1) broadcast(batch, *a.lengths, 1, "lengths");
    if (a.starts && a.starts->dim() > 1) broadcast(batch, *a.starts, 1, "starts");
    if (a.block_table) broadcast(batch, *a.block_table, 2, "block_table");
    if (a.seed) broadcast(batch, *a.seed, 0, "seed");
    if (a.location) broadcast(batch, *a.location, 2, "location");
    if (a.location_weight) broadcast(batch, *a.location_weight, 2, "location_weight");
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

  // Keys or values. Those stored in 16 bits are not converted.
  template <class T>
  StoredRows<T> stored(const Tensor& t, const char* name) {
    const bool half = is_half(t.scalar_type()) && sizeof(T) == sizeof(float);
    const Rows<const T> r = half ? Rows<const T>{} : rows<T>(t, 2, name);
    if (!half) return {r.data, r.offset, r.row};
    STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU, but query is.");
    held.push_back(t.size(-1) <= 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t));
    const Tensor& u = held.back();
    offsets.push_back(batch_offsets(batch, u, 2));
    const Storage storage = u.scalar_type() == ScalarType::Half ? Storage::float16 : Storage::bfloat16;
    return {u.const_data_ptr(), offsets.back().data(), row_stride(u), storage};
  }

  static int64_t row_stride(const Tensor& t) { return t.size(-2) == 1 ? 0 : t.stride(-2); }

  // A tensor of rank two or less is aligned at its last dim, as in broadcasting.
  static int64_t stride_or_zero(const Tensor& t, int64_t from_end) {
    return t.dim() < from_end || t.size(-from_end) == 1 ? 0 : t.stride(-from_end);
  }

  // A gradient or a saved output, which has all leading dims.
  template <class T>
  Rows<const T> whole(const Tensor& t, const Sizes& expected, int64_t own, const char* name) {
    STD_TORCH_CHECK(sizes(t) == expected, name, " has another shape than the output that it belongs to.");
    return rows<T>(t, own, name);
  }

  // Allocates a result with all leading dims; it is empty where it is not needed.
  template <class T>
  Tensor output(bool needed, std::initializer_list<int64_t> own, T*& to) const {
    const Tensor t = empty(needed ? with(batch, own) : Sizes{0}, compute_type(type));
    to = needed ? data<T>(t) : nullptr;
    return t;
  }

  // Allocates the mask's gradient, zeroed. Clears `needed` where there is none: without a mask, or if it is boolean.
  template <class T>
  Tensor mask_gradient(Backward<T>& p, const std::optional<Tensor>& attn_mask, bool& needed) {
    needed = needed && attn_mask && attn_mask->scalar_type() != ScalarType::Bool;
    Tensor mask = empty(needed ? sizes(*attn_mask) : Sizes{0}, ScalarType::Double);
    p.grad_mask = nullptr;
    if (!needed) return mask;
    held.push_back(torch::stable::zero_(mask));
    offsets.push_back(batch_offsets(batch, mask, std::min<int64_t>(mask.dim(), 2)));
    p.grad_mask = data<double>(mask);
    p.grad_mask_offset = offsets.back().data();
    p.grad_mask_row = stride_or_zero(mask, 2);
    p.grad_mask_column = stride_or_zero(mask, 1);
    return mask;
  }

  template <class T>
  void fill(Problem<T>& p, const Arguments& a) {
    p.batch = entries;
    p.queries = a.query.size(-2);
    p.keys = a.key.size(-2);
    p.hidden = a.query.size(-1);
    p.values = a.value ? a.value->size(-1) : 0;
    STD_TORCH_CHECK(a.key.size(-1) == p.hidden && a.weight.size(-1) == p.hidden,
                    "The last dims of query, key and weight must agree; they are ", p.hidden, ", ", a.key.size(-1),
                    " and ", a.weight.size(-1), ".");
    p.threads = static_cast<int>(torch::stable::get_num_threads());
    p.query = rows<T>(a.query, 2, "query");
    p.key = stored<T>(a.key, "key");
    if (a.value) {
      STD_TORCH_CHECK(a.value->size(-2) == p.keys, "value has ", a.value->size(-2), " rows for ", p.keys, " keys.");
      p.value = stored<T>(*a.value, "value");
    }
    p.weight = rows<T>(a.weight, 1, "weight");
    if (a.attn_mask) p.mask = mask(*a.attn_mask, p.queries, p.keys);
    p.lengths = a.lengths ? per_row(*a.lengths, p.queries, "lengths") : Rows<const int64_t>{};
    p.starts = a.starts ? per_row(*a.starts, p.queries, "starts") : Rows<const int64_t>{};
    p.blocks = blocks(a, p.queries, p.keys);
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
    p.drop_below = keep_threshold(a.dropout_p);
    p.keep_scale = a.dropout_p < 1 ? T(1 / (1 - a.dropout_p)) : T(0);
    p.scale = T(a.scale);
  }

 private:
  Rows<const int64_t> per_row(const Tensor& t, int64_t queries, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_cpu(), name, " must be int64 on the CPU.");
    STD_TORCH_CHECK(t.dim() == 0 || t.size(-1) == 1 || t.size(-1) == queries, "The last dim of ", name, " is ",
                    t.dim() ? t.size(-1) : 1, "; it must be 1 or the number of query rows, ", queries, ".");
    held.push_back(t);
    offsets.push_back(batch_offsets(batch, t, std::min<int64_t>(t.dim(), 1)));
    return {static_cast<const int64_t*>(t.const_data_ptr()), offsets.back().data(), stride_or_zero(t, 1)};
  }

  BlockTable blocks(const Arguments& a, int64_t queries, int64_t keys) {
    STD_TORCH_CHECK(!a.block_table == !a.block_tiles, "block_table and block_tiles come together.");
    BlockTable b;
    if (!a.block_table) return b;
    const Tensor& t = *a.block_table;
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_cpu(), "block_table must be int32 on the CPU.");
    STD_TORCH_CHECK(
        a.block_tiles->scalar_type() == ScalarType::Bool && a.block_tiles->is_cpu() && a.block_tiles->dim() == 3 &&
            a.block_tiles->size(1) > 0 && a.block_tiles->size(2) > 0,
        "block_tiles must be bool (tiles, rows, keys) on the CPU; its shape also gives the size of a block.");
    b.count = a.block_tiles->size(0);
    b.rows = a.block_tiles->size(1);
    b.keys = a.block_tiles->size(2);
    const int64_t row_blocks = (queries + b.rows - 1) / b.rows, key_blocks = (keys + b.keys - 1) / b.keys;
    STD_TORCH_CHECK(t.size(-2) == row_blocks && t.size(-1) == key_blocks, "block_table must be (..., ", row_blocks,
                    ", ", key_blocks, ") for blocks of ", b.rows, " rows and ", b.keys, " keys.");
    held.push_back(torch::stable::contiguous(*a.block_tiles));
    b.tiles = static_cast<const unsigned char*>(held.back().const_data_ptr());
    held.push_back(t);
    offsets.push_back(batch_offsets(batch, t, 2));
    b.data = static_cast<const int32_t*>(t.const_data_ptr());
    b.offset = offsets.back().data();
    b.row = t.stride(-2);
    b.column = t.stride(-1);
    return b;
  }

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

}  // namespace additive_attn
