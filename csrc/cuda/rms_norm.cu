// RMSNorm, alone or with the sum of the residual stream before it, and its backward pass.
#include <type_traits>

#include "cuda/decode_step.h"
#include "cuda/launch.h"
#include "cuda/vectors.h"

namespace megalora {
namespace {

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
template <typename T, bool precise>
struct Weight {
  float shift;  // 1 where the weight is 1 + w

  __device__ __forceinline__ explicit Weight(const NormRounding& rounding)
      : shift(precise && rounding.offset ? 1.f : 0.f) {}

  __device__ __forceinline__ float of(T w) const { return precise ? to_float(w) + shift : to_float(w); }

  // weight * normed: rounded before the weight, as most of HF's models do, or behind it alone.
  __device__ __forceinline__ T product(T w, float normed) const {
    return from_float<T>(of(w) * (precise ? normed : to_float(from_float<T>(normed))));
  }
};

// `threads` threads hold a row in registers, `held` vectors each. Rows of 32 threads stand several to a block.
// eps: of the parameters, in the type of the arithmetic.
template <typename T, int threads, int held, bool precise>
__global__ void rms_norm_kernel(RmsNormParams params, float eps) {
  let_next_start();
  await_previous();
  const Weight<T, precise> weight(params.rounding);
  const auto *x = static_cast<const T*>(params.x.data), *delta = static_cast<const T*>(params.delta);
  const int64_t size = params.size;
  __shared__ float scratch[32];
  constexpr int each = Vector<T>::size;
  const int64_t row = threads == 32 ? blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32 : blockIdx.x;
  const int lane = threadIdx.x % threads;
  if (row >= params.rows) return;  // whole warps only: a block of one row never gets here
  Vector<T> kept[held];
  float squares = 0;
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      kept[h] = load(x + row * params.x.stride + at);
      if (delta != nullptr) {
        const auto more = load(delta + row * size + at);
#pragma unroll
        for (int j = 0; j < each; ++j) kept[h].at[j] = from_float<T>(to_float(kept[h].at[j]) + to_float(more.at[j]));
        store(static_cast<T*>(params.sum) + row * size + at, kept[h]);
      }
#pragma unroll
      for (int j = 0; j < each; ++j) squares += to_float(kept[h].at[j]) * to_float(kept[h].at[j]);
    }
  }
  const float r = rsqrtf(row_sum<threads>(squares, scratch) / static_cast<float>(size) + eps);
  if (lane == 0) static_cast<float*>(params.inverse)[row] = r;
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      const auto w = load(static_cast<const T*>(params.weight) + at);
      Vector<T> out;
#pragma unroll
      for (int j = 0; j < each; ++j) out.at[j] = weight.product(w.at[j], to_float(kept[h].at[j]) * r);
      store(static_cast<T*>(params.y.data) + row * params.y.stride + at, out);
    }
  }
}

template <typename T, int threads, int held, bool precise>
__global__ void rms_norm_backward_kernel(RmsNormBackwardParams params) {
  const Weight<T, precise> weight(params.rounding);
  const auto* residual = static_cast<const T*>(params.residual);
  const int64_t size = params.size;
  __shared__ float scratch[32];
  constexpr int each = Vector<T>::size;
  const int64_t row = threads == 32 ? blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32 : blockIdx.x;
  const int lane = threadIdx.x % threads;
  if (row >= params.rows) return;
  const float r = static_cast<const float*>(params.inverse)[row];
  Vector<T> xs[held], ds[held];
  float dot = 0;
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      xs[h] = load(static_cast<const T*>(params.x.data) + row * params.x.stride + at);
      ds[h] = load(static_cast<const T*>(params.dy.data) + row * params.dy.stride + at);
      const auto w = load(static_cast<const T*>(params.weight) + at);
#pragma unroll
      for (int j = 0; j < each; ++j) {
        dot += to_float(ds[h].at[j]) * weight.of(w.at[j]) * to_float(xs[h].at[j]) * r;
      }
    }
  }
  const float mean = row_sum<threads>(dot, scratch) / static_cast<float>(size);
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      const auto w = load(static_cast<const T*>(params.weight) + at);
      Vector<T> before, out;
      if (residual != nullptr) before = load(residual + row * size + at);
#pragma unroll
      for (int j = 0; j < each; ++j) {
        const float dn = to_float(ds[h].at[j]) * weight.of(w.at[j]);
        float d = r * (dn - to_float(xs[h].at[j]) * r * mean);
        if (residual != nullptr) d += to_float(before.at[j]);
        out.at[j] = from_float<T>(d);
      }
      store(static_cast<T*>(params.dx) + row * size + at, out);
    }
  }
}

// How a row is held: by so many threads, in so many vectors each.
template <int threads_, int held_>
struct RowShape {
  static constexpr int threads = threads_, held = held_;
  static constexpr int block = threads == 32 ? 256 : threads;
};

// Calls `body` with std::true_type where `precise`, std::false_type elsewhere.
template <typename Body>
void with_rounding(bool precise, Body body) {
  precise ? body(std::true_type{}) : body(std::false_type{});
}

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

}  // namespace

void launch_rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    with_row_shape<T>(params.size, [&](auto shape) {
      constexpr int threads = decltype(shape)::threads, held = decltype(shape)::held, block = decltype(shape)::block;
      with_rounding(params.rounding.precise, [&](auto precise) {
        launch_following(rms_norm_kernel<T, threads, held, decltype(precise)::value>,
                         dim3(blocks_for(params.rows, block / threads)), block, params.rows, stream, params,
                         static_cast<float>(params.eps));
      });
    });
  });
}

void launch_rms_norm_backward(const RmsNormBackwardParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    with_row_shape<T>(params.size, [&](auto shape) {
      constexpr int threads = decltype(shape)::threads, held = decltype(shape)::held, block = decltype(shape)::block;
      with_rounding(params.rounding.precise, [&](auto precise) {
        rms_norm_backward_kernel<T, threads, held, decltype(precise)::value>
            <<<blocks_for(params.rows, block / threads), block, 0, stream>>>(params);
      });
    });
  });
}

}  // namespace megalora
