// Factors of columns on CUDA.
#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {
namespace {

const float* factors_of(const Tensor& g, const Tensor& like) {
  MEGALORA_CHECK(g.scalar_type() == at::kFloat && g.is_contiguous() && g.device() == like.device(), g.scalar_type());
  MEGALORA_CHECK(g.dim() == 1 && g.size(0) == like.size(1), g.sizes(), like.sizes());
  return g.const_data_ptr<float>();
}

void check_columns(const Tensor& x, const Tensor& like) {
  MEGALORA_CHECK(x.dim() == 2 && x.sizes() == like.sizes() && x.size(1) % kOctet == 0, x.sizes(), like.sizes());
  MEGALORA_CHECK(x.size(0) <= kColumnScaleRows * 65535, x.sizes());  // blocks along y
  check_rows(x, like);
}

}  // namespace

void scale_columns_(const Tensor& x, const Tensor& g) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_columns(x, x);
  ColumnScaleParams params{};
  params.x = matrix_of(x);
  params.factors = factors_of(g, x);
  params.rows = x.size(0);
  params.size = x.size(1);
  params.type = type_of(x);
  if (x.numel() == 0) return;
  launch_scale_columns(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void scale_columns_backward_(const Tensor& dy, const OptionalTensor& y, const Tensor& g, const Tensor& dx,
                             const OptionalTensor& sums) {
  const c10::cuda::CUDAGuard guard(dy.device());
  check_columns(dy, dy);
  check_columns(dx, dy);
  MEGALORA_CHECK(y.has_value() == sums.has_value(), "y and sums go together");
  ColumnScaleBackwardParams params{};
  params.dy = matrix_of(dy);
  params.dx = matrix_of(dx);
  params.factors = factors_of(g, dy);
  params.rows = dy.size(0);
  params.size = dy.size(1);
  params.type = type_of(dy);
  if (y) {
    check_columns(*y, dy);
    const int64_t parts = (dy.size(0) + kColumnScaleRows - 1) / kColumnScaleRows;
    MEGALORA_CHECK(sums->scalar_type() == at::kFloat && sums->is_contiguous(), sums->scalar_type());
    MEGALORA_CHECK(sums->dim() == 2 && sums->size(0) == parts && sums->size(1) == dy.size(1), sums->sizes());
    params.y = matrix_of(*y);
    params.sums = sums->mutable_data_ptr<float>();
  }
  if (dy.numel() == 0) return;
  launch_scale_columns_backward(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megalora::cuda
