// The kernel itself, on a CPU, for tests/ops/test_quantised_skinny.py.
#include "cuda_runtime_api.h"
// What is above stands for CUDA; what is below is the kernel's.
#include "../../../csrc/cuda/fp8_skinny.cu"
#include "skinny.h"

using namespace megalora;

extern "C" void run_fp8(void* x, void* branch, void* bias, void* y, const int64_t (&sizes)[5], void* codes,
                        int64_t stride, float* scale, const Beside& beside) {
  Fp8SkinnyParams params{};
  begin(params, x, branch, bias, y, sizes);
  params.codes = {codes, stride};
  params.scale = scale;
  params.beside = beside_of(beside);
  allow(codes, (params.out_features - 1) * stride + params.in_features);
  launch_fp8_skinny(params, nullptr);
}
