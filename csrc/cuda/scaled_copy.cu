// Many small matrices scaled and rounded into their places in one launch.
#include "cuda/scaled_copy.h"

#include <algorithm>

#include "cuda/vectors.h"

namespace megalora {
namespace {

struct Copies {  // an argument of the kernel: nothing to copy to the device first
  ScaledCopy at[kMostCopies];
};

template <typename T>
__global__ void scaled_copy_kernel(const __grid_constant__ Copies copies) {
  const ScaledCopy& copy = copies.at[blockIdx.y];
  const int64_t numel = copy.rows * copy.columns;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < numel; i += int64_t{gridDim.x} * blockDim.x) {
    T* out = static_cast<T*>(copy.out.data) + i / copy.columns * copy.out.stride + i % copy.columns;
    *out = from_float<T>(copy.in[i] * copy.scale);
  }
}

constexpr int64_t kMostBlocks = 64;  // of one matrix

}  // namespace

void launch_scaled_copies(const ScaledCopy* copies, int count, Type type, cudaStream_t stream) {
  Copies argument{};
  int64_t largest = 0;
  for (int i = 0; i < count; ++i) {
    argument.at[i] = copies[i];
    largest = std::max(largest, copies[i].rows * copies[i].columns);
  }
  if (largest == 0) return;
  const dim3 grid(std::min<unsigned>(blocks_for(largest, kThreads), kMostBlocks), count);
  dispatch(type, [&](auto zero) { scaled_copy_kernel<decltype(zero)><<<grid, kThreads, 0, stream>>>(argument); });
}

}  // namespace megalora
