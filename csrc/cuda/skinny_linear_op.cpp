// A linear of a few rows on CUDA.
#include <ATen/ops/empty.h>

#include "cuda/beside_checks.h"
#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {
namespace {

Tensor linear(const Tensor& x_MI, const Tensor& weight_OI, const OptionalTensor& bias_O, const BesideArguments& given) {
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
  const BesideParams beside = beside_of(given, x_MI, weight_OI.size(1), weight_OI.size(0));
  Tensor y = at::empty({x_MI.size(0), outputs_left(given, weight_OI.size(0))}, x_MI.options());
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
  params.beside = beside;
  launch_skinny_linear(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace

Tensor skinny_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return linear(x, weight, bias, {{}, {}, {}, 0, false, false, "none"});
}

Tensor step_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& delta,
                   const OptionalTensor& sum, const OptionalTensor& norm, double eps, bool precise, bool offset,
                   std::string_view gate) {
  return linear(x, weight, bias, {delta, sum, norm, eps, precise, offset, gate});
}

}  // namespace megalora::cuda
