// The columns of a matrix, each times its own factor, and the backward pass of that with the factors' sums.
#include "cuda/launch.h"
#include "cuda/vectors.h"

namespace megalora {
namespace {

// A thread has one vector of columns, whose factors it reads once, and goes through kColumnScaleRows rows, kAtOnce at a
// time: all of these are read before the first is written, since the compiler may not move a read over a write that
// could be to the same place, and one vector in flight for each thread is too little for the memory.
constexpr int kAtOnce = 4;
static_assert(kColumnScaleRows % kAtOnce == 0);

template <typename T>
__global__ void scale_columns_kernel(const __grid_constant__ ColumnScaleParams params) {
  constexpr int each = Vector<T>::size;
  const int64_t at = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) * each;
  if (at >= params.size) return;
  float factor[each];
#pragma unroll
  for (int j = 0; j < each; ++j) factor[j] = params.factors[at + j];
  const int64_t first = blockIdx.y * int64_t{kColumnScaleRows};
  const int64_t stop = min(first + kColumnScaleRows, params.rows);
  T* x = static_cast<T*>(params.x.data) + at;
  for (int64_t row = first; row < stop; row += kAtOnce) {
    Vector<T> v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row + i < stop) v[i] = load(x + (row + i) * params.x.stride);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < each; ++j) v[i].at[j] = from_float<T>(to_float(v[i].at[j]) * factor[j]);
      if (row + i < stop) store(x + (row + i) * params.x.stride, v[i]);
    }
  }
}

template <typename T, bool sums>
__global__ void scale_columns_backward_kernel(const __grid_constant__ ColumnScaleBackwardParams params) {
  constexpr int each = Vector<T>::size;
  const int64_t at = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) * each;
  if (at >= params.size) return;
  float factor[each], sum[each] = {};
#pragma unroll
  for (int j = 0; j < each; ++j) factor[j] = params.factors[at + j];
  const int64_t first = blockIdx.y * int64_t{kColumnScaleRows};
  const int64_t stop = min(first + kColumnScaleRows, params.rows);
  const auto *dy = static_cast<const T*>(params.dy.data) + at, *y = static_cast<const T*>(params.y.data) + at;
  T* dx = static_cast<T*>(params.dx.data) + at;
  for (int64_t row = first; row < stop; row += kAtOnce) {
    Vector<T> d[kAtOnce], v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row + i >= stop) continue;
      d[i] = load(dy + (row + i) * params.dy.stride);
      if constexpr (sums) v[i] = load(y + (row + i) * params.y.stride);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row + i >= stop) continue;
#pragma unroll
      for (int j = 0; j < each; ++j) {
        if constexpr (sums) sum[j] += to_float(d[i].at[j]) * to_float(v[i].at[j]);
        d[i].at[j] = from_float<T>(to_float(d[i].at[j]) * factor[j]);
      }
      store(dx + (row + i) * params.dx.stride, d[i]);
    }
  }
  if constexpr (sums) {
#pragma unroll
    for (int j = 0; j < each; ++j) params.sums[blockIdx.y * params.size + at + j] = sum[j];
  }
}

template <typename T>
dim3 grid_of(int64_t rows, int64_t size) {
  return {blocks_for(size / Vector<T>::size, kThreads), blocks_for(rows, kColumnScaleRows)};
}

}  // namespace

void launch_scale_columns(const ColumnScaleParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    scale_columns_kernel<T><<<grid_of<T>(params.rows, params.size), kThreads, 0, stream>>>(params);
  });
}

void launch_scale_columns_backward(const ColumnScaleBackwardParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    const auto grid = grid_of<T>(params.rows, params.size);
    if (params.sums != nullptr) {
      scale_columns_backward_kernel<T, true><<<grid, kThreads, 0, stream>>>(params);
    } else {
      scale_columns_backward_kernel<T, false><<<grid, kThreads, 0, stream>>>(params);
    }
  });
}

}  // namespace megalora
