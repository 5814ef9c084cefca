// Softmax cross entropy on CUDA.
#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {
namespace {

void check_logits(const Tensor& logits, const Tensor& label) {
  MEGALORA_CHECK(logits.dim() == 2, logits.sizes());
  check_rows(logits, logits);
  MEGALORA_CHECK(label.scalar_type() == at::kLong && label.is_contiguous(), "label: contiguous int64");
  MEGALORA_CHECK(label.numel() == logits.size(0), label.sizes(), " for ", logits.sizes());
}

LogitForm form_of(double scale, double softcap) {
  MEGALORA_CHECK(softcap >= 0, "softcap ", softcap);
  return {scale, softcap};
}

}  // namespace

void cross_entropy_stats_(const Tensor& logits, const Tensor& label, const Tensor& stats, double scale,
                          double softcap) {
  const c10::cuda::CUDAGuard guard(logits.device());
  check_logits(logits, label);
  MEGALORA_CHECK(stats.scalar_type() == at::kFloat && stats.is_contiguous() && stats.size(0) == 3, stats.sizes());
  MEGALORA_CHECK(stats.size(1) == logits.size(0), stats.sizes(), " for ", logits.sizes());
  CrossEntropyStatsParams params{};
  params.form = form_of(scale, softcap);
  params.logits = matrix_of(logits);
  params.label = label.const_data_ptr<int64_t>();
  params.stats = stats.mutable_data_ptr();
  params.rows = logits.size(0);
  params.vocab = logits.size(1);
  params.type = type_of(logits);
  if (logits.numel() == 0) return;
  launch_cross_entropy_stats(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void cross_entropy_grad_(const Tensor& logits, const Tensor& label, const Tensor& max, const Tensor& total,
                         double scale, double softcap) {
  const c10::cuda::CUDAGuard guard(logits.device());
  check_logits(logits, label);
  for (const Tensor* x : {&max, &total}) {
    MEGALORA_CHECK(x->scalar_type() == at::kFloat && x->is_contiguous(), "max, total: contiguous float32");
    MEGALORA_CHECK(x->numel() == logits.size(0), x->sizes(), " for ", logits.sizes());
  }
  CrossEntropyGradParams params{};
  params.form = form_of(scale, softcap);
  params.logits = matrix_of(logits);
  params.label = label.const_data_ptr<int64_t>();
  params.max = max.const_data_ptr();
  params.total = total.const_data_ptr();
  params.rows = logits.size(0);
  params.vocab = logits.size(1);
  params.type = type_of(logits);
  if (logits.numel() == 0) return;
  launch_cross_entropy_grad(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megalora::cuda
