// What the LoRA ops on CUDA share.
#pragma once

#include "cuda/checks.h"
#include "lora_params.h"

namespace megalora::cuda {

inline void check_rank(int64_t rank) { MEGALORA_CHECK(rank >= kOctet && rank <= kLargestRank, "rank ", rank); }

inline void check_A(const Tensor& A_RK, const Tensor& x_TK) {
  check_matrix(A_RK, x_TK);
  check_rank(A_RK.size(0));
  MEGALORA_CHECK(A_RK.size(0) % kOctet == 0, "got ", A_RK.sizes());
  MEGALORA_CHECK(A_RK.size(1) == x_TK.size(1), A_RK.sizes(), " for ", x_TK.sizes());
  MEGALORA_CHECK(A_RK.is_contiguous(), "strides ", A_RK.strides());
}

// dx [T, K], the gradient dz [T, R] of the down-projection of what dx is the gradient of, and A [R, K].
inline void check_gradients(const Tensor& dx_TK, const Tensor& dz_TR, const Tensor& A_RK) {
  check_matrix(dx_TK, dx_TK);
  check_matrix(dz_TR, dx_TK);
  check_A(A_RK, dx_TK);
  MEGALORA_CHECK(dz_TR.size(0) == dx_TK.size(0), dz_TR.sizes(), " for ", dx_TK.sizes());
  MEGALORA_CHECK(dz_TR.size(1) == A_RK.size(0), dz_TR.sizes(), " for ", A_RK.sizes());
}

// gate_up [T, 2 K], or up [T, K] alone, and a gradient of its shape: contiguous, beside x [T, K]. Returns whether there
// is a gate.
inline bool check_gate_up(const Tensor& gate_up, const Tensor& x_TK) {
  check_matrix(gate_up, x_TK);
  const bool gated = gate_up.size(1) == 2 * x_TK.size(1);
  MEGALORA_CHECK(gate_up.is_contiguous(), "strides ", gate_up.strides());
  MEGALORA_CHECK(gate_up.size(0) == x_TK.size(0), gate_up.sizes(), " for ", x_TK.sizes());
  MEGALORA_CHECK(gated || gate_up.size(1) == x_TK.size(1), gate_up.sizes(), " for ", x_TK.sizes());
  return gated;
}

// What every LoRA kernel takes, of x [T, K] and A [R, K].
inline void fill(LoraParams& params, const Tensor& x_TK, const Tensor& A_RK, const MaskArguments& mask) {
  params.A = A_RK.const_data_ptr();
  params.mask = octet_mask(mask, x_TK);
  params.tokens = x_TK.size(0);
  params.features = x_TK.size(1);
  params.rank = A_RK.size(0);
  params.type = type_of(x_TK);
}

}  // namespace megalora::cuda
