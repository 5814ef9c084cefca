// act(gate) * up, or act(up), and its backward pass.
#include "cuda/decode_step.h"
#include "cuda/gates.h"
#include "cuda/launch.h"
#include "cuda/vectors.h"

namespace megalora {
namespace {

template <typename T, typename Origin>
__global__ void swiglu_kernel(const __grid_constant__ SwiGluParams params) {
  let_next_start();
  await_previous();
  constexpr int each = Vector<T>::size;
  const auto* gate_up = static_cast<const T*>(params.gate_up);
  const int64_t size = params.size;
  const int64_t groups = size / each, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= params.rows * groups) return;
  const int64_t row = i / groups, at = i % groups * each;
  const int64_t first = row * (Origin::gated ? 2 : 1) * size + at;
  const auto in = load(gate_up + first);
  Vector<T> y, up;
  if constexpr (Origin::gated) up = load(gate_up + first + size);
#pragma unroll
  for (int j = 0; j < each; ++j) {
    const Activated<Origin::act> opened(to_float(in.at[j]));
    y.at[j] = from_float<T>(opened.value());
    if constexpr (Origin::gated) y.at[j] = from_float<T>(to_float(y.at[j]) * to_float(up.at[j]));
  }
  store(static_cast<T*>(params.out.data) + row * params.out.stride + at, y);
}

template <typename T, typename Origin>
__global__ void swiglu_backward_kernel(const __grid_constant__ SwiGluBackwardParams params) {
  constexpr int each = Vector<T>::size;
  const auto *gate_up = static_cast<const T*>(params.gate_up), *dy = static_cast<const T*>(params.dy.data);
  auto* grad = static_cast<T*>(params.grad);
  const int64_t size = params.size;
  const int64_t groups = size / each, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= params.rows * groups) return;
  const int64_t row = i / groups, at = i % groups * each;
  const int64_t first = row * (Origin::gated ? 2 : 1) * size + at;
  const auto in = load(gate_up + first), d = load(dy + row * params.dy.stride + at);
  Vector<T> up, din, dup;
  if constexpr (Origin::gated) up = load(gate_up + first + size);
#pragma unroll
  for (int j = 0; j < each; ++j) {
    const Activated<Origin::act> opened(to_float(in.at[j]));
    const float dj = to_float(d.at[j]);
    if constexpr (Origin::gated) {
      dup.at[j] = from_float<T>(dj * opened.value());
      din.at[j] = from_float<T>(opened.backward(dj * to_float(up.at[j])));
    } else {
      din.at[j] = from_float<T>(opened.backward(dj));
    }
  }
  store(grad + first, din);
  if constexpr (Origin::gated) store(grad + first + size, dup);
}

}  // namespace

void launch_swiglu(const SwiGluParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(blocks_for(params.rows * params.size / Vector<T>::size, kThreads));
    dispatch_origin(params.gate, params.gated, [&](auto origin) {
      launch_following(swiglu_kernel<T, decltype(origin)>, grid, kThreads, params.rows, stream, params);
    });
  });
}

void launch_swiglu_backward(const SwiGluBackwardParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    dispatch_origin(params.gate, params.gated, [&](auto origin) {
      swiglu_backward_kernel<T, decltype(origin)>
          <<<blocks_for(params.rows * params.size / Vector<T>::size, kThreads), kThreads, 0, stream>>>(params);
    });
  });
}

}  // namespace megalora
