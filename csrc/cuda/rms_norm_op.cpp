// RMSNorm on CUDA.
#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {
namespace {

// Rows that a block can hold, and one inverse for each.
void check_norm(const Tensor& x, const Tensor& weight, const Tensor& inverse) {
  MEGALORA_CHECK(x.dim() == 2, x.sizes());
  MEGALORA_CHECK(x.size(1) % kOctet == 0 && x.size(1) <= kLargestNorm, x.sizes());
  MEGALORA_CHECK(weight.numel() == x.size(1), weight.sizes(), " for ", x.sizes());
  MEGALORA_CHECK(inverse.scalar_type() == at::kFloat && inverse.numel() == x.size(0), "inverse [N] float32");
  check_rows(x, x);
  check_rows(weight, x);
}

void check_dense(const Tensor& other, const Tensor& x) {
  MEGALORA_CHECK(other.is_contiguous() && other.sizes() == x.sizes(), other.sizes(), " for ", x.sizes());
  check_rows(other, x);
}

}  // namespace

void rms_norm_(const Tensor& x, const OptionalTensor& delta, const Tensor& weight, double eps,
               const OptionalTensor& sum, const Tensor& y, const Tensor& inverse, bool precise, bool offset) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_norm(x, weight, inverse);
  MEGALORA_CHECK(y.sizes() == x.sizes(), x.sizes(), " and ", y.sizes());
  MEGALORA_CHECK(delta.has_value() == sum.has_value(), "delta and sum go together");
  check_rows(y, x);
  if (delta) {
    check_dense(*delta, x);
    check_dense(*sum, x);
  }
  RmsNormParams params{};
  params.x = matrix_of(x);
  params.y = matrix_of(y);
  params.delta = data_or_null(delta);
  params.weight = weight.const_data_ptr();
  params.sum = data_or_null(sum);
  params.inverse = inverse.mutable_data_ptr();
  params.eps = eps;
  params.rows = x.size(0);
  params.size = x.size(1);
  params.rounding = norm_rounding(precise, offset);
  params.type = type_of(x);
  if (x.numel() == 0) return;
  launch_rms_norm(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void rms_norm_backward_(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& inverse,
                        const OptionalTensor& residual, const Tensor& dx, bool precise, bool offset) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_norm(x, weight, inverse);
  MEGALORA_CHECK(dy.sizes() == x.sizes(), x.sizes(), " and ", dy.sizes());
  check_rows(dy, x);
  check_dense(dx, x);
  if (residual) check_dense(*residual, x);
  RmsNormBackwardParams params{};
  params.dy = matrix_of(dy);
  params.x = matrix_of(x);
  params.weight = weight.const_data_ptr();
  params.inverse = inverse.const_data_ptr();
  params.residual = data_or_null(residual);
  params.dx = dx.mutable_data_ptr();
  params.rows = x.size(0);
  params.size = x.size(1);
  params.rounding = norm_rounding(precise, offset);
  params.type = type_of(x);
  if (x.numel() == 0) return;
  launch_rms_norm_backward(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megalora::cuda
