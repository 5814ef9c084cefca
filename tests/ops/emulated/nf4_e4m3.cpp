// The kernels themselves, on a CPU, for tests/ops/test_nf4_fp8.py.
#include "cuda_runtime_api.h"
// What is above stands for CUDA; what is below is the kernels'.
#include "../../../csrc/cuda/nf4_e4m3.cu"

using namespace megalora;

// scale, numbers, offset null: absmax are float32.
extern "C" void run(uint8_t* codes, void* absmax, float* scale, float* numbers, float* offset, float* row_scale,
                    uint8_t* terms, uint8_t* out, const int64_t (&sizes)[7], bool turned) {
  const auto [rows, columns, term_columns, first, width, nested_shift, stride] = sizes;
  launch_nf4_to_e4m3({codes,
                      absmax,
                      scale,
                      numbers,
                      offset,
                      row_scale,
                      {terms, term_columns},
                      {out, stride},
                      rows,
                      columns,
                      term_columns,
                      first,
                      width,
                      nested_shift,
                      turned},
                     nullptr);
}
