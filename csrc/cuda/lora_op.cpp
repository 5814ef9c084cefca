// The skinny products of a LoRA linear on CUDA, one by one. Those of the backward pass together are in
// lora_backward_op.cpp.
#include <ATen/ops/empty.h>

#include "cuda/lora.h"
#include "cuda/lora_checks.h"

namespace megalora::cuda {
namespace {

void check_z(const Tensor& z_TZ, const Tensor& x_TK, const Tensor& A_RK) {
  check_matrix(z_TZ, x_TK);
  MEGALORA_CHECK(z_TZ.size(0) == x_TK.size(0), z_TZ.sizes(), " for ", x_TK.sizes());
  MEGALORA_CHECK(z_TZ.size(1) >= A_RK.size(0), z_TZ.sizes(), " for rank ", A_RK.size(0));
}

void fill_z(LoraDownParams& params, const Tensor& z_TZ) {
  params.z = matrix_of(z_TZ);
  params.z_columns = z_TZ.size(1);
}

// Of params whose mask and scaling are there.
Tensor weight_grad(LoraWeightGradParams& params, const Tensor& dz_TR, const Tensor& x_TK) {
  check_matrix(x_TK, x_TK);
  check_matrix(dz_TR, x_TK);
  check_rank(dz_TR.size(1));
  MEGALORA_CHECK(dz_TR.size(0) == x_TK.size(0), dz_TR.sizes(), " for ", x_TK.sizes());
  params.tokens = x_TK.size(0);
  params.features = x_TK.size(1);
  params.rank = dz_TR.size(1);
  params.type = type_of(x_TK);
  params.dz = matrix_of(dz_TR);
  params.x = matrix_of(x_TK);
  const c10::cuda::CUDAGuard guard(x_TK.device());
  const auto options = x_TK.options().dtype(at::kFloat);
  Tensor out = params.transposed ? at::empty({params.features, params.rank}, options)
                                 : at::empty({params.rank, params.features}, options);
  params.out = out.mutable_data_ptr();
  C10_CUDA_CHECK(launch_lora_weight_grad(params, stream()));
  return out;
}

}  // namespace

void lora_down_(const Tensor& z_TZ, const Tensor& x_TK, const Tensor& A_RK, const MaskArguments& mask,
                const OptionalTensor& copy) {
  check_matrix(x_TK, x_TK);
  check_A(A_RK, x_TK);
  check_z(z_TZ, x_TK, A_RK);
  if (copy) {
    check_matrix(*copy, x_TK);
    MEGALORA_CHECK(copy->sizes() == x_TK.sizes(), copy->sizes(), " for ", x_TK.sizes());
  }
  LoraDownParams params{};
  fill(params, x_TK, A_RK, mask);
  fill_z(params, z_TZ);
  params.x = matrix_of(x_TK);
  if (copy) params.copy = matrix_of(*copy);
  const c10::cuda::CUDAGuard guard(x_TK.device());
  C10_CUDA_CHECK(launch_lora_down(params, stream()));
}

void swiglu_lora_down_(const Tensor& z_TZ, const Tensor& gate_up, const Tensor& A_RK, const MaskArguments& mask,
                       const Tensor& x_TK, std::string_view gate) {
  check_matrix(x_TK, x_TK);
  const bool gated = check_gate_up(gate_up, x_TK);
  check_A(A_RK, x_TK);
  MEGALORA_CHECK(A_RK.size(0) <= kLargestRankGatedDown, "rank ", A_RK.size(0));
  check_z(z_TZ, x_TK, A_RK);
  LoraDownParams params{};
  fill(params, x_TK, A_RK, mask);
  fill_z(params, z_TZ);
  params.copy = matrix_of(x_TK);
  params.gate_up = gate_up.const_data_ptr();
  params.gate = gate_of(gate);
  params.gated = gated;
  const c10::cuda::CUDAGuard guard(x_TK.device());
  C10_CUDA_CHECK(launch_lora_down(params, stream()));
}

Tensor lora_down_weight_grad(const Tensor& dz_TR, const Tensor& x_TK, const MaskArguments& mask) {
  LoraWeightGradParams params{};
  params.mask = octet_mask(mask, x_TK);
  params.scaling = 1;  // the mask's is the kernel's own
  return weight_grad(params, dz_TR, x_TK);
}

Tensor lora_up_weight_grad(const Tensor& dy_TO, const Tensor& z_TR, double scaling) {
  LoraWeightGradParams params{};
  params.mask.scale = 1;
  params.scaling = scaling;
  params.transposed = true;
  return weight_grad(params, z_TR, dy_TO);
}

void lora_down_input_grad_(const Tensor& dx_TK, const Tensor& dz_TR, const Tensor& A_RK, const MaskArguments& mask,
                           const OptionalTensor& out_TK) {
  const Tensor& out = out_TK ? *out_TK : dx_TK;
  check_gradients(dx_TK, dz_TR, A_RK);
  check_matrix(out, dx_TK);
  MEGALORA_CHECK(out.sizes() == dx_TK.sizes(), out.sizes(), " for ", dx_TK.sizes());
  LoraInputGradParams params{};
  fill(params, dx_TK, A_RK, mask);
  params.dx = matrix_of(dx_TK);
  params.dz = matrix_of(dz_TR);
  params.out = matrix_of(out);
  const c10::cuda::CUDAGuard guard(dx_TK.device());
  C10_CUDA_CHECK(launch_lora_input_grad(params, stream()));
}

}  // namespace megalora::cuda
