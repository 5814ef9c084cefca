// act(gate) * up and its backward pass.
#include "cuda/decode_step.h"
#include "cuda/gates.h"
#include "cuda/launch.h"
#include "cuda/vectors.h"

namespace megalora {
namespace {

template <typename T, Gate act>
__global__ void swiglu_kernel(const __grid_constant__ SwiGluParams params) {
  let_next_start();
  await_previous();
  constexpr int each = Vector<T>::size;
  const auto* gate_up = static_cast<const T*>(params.gate_up);
  const int64_t size = params.size;
  const int64_t groups = size / each, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= params.rows * groups) return;
  const int64_t row = i / groups, at = i % groups * each;
  const auto gate = load(gate_up + row * 2 * size + at), up = load(gate_up + row * 2 * size + size + at);
  Vector<T> y;
#pragma unroll
  for (int j = 0; j < each; ++j) {
    const Activated<act> opened(to_float(gate.at[j]));
    y.at[j] = from_float<T>(to_float(from_float<T>(opened.value())) * to_float(up.at[j]));
  }
  store(static_cast<T*>(params.out.data) + row * params.out.stride + at, y);
}

template <typename T, Gate act>
__global__ void swiglu_backward_kernel(const __grid_constant__ SwiGluBackwardParams params) {
  constexpr int each = Vector<T>::size;
  const auto *gate_up = static_cast<const T*>(params.gate_up), *dy = static_cast<const T*>(params.dy.data);
  auto* grad = static_cast<T*>(params.grad);
  const int64_t size = params.size;
  const int64_t groups = size / each, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= params.rows * groups) return;
  const int64_t row = i / groups, at = i % groups * each;
  const int64_t first = row * 2 * size + at;
  const auto gate = load(gate_up + first), up = load(gate_up + first + size),
             d = load(dy + row * params.dy.stride + at);
  Vector<T> dgate, dup;
#pragma unroll
  for (int j = 0; j < each; ++j) {
    const Activated<act> opened(to_float(gate.at[j]));
    const float dj = to_float(d.at[j]);
    dup.at[j] = from_float<T>(dj * opened.value());
    dgate.at[j] = from_float<T>(opened.backward(dj * to_float(up.at[j])));
  }
  store(grad + first, dgate);
  store(grad + first + size, dup);
}

}  // namespace

void launch_swiglu(const SwiGluParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(blocks_for(params.rows * params.size / Vector<T>::size, kThreads));
    dispatch_gate(params.gate, [&](auto act) {
      launch_following(swiglu_kernel<T, decltype(act)::value>, grid, kThreads, params.rows, stream, params);
    });
  });
}

void launch_swiglu_backward(const SwiGluBackwardParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    dispatch_gate(params.gate, [&](auto act) {
      swiglu_backward_kernel<T, decltype(act)::value>
          <<<blocks_for(params.rows * params.size / Vector<T>::size, kThreads), kThreads, 0, stream>>>(params);
    });
  });
}

}  // namespace megalora
