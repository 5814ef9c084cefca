// silu(gate) * up and its backward pass.
#include "cuda_vectors.h"

namespace megalora {
namespace {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

template <typename T>
__global__ void swiglu_kernel(const T* gate_up, T* out, int64_t out_stride, int64_t rows, int64_t size) {
  constexpr int each = Vector<T>::size;
  const int64_t groups = size / each, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= rows * groups) return;
  const int64_t row = i / groups, at = i % groups * each;
  const auto gate = load(gate_up + row * 2 * size + at), up = load(gate_up + row * 2 * size + size + at);
  Vector<T> y;
#pragma unroll
  for (int j = 0; j < each; ++j) {
    const float g = to_float(gate.at[j]);
    y.at[j] = from_float<T>(to_float(from_float<T>(g * sigmoid(g))) * to_float(up.at[j]));
  }
  store(out + row * out_stride + at, y);
}

template <typename T>
__global__ void swiglu_backward_kernel(const T* dy, int64_t dy_stride, const T* gate_up, T* grad, int64_t rows,
                                       int64_t size) {
  constexpr int each = Vector<T>::size;
  const int64_t groups = size / each, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= rows * groups) return;
  const int64_t row = i / groups, at = i % groups * each;
  const int64_t first = row * 2 * size + at;
  const auto gate = load(gate_up + first), up = load(gate_up + first + size), d = load(dy + row * dy_stride + at);
  Vector<T> dgate, dup;
#pragma unroll
  for (int j = 0; j < each; ++j) {
    const float g = to_float(gate.at[j]), s = sigmoid(g), dj = to_float(d.at[j]);
    dup.at[j] = from_float<T>(dj * (g * s));
    dgate.at[j] = from_float<T>(dj * to_float(up.at[j]) * s * (1.f + g * (1.f - s)));
  }
  store(grad + first, dgate);
  store(grad + first + size, dup);
}

}  // namespace

void launch_swiglu(Type type, const void* gate_up, void* out, int64_t out_stride, int64_t rows, int64_t size,
                   void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    swiglu_kernel<T><<<blocks_for(rows * size / Vector<T>::size, kThreads), kThreads, 0,
                       static_cast<cudaStream_t>(stream)>>>(static_cast<const T*>(gate_up), static_cast<T*>(out),
                                                            out_stride, rows, size);
  });
}

void launch_swiglu_backward(Type type, const void* dy, int64_t dy_stride, const void* gate_up, void* grad, int64_t rows,
                            int64_t size, void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    swiglu_backward_kernel<T><<<blocks_for(rows * size / Vector<T>::size, kThreads), kThreads, 0,
                                static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(dy), dy_stride, static_cast<const T*>(gate_up), static_cast<T*>(grad), rows, size);
  });
}

}  // namespace megalora
