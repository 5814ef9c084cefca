// A linear of a few rows on a GPU. Bound by what it reads once: the weight. Its grid depends on shapes alone, so that a
// CUDA graph can hold it.
#include "cuda/decode_step.h"
#include "cuda/halves.h"
#include "cuda/launch.h"
#include "kernel_limits.h"

namespace megalora {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// A warp makes kOutputs outputs of each row of x. kUnrolled octets of each weight's row are under way at a time: fewer
// do not keep the memory busy, more take registers from warps that would.
constexpr int kWarps = 8, kOutputs = 2, kUnrolled = 4;
constexpr int64_t kPrefetched = 2048;  // bytes of a row, before the kernel before has ended

template <int M, bool bfloat16>
__global__ void __launch_bounds__(kWarps* kLanes) skinny_kernel(SkinnyLinearParams params) {
  const auto* x_data = static_cast<const uint16_t*>(params.x.data);
  const auto* weight = static_cast<const uint16_t*>(params.weight.data);
  const int lane = threadIdx.x % kLanes;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes) * kOutputs;
  const int64_t fetched = static_cast<int64_t>(blockIdx.x) * kWarps * kOutputs + threadIdx.x;
  if (threadIdx.x < kWarps * kOutputs && fetched < params.out_features) {
    prefetch(weight + fetched * params.weight.stride, static_cast<uint32_t>(min(2 * params.in_features, kPrefetched)));
  }
  let_next_start();
  await_previous();
  if (first >= params.out_features) return;
  const uint4* weights[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const int64_t row = min(first + o, params.out_features - 1);
    weights[o] = reinterpret_cast<const uint4*>(weight + row * params.weight.stride);
  }
  float sums[kOutputs][M] = {};
  const int octets = static_cast<int>(params.in_features / 8);
  int at = lane;
  for (; at + (kUnrolled - 1) * kLanes < octets; at += kUnrolled * kLanes) {
    uint4 words[kUnrolled][kOutputs];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) words[u][o] = stream_octet(weights[o] + at + u * kLanes);
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float x[8];
        unpack<bfloat16>(*(reinterpret_cast<const uint4*>(x_data + m * params.x.stride) + at + u * kLanes), x);
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
          float w[8];
          unpack<bfloat16>(words[u][o], w);
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[o][m] = fmaf(w[i], x[i], sums[o][m]);
        }
      }
    }
  }
  for (; at < octets; at += kLanes) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      float w[8];
      unpack<bfloat16>(stream_octet(weights[o] + at), w);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float x[8];
        unpack<bfloat16>(*(reinterpret_cast<const uint4*>(x_data + m * params.x.stride) + at), x);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[o][m] = fmaf(w[i], x[i], sums[o][m]);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float total = sums[o][m];
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
      if (lane == 0 && first + o < params.out_features) {
        if (params.bias != nullptr) total += widen<bfloat16>(params.bias, first + o);
        narrow<bfloat16>(params.y, m * params.out_features + first + o, total);
      }
    }
  }
}

template <int M>
void launch_rows(const SkinnyLinearParams& params, cudaStream_t stream) {
  const auto kernel = params.type == Type::bfloat16 ? skinny_kernel<M, true> : skinny_kernel<M, false>;
  const auto blocks = static_cast<unsigned>((params.out_features + kWarps * kOutputs - 1) / (kWarps * kOutputs));
  launch_following(kernel, dim3(blocks), kWarps * kLanes, M, stream, params);
}

}  // namespace

void launch_skinny_linear(const SkinnyLinearParams& params, cudaStream_t stream) {
  static_assert(kMostSkinnyRows == 4);
  switch (params.rows) {
    case 1: return launch_rows<1>(params, stream);
    case 2: return launch_rows<2>(params, stream);
    case 3: return launch_rows<3>(params, stream);
    case 4: return launch_rows<4>(params, stream);
  }
}

}  // namespace megalora
