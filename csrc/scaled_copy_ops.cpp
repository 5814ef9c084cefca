// scaled_copy_ for torch (megalora/ops/scaled_copy.py): schema and Meta in every build, the kernel in a CUDA build.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "common.h"

#if defined(MEGALORA_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "scaled_copy.h"
#endif

namespace megalora {
namespace {

void scaled_copy_meta_(at::TensorList, at::TensorList, at::ArrayRef<double>) {}

#if defined(MEGALORA_CUDA)

CopyType type_of(const at::Tensor& out) {
  switch (out.scalar_type()) {
    case at::kBFloat16: return CopyType::bfloat16;
    case at::kHalf: return CopyType::float16;
    case at::kFloat: return CopyType::float32;
    default: MEGALORA_CHECK(false, "got ", out.scalar_type());
  }
}

void scaled_copy_(at::TensorList outs, at::TensorList sources, at::ArrayRef<double> scales) {
  MEGALORA_CHECK(outs.size() == sources.size() && outs.size() == scales.size(), "the lists differ in length");
  if (outs.empty()) return;
  const c10::cuda::CUDAGuard guard(outs[0].device());
  ScaledCopy copies[kMostCopies];
  int count = 0;
  for (size_t i = 0; i < outs.size(); ++i) {
    const at::Tensor &out = outs[i], &source = sources[i];
    MEGALORA_CHECK(out.device() == outs[0].device() && source.device() == outs[0].device(), out.device());
    MEGALORA_CHECK(out.scalar_type() == outs[0].scalar_type(), out.scalar_type(), " and ", outs[0].scalar_type());
    MEGALORA_CHECK(source.scalar_type() == at::kFloat && source.is_contiguous(), "got ", source.scalar_type());
    MEGALORA_CHECK(out.sizes() == source.sizes() && out.dim() >= 1 && out.dim() <= 2, out.sizes(), " for ",
                   source.sizes());
    MEGALORA_CHECK(out.numel() == 0 || out.stride(-1) == 1, "strides ", out.strides());
    const bool matrix = out.dim() == 2;
    copies[count++] = {source.const_data_ptr<float>(), out.mutable_data_ptr(),          matrix ? out.size(0) : 1,
                       out.size(-1),                   matrix ? out.stride(0) : int64_t{0}, static_cast<float>(scales[i])};
    if (count == kMostCopies || i + 1 == outs.size()) {
      launch_scaled_copies(copies, count, type_of(out), c10::cuda::getCurrentCUDAStream().stream());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      count = 0;
    }
  }
}

#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalora, m) {
  // outs of one dtype, rows of any stride; sources float32, contiguous, of the same shapes.
  m.def("scaled_copy_(Tensor(a!)[] outs, Tensor[] sources, float[] scales) -> ()");
}

TORCH_LIBRARY_IMPL(megalora, Meta, m) { m.impl("scaled_copy_", &scaled_copy_meta_); }

#if defined(MEGALORA_CUDA)
TORCH_LIBRARY_IMPL(megalora, CUDA, m) { m.impl("scaled_copy_", &scaled_copy_); }
#endif

}  // namespace megalora
