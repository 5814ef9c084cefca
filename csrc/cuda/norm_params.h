// Parameters of the norms' kernels on CUDA (megalora/ops/fused_norm.py says what is computed). N rows of `size`
// elements, `size` apart unless a Matrix says otherwise. Statistics are float32.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace megalora {

// RMSNorm, rounded before the weight is applied (rms) or behind it (precise); LayerNorm.
enum class NormKind { none, rms, precise, layer };

// A norm's weights in the tensors' type, null: none. offset: the weight is 1 + w, in float32 where it is precise, else
// in the tensors' type.
struct NormOf {
  NormKind kind;
  bool offset;
  const void *weight, *bias;
  double eps;
};

// What is added to x before it is normed: mask * (scale * norm(delta)), each step rounded to the tensors' type.
struct NormAddend {
  const void* delta;  // null: nothing is added
  NormOf norm;        // rms or precise, or none
  void* inverse;      // [N], that norm's
  double scale;
  Mask mask;
};

// sum = x + the addend (not written where there is none); y = norm(sum). statistics: inverse [N], of LayerNorm means
// [N] behind it.
struct NormParams {
  Matrix x, y;
  NormAddend addend;
  NormOf norm;
  void *sum, *statistics;
  int64_t rows, size;
  Type type;
};

// dx = d(norm)(dy) + residual (null: none), x the sum; ddelta, where not null: what the addend's delta gets of dx.
struct NormBackwardParams {
  Matrix dy, x;
  NormAddend addend;
  NormOf norm;
  const void *statistics, *residual;
  void *dx, *ddelta;
  int64_t rows, size;
  Type type;
};

void launch_norm(const NormParams& params, cudaStream_t stream);
void launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream);

}  // namespace megalora
