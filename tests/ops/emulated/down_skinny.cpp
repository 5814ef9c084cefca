// The kernel itself, on a CPU, for tests/ops/test_step_linear.py.
#include "cuda_runtime_api.h"
// What is above stands for CUDA; what is below is the kernel's.
#include "../../../csrc/cuda/step_down.cu"
#include "skinny.h"

using namespace megalora;

extern "C" void run_down(void* x, void* A, void* X, const int64_t (&sizes)[5], const Beside& beside) {
  const auto [rows, x_stride, in_features, rank, room] = sizes;
  tensors.clear();
  allow(A, rank * in_features * 2);
  launch_step_down({{x, x_stride},
                    {A, in_features},
                    {X, in_features + room},
                    beside_of(beside),
                    rows,
                    in_features,
                    rank,
                    room,
                    Type::bfloat16},
                   nullptr);
}
