// The kernel itself, on a CPU, for tests/ops/test_step_linear.py.
#include "cuda_runtime_api.h"
// What is above stands for CUDA; what is below is the kernel's.
#include "../../../csrc/cuda/skinny_linear.cu"
#include "skinny.h"

using namespace megalora;

extern "C" void run_dense(void* x, void* weight, void* bias, void* y, const int64_t (&sizes)[5], const Beside& beside) {
  const auto [rows, stride, in_features, out_features, weight_stride] = sizes;
  tensors.clear();
  allow(weight, ((out_features - 1) * weight_stride + in_features) * 2);
  launch_skinny_linear({{x, stride},
                        {weight, weight_stride},
                        bias,
                        y,
                        rows,
                        in_features,
                        out_features,
                        Type::bfloat16,
                        beside_of(beside)},
                       nullptr);
}
