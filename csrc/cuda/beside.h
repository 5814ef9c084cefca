// What linears of a few rows do beside their product, so that a step of generation has fewer kernels: they norm what
// they read, and outputs that are a gate and what it opens leave as one (BesideParams).
#pragma once

#include <type_traits>

#include "cuda/decode_step.h"
#include "cuda/gates.h"
#include "cuda/halves.h"
#include "kernel_limits.h"

namespace megalora {

constexpr int kWarpLanes = 32;

// Rounds eight floats; returns them as words.
template <bool bfloat16>
__device__ __forceinline__ uint4 round_octet(float (&x)[8]) {
  const uint4 words = {pack<bfloat16>(x[0], x[1]), pack<bfloat16>(x[2], x[3]), pack<bfloat16>(x[4], x[5]),
                       pack<bfloat16>(x[6], x[7])};
  unpack<bfloat16>(words, x);
  return words;
}

template <bool bfloat16>
__device__ __forceinline__ float rounded_to(float x) {
  float octet[8] = {x};
  round_octet<bfloat16>(octet);
  return octet[0];
}

// norm(x + delta) of M rows, in the shared memory of each block: a thread takes an octet of each row, and those that
// lie kThreads further on. Rounded where the norm's kernel rounds (norm.cu).
template <int M, bool bfloat16, int kThreads>
struct NormedRows {
  static constexpr int kHeld = static_cast<int>(kLargestNormedRow / 8 / kThreads);
  static constexpr int64_t kRoom = M * kLargestNormedRow < kMostNormed ? M * kLargestNormedRow : kMostNormed;
  static_assert(kHeld * kThreads * 8 == kLargestNormedRow);

  uint4 weight[kHeld];
  int octets;

  // Asks for the norm's weight: no kernel of the step writes it.
  __device__ __forceinline__ NormedRows(const BesideParams& beside, int64_t size) : octets(static_cast<int>(size / 8)) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int octet = threadIdx.x + h * kThreads;
      if (octet < octets) weight[h] = static_cast<const uint4*>(beside.norm)[octet];
    }
  }

  // Writes the rows into `to`, `octets` apart. Behind await_previous, by all threads of the block; the first block
  // keeps x + delta.
  __device__ __forceinline__ void stage(uint4* to, const BesideParams& beside, const Matrix& x_MI) const {
    __shared__ float partial[M][kThreads / kWarpLanes];
    float squares[M] = {};
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int octet = threadIdx.x + h * kThreads;
        if (octet >= octets) continue;
        const auto* row = static_cast<const uint16_t*>(x_MI.data) + m * x_MI.stride;
        uint4 words = reinterpret_cast<const uint4*>(row)[octet];
        float x[8];
        unpack<bfloat16>(words, x);
        if (beside.delta != nullptr) {
          const int64_t at = int64_t{m} * octets + octet;
          float delta[8];
          unpack<bfloat16>(static_cast<const uint4*>(beside.delta)[at], delta);
#pragma unroll
          for (int i = 0; i < 8; ++i) x[i] += delta[i];
          words = round_octet<bfloat16>(x);
          if (blockIdx.x == 0) static_cast<uint4*>(beside.sum)[at] = words;
        }
        to[m * octets + octet] = words;
#pragma unroll
        for (int i = 0; i < 8; ++i) squares[m] = fmaf(x[i], x[i], squares[m]);
      }
#pragma unroll
      for (int step = kWarpLanes / 2; step > 0; step /= 2) {
        squares[m] += __shfl_xor_sync(0xFFFFFFFF, squares[m], step);
      }
      if (threadIdx.x % kWarpLanes == 0) partial[m][threadIdx.x / kWarpLanes] = squares[m];
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float total = 0;
#pragma unroll
      for (int warp = 0; warp < kThreads / kWarpLanes; ++warp) total += partial[m][warp];
      const float inverse = rsqrtf(total / static_cast<float>(8 * octets) + beside.eps);
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int octet = threadIdx.x + h * kThreads;
        if (octet < octets)
          to[m * octets + octet] = normed(to[m * octets + octet], weight[h], inverse, beside.rounding);
      }
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ static uint4 normed(const uint4& words, const uint4& weights, float inverse,
                                                 NormRounding rounding) {
    float x[8], w[8];
    unpack<bfloat16>(words, x);
    unpack<bfloat16>(weights, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] *= inverse;
      if (rounding.offset) w[i] += 1.f;
    }
    if (!rounding.precise) {
      round_octet<bfloat16>(x);
      round_octet<bfloat16>(w);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= w[i];
    return round_octet<bfloat16>(x);
  }
};

// The rows of a weight that a block multiplies, two that follow each other a warp: those of outputs that follow each
// other, or of gates and, by its second half of warps, of what they open. Rows of a gate and of what it opens in one
// warp took a sixth longer in e4m3.
template <int warps>
struct BlockRows {
  static constexpr int count = 2 * warps;
  bool gated;
  int64_t outputs, first;  // of y, and the block's first

  __device__ __forceinline__ BlockRows(const BesideParams& beside, int64_t rows)
      : gated(beside.gate != Gate::none),
        outputs(gated ? rows / 2 : rows),
        first(blockIdx.x * int64_t{gated ? warps : count}) {}
  // The i-th of them, that of an output which may not be there.
  __device__ __forceinline__ int64_t row(int i) const {
    return gated && i >= warps ? outputs + first + i - warps : first + i;
  }
  __device__ __forceinline__ bool has(int i) const { return first + (gated ? i % warps : i) < outputs; }
  __device__ __forceinline__ int64_t row_or_last(int i) const {
    return has(i) ? row(i) : (gated && i >= warps ? 2 : 1) * outputs - 1;
  }
};

template <Gate gate, bool bfloat16>
__device__ __forceinline__ float opened(float by, float what) {
  const float value = Activated<gate>(rounded_to<bfloat16>(by)).value();
  return rounded_to<bfloat16>(value) * rounded_to<bfloat16>(what);
}

// Writes the sums of a warp's two rows, which all its lanes have. By all threads of the block.
template <int M, bool bfloat16, int warps>
__device__ __forceinline__ void write_rows(void* y, const BesideParams& beside, const BlockRows<warps>& rows,
                                           const float (&sums)[2][M]) {
  __shared__ float all[M][2 * warps];
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  if (lane == 0) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        if (rows.gated) {
          all[m][2 * warp + o] = sums[o][m];
        } else if (rows.has(2 * warp + o)) {
          narrow<bfloat16>(y, m * rows.outputs + rows.row(2 * warp + o), sums[o][m]);
        }
      }
    }
  }
  if (!rows.gated) return;
  __syncthreads();
  const int i = threadIdx.x % warps, m = threadIdx.x / warps;
  if (m >= M || !rows.has(i)) return;
  const float by = all[m][i], what = all[m][warps + i];
  const float value = beside.gate == Gate::silu   ? opened<Gate::silu, bfloat16>(by, what)
                      : beside.gate == Gate::gelu ? opened<Gate::gelu, bfloat16>(by, what)
                                                  : opened<Gate::gelu_tanh, bfloat16>(by, what);
  narrow<bfloat16>(y, m * rows.outputs + rows.row(i), value);
}

// Calls `body` with how many rows there are and whether they are bfloat16 and normed, as std::integral_constants.
template <typename Body>
void dispatch_step(int64_t rows, Type type, const BesideParams& beside, Body body) {
  const auto of_rows = [&](auto m) {
    const auto of_type = [&](auto bfloat16) {
      if (beside.norm != nullptr) return body(m, bfloat16, std::true_type{});
      body(m, bfloat16, std::false_type{});
    };
    if (type == Type::bfloat16) return of_type(std::true_type{});
    of_type(std::false_type{});
  };
  static_assert(kMostSkinnyRows == 4);
  switch (rows) {
    case 1: return of_rows(std::integral_constant<int, 1>{});
    case 2: return of_rows(std::integral_constant<int, 2>{});
    case 3: return of_rows(std::integral_constant<int, 3>{});
    case 4: return of_rows(std::integral_constant<int, 4>{});
  }
}

}  // namespace megalora
