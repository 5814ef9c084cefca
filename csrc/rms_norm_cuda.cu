// RMSNorm, alone or with the sum of the residual stream before it, and its backward pass.
#include "cuda_vectors.h"

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

// `threads` threads hold a row in registers, `held` vectors each. Rows of 32 threads stand several to a block.
template <typename T, int threads, int held>
__global__ void rms_norm_kernel(const T* x, const T* delta, const T* weight, float eps, T* sum, T* y, int64_t y_stride,
                                float* inverse, int64_t rows, int64_t size, int64_t x_stride) {
  __shared__ float scratch[32];
  constexpr int each = Vector<T>::size;
  const int64_t row = threads == 32 ? blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32 : blockIdx.x;
  const int lane = threadIdx.x % threads;
  if (row >= rows) return;  // whole warps only: a block of one row never gets here
  Vector<T> kept[held];
  float squares = 0;
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      kept[h] = load(x + row * x_stride + at);
      if (delta != nullptr) {
        const auto more = load(delta + row * size + at);
#pragma unroll
        for (int j = 0; j < each; ++j) kept[h].at[j] = from_float<T>(to_float(kept[h].at[j]) + to_float(more.at[j]));
        store(sum + row * size + at, kept[h]);
      }
#pragma unroll
      for (int j = 0; j < each; ++j) squares += to_float(kept[h].at[j]) * to_float(kept[h].at[j]);
    }
  }
  const float r = rsqrtf(row_sum<threads>(squares, scratch) / static_cast<float>(size) + eps);
  if (lane == 0) inverse[row] = r;
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      const auto w = load(weight + at);
      Vector<T> out;
#pragma unroll
      for (int j = 0; j < each; ++j) {  // rounded before the weight, as HF does
        out.at[j] = from_float<T>(to_float(w.at[j]) * to_float(from_float<T>(to_float(kept[h].at[j]) * r)));
      }
      store(y + row * y_stride + at, out);
    }
  }
}

template <typename T, int threads, int held>
__global__ void rms_norm_backward_kernel(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const T* weight,
                                         const float* inverse, const T* residual, T* dx, int64_t rows, int64_t size) {
  __shared__ float scratch[32];
  constexpr int each = Vector<T>::size;
  const int64_t row = threads == 32 ? blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32 : blockIdx.x;
  const int lane = threadIdx.x % threads;
  if (row >= rows) return;
  const float r = inverse[row];
  Vector<T> xs[held], ds[held];
  float dot = 0;
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      xs[h] = load(x + row * x_stride + at);
      ds[h] = load(dy + row * dy_stride + at);
      const auto w = load(weight + at);
#pragma unroll
      for (int j = 0; j < each; ++j) {
        dot += to_float(ds[h].at[j]) * to_float(w.at[j]) * to_float(xs[h].at[j]) * r;
      }
    }
  }
  const float mean = row_sum<threads>(dot, scratch) / static_cast<float>(size);
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      const auto w = load(weight + at);
      Vector<T> before, out;
      if (residual != nullptr) before = load(residual + row * size + at);
#pragma unroll
      for (int j = 0; j < each; ++j) {
        const float dn = to_float(ds[h].at[j]) * to_float(w.at[j]);
        float d = r * (dn - to_float(xs[h].at[j]) * r * mean);
        if (residual != nullptr) d += to_float(before.at[j]);
        out.at[j] = from_float<T>(d);
      }
      store(dx + row * size + at, out);
    }
  }
}

// Calls `body` with the threads of a row and the vectors that each holds, as integral constants.
template <int threads_, int held_>
struct Shape {
  static constexpr int threads = threads_, held = held_;
};
template <typename T, typename Body>
void with_row_shape(int64_t size, Body body) {
  const int64_t vectors = size / Vector<T>::size;
  if (vectors <= 32) return body(Shape<32, 1>{});
  if (vectors <= 64) return body(Shape<32, 2>{});
  if (vectors <= 256) return body(Shape<256, 1>{});
  if (vectors <= 512) return body(Shape<256, 2>{});
  if (vectors <= 1024) return body(Shape<256, 4>{});
  return body(Shape<512, 8>{});  // up to 32768 elements of 16 bits, 16384 floats
}

}  // namespace

void launch_rms_norm(Type type, const void* x, const void* delta, const void* weight, float eps, void* sum, void* y,
                     int64_t y_stride, float* inverse, int64_t rows, int64_t size, int64_t x_stride, void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    with_row_shape<T>(size, [&](auto shape) {
      constexpr int threads = decltype(shape)::threads, held = decltype(shape)::held;
      const int block = threads == 32 ? 256 : threads;
      rms_norm_kernel<T, threads, held>
          <<<blocks_for(rows, block / threads), block, 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(x), static_cast<const T*>(delta), static_cast<const T*>(weight), eps,
              static_cast<T*>(sum), static_cast<T*>(y), y_stride, inverse, rows, size, x_stride);
    });
  });
}

void launch_rms_norm_backward(Type type, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                              const void* weight, const float* inverse, const void* residual, void* dx, int64_t rows,
                              int64_t size, void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    with_row_shape<T>(size, [&](auto shape) {
      constexpr int threads = decltype(shape)::threads, held = decltype(shape)::held;
      const int block = threads == 32 ? 256 : threads;
      rms_norm_backward_kernel<T, threads, held>
          <<<blocks_for(rows, block / threads), block, 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(dy), dy_stride, static_cast<const T*>(x), x_stride, static_cast<const T*>(weight),
              inverse, static_cast<const T*>(residual), static_cast<T*>(dx), rows, size);
    });
  });
}

}  // namespace megalora
