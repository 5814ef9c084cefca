// The backward pass of a LoRA branch on CUDA, several of its products in one pass (megalora/ops/lora_backward.py).
#include <ATen/ops/empty.h>

#include "cuda/lora.h"
#include "cuda/lora_checks.h"

namespace megalora::cuda {
namespace {

// A factor's gradient, float32: [ranks, size], or [size, ranks] if `transposed`.
FactorGrad factor_grad(const Tensor& grad, bool transposed, int64_t size, double scaling, const Tensor& like) {
  MEGALORA_CHECK(grad.scalar_type() == at::kFloat, "got ", grad.scalar_type());
  MEGALORA_CHECK(grad.is_contiguous(), "strides ", grad.strides());
  MEGALORA_CHECK(grad.device() == like.device(), grad.device(), " beside ", like.device());
  MEGALORA_CHECK(grad.dim() == 2 && grad.size(transposed ? 0 : 1) == size, grad.sizes(), " for ", size, " features");
  return {grad.mutable_data_ptr<float>(), static_cast<int>(grad.size(transposed ? 1 : 0)), static_cast<float>(scaling)};
}

FactorGrads down_grads(at::TensorList dA, const Tensor& A_RK) {
  MEGALORA_CHECK(static_cast<int64_t>(dA.size()) <= kMostBranches, "got ", dA.size(), " factors");
  FactorGrads grads{};
  int64_t ranks = 0;
  for (size_t i = 0; i < dA.size(); ++i) {
    grads.down[i] = factor_grad(dA[i], false, A_RK.size(1), 1.0, A_RK);
    ranks += grads.down[i].ranks;
  }
  MEGALORA_CHECK(ranks == A_RK.size(0), ranks, " ranks for ", A_RK.sizes());
  return grads;
}

// Puts into `params` the gradients of gate and up, whose z lie side by side in z [T, Z]; or of one linear of both, with
// one z; or of up alone.
void add_up_grads(LoraBackwardParams& params, const Tensor& z_TZ, at::TensorList dB, at::ArrayRef<double> scaling,
                  const Tensor& dy_TK) {
  const int64_t size = dy_TK.size(1);
  FactorGrads& grads = params.grads;
  check_matrix(z_TZ, dy_TK);
  params.z = matrix_of(z_TZ);
  MEGALORA_CHECK(dB.size() == 1 || (params.gated && dB.size() == 2), "got ", dB.size());
  if (dB.size() == 2) {
    grads.gate = factor_grad(dB[0], true, size, scaling[0], dy_TK);
    grads.up = factor_grad(dB[1], true, size, scaling[1], dy_TK);
    params.up_first = grads.gate.ranks;
  } else {
    grads.up = factor_grad(dB[0], true, params.gated ? 2 * size : size, scaling[0], dy_TK);
    if (params.gated) {
      grads.gate = grads.up;
      grads.up.data += size * grads.up.ranks;
    }
  }
  for (const FactorGrad* factor : {&grads.gate, &grads.up}) {
    MEGALORA_CHECK(factor->ranks % kOctet == 0 && factor->ranks <= kLargestRankGatedBackward, "rank ", factor->ranks);
  }
  MEGALORA_CHECK(z_TZ.size(0) == dy_TK.size(0), z_TZ.sizes(), " for ", dy_TK.sizes());
  MEGALORA_CHECK(z_TZ.size(1) >= params.up_first + grads.up.ranks, z_TZ.sizes(), " for ", dy_TK.sizes());
}

void run(LoraBackwardParams& params, const Tensor& dx_TK, const Tensor& dz_TR) {
  params.dx = matrix_of(dx_TK);
  params.dz = matrix_of(dz_TR);
  const c10::cuda::CUDAGuard guard(dx_TK.device());
  const int64_t numel = lora_backward_sums(params);
  const Tensor sums = at::empty({numel}, dx_TK.options().dtype(at::kFloat));
  params.sums = sums.mutable_data_ptr<float>();
  C10_CUDA_CHECK(launch_lora_backward(params, stream()));
}

}  // namespace

void lora_backward_(const Tensor& dx_TK, const Tensor& dz_TR, const Tensor& x_TK, const Tensor& A_RK,
                    const MaskArguments& mask, at::TensorList dA, const OptionalTensor& out_TK) {
  check_gradients(dx_TK, dz_TR, A_RK);
  MEGALORA_CHECK(A_RK.size(0) <= kLargestRankBackward, "rank ", A_RK.size(0));
  const Tensor& out = out_TK ? *out_TK : dx_TK;
  for (const Tensor* other : {&x_TK, &out}) {
    check_matrix(*other, dx_TK);
    MEGALORA_CHECK(other->sizes() == dx_TK.sizes(), other->sizes(), " for ", dx_TK.sizes());
  }
  LoraBackwardParams params{};
  fill(params, dx_TK, A_RK, mask);
  params.out = matrix_of(out);
  params.x = matrix_of(x_TK);
  params.grads = down_grads(dA, A_RK);
  run(params, dx_TK, dz_TR);
}

void swiglu_lora_gradients_(const Tensor& dy_TK, const Tensor& gate_up, const Tensor& dz_TR, const Tensor& A_RK,
                            const MaskArguments& mask, const Tensor& grad, at::TensorList dA,
                            const OptionalTensor& z_TZ, at::TensorList dB, at::ArrayRef<double> scaling,
                            std::string_view gate) {
  check_gradients(dy_TK, dz_TR, A_RK);
  MEGALORA_CHECK(A_RK.size(0) <= kLargestRankGatedBackward, "rank ", A_RK.size(0));
  const bool gated = check_gate_up(gate_up, dy_TK);
  MEGALORA_CHECK(check_gate_up(grad, dy_TK) == gated, grad.sizes());
  MEGALORA_CHECK(z_TZ.has_value() == !dB.empty() && dB.size() == scaling.size(), dB.size(), " gradients");
  LoraBackwardParams params{};
  fill(params, dy_TK, A_RK, mask);
  params.gated = gated;
  params.grads = down_grads(dA, A_RK);
  if (z_TZ) add_up_grads(params, *z_TZ, dB, scaling, dy_TK);
  params.gate_up = gate_up.const_data_ptr();
  params.gate = gate_of(gate);
  params.grad = grad.mutable_data_ptr();
  run(params, dy_TK, dz_TR);
}

void swiglu_lora_backward_(const Tensor& dy_TK, const Tensor& gate_up, const Tensor& dz_TR, const Tensor& A_RK,
                           const MaskArguments& mask, const Tensor& grad, const OptionalTensor& x_TK,
                           std::string_view gate) {
  check_gradients(dy_TK, dz_TR, A_RK);
  MEGALORA_CHECK(check_gate_up(gate_up, dy_TK) && check_gate_up(grad, dy_TK), gate_up.sizes(), grad.sizes());
  if (x_TK) {
    check_matrix(*x_TK, dy_TK);
    MEGALORA_CHECK(x_TK->is_contiguous() && x_TK->sizes() == dy_TK.sizes(), x_TK->sizes(), " for ", dy_TK.sizes());
  }
  LoraInputGradParams params{};
  fill(params, dy_TK, A_RK, mask);
  params.dx = matrix_of(dy_TK);
  params.dz = matrix_of(dz_TR);
  params.out = matrix_of(dy_TK);
  params.gate_up = gate_up.const_data_ptr();
  params.gate = gate_of(gate);
  params.grad = grad.mutable_data_ptr();
  params.x = data_or_null(x_TK);
  const c10::cuda::CUDAGuard guard(dy_TK.device());
  C10_CUDA_CHECK(launch_lora_input_grad(params, stream()));
}

}  // namespace megalora::cuda
