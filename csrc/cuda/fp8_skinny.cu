// A linear of at most four rows on e4m3 weights, with the columns of its branch in 16 bits: bound by reading the
// weight, half the bytes of a dense one. As skinny_linear.cu: e4m3 is exact in float32, sums are in float32, and the
// scale of a row comes behind its sum.
#include <cuda_fp8.h>

#include "cuda/beside.h"
#include "cuda/decode_step.h"
#include "cuda/halves.h"
#include "cuda/launch.h"
#include "kernel_limits.h"

namespace megalora {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// A warp makes kOutputs outputs of each row of x. A lane has kAhead words of sixteen codes of each of them under way,
// and asks for the next as soon as one is used; codes that no kernel of the step writes are asked for before the kernel
// before has ended. With twice as many words fewer blocks fit: where they are all under way before the first is used,
// the memory has nothing to do while they are.
constexpr int kWarps = 8, kOutputs = 2, kAhead = 4, kCodes = 16;

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

// Brings nearer the branch of the warp's outputs, which is read last.
__device__ __forceinline__ void fetch_branch(const Fp8SkinnyParams& params, const BlockRows<kWarps>& rows) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (lane >= kOutputs || params.room == 0 || !rows.has(kOutputs * warp + lane)) return;
  const int64_t output = rows.row(kOutputs * warp + lane);
  const auto* branch = static_cast<const uint16_t*>(params.branch.data) + output * params.branch.stride;
  prefetch(branch, static_cast<uint32_t>(2 * params.room));
}

// Rows of x, `stride` octets apart.
struct Octets {
  const uint4* first;
  int64_t stride;
};

// Adds the product of sixteen codes of each output with their columns of x, those from 16 `at` on.
template <int M, bool bfloat16>
__device__ __forceinline__ void add(float (&sums)[kOutputs][M], const uint4 (&words)[kOutputs], const Octets& rows,
                                    int at) {
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
      unpack<bfloat16>(rows.first[m * rows.stride + 2 * at + half], x);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[o][m] = fmaf(w[o][i], x[i], sums[o][m]);
      }
    }
  }
}

// Adds the product with the branch of output `row`.
template <int M, bool bfloat16>
__device__ __forceinline__ void add_branch(float (&sums)[M], const Fp8SkinnyParams& params, int64_t row) {
  const auto* x_data = static_cast<const uint16_t*>(params.x.data);
  const auto* branch =
      reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(params.branch.data) + row * params.branch.stride);
#pragma unroll 1
  for (int octet = threadIdx.x % kLanes; octet < params.room / 8; octet += kLanes) {
    float w[8];
    unpack<bfloat16>(branch[octet], w);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float x[8];
      unpack<bfloat16>(reinterpret_cast<const uint4*>(x_data + m * params.x.stride + params.in_features)[octet], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[m] = fmaf(w[i], x[i], sums[m]);
    }
  }
}

template <int M, bool bfloat16, bool normed>
__global__ void __launch_bounds__(kWarps* kLanes, M == 1 ? 3 : 2) fp8_skinny_kernel(Fp8SkinnyParams params) {
  using Rows = NormedRows<M, bfloat16, kWarps * kLanes>;
  __shared__ uint4 staged[normed ? Rows::kRoom / 8 : 1];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int end = static_cast<int>(params.in_features / kCodes);
  const BlockRows<kWarps> rows(params.beside, params.out_features);
  fetch_branch(params, rows);
  let_next_start();
  if (!params.kept) await_previous();
  const uint4* weights[kOutputs];
  int64_t outputs[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    outputs[o] = rows.row_or_last(kOutputs * warp + o);
    weights[o] = reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(params.codes.data) +
                                                outputs[o] * params.codes.stride);
  }
  uint4 held[kAhead][kOutputs];
  const auto load = [&](uint4(&to)[kOutputs], int at) {
    if (at >= end) return;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) to[o] = stream_octet(weights[o] + at);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(held[i], lane + i * kLanes);
  float scale[kOutputs], sums[kOutputs][M] = {};
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) scale[o] = params.scale[outputs[o]];  // comes while the codes do
  Octets x{static_cast<const uint4*>(params.x.data), params.x.stride / 8};
  if constexpr (normed) {
    const Rows normed_rows(params.beside, params.in_features);
    await_previous();
    normed_rows.stage(staged, params.beside, params.x);
    x = {staged, params.in_features / 8};
  } else {
    await_previous();
  }
  for (int start = lane; start < end; start += kAhead * kLanes) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = start + i * kLanes;
      if (at >= end) break;
      add<M, bfloat16>(sums, held[i], x, at);
      load(held[i], at + kAhead * kLanes);
    }
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (int m = 0; m < M; ++m) sums[o][m] *= scale[o];
    if constexpr (!normed) add_branch<M, bfloat16>(sums[o], params, outputs[o]);
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

void launch_fp8_skinny(const Fp8SkinnyParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((params.out_features + kWarps * kOutputs - 1) / (kWarps * kOutputs));
  dispatch_step(params.rows, params.type, params.beside, [&](auto m, auto bfloat16, auto normed) {
    constexpr int M = decltype(m)::value;
    launch_following(fp8_skinny_kernel<M, decltype(bfloat16)::value, decltype(normed)::value>, dim3(blocks),
                     kWarps * kLanes, M, stream, params);
  });
}

}  // namespace megalora
