// Dropout on CUDA.
#include <ATen/ops/empty_like.h>

#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {
namespace {

void dropout_into(bool accumulate, const Tensor& x, const Tensor& out, const MaskArguments& mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  MEGALORA_CHECK(x.dim() == 2, "x has shape ", x.sizes());
  MEGALORA_CHECK(out.sizes() == x.sizes(), out.sizes(), " and ", x.sizes());
  MEGALORA_CHECK(x.size(1) % kOctet == 0, x.sizes());
  check_rows(x, x);
  check_rows(out, x);
  DropoutParams params{};
  params.in = matrix_of(x);
  params.out = matrix_of(out);
  params.mask = octet_mask(mask, x);
  params.tokens = x.size(0);
  params.features = x.size(1);
  params.accumulate = accumulate;
  params.type = type_of(x);
  if (x.numel() == 0) return;
  launch_dropout(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

Tensor dropout(const Tensor& x, const MaskArguments& mask) {
  Tensor out = at::empty_like(x, at::MemoryFormat::Contiguous);
  dropout_into(false, x, out, mask);
  return out;
}

void dropout_add_(const Tensor& out, const Tensor& g, const MaskArguments& mask) { dropout_into(true, g, out, mask); }

}  // namespace megalora::cuda
