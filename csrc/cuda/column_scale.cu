// The columns of a matrix, each times its own factor, and the backward pass of that with the factors' sums.
#include "cuda/launch.h"
#include "cuda/vectors.h"

namespace megalora {
namespace {

// A thread has one vector of columns, whose factors it reads once, and goes through kColumnScaleRows rows; in place
// kAtOnce at a time: all of these are read before the first is written, since the compiler may not move a read over a
// write that could be to the same place, and one vector in flight for each thread is too little for the memory (88 us
// for 97 on an H200). Backward has two reads in flight as it is, and was slower that way (143 us for 138).
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
  const auto *dy = static_cast<const T*>(params.dy.data), *y = static_cast<const T*>(params.y.data);
  auto* dx = static_cast<T*>(params.dx.data);
#pragma unroll 4
  for (int64_t row = first; row < stop; ++row) {
    auto d = load(dy + row * params.dy.stride + at);
    if constexpr (sums) {
      const auto v = load(y + row * params.y.stride + at);
#pragma unroll
      for (int j = 0; j < each; ++j) sum[j] += to_float(d.at[j]) * to_float(v.at[j]);
    }
#pragma unroll
    for (int j = 0; j < each; ++j) d.at[j] = from_float<T>(to_float(d.at[j]) * factor[j]);
    store(dx + row * params.dx.stride + at, d);
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
