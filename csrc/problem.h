// What the kernels compute, on raw pointers: the boundary between the torch side (bindings/) and the kernels.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>

namespace additive_attn {

// Element (n, i, c) of a tensor lies at data[offset[n] + i * row + c]: n counts the entries after broadcasting.
template <class T>
struct Rows {
  T* data = nullptr;
  const std::int64_t* offset = nullptr;
  std::int64_t row = 0;

  T* at(std::int64_t n, std::int64_t i) const { return data + offset[n] + i * row; }
  explicit operator bool() const { return data != nullptr; }
};

// Keys and values may be stored in 16 bits; the kernels widen them as they read them.
enum class Storage : int { computed, bfloat16, float16 };

template <class T>
struct StoredRows {
  const void* data = nullptr;
  const std::int64_t* offset = nullptr;
  std::int64_t row = 0;
  Storage storage = Storage::computed;

  std::int64_t element() const { return storage == Storage::computed ? sizeof(T) : 2; }
  const void* at(std::int64_t n, std::int64_t i) const {
    return static_cast<const char*>(data) + (offset[n] + i * row) * element();
  }
  explicit operator bool() const { return data != nullptr; }
};

enum class MaskType { none, boolean, float16, bfloat16, float32, float64 };

struct Mask {
  MaskType type = MaskType::none;
  const void* data = nullptr;
  const std::int64_t* offset = nullptr;
  std::int64_t row = 0, column = 0;
};

// Which pairs of each block of rows and keys are attended. Code 0: none; 1: all; 1 + t: those of tile t - 1; any other
// code: none.
struct BlockTable {
  const std::int32_t* data = nullptr;
  const std::int64_t* offset = nullptr;
  std::int64_t row = 0, column = 0;
  std::int64_t rows = 1, keys = 1, count = 0;  // rows and keys of a block; number of tiles
  const unsigned char* tiles = nullptr;        // [tile][row][key]

  explicit operator bool() const { return data != nullptr; }
  std::int64_t of_block(std::int64_t n, std::int64_t i, std::int64_t j) const {
    const std::int64_t code = data[offset[n] + i * row + j * column];
    return code < 0 || code > count + 1 ? 0 : code;
  }
};

// What a decoder's step adds to key j inside the tanh: sum_f x_fj M_fh (math.md, eq. 17).
template <class T>
struct Location {
  std::int64_t features = -1;  // F; below 0 = no location
  Rows<const T> x, weight;     // element (n, f): Lk numbers; H numbers

  explicit operator bool() const { return features >= 0; }
};

template <class T>
struct Problem {
  std::int64_t batch, queries, keys, hidden, values;  // B (flattened), Lq, Lk, H, Dv; Dv = 0 without values
  int threads;                                        // a hint for the size of the pieces; no result depends on it
  Rows<const T> query, weight;                        // weight has one row per entry
  StoredRows<T> key, value;
  StoredRows<T> prepared;  // of a single row's keys (prepared_keys.h); no data = none
  Location<T> location;    // of a single row
  Mask mask;
  Rows<const std::int64_t> lengths;  // element (n, i): row i may attend to keys before this; no data = all
  Rows<const std::int64_t> starts;   // element (n, i): row i may attend to keys from this on; no data = all
  BlockTable blocks;
  std::int64_t left, right;  // keys i - left .. i + right; -1 = unbounded
  const std::int64_t* seed;  // per entry through seed_offset; no data = no dropout
  const std::int64_t* seed_offset;
  std::uint32_t drop_below;  // a key is dropped when its random word is below this
  T keep_scale;              // 1 / (1 - p), 0 when everything is dropped
  T scale;
};

// Outputs are contiguous over (batch, queries, ...).
template <class T>
struct Forward : Problem<T> {
  T* out;      // (B, Lq, Dv)
  T* lse;      // (B, Lq)
  T* weights;  // (B, Lq, Lk) or null
};

template <class T>
struct Scores : Problem<T> {
  T* scores;  // (B, Lq, Lk)
};

template <class T>
struct Backward : Problem<T> {
  const T* lse;                                         // (B, Lq)
  Rows<const T> grad_out, grad_weights;                 // no data = zero
  Rows<const T> grad_lse;                               // element (n, i); no data = zero
  Rows<const T> grad_scores;                            // G, in place of the gradients of the outputs and lse
  T *grad_query, *grad_key, *grad_value, *grad_weight;  // (B, Lq, H), (B, Lk, H), (B, Lk, Dv), (B, H) or null
  // Contiguous in the mask's own shape, zeroed by the caller, or null. In double, since a mask may broadcast over
  // thousands of rows.
  double* grad_mask;
  const std::int64_t* grad_mask_offset;
  std::int64_t grad_mask_row, grad_mask_column;
};

// The features of a location: (B, F, Lk) from inputs (B, C, Lk) and filters (F, C, width), contiguous, width odd.
template <class T>
struct LocationFeatures {
  std::int64_t batch, channels, keys, filters, width;
  Rows<const T> inputs;  // element (n, c): Lk numbers
  const T* filter;
  T* out = nullptr;
};

template <class T>
struct LocationFeaturesBackward : LocationFeatures<T> {
  Rows<const T> grad;             // element (n, f): Lk numbers
  T *grad_inputs, *grad_filters;  // (B, C, Lk), (F, C, width), or null
};

// Which weights dropout keeps; contiguous.
struct KeepEntries {
  std::int64_t entries, rows, keys;
  const std::int64_t* seed;  // one per entry
  std::uint32_t drop_below;
  bool* kept;  // (entries, rows, keys)
};

// Prepares keys for decoder steps (kernels/prepared_keys.h).
template <class T>
struct PreparedKeys {
  std::int64_t batch, keys, hidden;
  StoredRows<T> key;
  Rows<const T> weight;   // of the steps to come, or no data
  T* prepared;            // (B, Lk, H)
  std::uint16_t* narrow;  // the same for keys in 16 bits; one of the two is null
};

// The gradients of a step's query and scores; Lq = 1. Backward with grad_scores computes those that all steps share.
template <class T>
struct StepBackward : Problem<T> {
  Rows<const T> weights;                           // element (n, 0, j): what the step returned
  Rows<const T> grad_out, grad_weights, grad_lse;  // no data = zero
  T *grad_query, *grad_scores;                     // (B, H), (B, Lk)
  T* kept;                                         // (B, Lk): the weights after dropout, or null
  // With a location only. grad_key (B, Lk, H) is added to, or null.
  T* grad_key;
  T *grad_weight, *grad_location, *grad_location_weight;  // (B, H), (B, F, Lk), (B, F, H)
};

// The sums over features of pairs in forward mode and second derivatives; all tensors are contiguous.
template <class T>
struct Pairs {
  std::int64_t batch, queries, keys, hidden;
  const T *query, *key, *weight;                          // (B, Lq, H), (B, Lk, H), (B, H)
  const T *query_tangent, *key_tangent, *weight_tangent;  // the same shapes
  T *scores, *tangents;                                   // (B, Lq, Lk)
};

template <class T>
struct PairGradients : Pairs<T> {
  const T *grad, *grad_tangent;            // of the unscaled scores, (B, Lq, Lk)
  T *grad_query, *grad_key, *grad_weight;  // the tangents, or null
};

// The items [0, count) of one parallel pass. Free threads take them one by one, since items differ in cost where masks
// skip work. No result depends on which thread takes an item.
class Tasks {
 public:
  explicit Tasks(std::int64_t count) : count_(count) {}
  bool take(std::int64_t& task) { return (task = next_.fetch_add(1, std::memory_order_relaxed)) < count_; }

 private:
  std::atomic<std::int64_t> next_{0};
  const std::int64_t count_;
};

using Body = std::function<void(Tasks&)>;  // runs on each thread, and takes tasks until there are none
// `work` is the number of multiply-adds of one item: little work is not worth a second thread.
using ParallelFor = std::function<void(std::int64_t count, std::int64_t work, const Body&)>;

// One instruction set's kernels.
struct Kernels {
  const char* name;
  void (*forward32)(const Forward<float>&, const ParallelFor&);
  void (*forward64)(const Forward<double>&, const ParallelFor&);
  void (*backward32)(const Backward<float>&, const ParallelFor&);
  void (*backward64)(const Backward<double>&, const ParallelFor&);
  void (*scores32)(const Scores<float>&, const ParallelFor&);
  void (*scores64)(const Scores<double>&, const ParallelFor&);
  void (*features32)(const LocationFeatures<float>&, const ParallelFor&);
  void (*features64)(const LocationFeatures<double>&, const ParallelFor&);
  void (*features_backward32)(const LocationFeaturesBackward<float>&, const ParallelFor&);
  void (*features_backward64)(const LocationFeaturesBackward<double>&, const ParallelFor&);
  void (*prepare32)(const PreparedKeys<float>&, const ParallelFor&);
  void (*prepare64)(const PreparedKeys<double>&, const ParallelFor&);
  void (*step_backward32)(const StepBackward<float>&, const ParallelFor&);
  void (*step_backward64)(const StepBackward<double>&, const ParallelFor&);
  void (*pair_scores32)(const Pairs<float>&, const ParallelFor&);
  void (*pair_scores64)(const Pairs<double>&, const ParallelFor&);
  void (*pair_gradients32)(const PairGradients<float>&, const ParallelFor&);
  void (*pair_gradients64)(const PairGradients<double>&, const ParallelFor&);
  void (*keep_entries)(const KeepEntries&, const ParallelFor&);

  void forward(const Forward<float>& p, const ParallelFor& f) const { forward32(p, f); }
  void forward(const Forward<double>& p, const ParallelFor& f) const { forward64(p, f); }
  void backward(const Backward<float>& p, const ParallelFor& f) const { backward32(p, f); }
  void backward(const Backward<double>& p, const ParallelFor& f) const { backward64(p, f); }
  void scores(const Scores<float>& p, const ParallelFor& f) const { scores32(p, f); }
  void scores(const Scores<double>& p, const ParallelFor& f) const { scores64(p, f); }
  void location_features(const LocationFeatures<float>& p, const ParallelFor& f) const { features32(p, f); }
  void location_features(const LocationFeatures<double>& p, const ParallelFor& f) const { features64(p, f); }
  void location_features_backward(const LocationFeaturesBackward<float>& p, const ParallelFor& f) const {
    features_backward32(p, f);
  }
  void location_features_backward(const LocationFeaturesBackward<double>& p, const ParallelFor& f) const {
    features_backward64(p, f);
  }
  void prepare(const PreparedKeys<float>& p, const ParallelFor& f) const { prepare32(p, f); }
  void prepare(const PreparedKeys<double>& p, const ParallelFor& f) const { prepare64(p, f); }
  void step_backward(const StepBackward<float>& p, const ParallelFor& f) const { step_backward32(p, f); }
  void step_backward(const StepBackward<double>& p, const ParallelFor& f) const { step_backward64(p, f); }
  void pair_scores(const Pairs<float>& p, const ParallelFor& f) const { pair_scores32(p, f); }
  void pair_scores(const Pairs<double>& p, const ParallelFor& f) const { pair_scores64(p, f); }
  void pair_gradients(const PairGradients<float>& p, const ParallelFor& f) const { pair_gradients32(p, f); }
  void pair_gradients(const PairGradients<double>& p, const ParallelFor& f) const { pair_gradients64(p, f); }
};

// Null where this build or this processor lacks the instructions.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* baseline_kernels();  // SSE2, NEON or whatever the compiler targets; always there

// The fastest kernels, or those that ADDITIVE_ATTN_CPU names, until select_kernels chooses others. An empty name
// restores the former. Both throw std::runtime_error where this processor or this build lacks the kernels.
const Kernels& kernels();
const Kernels& select_kernels(const std::string& name);

}  // namespace additive_attn
