// The kernel itself, on a CPU, for tests/ops/test_quantised_skinny.py.
#include "cuda_runtime_api.h"
// What is above stands for CUDA; what is below is the kernel's.
#include "../../../csrc/cuda/nf4_skinny.cu"
#include "skinny.h"

using namespace megalora;

struct Part {
  uint8_t *codes, *absmax;
  float *scale, *numbers, *offset;
  int64_t scales, outputs, first, width;
};

extern "C" void run_nf4(void* x, void* branch, void* bias, void* y, const int64_t (&sizes)[5], const Part* parts,
                        int64_t count) {
  Nf4SkinnyParams params{};
  begin(params, x, branch, bias, y, sizes);
  int64_t first_output = 0;
  for (int i = 0; i < count; ++i) {
    const Part& part = parts[i];
    params.parts[i] = {part.codes,   part.absmax,  part.scale, part.numbers, part.offset,
                       part.outputs, first_output, part.first, part.width,   8};
    first_output += part.outputs;
    allow(part.codes, part.outputs * params.in_features / 2);
    allow(part.absmax, part.outputs * params.in_features / 64);
    allow(part.scale, part.scales * 4);
  }
  params.count = count;
  launch_nf4_skinny(params, nullptr);
}
