// silu(gate) * up and its backward pass, on the CPU.
#include <algorithm>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/exp.h"

namespace megalora::cpu {
namespace {

template <typename scalar_t>
MEGALORA_INLINE void forward(const SwiGluParams& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  for (int64_t row = begin; row < end; ++row) {
    const auto* gate = static_cast<const scalar_t*>(a.gate_up) + row * 2 * a.size;
    const auto* up = gate + a.size;
    auto* out = static_cast<scalar_t*>(a.out.data) + row * a.out.stride;
    for (int64_t i = 0; i < a.size; ++i) {
      const wide g = static_cast<wide>(gate[i]);
      out[i] = static_cast<scalar_t>(g * sigmoid(g).value * static_cast<wide>(up[i]));
    }
  }
}

template <typename scalar_t>
MEGALORA_INLINE void backward(const SwiGluBackwardParams& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  for (int64_t row = begin; row < end; ++row) {
    const auto* dy = static_cast<const scalar_t*>(a.dy.data) + row * a.dy.stride;
    const auto* gate = static_cast<const scalar_t*>(a.gate_up) + row * 2 * a.size;
    const auto* up = gate + a.size;
    auto* dgate = static_cast<scalar_t*>(a.grad) + row * 2 * a.size;
    auto* dup = dgate + a.size;
    for (int64_t first = 0; first < a.size; first += kWideChunk) {
      const int64_t n = std::min(kWideChunk, a.size - first);
      alignas(64) wide of_gate[kWideChunk], of_up[kWideChunk];
      for (int64_t i = 0; i < n; ++i) {
        const wide g = static_cast<wide>(gate[first + i]), d = static_cast<wide>(dy[first + i]);
        const Sigmoid<wide> s = sigmoid(g);
        of_gate[i] = d * static_cast<wide>(up[first + i]) * (s.value * (1 + g * s.rest));
        of_up[i] = d * (g * s.value);
      }
      narrow(dgate + first, of_gate, n);
      narrow(dup + first, of_up, n);
    }
  }
}

MEGALORA_MULTIVERSION void swiglu_rows(const SwiGluParams& a, int64_t begin, int64_t end) {
  dispatch(a.type, [&](auto zero) MEGALORA_INLINE_LAMBDA { forward<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void swiglu_backward_rows(const SwiGluBackwardParams& a, int64_t begin, int64_t end) {
  dispatch(a.type, [&](auto zero) MEGALORA_INLINE_LAMBDA { backward<decltype(zero)>(a, begin, end); });
}

}  // namespace

void swiglu_(const Tensor& gate_up, const Tensor& out, std::string_view gate) {
  MEGALORA_CHECK(gate_of(gate) == Gate::silu, gate);
  MEGALORA_CHECK(out.dim() == 2, out.sizes());
  check_rows(out, out);
  check_dense(gate_up, {out.size(0), 2 * out.size(1)}, out);
  SwiGluParams params{};
  params.gate_up = gate_up.const_data_ptr();
  params.out = matrix_of(out);
  params.rows = out.size(0);
  params.size = out.size(1);
  params.type = type_of(out);
  for_rows(swiglu_rows, params, params.rows, params.size);
}

void swiglu_backward_(const Tensor& dy, const Tensor& gate_up, const Tensor& grad, std::string_view gate) {
  MEGALORA_CHECK(gate_of(gate) == Gate::silu, gate);
  MEGALORA_CHECK(dy.dim() == 2, dy.sizes());
  check_rows(dy, dy);
  check_dense(gate_up, {dy.size(0), 2 * dy.size(1)}, dy);
  check_dense(grad, gate_up.sizes(), dy);
  SwiGluBackwardParams params{};
  params.dy = matrix_of(dy);
  params.gate_up = gate_up.const_data_ptr();
  params.grad = grad.mutable_data_ptr();
  params.rows = dy.size(0);
  params.size = dy.size(1);
  params.type = type_of(dy);
  for_rows(swiglu_backward_rows, params, params.rows, params.size);
}

}  // namespace megalora::cpu
