// Many small matrices scaled and rounded into their places in one launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "scaled_copy.h"

namespace megalora {
namespace {

struct Copies {  // an argument of the kernel: nothing to copy to the device first
  ScaledCopy at[kMostCopies];
};

__device__ __forceinline__ void put(float* out, float x) { *out = x; }
__device__ __forceinline__ void put(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void put(__half* out, float x) { *out = __float2half_rn(x); }

template <typename T>
__global__ void scaled_copy_kernel(const __grid_constant__ Copies copies) {
  const ScaledCopy& copy = copies.at[blockIdx.y];
  const int64_t numel = copy.rows * copy.columns;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < numel; i += int64_t{gridDim.x} * blockDim.x) {
    put(static_cast<T*>(copy.out) + i / copy.columns * copy.stride + i % copy.columns, copy.in[i] * copy.scale);
  }
}

constexpr int kThreads = 256, kMostBlocks = 64;

}  // namespace

void launch_scaled_copies(const ScaledCopy* copies, int count, CopyType type, void* stream) {
  Copies argument{};
  int64_t largest = 0;
  for (int i = 0; i < count; ++i) {
    argument.at[i] = copies[i];
    largest = std::max(largest, copies[i].rows * copies[i].columns);
  }
  if (largest == 0) return;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((largest + kThreads - 1) / kThreads, kMostBlocks)), count);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (type) {
    case CopyType::bfloat16: scaled_copy_kernel<__nv_bfloat16><<<grid, kThreads, 0, on>>>(argument); break;
    case CopyType::float16: scaled_copy_kernel<__half><<<grid, kThreads, 0, on>>>(argument); break;
    case CopyType::float32: scaled_copy_kernel<float><<<grid, kThreads, 0, on>>>(argument); break;
  }
}

}  // namespace megalora
