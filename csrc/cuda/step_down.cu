// The down-projection of a LoRA branch of a few rows, with the norm before it: a block a row of A. An adapter of r 16
// on all linears of an 8B model added 72 to 82 us to a layer of a step by the kernel of many rows (lora_down.cu), and
// adds 10 to 19 by this.
#include "cuda/beside.h"
#include "cuda/decode_step.h"
#include "cuda/halves.h"
#include "cuda/launch.h"
#include "kernel_limits.h"

namespace megalora {
namespace {

constexpr int kThreads = 256, kHeld = 8;  // octets of a row of A that a thread asks for before the wait

// Copies the rows of x behind each other to the rows of X, and zeros behind z.
template <int M>
__device__ __forceinline__ void fill(const StepDownParams& params, const uint4* x, int64_t stride) {
  const int octets = static_cast<int>(params.in_features / 8);
  const int rest = static_cast<int>(params.room - params.rank);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    uint16_t* row = static_cast<uint16_t*>(params.X.data) + m * params.X.stride;
    if (static_cast<const void*>(row) != x + m * stride) {
      for (int i = threadIdx.x; i < octets; i += kThreads) reinterpret_cast<uint4*>(row)[i] = x[m * stride + i];
    }
    for (int i = threadIdx.x; i < rest; i += kThreads) row[params.in_features + params.rank + i] = 0;
  }
}

template <int M, bool bfloat16, bool normed>
__global__ void __launch_bounds__(kThreads) step_down_kernel(StepDownParams params) {
  using Rows = NormedRows<M, bfloat16, kThreads>;
  __shared__ uint4 staged[normed ? Rows::kRoom / 8 : 1];
  __shared__ float partial[M][kThreads / kWarpLanes];
  const int octets = static_cast<int>(params.in_features / 8);
  const auto* row = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(params.A.data) +
                                                   blockIdx.x * int64_t{params.A.stride});
  let_next_start();
  uint4 held[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int octet = threadIdx.x + h * kThreads;
    if (octet < octets) held[h] = stream_octet(row + octet);
  }
  const uint4* x = static_cast<const uint4*>(params.x.data);
  int64_t stride = params.x.stride / 8;
  if constexpr (normed) {
    const Rows rows(params.beside, params.in_features);
    await_previous();
    rows.stage(staged, params.beside, params.x);
    x = staged;
    stride = octets;
  } else {
    await_previous();
  }
  if (blockIdx.x == 0) fill<M>(params, x, stride);
  float sums[M] = {};
  const auto add = [&](const uint4& words, int octet) {
    float a[8];
    unpack<bfloat16>(words, a);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float b[8];
      unpack<bfloat16>(x[m * stride + octet], b);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[m] = fmaf(a[i], b[i], sums[m]);
    }
  };
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int octet = threadIdx.x + h * kThreads;
    if (octet < octets) add(held[h], octet);
  }
  for (int octet = threadIdx.x + kHeld * kThreads; octet < octets; octet += kThreads) add(row[octet], octet);
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int step = kWarpLanes / 2; step > 0; step /= 2) sums[m] += __shfl_xor_sync(0xFFFFFFFF, sums[m], step);
    if (threadIdx.x % kWarpLanes == 0) partial[m][threadIdx.x / kWarpLanes] = sums[m];
  }
  __syncthreads();
  if (threadIdx.x >= M) return;
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarpLanes; ++warp) total += partial[threadIdx.x][warp];
  narrow<bfloat16>(params.X.data, threadIdx.x * params.X.stride + params.in_features + blockIdx.x, total);
}

}  // namespace

void launch_step_down(const StepDownParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(params.rank);
  dispatch_step(params.rows, params.type, params.beside, [&](auto m, auto bfloat16, auto normed) {
    constexpr int M = decltype(m)::value;
    launch_following(step_down_kernel<M, decltype(bfloat16)::value, decltype(normed)::value>, dim3(blocks), kThreads, M,
                     stream, params);
  });
}

}  // namespace megalora
