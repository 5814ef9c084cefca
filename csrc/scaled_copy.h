// Launcher of csrc/scaled_copy.cu: plain pointers and a stream (cudaStream_t as void*).
#pragma once

#include <cstdint>

namespace megalora {

// out [rows, columns], rows `stride` elements apart = scale * in, contiguous float32.
struct ScaledCopy {
  const float* in;
  void* out;
  int64_t rows, columns, stride;
  float scale;
};

enum class CopyType { bfloat16, float16, float32 };  // of out

constexpr int kMostCopies = 32;  // of one launch

void launch_scaled_copies(const ScaledCopy* copies, int count, CopyType type, void* stream);

}  // namespace megalora
