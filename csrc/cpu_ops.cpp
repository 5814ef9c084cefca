// The ops of csrc/cpu_kernels.h for torch: checks, cut of the rows over threads, registration. Schemas are in
// elementwise_ops.cpp and lora_cuda_ops.cpp.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "cpu_kernels.h"

namespace megalora {
namespace {

using at::Tensor;

constexpr int64_t kElementsPerTask = 16384;  // below this (about 10 us of work) another thread does not pay

template <typename Args>
void for_rows(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows, int64_t row_size) {
  if (rows == 0 || row_size == 0) return;
  at::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerTask / row_size),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void check_rows(const Tensor& x, const Tensor& like) {
  MEGALORA_CHECK(x.device() == like.device(), x.device(), " and ", like.device());
  MEGALORA_CHECK(x.scalar_type() == like.scalar_type(), x.scalar_type(), " and ", like.scalar_type());
  MEGALORA_CHECK(x.numel() == 0 || x.size(-1) < 2 || x.stride(-1) == 1, "strides ", x.strides());
}

void check_matrix(const Tensor& x, at::IntArrayRef sizes, const Tensor& like) {
  MEGALORA_CHECK(x.sizes() == sizes, x.sizes(), " for ", sizes);
  check_rows(x, like);
}

// Rows without gaps.
void check_dense(const Tensor& x, at::IntArrayRef sizes, const Tensor& like) {
  check_matrix(x, sizes, like);
  MEGALORA_CHECK(x.is_contiguous(), "strides ", x.strides());
}

// What goes with rows, one number or a few for each, in the type of the arithmetic.
void check_wide(const Tensor& x, int64_t numel, const Tensor& like) {
  MEGALORA_CHECK(x.scalar_type() == (like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat), x.scalar_type());
  MEGALORA_CHECK(x.is_contiguous() && x.numel() == numel, x.sizes(), ", strides ", x.strides());
}

void check_labels(const Tensor& label, int64_t rows) {
  MEGALORA_CHECK(label.scalar_type() == at::kLong && label.is_contiguous(), "label: contiguous int64");
  MEGALORA_CHECK(label.numel() == rows, label.sizes(), " for ", rows, " rows");
}

const void* data_or_null(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

void rms_norm_(const Tensor& x, const std::optional<Tensor>& delta, const Tensor& weight, double eps,
               const std::optional<Tensor>& sum, const Tensor& y, const Tensor& inverse) {
  MEGALORA_CHECK(x.dim() == 2, x.sizes());
  MEGALORA_CHECK(delta.has_value() == sum.has_value(), "delta and sum go together");
  check_rows(x, x);
  check_matrix(y, x.sizes(), x);
  check_dense(weight, {x.size(1)}, x);
  check_wide(inverse, x.size(0), x);
  if (delta) {
    check_dense(*delta, x.sizes(), x);
    check_dense(*sum, x.sizes(), x);
  }
  const RmsNorm args{x.const_data_ptr(), data_or_null(delta), weight.const_data_ptr(),
                     sum ? sum->mutable_data_ptr() : nullptr, y.mutable_data_ptr(), inverse.mutable_data_ptr(),
                     x.stride(0), y.stride(0), x.size(1), eps, x.scalar_type()};
  for_rows(rms_norm_rows, args, x.size(0), x.size(1));
}

void rms_norm_backward_(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& inverse,
                        const std::optional<Tensor>& residual, const Tensor& dx) {
  MEGALORA_CHECK(x.dim() == 2, x.sizes());
  check_rows(x, x);
  check_matrix(dy, x.sizes(), x);
  check_dense(dx, x.sizes(), x);
  check_dense(weight, {x.size(1)}, x);
  check_wide(inverse, x.size(0), x);
  if (residual) check_dense(*residual, x.sizes(), x);
  const RmsNormBackward args{dy.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                             inverse.const_data_ptr(), data_or_null(residual), dx.mutable_data_ptr(),
                             dy.stride(0), x.stride(0), x.size(1), x.scalar_type()};
  for_rows(rms_norm_backward_rows, args, x.size(0), x.size(1));
}

void swiglu_(const Tensor& gate_up, const Tensor& out) {
  MEGALORA_CHECK(out.dim() == 2, out.sizes());
  check_rows(out, out);
  check_dense(gate_up, {out.size(0), 2 * out.size(1)}, out);
  const SwiGlu args{gate_up.const_data_ptr(), out.mutable_data_ptr(), out.stride(0), out.size(1), out.scalar_type()};
  for_rows(swiglu_rows, args, out.size(0), out.size(1));
}

void swiglu_backward_(const Tensor& dy, const Tensor& gate_up, const Tensor& grad) {
  MEGALORA_CHECK(dy.dim() == 2, dy.sizes());
  check_rows(dy, dy);
  check_dense(gate_up, {dy.size(0), 2 * dy.size(1)}, dy);
  check_dense(grad, gate_up.sizes(), dy);
  const SwiGluBackward args{dy.const_data_ptr(), gate_up.const_data_ptr(), grad.mutable_data_ptr(),
                            dy.stride(0), dy.size(1), dy.scalar_type()};
  for_rows(swiglu_backward_rows, args, dy.size(0), dy.size(1));
}

Heads heads_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.size(1), x.stride(0), x.stride(1)};
}

void split_rope(bool backward, const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& q,
                const Tensor& k, const Tensor& v) {
  MEGALORA_CHECK(q.dim() == 3 && k.dim() == 3, q.sizes(), " and ", k.sizes());
  const int64_t tokens = q.size(0), heads = q.size(1), kv_heads = k.size(1), dim = q.size(2);
  MEGALORA_CHECK(dim % 2 == 0, "head_dim ", dim);
  check_rows(q, qkv);
  check_matrix(k, {tokens, kv_heads, dim}, qkv);
  check_matrix(v, {tokens, kv_heads, dim}, qkv);
  check_dense(qkv, {tokens, (heads + 2 * kv_heads) * dim}, qkv);
  check_dense(cos, {tokens, dim / 2}, qkv);
  check_dense(sin, {tokens, dim / 2}, qkv);
  const SplitRope args{const_cast<void*>(qkv.const_data_ptr()), heads_of(q), heads_of(k), heads_of(v),
                       cos.const_data_ptr(), sin.const_data_ptr(), dim, backward, qkv.scalar_type()};
  for_rows(split_rope_rows, args, tokens, qkv.size(1));
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
  MEGALORA_CHECK(logits.dim() == 2 && logits.size(1) > 0, logits.sizes());
  check_rows(logits, logits);
  check_labels(label, logits.size(0));
  check_wide(stats, 3 * logits.size(0), logits);
  const CrossEntropyStats args{logits.const_data_ptr(), logits.stride(0), logits.size(0), logits.size(1),
                               label.const_data_ptr<int64_t>(), stats.mutable_data_ptr(), logits.scalar_type()};
  for_rows(cross_entropy_stats_rows, args, logits.size(0), logits.size(1));
}

void cross_entropy_grad_(const Tensor& logits, const Tensor& label, const Tensor& max, const Tensor& total) {
  MEGALORA_CHECK(logits.dim() == 2, logits.sizes());
  check_rows(logits, logits);
  check_labels(label, logits.size(0));
  check_wide(max, logits.size(0), logits);
  check_wide(total, logits.size(0), logits);
  const CrossEntropyGrad args{logits.mutable_data_ptr(), logits.stride(0), logits.size(1),
                              label.const_data_ptr<int64_t>(), max.const_data_ptr(), total.const_data_ptr(),
                              logits.scalar_type()};
  for_rows(cross_entropy_grad_rows, args, logits.size(0), logits.size(1));
}

// ---- attention

// Of the documents whose bounds are given.
Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, at::IntArrayRef bounds, int64_t window,
                       const Tensor& out, const Tensor& lse) {
  MEGALORA_CHECK(q.dim() == 3 && k.dim() == 3, q.sizes(), " and ", k.sizes());
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  MEGALORA_CHECK(k.size(1) > 0 && heads % k.size(1) == 0, heads, " query heads for ", k.size(1), " key heads");
  check_rows(q, q);
  check_matrix(k, {tokens, k.size(1), dim}, q);
  check_matrix(v, k.sizes(), q);
  check_matrix(out, q.sizes(), q);
  check_wide(lse, heads * tokens, q);
  MEGALORA_CHECK(window > 0, "window ", window);
  MEGALORA_CHECK(!bounds.empty() && bounds.front() == 0 && bounds.back() == tokens, bounds, " for ", tokens, " tokens");
  MEGALORA_CHECK(std::is_sorted(bounds.begin(), bounds.end()), bounds);
  return {heads_of(q), heads_of(k), heads_of(v), heads_of(out), lse.mutable_data_ptr(), bounds.data(),
          static_cast<int64_t>(bounds.size()) - 1, tokens, dim, window, q.scalar_type()};
}

void attention_(const Tensor& q, const Tensor& k, const Tensor& v, at::IntArrayRef bounds, int64_t window,
                const Tensor& out, const Tensor& lse) {
  const Attention args = attention_of(q, k, v, bounds, window, out, lse);
  at::parallel_for(0, args.documents * q.size(1), 1,
                   [&](int64_t begin, int64_t end) { attention_tasks(args, begin, end); });
}

void attention_backward_(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                         const Tensor& lse, at::IntArrayRef bounds, int64_t window, const Tensor& dq, const Tensor& dk,
                         const Tensor& dv) {
  const Attention forward = attention_of(q, k, v, bounds, window, out, lse);
  check_matrix(dout, q.sizes(), q);
  check_matrix(dq, q.sizes(), q);
  check_wide(dk, q.numel(), q);
  check_wide(dv, q.numel(), q);
  const AttentionBackward args{forward, heads_of(dout), heads_of(dq), dk.mutable_data_ptr(), dv.mutable_data_ptr()};
  at::parallel_for(0, forward.documents * q.size(1), 1,
                   [&](int64_t begin, int64_t end) { attention_backward_tasks(args, begin, end); });
}

// ---- the LoRA branch

at::ScalarType wide_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// A [R, F] as the kernels read it (LoraInputs).
Tensor padded_A(const Tensor& A, const Tensor& x) {
  MEGALORA_CHECK(x.dim() == 2, x.sizes());
  MEGALORA_CHECK(A.dim() == 2 && A.size(1) == x.size(1), A.sizes(), " for ", x.sizes());
  MEGALORA_CHECK(A.scalar_type() == x.scalar_type(), A.scalar_type(), " for ", x.scalar_type());
  Tensor out = at::zeros({A.size(0), padded(A.size(1))}, A.options().dtype(wide_type(A)));
  out.narrow(1, 0, A.size(1)).copy_(A);
  return out;
}

LoraInputs lora_inputs(const Tensor& x, const Tensor& A, int64_t rank, const Tensor& token_index, const Mask& mask) {
  check_rows(x, x);
  MEGALORA_CHECK(token_index.scalar_type() == at::kLong && token_index.is_contiguous(), "token_index: contiguous int64");
  MEGALORA_CHECK(token_index.dim() == 1 && token_index.size(0) == x.size(0), token_index.sizes(), " for ", x.sizes());
  return {A.defined() ? A.const_data_ptr() : nullptr, token_index.const_data_ptr<int64_t>(), mask, x.size(1), rank,
          x.scalar_type()};
}

void lora_down_(Tensor& z, const Tensor& x, const Tensor& A, const Tensor& token_index, int64_t seed, int64_t site,
                int64_t step, int64_t feature_offset, double p, const std::optional<Tensor>& live_step,
                const std::optional<Tensor>& copy) {
  if (copy) copy->copy_(x);
  const Tensor wide_A = padded_A(A, x);
  const int64_t rank = A.size(0);
  const LoraInputs in =
      lora_inputs(x, wide_A, rank, token_index, make_mask(seed, site, step, feature_offset, p, live_step));
  check_rows(z, x);
  MEGALORA_CHECK(z.dim() == 2 && z.size(0) == x.size(0) && z.size(1) >= rank, z.sizes(), " for rank ", rank);
  const LoraDown args{in, x.const_data_ptr(), z.mutable_data_ptr(), x.stride(0), z.stride(0), z.size(1)};
  for_rows(lora_down_rows, args, x.size(0), std::max<int64_t>(1, x.size(1)));
}

void lora_down_input_grad_(Tensor& in_place, const Tensor& dz, const Tensor& A, const Tensor& token_index, int64_t seed,
                           int64_t site, int64_t step, int64_t feature_offset, double p,
                           const std::optional<Tensor>& live_step, const std::optional<Tensor>& out) {
  const Tensor dx = out ? out->copy_(in_place) : in_place;
  const Tensor wide_A = padded_A(A, dx);
  const LoraInputs in =
      lora_inputs(dx, wide_A, A.size(0), token_index, make_mask(seed, site, step, feature_offset, p, live_step));
  check_matrix(dz, {dx.size(0), A.size(0)}, dx);
  const LoraInputGrad args{in, dz.const_data_ptr(), dx.mutable_data_ptr(), dz.stride(0), dx.stride(0)};
  for_rows(lora_input_grad_rows, args, dx.size(0), dx.size(1));
}

constexpr int64_t kSegments = 8;            // into which the tokens of a sum over them are cut, at most
constexpr int64_t kSmallestSegment = 128;

// factor * dz [T, R]^T dropout(x [T, F]), [R, F] or [F, R] if `transposed`, wide.
Tensor weight_grad(const Tensor& dz, const Tensor& x, const LoraInputs& in, double factor, bool transposed) {
  const int64_t rank = in.rank, tokens = x.size(0), features = x.size(1);
  check_matrix(dz, {tokens, rank}, x);
  const auto options = x.options().dtype(wide_type(x));
  const int64_t segment = std::max(kSmallestSegment, (tokens + kSegments - 1) / kSegments);
  const int64_t segments = (tokens + segment - 1) / segment;
  const Tensor parts = at::empty({segments, rank, padded(features)}, options);
  const LoraWeightGrad args{in,           dz.const_data_ptr(), x.const_data_ptr(), parts.mutable_data_ptr(),
                            dz.stride(0), x.stride(0),         tokens,             segment};
  const int64_t chunks = (features + kLoraChunk - 1) / kLoraChunk;
  for_rows(lora_weight_grad_tasks, args, segments * chunks, segment * kLoraChunk);
  Tensor out = transposed ? at::empty({features, rank}, options) : at::empty({rank, features}, options);
  const SumParts sum{parts.const_data_ptr(), out.mutable_data_ptr(), segments, rank, features,
                     factor,                 transposed,             x.scalar_type()};
  for_rows(sum_parts_rows, sum, rank, features * std::max<int64_t>(1, segments));
  return out;
}

Tensor lora_down_weight_grad(const Tensor& dz, const Tensor& x, const Tensor& token_index, int64_t seed, int64_t site,
                             int64_t step, int64_t feature_offset, double p, const std::optional<Tensor>& live_step) {
  MEGALORA_CHECK(x.dim() == 2 && dz.dim() == 2, x.sizes(), " and ", dz.sizes());
  const Mask mask = make_mask(seed, site, step, feature_offset, p, live_step);
  return weight_grad(dz, x, lora_inputs(x, {}, dz.size(1), token_index, mask), mask.scale, false);
}

Tensor lora_up_weight_grad(const Tensor& dy, const Tensor& z, double scaling) {
  MEGALORA_CHECK(dy.dim() == 2 && z.dim() == 2, dy.sizes(), " and ", z.sizes());
  check_rows(dy, dy);
  const LoraInputs in{nullptr, nullptr, {}, dy.size(1), z.size(1), dy.scalar_type()};
  return weight_grad(z, dy, in, scaling, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(megalora, CPU, m) {
  m.impl("rms_norm_", &rms_norm_);
  m.impl("rms_norm_backward_", &rms_norm_backward_);
  m.impl("swiglu_", &swiglu_);
  m.impl("swiglu_backward_", &swiglu_backward_);
  m.impl("split_rope_", &split_rope_);
  m.impl("split_rope_backward_", &split_rope_backward_);
  m.impl("cross_entropy_stats_", &cross_entropy_stats_);
  m.impl("cross_entropy_grad_", &cross_entropy_grad_);
  m.impl("attention_", &attention_);
  m.impl("attention_backward_", &attention_backward_);
  m.impl("lora_down_", &lora_down_);
  m.impl("lora_down_weight_grad", &lora_down_weight_grad);
  m.impl("lora_down_input_grad_", &lora_down_input_grad_);
  m.impl("lora_up_weight_grad", &lora_up_weight_grad);
}

}  // namespace megalora
