// A linear of a few rows on e4m3 weights, with the columns of its branch in 16 bits: bound by reading the weight, half
// the bytes of a dense one. As skinny_linear.cu.
#include <cuda_fp8.h>

#include "cuda/halves.h"
#include "cuda/launch.h"
#include "kernel_limits.h"

namespace megalora {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// The weight is read once and by nobody else soon.
__device__ __forceinline__ uint4 stream_of(const uint4* from) {
  uint4 words;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
      : "l"(from));
  return words;
}

// Eight codes of two words.
__device__ __forceinline__ void unpack_e4m3(uint32_t low, uint32_t high, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t codes = (i < 2 ? low : high) >> (i % 2 * 16) & 0xFFFF;
    const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
    const float2 pair = __half22float2(__half2(raw));
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}

// A warp makes kOutputs outputs of each row of x; a lane reads sixteen codes at a time, kUnrolled of them ahead.
constexpr int kWarps = 8, kOutputs = 2, kUnrolled = 2;

template <int M, bool bfloat16>
__global__ void __launch_bounds__(kWarps* kLanes) fp8_skinny_kernel(Fp8SkinnyParams params) {
  const auto* x_data = static_cast<const uint16_t*>(params.x.data);
  const int lane = threadIdx.x % kLanes;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes) * kOutputs;
  if (first >= params.out_features) return;
  const uint4* weights[kOutputs];
  int64_t rows[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    rows[o] = min(first + o, params.out_features - 1);
    weights[o] =
        reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(params.codes.data) + rows[o] * params.codes.stride);
  }
  float sums[kOutputs][M] = {};
  const auto add = [&](const uint4(&words)[kOutputs], int at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float w[kOutputs][8];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        unpack_e4m3(half ? words[o].z : words[o].x, half ? words[o].w : words[o].y, w[o]);
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float x[8];
        unpack<bfloat16>(*(reinterpret_cast<const uint4*>(x_data + m * params.x.stride) + 2 * at + half), x);
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[o][m] = fmaf(w[o][i], x[i], sums[o][m]);
        }
      }
    }
  };
  const int sixteens = static_cast<int>(params.in_features / 16);
  int at = lane;
  for (; at + (kUnrolled - 1) * kLanes < sixteens; at += kUnrolled * kLanes) {
    uint4 words[kUnrolled][kOutputs];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) words[u][o] = stream_of(weights[o] + at + u * kLanes);
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) add(words[u], at + u * kLanes);
  }
  for (; at < sixteens; at += kLanes) {
    uint4 words[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) words[o] = stream_of(weights[o] + at);
    add(words, at);
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const float scale = params.scale[rows[o]];
#pragma unroll
    for (int m = 0; m < M; ++m) sums[o][m] *= scale;
    const auto* branch = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(params.branch.data) +
                                                        rows[o] * params.branch.stride);
    for (int octet = lane; octet < params.room / 8; octet += kLanes) {
      float w[8];
      unpack<bfloat16>(branch[octet], w);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float x[8];
        const uint16_t* z = x_data + m * params.x.stride + params.in_features;
        unpack<bfloat16>(*(reinterpret_cast<const uint4*>(z) + octet), x);
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
void launch_rows(const Fp8SkinnyParams& params, cudaStream_t stream) {
  const auto kernel = params.type == Type::bfloat16 ? fp8_skinny_kernel<M, true> : fp8_skinny_kernel<M, false>;
  const auto blocks = static_cast<unsigned>((params.out_features + kWarps * kOutputs - 1) / (kWarps * kOutputs));
  kernel<<<blocks, kWarps * kLanes, 0, stream>>>(params);
}

}  // namespace

void launch_fp8_skinny(const Fp8SkinnyParams& params, cudaStream_t stream) {
  static_assert(kMostSkinnyRows == 4);
  switch (params.rows) {
    case 1: return launch_rows<1>(params, stream);
    case 2: return launch_rows<2>(params, stream);
    case 3: return launch_rows<3>(params, stream);
    case 4: return launch_rows<4>(params, stream);
  }
}

}  // namespace megalora
