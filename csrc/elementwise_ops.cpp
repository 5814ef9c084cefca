// The ops of csrc/elementwise.h for torch: schemas and Meta kernels in every build, CUDA kernels in a CUDA build.
//
// They write into tensors that the caller gives, so that a result can leave room behind its rows. Each needs rows whose
// elements are adjacent and start on 16 bytes, and sizes that are multiples of 8; `megalora/ops` has the reference for
// everything else.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "common.h"

namespace {

// A Meta kernel of an op that only writes into its arguments: nothing to do.
void write_nothing(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
}

constexpr const char* kOps[] = {"rms_norm_",       "rms_norm_backward_",   "swiglu_",
                                "swiglu_backward_", "split_rope_",          "split_rope_backward_",
                                "cross_entropy_stats_", "cross_entropy_grad_",
                                "attention_", "attention_backward_"};

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalora, m) {
  // x, delta, sum [N, D]; weight [D]; y [N, D], rows of any stride; inverse [N] float32.
  m.def("rms_norm_(Tensor x, Tensor? delta, Tensor weight, float eps, Tensor(a!)? sum, Tensor(b!) y, Tensor(c!) inverse) "
        "-> ()");
  m.def("rms_norm_backward_(Tensor dy, Tensor x, Tensor weight, Tensor inverse, Tensor? residual, Tensor(a!) dx) -> ()");
  // gate_up, grad [T, 2 I]; out, dy [T, I], rows of any stride.
  m.def("swiglu_(Tensor gate_up, Tensor(a!) out) -> ()");
  m.def("swiglu_backward_(Tensor dy, Tensor gate_up, Tensor(a!) grad) -> ()");
  // qkv [T, (H + 2 K) D]; q [T, H, D], k, v [T, K, D], heads and tokens of any stride; cos, sin [T, D / 2].
  m.def("split_rope_(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) q, Tensor(b!) k, Tensor(c!) v) -> ()");
  m.def("split_rope_backward_(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) qkv) -> ()");
  // logits [N, V]; label [N] int64, of this part of the vocabulary where 0 <= label < V; stats [3, N] float32.
  m.def("cross_entropy_stats_(Tensor logits, Tensor label, Tensor(a!) stats) -> ()");
  // q, out, dout, dq [T, H, D]; k, v [T, K, D]; heads and tokens of any stride; lse [H, T]; dk, dv [T, H, D], the share
  // of each query head, of the type of the arithmetic.
  m.def("attention_(Tensor q, Tensor k, Tensor v, int[] bounds, int window, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("attention_backward_(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] bounds, "
        "int window, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
  m.def("cross_entropy_grad_(Tensor(a!) logits, Tensor label, Tensor max, Tensor total) -> ()");
}

TORCH_LIBRARY_IMPL(megalora, Meta, m) {
  for (const char* name : kOps) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&write_nothing>());
}

#if defined(MEGALORA_CUDA)

#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>
#include <optional>

#include "elementwise.h"

namespace megalora {
namespace {

using at::Tensor;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    case at::kFloat: return Type::float32;
    default: TORCH_CHECK(false, "megalora: dtype ", x.scalar_type(), " has no CUDA kernel: use the torch reference");
  }
}

void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

void check_rows(const Tensor& x, const Tensor& like) {
  MEGALORA_CHECK(x.scalar_type() == like.scalar_type(), x.scalar_type(), " and ", like.scalar_type());
  MEGALORA_CHECK(x.device() == like.device(), x.device(), " and ", like.device());
  MEGALORA_CHECK(x.numel() == 0 || x.stride(-1) == 1, "strides ", x.strides());
  MEGALORA_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, "rows must start on 16 bytes");
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    MEGALORA_CHECK(x.stride(d) * x.element_size() % 16 == 0, "strides ", x.strides());
  }
}

const void* data_or_null(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

MaskSpec mask_spec(int64_t seed, int64_t site, int64_t step, int64_t feature_offset, double p,
                   const std::optional<Tensor>& live_step) {
  if (live_step) {
    MEGALORA_CHECK(live_step->scalar_type() == at::kLong && live_step->numel() == 1, "live_step: one int64");
    MEGALORA_CHECK(live_step->is_cuda(), "live_step on ", live_step->device());
  }
  const auto threshold = static_cast<uint32_t>(std::nearbyint(p * 65536.0));
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(site), static_cast<uint32_t>(step), threshold,
          live_step ? live_step->const_data_ptr<int64_t>() : nullptr, feature_offset,
          static_cast<float>(65536.0 / (65536.0 - threshold))};
}

void dropout_into(bool accumulate, const Tensor& x, const Tensor& out, const Tensor& token_index, const MaskSpec& mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  MEGALORA_CHECK(x.dim() == 2, "x has shape ", x.sizes());
  MEGALORA_CHECK(out.sizes() == x.sizes(), out.sizes(), " and ", x.sizes());
  MEGALORA_CHECK(x.size(1) % 8 == 0 && mask.feature_offset % 8 == 0, "features ", x.size(1), ", offset ", mask.feature_offset);
  MEGALORA_CHECK(token_index.scalar_type() == at::kLong && token_index.is_contiguous(), "token_index: contiguous int64");
  MEGALORA_CHECK(token_index.numel() == x.size(0), token_index.sizes(), " and ", x.sizes());
  check_rows(x, x);
  check_rows(out, x);
  if (x.numel() == 0) return;
  launch_dropout(type_of(x), accumulate, x.const_data_ptr(), x.stride(0), out.mutable_data_ptr(), out.stride(0),
                 token_index.const_data_ptr<int64_t>(), x.size(0), x.size(1), mask, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor dropout(const Tensor& x, const Tensor& token_index, int64_t seed, int64_t site, int64_t step,
               int64_t feature_offset, double p, const std::optional<Tensor>& live_step) {
  Tensor out = at::empty_like(x, at::MemoryFormat::Contiguous);
  dropout_into(false, x, out, token_index, mask_spec(seed, site, step, feature_offset, p, live_step));
  return out;
}

void dropout_add_(Tensor& out, const Tensor& g, const Tensor& token_index, int64_t seed, int64_t site, int64_t step,
                  int64_t feature_offset, double p, const std::optional<Tensor>& live_step) {
  dropout_into(true, g, out, token_index, mask_spec(seed, site, step, feature_offset, p, live_step));
}

void rms_norm_(const Tensor& x, const std::optional<Tensor>& delta, const Tensor& weight, double eps,
               const std::optional<Tensor>& sum, const Tensor& y, const Tensor& inverse) {
  const c10::cuda::CUDAGuard guard(x.device());
  MEGALORA_CHECK(x.dim() == 2 && y.sizes() == x.sizes(), x.sizes(), " and ", y.sizes());
  MEGALORA_CHECK(x.size(1) % 8 == 0 && x.size(1) <= 16384 && weight.numel() == x.size(1), x.sizes(), weight.sizes());
  MEGALORA_CHECK(delta.has_value() == sum.has_value(), "delta and sum go together");
  MEGALORA_CHECK(inverse.scalar_type() == at::kFloat && inverse.numel() == x.size(0), "inverse [N] float32");
  check_rows(x, x);
  check_rows(y, x);
  check_rows(weight, x);
  if (delta) {
    MEGALORA_CHECK(delta->is_contiguous() && sum->is_contiguous() && delta->sizes() == x.sizes(), delta->sizes());
    check_rows(*delta, x);
    check_rows(*sum, x);
  }
  if (x.numel() == 0) return;
  launch_rms_norm(type_of(x), x.const_data_ptr(), data_or_null(delta), weight.const_data_ptr(), static_cast<float>(eps),
                  sum ? sum->mutable_data_ptr() : nullptr, y.mutable_data_ptr(), y.stride(0),
                  inverse.mutable_data_ptr<float>(), x.size(0), x.size(1), x.stride(0), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void rms_norm_backward_(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& inverse,
                        const std::optional<Tensor>& residual, const Tensor& dx) {
  const c10::cuda::CUDAGuard guard(x.device());
  MEGALORA_CHECK(x.dim() == 2 && dy.sizes() == x.sizes() && dx.sizes() == x.sizes(), x.sizes(), dy.sizes(), dx.sizes());
  MEGALORA_CHECK(x.size(1) % 8 == 0 && x.size(1) <= 16384 && dx.is_contiguous(), x.sizes());
  check_rows(x, x);
  check_rows(dy, x);
  check_rows(dx, x);
  check_rows(weight, x);
  if (residual) {
    MEGALORA_CHECK(residual->is_contiguous() && residual->sizes() == x.sizes(), residual->sizes());
    check_rows(*residual, x);
  }
  if (x.numel() == 0) return;
  launch_rms_norm_backward(type_of(x), dy.const_data_ptr(), dy.stride(0), x.const_data_ptr(), x.stride(0),
                           weight.const_data_ptr(), inverse.const_data_ptr<float>(), data_or_null(residual),
                           dx.mutable_data_ptr(), x.size(0), x.size(1), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void swiglu_(const Tensor& gate_up, const Tensor& out) {
  const c10::cuda::CUDAGuard guard(out.device());
  MEGALORA_CHECK(gate_up.is_contiguous() && gate_up.dim() == 2 && out.dim() == 2, gate_up.sizes());
  MEGALORA_CHECK(gate_up.size(1) == 2 * out.size(1) && out.size(1) % 8 == 0, gate_up.sizes(), out.sizes());
  check_rows(gate_up, out);
  check_rows(out, out);
  if (out.numel() == 0) return;
  launch_swiglu(type_of(out), gate_up.const_data_ptr(), out.mutable_data_ptr(), out.stride(0), out.size(0), out.size(1),
                stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void swiglu_backward_(const Tensor& dy, const Tensor& gate_up, const Tensor& grad) {
  const c10::cuda::CUDAGuard guard(dy.device());
  MEGALORA_CHECK(gate_up.is_contiguous() && grad.is_contiguous() && gate_up.sizes() == grad.sizes(), gate_up.sizes());
  MEGALORA_CHECK(gate_up.size(1) == 2 * dy.size(1) && dy.size(1) % 8 == 0, gate_up.sizes(), dy.sizes());
  check_rows(gate_up, dy);
  check_rows(dy, dy);
  check_rows(grad, dy);
  if (dy.numel() == 0) return;
  launch_swiglu_backward(type_of(dy), dy.const_data_ptr(), dy.stride(0), gate_up.const_data_ptr(),
                         grad.mutable_data_ptr(), dy.size(0), dy.size(1), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void split_rope(bool backward, const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& q, const Tensor& k,
                const Tensor& v) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  const int64_t heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(2);
  MEGALORA_CHECK(qkv.is_contiguous() && qkv.size(1) == (heads + 2 * kv_heads) * head_dim, qkv.sizes(), q.sizes(), k.sizes());
  MEGALORA_CHECK(head_dim % 16 == 0 && cos.is_contiguous() && sin.is_contiguous(), "head_dim ", head_dim);
  for (const Tensor* side : {&qkv, &cos, &sin, &q, &k, &v}) check_rows(*side, qkv);
  if (qkv.numel() == 0) return;
  const auto side = [](const Tensor& x) { return Heads{const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)}; };
  launch_split_rope(type_of(qkv), backward, const_cast<void*>(qkv.const_data_ptr()), side(q), side(k), side(v),
                    cos.const_data_ptr(), sin.const_data_ptr(), qkv.size(0), static_cast<int>(heads),
                    static_cast<int>(kv_heads), static_cast<int>(head_dim), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void split_rope_(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& q, const Tensor& k,
                 const Tensor& v) {
  split_rope(false, qkv, cos, sin, q, k, v);
}

void split_rope_backward_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                          const Tensor& qkv) {
  split_rope(true, qkv, cos, sin, q, k, v);
}

void cross_entropy_stats_(const Tensor& logits, const Tensor& label, const Tensor& stats) {
  const c10::cuda::CUDAGuard guard(logits.device());
  check_rows(logits, logits);
  MEGALORA_CHECK(label.scalar_type() == at::kLong && label.is_contiguous(), "label: contiguous int64");
  MEGALORA_CHECK(stats.scalar_type() == at::kFloat && stats.is_contiguous() && stats.size(0) == 3, stats.sizes());
  MEGALORA_CHECK(label.numel() == logits.size(0) && stats.size(1) == logits.size(0), logits.sizes());
  if (logits.numel() == 0) return;
  launch_cross_entropy_stats(type_of(logits), logits.const_data_ptr(), logits.stride(0), label.const_data_ptr<int64_t>(),
                             stats.mutable_data_ptr<float>(), logits.size(0), logits.size(1), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void cross_entropy_grad_(const Tensor& logits, const Tensor& label, const Tensor& max, const Tensor& total) {
  const c10::cuda::CUDAGuard guard(logits.device());
  check_rows(logits, logits);
  MEGALORA_CHECK(label.scalar_type() == at::kLong && label.is_contiguous(), "label: contiguous int64");
  MEGALORA_CHECK(max.scalar_type() == at::kFloat && max.is_contiguous() && total.is_contiguous(), "max, total: float32");
  if (logits.numel() == 0) return;
  launch_cross_entropy_grad(type_of(logits), logits.mutable_data_ptr(), logits.stride(0), label.const_data_ptr<int64_t>(),
                            max.const_data_ptr<float>(), total.const_data_ptr<float>(), logits.size(0), logits.size(1),
                            stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace megalora

TORCH_LIBRARY_IMPL(megalora, CUDA, m) {
  m.impl("dropout", &megalora::dropout);
  m.impl("dropout_add_", &megalora::dropout_add_);
  m.impl("rms_norm_", &megalora::rms_norm_);
  m.impl("rms_norm_backward_", &megalora::rms_norm_backward_);
  m.impl("swiglu_", &megalora::swiglu_);
  m.impl("swiglu_backward_", &megalora::swiglu_backward_);
  m.impl("split_rope_", &megalora::split_rope_);
  m.impl("split_rope_backward_", &megalora::split_rope_backward_);
  m.impl("cross_entropy_stats_", &megalora::cross_entropy_stats_);
  m.impl("cross_entropy_grad_", &megalora::cross_entropy_grad_);
}

#endif  // MEGALORA_CUDA
