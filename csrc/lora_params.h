// Parameters of the LoRA kernels of both devices. What each computes is in megalora/ops/lora_linear.py and
// lora_backward.py.
//
// T tokens, F features, R the rank. On CUDA all matrices are bfloat16 or float16, and strides, F, R and feature offsets
// are multiples of kOctet.
#pragma once

#include "kernel_limits.h"
#include "params.h"

namespace megalora {

struct LoraParams {
  const void* A;  // [R, F] contiguous; on the CPU [R, padded(F)] wide, zeros behind F (cpu/lora.cpp)
  Mask mask;
  int64_t tokens, features, rank;
  Type type;
};

// z [T, z_columns] = dropout(x [T, F]) A^T, and zeros in the columns from R on.
struct LoraDownParams : LoraParams {
  Matrix x, z;
  int64_t z_columns;
  // On CUDA. copy [T, F] = x, where its data are not null. With gate_up [T, 2 F], contiguous, gate before up, where not
  // null: x = act(gate) * up is made, into `copy`, instead of read; R <= kLargestRankGatedDown. Where it is not `gated`
  // gate_up is up [T, F], and x = act(up).
  Matrix copy;
  const void* gate_up;
  Gate gate;  // none where gate_up is null
  bool gated;
};

// out [T, F] = dx + mask * scale * (dz [T, R] A), out may be dx. On the CPU it is.
struct LoraInputGradParams : LoraParams {
  Matrix dx, dz, out;
  // On CUDA, where gate_up [T, 2 F] is not null and x = act(gate) * up: that sum goes on to grad [T, 2 F], the
  // gradient of gate_up, and out is not written; and x [T, F] is made again where not null, 0 where it is dropped. All
  // contiguous.
  const void* gate_up;
  Gate gate;
  void *grad, *x;
};

// out = scaling * dz [T, R]^T dropout(x [T, F]), wide and contiguous: [R, F], or [F, R] if `transposed`. A is not read.
struct LoraWeightGradParams : LoraParams {
  Matrix dz, x;
  void* out;
  double scaling;
  bool transposed;
};

// What the gradient of one factor is added to: float32, contiguous; ranks 0: there is none.
struct FactorGrad {
  float* data;
  int ranks;
  float scaling;
};
struct FactorGrads {
  FactorGrad down[kMostBranches];  // [ranks, F] each: of the branches that read x, in the order of dz's columns
  FactorGrad gate, up;             // [F, ranks]; without a gate up alone
};

// The backward pass in one read of what it reads, on CUDA: out = dx + mask * scale * (dz A), out may be dx, and
// grads.down += dz^T dropout(x).
//
// With gate_up [T, 2 F], where not null: x = act(gate) * up is made again, the sum goes on to grad [T, 2 F], the
// gradient of gate_up, and grads.gate += s dgate^T z[:, : ranks of gate], grads.up += s dup^T z[:, up_first :][:, :
// ranks of up]. gate_up and grad are contiguous; out and x are not used. Where it is not `gated` gate_up is up [T, F],
// as grad is, and x = act(up).
struct LoraBackwardParams : LoraParams {
  Matrix dx, dz, out, x, z;
  int up_first;
  const void* gate_up;
  Gate gate;
  bool gated;
  void* grad;
  FactorGrads grads;
  float* sums;  // room for what the blocks sum up: as many elements as lora_backward_sums says
};

}  // namespace megalora
