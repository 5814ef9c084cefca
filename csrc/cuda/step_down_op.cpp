// The down-projection of a LoRA branch of a few rows, on CUDA.
#include "cuda/beside_checks.h"
#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {

void step_down_(const Tensor& x, const Tensor& A, const OptionalTensor& delta, const OptionalTensor& sum,
                const OptionalTensor& norm, double eps, bool precise, bool offset, const Tensor& X) {
  check_matrix(x, x);
  check_matrix(A, x);
  check_matrix(X, x);
  MEGALORA_CHECK(x.size(0) <= kMostSkinnyRows && X.size(0) == x.size(0), x.sizes(), " and ", X.sizes());
  MEGALORA_CHECK(A.size(1) == x.size(1), A.sizes(), " for ", x.sizes());
  MEGALORA_CHECK(X.size(1) >= A.size(1) + A.size(0), X.sizes(), " for ", A.sizes());
  const c10::cuda::CUDAGuard guard(x.device());
  StepDownParams params{};
  params.beside = beside_of({delta, sum, norm, eps, precise, offset, "none"}, x, x.size(1), A.size(0));
  params.x = matrix_of(x);
  params.A = matrix_of(A);
  params.X = matrix_of(X);
  params.rows = x.size(0);
  params.in_features = x.size(1);
  params.rank = A.size(0);
  params.room = X.size(1) - x.size(1);
  params.type = type_of(x);
  if (X.numel() == 0) return;
  launch_step_down(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megalora::cuda
