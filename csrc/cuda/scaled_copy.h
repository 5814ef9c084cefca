// Launcher of cuda/scaled_copy.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace megalora {

// out [rows, columns] = scale * in, contiguous float32.
struct ScaledCopy {
  const float* in;
  Matrix out;
  int64_t rows, columns;
  float scale;
};

constexpr int kMostCopies = 32;  // of one launch: they are arguments of the kernel, of 4 KB at most

// `type` is that of the outs.
void launch_scaled_copies(const ScaledCopy* copies, int count, Type type, cudaStream_t stream);

}  // namespace megalora
