// scaled_copy_ (megalora/ops/scaled_copy.py) on CUDA, kMostCopies matrices a launch.
#include "cuda/scaled_copy.h"

#include "cuda/checks.h"

namespace megalora::cuda {
namespace {

ScaledCopy copy_of(const Tensor& out, const Tensor& source, double scale, const Tensor& like) {
  MEGALORA_CHECK(out.device() == like.device() && source.device() == like.device(), out.device());
  MEGALORA_CHECK(out.scalar_type() == like.scalar_type(), out.scalar_type(), " and ", like.scalar_type());
  MEGALORA_CHECK(source.scalar_type() == at::kFloat && source.is_contiguous(), "got ", source.scalar_type());
  MEGALORA_CHECK(out.sizes() == source.sizes(), out.sizes(), " for ", source.sizes());
  MEGALORA_CHECK(out.dim() >= 1 && out.dim() <= 2, out.sizes());
  MEGALORA_CHECK(out.numel() == 0 || out.stride(-1) == 1, "strides ", out.strides());
  const bool matrix = out.dim() == 2;
  ScaledCopy copy{};
  copy.in = source.const_data_ptr<float>();
  copy.out = {out.mutable_data_ptr(), matrix ? out.stride(0) : 0};
  copy.rows = matrix ? out.size(0) : 1;
  copy.columns = out.size(-1);
  copy.scale = static_cast<float>(scale);
  return copy;
}

}  // namespace

void scaled_copy_(at::TensorList outs, at::TensorList sources, at::ArrayRef<double> scales) {
  MEGALORA_CHECK(outs.size() == sources.size() && outs.size() == scales.size(), "the lists differ in length");
  if (outs.empty()) return;
  const c10::cuda::CUDAGuard guard(outs[0].device());
  ScaledCopy copies[kMostCopies];
  int count = 0;
  for (size_t i = 0; i < outs.size(); ++i) {
    copies[count++] = copy_of(outs[i], sources[i], scales[i], outs[0]);
    if (count == kMostCopies || i + 1 == outs.size()) {
      launch_scaled_copies(copies, count, type_of(outs[0]), stream());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      count = 0;
    }
  }
}

}  // namespace megalora::cuda
