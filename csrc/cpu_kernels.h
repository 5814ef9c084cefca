// The row kernels of the CPU: plain loops over the rows [begin, end) of what a struct describes, so that any cut of the
// rows over threads gives the same bits. Each file of a topic defines some; cpu_ops.cpp checks, cuts and registers.
//
// Strides count elements; the elements of a row are adjacent. dtype: float, double or bfloat16; arithmetic is in float,
// in double for double. What is computed is said in megalora/ops/*.py.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

#include "common.h"
#include "inline.h"
#include "mask.h"

namespace megalora {

// What sums and products of a type are worked out in.
template <typename scalar_t>
using wide_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Calls `body` with a value of the C++ type of `dtype`.
template <typename Body>
MEGALORA_INLINE void dispatch(c10::ScalarType dtype, Body&& body) {
  switch (dtype) {
    case c10::ScalarType::Float: return body(float{});
    case c10::ScalarType::Double: return body(double{});
    case c10::ScalarType::BFloat16: return body(c10::BFloat16{});
    default: MEGALORA_CHECK(false, "no CPU kernel for dtype ", dtype);
  }
}

// Sums have one order, whatever the width of the vectors: element i goes to lane i % kLanes, then the lanes in pairs.
constexpr int64_t kLanes = 32;

// The sum of `count` lanes, a power of 2; overwrites them.
template <typename T>
MEGALORA_INLINE T add_halves(T* lanes, int64_t count) {
  for (int64_t half = count / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
template <typename T>
MEGALORA_INLINE T sum_lanes(T* lanes) {
  return add_halves(lanes, kLanes);
}

// ---- rms_norm.cpp

// sum = x + delta (delta null: sum is not written and x is normed); y = weight * sum * inverse; inverse [N], wide.
struct RmsNorm {
  const void *x, *delta, *weight;
  void *sum, *y, *inverse;
  int64_t x_stride, y_stride, size;  // rows of delta and sum are `size` apart
  double eps;
  c10::ScalarType dtype;
};
void rms_norm_rows(const RmsNorm& a, int64_t begin, int64_t end);

// dx = d(rms_norm)(dy) + residual (null: none); rows of residual and dx are `size` apart.
struct RmsNormBackward {
  const void *dy, *x, *weight, *inverse, *residual;
  void* dx;
  int64_t dy_stride, x_stride, size;
  c10::ScalarType dtype;
};
void rms_norm_backward_rows(const RmsNormBackward& a, int64_t begin, int64_t end);

// ---- swiglu.cpp

// out [N, I] = silu(gate) * up, gate_up [N, 2 I] contiguous, gate before up.
struct SwiGlu {
  const void* gate_up;
  void* out;
  int64_t out_stride, size;
  c10::ScalarType dtype;
};
void swiglu_rows(const SwiGlu& a, int64_t begin, int64_t end);

// grad [N, 2 I] contiguous, of dy [N, I].
struct SwiGluBackward {
  const void *dy, *gate_up;
  void* grad;
  int64_t dy_stride, size;
  c10::ScalarType dtype;
};
void swiglu_backward_rows(const SwiGluBackward& a, int64_t begin, int64_t end);

// ---- rope.cpp

// Between qkv [T, (H + 2 K) D] contiguous and its heads, q and k rotated; `backward` goes the other way.
struct Heads {
  void* data;
  int64_t count, token_stride, head_stride;
};
struct SplitRope {
  void* qkv;
  Heads q, k, v;
  const void *cos, *sin;  // [T, D / 2] contiguous
  int64_t head_dim;
  bool backward;
  c10::ScalarType dtype;
};
void split_rope_rows(const SplitRope& a, int64_t begin, int64_t end);

// ---- cross_entropy.cpp

// stats [3, N], wide: maximum, sum of exp(logit - maximum), logit of the label (0 where it is outside 0 .. V-1).
struct CrossEntropyStats {
  const void* logits;
  int64_t row_stride, rows, vocab;
  const int64_t* label;
  void* stats;
  c10::ScalarType dtype;
};
void cross_entropy_stats_rows(const CrossEntropyStats& a, int64_t begin, int64_t end);

// logits = exp(logit - max) / total - (1 at the label), in place; max, total [N], wide.
struct CrossEntropyGrad {
  void* logits;
  int64_t row_stride, vocab;
  const int64_t* label;
  const void *max, *total;
  c10::ScalarType dtype;
};
void cross_entropy_grad_rows(const CrossEntropyGrad& a, int64_t begin, int64_t end);

// ---- attention_cpu.cpp

// Causal attention within documents: q, k, v as [T, H, D] and [T, K, D] by their strides. A task is a document and a
// query head; lse [H, T] wide is the logarithm of each row's sum of exponentials.
struct Attention {
  Heads q, k, v, out;
  void* lse;
  const int64_t* bounds;  // [documents + 1]
  int64_t documents, tokens, head_dim, window;
  c10::ScalarType dtype;
};
void attention_tasks(const Attention& a, int64_t begin, int64_t end);

// dq by its strides; dk, dv [T, H, D] contiguous and wide: the share of each query head in the gradient of what it read.
struct AttentionBackward {
  Attention forward;
  Heads dout, dq;
  void *dk, *dv;
};
void attention_backward_tasks(const AttentionBackward& a, int64_t begin, int64_t end);

// ---- lora_cpu.cpp (T tokens, F features, R the rank)

// Rows of `wide` numbers that kernels read whole vectors of: their stride, a multiple of a cache line.
constexpr int64_t padded(int64_t features) { return (features + 15) / 16 * 16; }

// What a LoRA kernel reads besides: A [R, padded(F)] wide, zero behind F, and the mask of the tokens [T].
struct LoraInputs {
  const void* A;
  const int64_t* token;
  Mask mask;
  int64_t features, rank;
  c10::ScalarType dtype;
};

// z [T, z_columns] = dropout(x [T, F]) A^T, and zeros in the columns from R on.
struct LoraDown {
  LoraInputs in;
  const void* x;
  void* z;
  int64_t x_stride, z_stride, z_columns;
};
void lora_down_rows(const LoraDown& a, int64_t begin, int64_t end);

// dx [T, F] += mask . (dz [T, R] A), in place.
struct LoraInputGrad {
  LoraInputs in;
  const void* dz;
  void* dx;
  int64_t dz_stride, dx_stride;
};
void lora_input_grad_rows(const LoraInputGrad& a, int64_t begin, int64_t end);

// parts [segments, R, padded(F)] wide: dz [T, R]^T dropout(x [T, F]) of each segment of the tokens. A task is a segment
// and a chunk of the features; `weight_grad_tasks` says how many there are. A is not read.
constexpr int64_t kLoraChunk = 512;
struct LoraWeightGrad {
  LoraInputs in;
  const void *dz, *x;
  void* parts;
  int64_t dz_stride, x_stride, tokens, segment;
};
void lora_weight_grad_tasks(const LoraWeightGrad& a, int64_t begin, int64_t end);

// out [R, F] wide (or [F, R] if transposed) = factor * the sum of the parts, in their order. Rows are those of the parts.
struct SumParts {
  const void* parts;
  void* out;
  int64_t segments, rows, features;
  double factor;
  bool transposed;
  c10::ScalarType dtype;
};
void sum_parts_rows(const SumParts& a, int64_t begin, int64_t end);

}  // namespace megalora
