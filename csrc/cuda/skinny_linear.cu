// A linear of a few rows on a GPU. Bound by what it reads once: the weight. Its grid depends on shapes alone, so that a
// CUDA graph can hold it.
#include "cuda/beside.h"
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

template <int M, bool bfloat16, bool normed>
__global__ void __launch_bounds__(kWarps* kLanes) skinny_kernel(SkinnyLinearParams params) {
  using Rows = NormedRows<M, bfloat16, kWarps * kLanes>;
  __shared__ uint4 staged[normed ? Rows::kRoom / 8 : 1];
  const auto* weight = static_cast<const uint16_t*>(params.weight.data);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const BlockRows<kWarps> rows(params.beside, params.out_features);
  if (threadIdx.x < kWarps * kOutputs && rows.has(threadIdx.x)) {
    prefetch(weight + rows.row(threadIdx.x) * params.weight.stride,
             static_cast<uint32_t>(min(2 * params.in_features, kPrefetched)));
  }
  let_next_start();
  const uint4* x_octets = static_cast<const uint4*>(params.x.data);
  int64_t x_stride = params.x.stride / 8;
  if constexpr (normed) {
    const Rows normed_rows(params.beside, params.in_features);
    await_previous();
    normed_rows.stage(staged, params.beside, params.x);
    x_octets = staged;
    x_stride = params.in_features / 8;
  } else {
    await_previous();
  }
  const uint4* weights[kOutputs];
  int64_t outputs[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    outputs[o] = rows.row_or_last(kOutputs * warp + o);
    weights[o] = reinterpret_cast<const uint4*>(weight + outputs[o] * params.weight.stride);
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
        unpack<bfloat16>(x_octets[m * x_stride + at + u * kLanes], x);
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
        unpack<bfloat16>(x_octets[m * x_stride + at], x);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[o][m] = fmaf(w[i], x[i], sums[o][m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) sums[o][m] += __shfl_xor_sync(kAllLanes, sums[o][m], step);
      if (params.bias != nullptr) sums[o][m] += widen<bfloat16>(params.bias, outputs[o]);
    }
  }
  write_rows<M, bfloat16>(params.y, params.beside, rows, sums);
}

}  // namespace

void launch_skinny_linear(const SkinnyLinearParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((params.out_features + kWarps * kOutputs - 1) / (kWarps * kOutputs));
  dispatch_step(params.rows, params.type, params.beside, [&](auto m, auto bfloat16, auto normed) {
    constexpr int M = decltype(m)::value;
    launch_following(skinny_kernel<M, decltype(bfloat16)::value, decltype(normed)::value>, dim3(blocks),
                     kWarps * kLanes, M, stream, params);
  });
}

}  // namespace megalora
