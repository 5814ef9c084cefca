// SwiGLU, and activations without a gate, on CUDA.
#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {
namespace {

// Whether gate_up [T, 2 I] has a gate before up, beside x [T, I]; gate_up [T, I] has none.
bool is_gated(const Tensor& gate_up, const Tensor& x) {
  MEGALORA_CHECK(gate_up.is_contiguous() && gate_up.dim() == 2 && x.dim() == 2, gate_up.sizes());
  const bool gated = gate_up.size(1) == 2 * x.size(1);
  MEGALORA_CHECK(gated || gate_up.size(1) == x.size(1), gate_up.sizes(), x.sizes());
  MEGALORA_CHECK(gate_up.size(0) == x.size(0) && x.size(1) % kOctet == 0, gate_up.sizes(), x.sizes());
  return gated;
}

}  // namespace

void swiglu_(const Tensor& gate_up, const Tensor& out, std::string_view gate) {
  const c10::cuda::CUDAGuard guard(out.device());
  check_rows(gate_up, out);
  check_rows(out, out);
  SwiGluParams params{};
  params.gate_up = gate_up.const_data_ptr();
  params.out = matrix_of(out);
  params.rows = out.size(0);
  params.size = out.size(1);
  params.gate = gate_of(gate);
  params.gated = is_gated(gate_up, out);
  params.type = type_of(out);
  if (out.numel() == 0) return;
  launch_swiglu(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void swiglu_backward_(const Tensor& dy, const Tensor& gate_up, const Tensor& grad, std::string_view gate) {
  const c10::cuda::CUDAGuard guard(dy.device());
  MEGALORA_CHECK(grad.is_contiguous() && gate_up.sizes() == grad.sizes(), gate_up.sizes());
  check_rows(gate_up, dy);
  check_rows(dy, dy);
  check_rows(grad, dy);
  SwiGluBackwardParams params{};
  params.dy = matrix_of(dy);
  params.gate_up = gate_up.const_data_ptr();
  params.grad = grad.mutable_data_ptr();
  params.rows = dy.size(0);
  params.size = dy.size(1);
  params.gate = gate_of(gate);
  params.gated = is_gated(gate_up, dy);
  params.type = type_of(dy);
  if (dy.numel() == 0) return;
  launch_swiglu_backward(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megalora::cuda
