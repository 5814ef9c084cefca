// silu(gate) * up and its backward pass, on the CPU.
#include "cpu_kernels.h"
#include "exp.h"

namespace megalora {
namespace {

template <typename scalar_t>
MEGALORA_INLINE void forward(const SwiGlu& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  for (int64_t row = begin; row < end; ++row) {
    const auto* gate = static_cast<const scalar_t*>(a.gate_up) + row * 2 * a.size;
    const auto* up = gate + a.size;
    auto* out = static_cast<scalar_t*>(a.out) + row * a.out_stride;
    for (int64_t i = 0; i < a.size; ++i) {
      const wide g = static_cast<wide>(gate[i]);
      out[i] = static_cast<scalar_t>(g * sigmoid(g).value * static_cast<wide>(up[i]));
    }
  }
}

template <typename scalar_t>
MEGALORA_INLINE void backward(const SwiGluBackward& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  for (int64_t row = begin; row < end; ++row) {
    const auto* dy = static_cast<const scalar_t*>(a.dy) + row * a.dy_stride;
    const auto* gate = static_cast<const scalar_t*>(a.gate_up) + row * 2 * a.size;
    const auto* up = gate + a.size;
    auto* dgate = static_cast<scalar_t*>(a.grad) + row * 2 * a.size;
    auto* dup = dgate + a.size;
    for (int64_t i = 0; i < a.size; ++i) {
      const wide g = static_cast<wide>(gate[i]), d = static_cast<wide>(dy[i]);
      const Sigmoid<wide> s = sigmoid(g);
      dgate[i] = static_cast<scalar_t>(d * static_cast<wide>(up[i]) * (s.value * (1 + g * s.rest)));
      dup[i] = static_cast<scalar_t>(d * (g * s.value));
    }
  }
}

}  // namespace

MEGALORA_MULTIVERSION void swiglu_rows(const SwiGlu& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&](auto zero) MEGALORA_INLINE_LAMBDA { forward<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void swiglu_backward_rows(const SwiGluBackward& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&](auto zero) MEGALORA_INLINE_LAMBDA { backward<decltype(zero)>(a, begin, end); });
}

}  // namespace megalora
