// A linear of a few rows on CUDA.
#include <ATen/ops/empty.h>

#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {

Tensor skinny_linear(const Tensor& x_MI, const Tensor& weight_OI, const OptionalTensor& bias_O) {
  MEGALORA_CHECK(x_MI.dim() == 2 && weight_OI.dim() == 2, x_MI.sizes(), " and ", weight_OI.sizes());
  MEGALORA_CHECK(x_MI.size(0) <= kMostSkinnyRows, x_MI.sizes());
  MEGALORA_CHECK(x_MI.size(1) == weight_OI.size(1), x_MI.sizes(), " and ", weight_OI.sizes());
  MEGALORA_CHECK(x_MI.size(1) % kOctet == 0, x_MI.sizes());
  MEGALORA_CHECK(x_MI.scalar_type() == at::kBFloat16 || x_MI.scalar_type() == at::kHalf, "got ", x_MI.scalar_type());
  check_rows(x_MI, x_MI);
  check_rows(weight_OI, x_MI);
  Tensor bias;
  if (bias_O.has_value()) {
    bias = bias_O->contiguous();
    MEGALORA_CHECK(bias.numel() == weight_OI.size(0) && bias.scalar_type() == x_MI.scalar_type(), bias.sizes());
  }
  const c10::cuda::CUDAGuard guard(x_MI.device());
  Tensor y = at::empty({x_MI.size(0), weight_OI.size(0)}, x_MI.options());
  if (y.numel() == 0) return y;
  SkinnyLinearParams params{};
  params.x = matrix_of(x_MI);
  params.weight = matrix_of(weight_OI);
  params.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  params.y = y.mutable_data_ptr();
  params.rows = x_MI.size(0);
  params.in_features = x_MI.size(1);
  params.out_features = weight_OI.size(0);
  params.type = type_of(x_MI);
  launch_skinny_linear(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace megalora::cuda
