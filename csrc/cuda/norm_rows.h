// What the norms' kernels share: a row is held in the registers of `threads` threads, `held` vectors each.
#pragma once

#include <type_traits>

#include "cuda/draw.h"
#include "cuda/norm_params.h"
#include "cuda/vectors.h"

namespace megalora {

// How a row is held. Rows of 32 threads stand several to a block.
template <int threads_, int held_>
struct RowShape {
  static constexpr int threads = threads_, held = held_;
  static constexpr int block = threads == 32 ? 256 : threads;
  static constexpr int blocks_per_sm = held <= 2 ? 4 : held <= 4 ? 3 : 1;  // at least, of the backward pass
};

// Calls `body` with the RowShape of rows of `size` elements: few registers a thread, and as few threads as that allows,
// since what they sum up must meet.
template <typename T, typename Body>
void with_row_shape(int64_t size, Body body) {
  const int64_t vectors = size / Vector<T>::size;
  if (vectors <= 32) return body(RowShape<32, 1>{});
  if (vectors <= 64) return body(RowShape<32, 2>{});
  if (vectors <= 256) return body(RowShape<256, 1>{});
  if (vectors <= 512) return body(RowShape<256, 2>{});
  if (vectors <= 1024) return body(RowShape<256, 4>{});
  using Largest = RowShape<512, 8>;
  static_assert(Largest::threads * Largest::held * Vector<T>::size >= kLargestNorm);
  return body(Largest{});
}

// Calls `body` with the norm's kind and that of the addend's norm, as std::integral_constants. Those that two norms
// meet in are 16-bit floats.
template <typename T, typename Body>
void with_kinds(NormKind kind, NormKind before, Body body) {
  const auto with = [&](auto of) {
    using Of = decltype(of);
    if constexpr (sizeof(T) == 2 && Of::value != NormKind::layer) {
      if (before == Of::value) return body(of, of);
    }
    body(of, std::integral_constant<NormKind, NormKind::none>{});
  };
  if (kind == NormKind::layer) return with(std::integral_constant<NormKind, NormKind::layer>{});
  if (kind == NormKind::precise) return with(std::integral_constant<NormKind, NormKind::precise>{});
  return with(std::integral_constant<NormKind, NormKind::rms>{});
}

// Where a thread stands: its row, and the elements of it that it holds.
template <typename T, typename Shape>
struct RowPlace {
  int64_t row;
  int lane;

  __device__ __forceinline__ RowPlace() {
    constexpr int threads = Shape::threads;
    row = threads == 32 ? blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32 : blockIdx.x;
    lane = threadIdx.x % threads;
  }
  __device__ __forceinline__ int64_t element(int h) const {
    return (int64_t{h} * Shape::threads + lane) * Vector<T>::size;
  }
};

// Lets nothing that was worked out of v be kept in registers in its place: as float32 it takes twice as many.
template <typename T>
__device__ __forceinline__ void repack(Vector<T>& v) {
  auto& words = *reinterpret_cast<uint4*>(&v);
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
}

// The sums of a row's threads, of two numbers at once.
template <int threads>
__device__ __forceinline__ float2 row_sum(float2 value, float2* scratch) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    value.x += __shfl_xor_sync(0xFFFFFFFF, value.x, offset);
    value.y += __shfl_xor_sync(0xFFFFFFFF, value.y, offset);
  }
  if (threads == 32) return value;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float2 total = {0, 0};
#pragma unroll
  for (int warp = 0; warp < threads / 32; ++warp) total.x += scratch[warp].x, total.y += scratch[warp].y;
  __syncthreads();
  return total;
}

template <int threads>
__device__ __forceinline__ float row_sum(float value, float* scratch) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, offset);
  if (threads == 32) return value;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < threads / 32; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

// What a row is multiplied by, and where the product is rounded. All in float32.
template <typename T, NormKind kind>
struct NormWeight {
  static constexpr bool precise = kind == NormKind::precise;
  const T *weight, *bias;
  float shift;  // 1 where the weight is 1 + w, a sum that is rounded as the product is

  __device__ __forceinline__ explicit NormWeight(const NormOf& norm)
      : weight(static_cast<const T*>(norm.weight)),
        bias(static_cast<const T*>(norm.bias)),
        shift(norm.offset ? 1.f : 0.f) {}

  __device__ __forceinline__ Vector<T> read(int64_t at) const {
    if (kind != NormKind::layer || weight != nullptr) return load(weight + at);
    Vector<T> ones;
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) ones.at[j] = from_float<T>(1.f);
    return ones;
  }
  __device__ __forceinline__ float of(T w) const {
    const float whole = to_float(w) + shift;
    return precise ? whole : to_float(from_float<T>(whole));
  }

  // weight * normed: rounded before the weight, as most of HF's models do, or behind it alone.
  __device__ __forceinline__ T product(T w, float normed) const {
    return from_float<T>(of(w) * (precise ? normed : to_float(from_float<T>(normed))));
  }
};

// The scale and the mask of what is added, forward and backward.
template <typename T>
struct AddendFactors {
  const Draw& draw;
  float scale;
  StepDraw step;
  TokenDraw token;

  // scale: of the addend, beside the mask's.
  __device__ __forceinline__ AddendFactors(const Draw& draw, float scale, int64_t row)
      : draw(draw), scale(scale), step(draw) {
    if (draw.on) token.init(draw, step, __ldg(draw.token + row));
  }
  __device__ __forceinline__ void multiply(Vector<T>& v, float factor) const {
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) v.at[j] = from_float<T>(__fmul_rn(to_float(v.at[j]), factor));
  }
  __device__ __forceinline__ void drop(Vector<T>& v, int64_t at) const {
    if constexpr (sizeof(T) == 2) {
      if (!draw.on) return;
      multiply(v, draw.scale);
      auto& words = *reinterpret_cast<uint4*>(&v);
      words = words & token.keep_block(draw, step, draw.first_block + static_cast<uint32_t>(at / kOctet));
    }
  }
  __device__ __forceinline__ void forward(Vector<T>& v, int64_t at) const {
    if (scale != 1.f) multiply(v, scale);
    drop(v, at);
  }
  __device__ __forceinline__ void backward(Vector<T>& v, int64_t at) const {
    drop(v, at);
    if (scale != 1.f) multiply(v, scale);
  }
};

}  // namespace megalora
