// The skinny products of a LoRA linear as torch ops: schemas, shapes (Meta) and, in a CUDA build, the kernels of
// lora_cuda.cu. Those of the CPU are in lora_cpu.cpp and cpu_ops.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "common.h"

#if defined(MEGALORA_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "lora_cuda.h"
#endif

namespace megalora {
namespace {

// Gradients of the adapters are float32, float64 where the tensors are.
at::ScalarType grad_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void lora_down_meta_(at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t,
                     int64_t, double, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&) {}

at::Tensor lora_down_weight_grad_meta(const at::Tensor& dz_TR, const at::Tensor& x_TK, const at::Tensor&, int64_t,
                                      int64_t, int64_t, int64_t, double, const std::optional<at::Tensor>&) {
  return at::empty_symint({dz_TR.sym_size(1), x_TK.sym_size(1)}, x_TK.options().dtype(grad_type(x_TK)));
}

void lora_down_input_grad_meta_(at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t,
                                int64_t, int64_t, double, const std::optional<at::Tensor>&,
                                const std::optional<at::Tensor>&) {}

void swiglu_lora_down_meta_(at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t,
                            int64_t, int64_t, double, const std::optional<at::Tensor>&, const at::Tensor&) {}

void lora_backward_meta_(at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         int64_t, int64_t, int64_t, int64_t, double, const std::optional<at::Tensor>&, at::TensorList,
                         const std::optional<at::Tensor>&) {}

void swiglu_lora_gradients_meta_(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const at::Tensor&, int64_t, int64_t, int64_t, int64_t, double,
                                 const std::optional<at::Tensor>&, const at::Tensor&, at::TensorList,
                                 const std::optional<at::Tensor>&, at::TensorList, at::ArrayRef<double>) {}

void swiglu_lora_backward_meta_(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const at::Tensor&, int64_t, int64_t, int64_t, int64_t, double,
                                const std::optional<at::Tensor>&, const at::Tensor&,
                                const std::optional<at::Tensor>&) {}

at::Tensor lora_up_weight_grad_meta(const at::Tensor& dy_TO, const at::Tensor& z_TR, double) {
  return at::empty_symint({dy_TO.sym_size(1), z_TR.sym_size(1)}, dy_TO.options().dtype(grad_type(dy_TO)));
}

#if defined(MEGALORA_CUDA)

// Rows of 16-bit floats that the kernels can copy 16 bytes at a time.
void check_matrix(const at::Tensor& m, const at::Tensor& like) {
  MEGALORA_CHECK(m.dim() == 2, "got ", m.dim(), " dimensions");
  MEGALORA_CHECK(m.scalar_type() == at::kBFloat16 || m.scalar_type() == at::kHalf, "got ", m.scalar_type());
  MEGALORA_CHECK(m.scalar_type() == like.scalar_type(), m.scalar_type(), " beside ", like.scalar_type());
  MEGALORA_CHECK(m.device() == like.device(), m.device(), " beside ", like.device());
  MEGALORA_CHECK(m.size(1) % 8 == 0, "got ", m.sizes());
  MEGALORA_CHECK(m.size(0) < INT32_MAX && m.size(1) < INT32_MAX, "got ", m.sizes());
  MEGALORA_CHECK(m.numel() == 0 || m.stride(1) == 1, "strides ", m.strides());
  MEGALORA_CHECK(m.size(0) < 2 || (m.stride(0) % 8 == 0 && m.stride(0) >= m.size(1)), "strides ", m.strides());
  MEGALORA_CHECK(reinterpret_cast<uintptr_t>(m.const_data_ptr()) % 16 == 0, "the data are not 16-byte aligned");
}

void check_rank(int64_t rank) { MEGALORA_CHECK(rank >= 8 && rank <= kLargestRank, "rank ", rank); }

void check_A(const at::Tensor& A_RK, const at::Tensor& x_TK) {
  check_matrix(A_RK, x_TK);
  check_rank(A_RK.size(0));
  MEGALORA_CHECK(A_RK.size(0) % 8 == 0, "got ", A_RK.sizes());
  MEGALORA_CHECK(A_RK.size(1) == x_TK.size(1), A_RK.sizes(), " for ", x_TK.sizes());
  MEGALORA_CHECK(A_RK.is_contiguous(), "strides ", A_RK.strides());
}

LoraMask make_mask(const at::Tensor& x_TK, const at::Tensor& token_index_T, int64_t seed, int64_t site, int64_t step,
                   int64_t feature_offset, double p, const std::optional<at::Tensor>& live_step) {
  MEGALORA_CHECK(p >= 0 && std::nearbyint(p * 65536) < 65536, "p ", p);
  const auto threshold = static_cast<uint32_t>(std::nearbyint(p * 65536));  // ties to even, as Python's round
  if (threshold == 0) return {};
  MEGALORA_CHECK(seed >= 0 && seed <= UINT32_MAX, "seed ", seed, " (fold it to 32 bits)");
  MEGALORA_CHECK(site >= 0 && site <= UINT32_MAX, "site ", site);
  MEGALORA_CHECK(step >= 0 && step <= UINT32_MAX, "step ", step);
  MEGALORA_CHECK(feature_offset >= 0 && feature_offset % 8 == 0, "feature_offset ", feature_offset);
  MEGALORA_CHECK(token_index_T.dim() == 1 && token_index_T.size(0) == x_TK.size(0), token_index_T.sizes(), " for ",
                 x_TK.sizes());
  MEGALORA_CHECK(token_index_T.scalar_type() == at::kLong, "got ", token_index_T.scalar_type());
  MEGALORA_CHECK(token_index_T.is_contiguous(), "strides ", token_index_T.strides());
  MEGALORA_CHECK(token_index_T.device() == x_TK.device(), token_index_T.device(), " beside ", x_TK.device());
  if (live_step) {
    MEGALORA_CHECK(live_step->scalar_type() == at::kLong && live_step->numel() == 1, "live_step: one int64");
    MEGALORA_CHECK(live_step->device() == x_TK.device(), live_step->device(), " beside ", x_TK.device());
  }
  return {token_index_T.const_data_ptr<int64_t>(),
          static_cast<uint32_t>(seed),
          static_cast<uint32_t>(site),
          static_cast<uint32_t>(step),
          live_step ? live_step->const_data_ptr<int64_t>() : nullptr,
          static_cast<uint32_t>(feature_offset / 8),
          threshold};
}

void lora_down_(at::Tensor& z_TZ, const at::Tensor& x_TK, const at::Tensor& A_RK, const at::Tensor& token_index_T,
                int64_t seed, int64_t site, int64_t step, int64_t feature_offset, double p,
                const std::optional<at::Tensor>& live_step, const std::optional<at::Tensor>& copy) {
  check_matrix(x_TK, x_TK);
  check_matrix(z_TZ, x_TK);
  check_A(A_RK, x_TK);
  MEGALORA_CHECK(z_TZ.size(0) == x_TK.size(0), z_TZ.sizes(), " for ", x_TK.sizes());
  MEGALORA_CHECK(z_TZ.size(1) >= A_RK.size(0), z_TZ.sizes(), " for rank ", A_RK.size(0));
  if (copy) {
    check_matrix(*copy, x_TK);
    MEGALORA_CHECK(copy->sizes() == x_TK.sizes(), copy->sizes(), " for ", x_TK.sizes());
  }
  const LoraMask mask = make_mask(x_TK, token_index_T, seed, site, step, feature_offset, p, live_step);
  const c10::cuda::CUDAGuard guard(x_TK.device());
  C10_CUDA_CHECK(launch_lora_down(z_TZ.mutable_data_ptr(), z_TZ.stride(0), z_TZ.size(1), x_TK.const_data_ptr(),
                                  x_TK.stride(0), copy ? copy->mutable_data_ptr() : nullptr,
                                  copy ? copy->stride(0) : 0, nullptr, A_RK.const_data_ptr(), x_TK.size(0),
                                  x_TK.size(1), A_RK.size(0), mask, x_TK.scalar_type() == at::kBFloat16,
                                  c10::cuda::getCurrentCUDAStream()));
}

// gate_up [T, 2 K], and a gradient of its shape: contiguous, beside x [T, K].
void check_gate_up(const at::Tensor& both, const at::Tensor& x_TK) {
  check_matrix(both, x_TK);
  MEGALORA_CHECK(both.is_contiguous(), "strides ", both.strides());
  MEGALORA_CHECK(both.size(0) == x_TK.size(0) && both.size(1) == 2 * x_TK.size(1), both.sizes(), " for ", x_TK.sizes());
}

void swiglu_lora_down_(at::Tensor& z_TZ, const at::Tensor& gate_up, const at::Tensor& A_RK,
                       const at::Tensor& token_index_T, int64_t seed, int64_t site, int64_t step,
                       int64_t feature_offset, double p, const std::optional<at::Tensor>& live_step,
                       const at::Tensor& x_TK) {
  check_matrix(x_TK, x_TK);
  check_matrix(z_TZ, x_TK);
  check_gate_up(gate_up, x_TK);
  check_A(A_RK, x_TK);
  MEGALORA_CHECK(A_RK.size(0) <= kLargestRankGatedDown, "rank ", A_RK.size(0));
  MEGALORA_CHECK(z_TZ.size(0) == x_TK.size(0), z_TZ.sizes(), " for ", x_TK.sizes());
  MEGALORA_CHECK(z_TZ.size(1) >= A_RK.size(0), z_TZ.sizes(), " for rank ", A_RK.size(0));
  const LoraMask mask = make_mask(x_TK, token_index_T, seed, site, step, feature_offset, p, live_step);
  const c10::cuda::CUDAGuard guard(x_TK.device());
  C10_CUDA_CHECK(launch_lora_down(z_TZ.mutable_data_ptr(), z_TZ.stride(0), z_TZ.size(1), nullptr, 0,
                                  const_cast<void*>(x_TK.const_data_ptr()), x_TK.stride(0), gate_up.const_data_ptr(),
                                  A_RK.const_data_ptr(), x_TK.size(0), x_TK.size(1), A_RK.size(0), mask,
                                  x_TK.scalar_type() == at::kBFloat16, c10::cuda::getCurrentCUDAStream()));
}

at::Tensor weight_grad(const at::Tensor& dz_TR, const at::Tensor& x_TK, const LoraMask& mask, double scaling,
                       bool transposed) {
  check_matrix(x_TK, x_TK);
  check_matrix(dz_TR, x_TK);
  check_rank(dz_TR.size(1));
  MEGALORA_CHECK(dz_TR.size(0) == x_TK.size(0), dz_TR.sizes(), " for ", x_TK.sizes());
  const int64_t rank = dz_TR.size(1), features = x_TK.size(1);
  const c10::cuda::CUDAGuard guard(x_TK.device());
  at::Tensor out = transposed ? at::empty({features, rank}, x_TK.options().dtype(at::kFloat))
                              : at::empty({rank, features}, x_TK.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_lora_weight_grad(out.mutable_data_ptr<float>(), transposed, static_cast<float>(scaling),
                                         dz_TR.const_data_ptr(), dz_TR.stride(0), x_TK.const_data_ptr(), x_TK.stride(0),
                                         x_TK.size(0), features, rank, mask, x_TK.scalar_type() == at::kBFloat16,
                                         c10::cuda::getCurrentCUDAStream()));
  return out;
}

at::Tensor lora_down_weight_grad(const at::Tensor& dz_TR, const at::Tensor& x_TK, const at::Tensor& token_index_T,
                                 int64_t seed, int64_t site, int64_t step, int64_t feature_offset, double p,
                                 const std::optional<at::Tensor>& live_step) {
  const LoraMask mask = make_mask(x_TK, token_index_T, seed, site, step, feature_offset, p, live_step);
  return weight_grad(dz_TR, x_TK, mask, 1.0, false);
}

at::Tensor lora_up_weight_grad(const at::Tensor& dy_TO, const at::Tensor& z_TR, double scaling) {
  return weight_grad(z_TR, dy_TO, {}, scaling, true);
}

void input_grad(const at::Tensor& out, const at::Tensor& dx_TK, const at::Tensor& dz_TR, const at::Tensor& A_RK, const LoraMask& mask,
                const SwiGluMade& made) {
  check_matrix(dx_TK, dx_TK);
  check_matrix(dz_TR, dx_TK);
  check_A(A_RK, dx_TK);
  MEGALORA_CHECK(dz_TR.size(0) == dx_TK.size(0), dz_TR.sizes(), " for ", dx_TK.sizes());
  MEGALORA_CHECK(dz_TR.size(1) == A_RK.size(0), dz_TR.sizes(), " for ", A_RK.sizes());
  check_matrix(out, dx_TK);
  MEGALORA_CHECK(out.sizes() == dx_TK.sizes(), out.sizes(), " for ", dx_TK.sizes());
  const c10::cuda::CUDAGuard guard(dx_TK.device());
  C10_CUDA_CHECK(launch_lora_down_input_grad(const_cast<void*>(out.const_data_ptr()), out.stride(0),
                                             dx_TK.const_data_ptr(), dx_TK.stride(0), dz_TR.const_data_ptr(),
                                             dz_TR.stride(0), A_RK.const_data_ptr(), dx_TK.size(0), dx_TK.size(1),
                                             A_RK.size(0), mask, made, dx_TK.scalar_type() == at::kBFloat16,
                                             c10::cuda::getCurrentCUDAStream()));
}

void lora_down_input_grad_(at::Tensor& dx_TK, const at::Tensor& dz_TR, const at::Tensor& A_RK,
                           const at::Tensor& token_index_T, int64_t seed, int64_t site, int64_t step,
                           int64_t feature_offset, double p, const std::optional<at::Tensor>& live_step,
                           const std::optional<at::Tensor>& out) {
  const LoraMask mask = make_mask(dx_TK, token_index_T, seed, site, step, feature_offset, p, live_step);
  input_grad(out ? *out : dx_TK, dx_TK, dz_TR, A_RK, mask, {});
}

// A factor's gradient, float32: [ranks, size], or [size, ranks] if `transposed`.
FactorGrad factor_grad(const at::Tensor& grad, bool transposed, int64_t size, double scaling, const at::Tensor& like) {
  MEGALORA_CHECK(grad.scalar_type() == at::kFloat, "got ", grad.scalar_type());
  MEGALORA_CHECK(grad.is_contiguous(), "strides ", grad.strides());
  MEGALORA_CHECK(grad.device() == like.device(), grad.device(), " beside ", like.device());
  MEGALORA_CHECK(grad.dim() == 2 && grad.size(transposed ? 0 : 1) == size, grad.sizes(), " for ", size, " features");
  return {grad.mutable_data_ptr<float>(), static_cast<int>(grad.size(transposed ? 1 : 0)), static_cast<float>(scaling)};
}

FactorGrads factor_grads(at::TensorList dA, const at::Tensor& A_RK) {
  MEGALORA_CHECK(static_cast<int64_t>(dA.size()) <= kLargestParts, "got ", dA.size(), " factors");
  FactorGrads grads{};
  int64_t ranks = 0;
  for (size_t i = 0; i < dA.size(); ++i) {
    grads.down[i] = factor_grad(dA[i], false, A_RK.size(1), 1.0, A_RK);
    ranks += grads.down[i].ranks;
  }
  MEGALORA_CHECK(ranks == A_RK.size(0), ranks, " ranks for ", A_RK.sizes());
  return grads;
}

void check_backward(const at::Tensor& dx_TK, const at::Tensor& dz_TR, const at::Tensor& A_RK, int64_t largest_rank) {
  check_matrix(dx_TK, dx_TK);
  check_matrix(dz_TR, dx_TK);
  check_A(A_RK, dx_TK);
  MEGALORA_CHECK(A_RK.size(0) <= largest_rank, "rank ", A_RK.size(0));
  MEGALORA_CHECK(dz_TR.size(0) == dx_TK.size(0), dz_TR.sizes(), " for ", dx_TK.sizes());
  MEGALORA_CHECK(dz_TR.size(1) == A_RK.size(0), dz_TR.sizes(), " for ", A_RK.sizes());
}

void lora_backward_(at::Tensor& dx_TK, const at::Tensor& dz_TR, const at::Tensor& x_TK, const at::Tensor& A_RK,
                    const at::Tensor& token_index_T, int64_t seed, int64_t site, int64_t step, int64_t feature_offset,
                    double p, const std::optional<at::Tensor>& live_step, at::TensorList dA,
                    const std::optional<at::Tensor>& out_TK) {
  check_backward(dx_TK, dz_TR, A_RK, kLargestRankBackward);
  const at::Tensor& out = out_TK ? *out_TK : dx_TK;
  for (const at::Tensor* other : {&x_TK, &out}) {
    check_matrix(*other, dx_TK);
    MEGALORA_CHECK(other->sizes() == dx_TK.sizes(), other->sizes(), " for ", dx_TK.sizes());
  }
  const LoraMask mask = make_mask(dx_TK, token_index_T, seed, site, step, feature_offset, p, live_step);
  const c10::cuda::CUDAGuard guard(dx_TK.device());
  const at::Tensor sums = at::empty({sums_of_lora_backward(dx_TK.size(0), dx_TK.size(1), A_RK.size(0))},
                                    dx_TK.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_lora_backward(const_cast<void*>(out.const_data_ptr()), out.stride(0), dx_TK.const_data_ptr(),
                                      dx_TK.stride(0), x_TK.const_data_ptr(), x_TK.stride(0), dz_TR.const_data_ptr(),
                                      dz_TR.stride(0), A_RK.const_data_ptr(), dx_TK.size(0), dx_TK.size(1),
                                      A_RK.size(0), mask, factor_grads(dA, A_RK), sums.mutable_data_ptr<float>(),
                                      dx_TK.scalar_type() == at::kBFloat16, c10::cuda::getCurrentCUDAStream()));
}

void swiglu_lora_gradients_(const at::Tensor& dy_TK, const at::Tensor& gate_up, const at::Tensor& dz_TR,
                            const at::Tensor& A_RK, const at::Tensor& token_index_T, int64_t seed, int64_t site,
                            int64_t step, int64_t feature_offset, double p, const std::optional<at::Tensor>& live_step,
                            const at::Tensor& grad, at::TensorList dA, const std::optional<at::Tensor>& z_TZ,
                            at::TensorList dB, at::ArrayRef<double> scaling) {
  check_backward(dy_TK, dz_TR, A_RK, kLargestRankGatedBackward);
  check_gate_up(gate_up, dy_TK);
  check_gate_up(grad, dy_TK);
  FactorGrads grads = factor_grads(dA, A_RK);
  MEGALORA_CHECK(z_TZ.has_value() == !dB.empty() && dB.size() == scaling.size(), dB.size(), " gradients");
  if (z_TZ) {
    MEGALORA_CHECK(dB.size() == 2, "got ", dB.size());
    check_matrix(*z_TZ, dy_TK);
    grads.gate = factor_grad(dB[0], true, dy_TK.size(1), scaling[0], dy_TK);
    grads.up = factor_grad(dB[1], true, dy_TK.size(1), scaling[1], dy_TK);
    for (const FactorGrad* factor : {&grads.gate, &grads.up}) {
      MEGALORA_CHECK(factor->ranks % 8 == 0 && factor->ranks <= kLargestRankGatedBackward, "rank ", factor->ranks);
    }
    MEGALORA_CHECK(z_TZ->size(0) == dy_TK.size(0) && z_TZ->size(1) >= grads.gate.ranks + grads.up.ranks,
                   z_TZ->sizes(), " for ", dy_TK.sizes());
  }
  const LoraMask mask = make_mask(dy_TK, token_index_T, seed, site, step, feature_offset, p, live_step);
  const c10::cuda::CUDAGuard guard(dy_TK.device());
  const at::Tensor sums = at::empty({sums_of_swiglu_lora_backward(dy_TK.size(0), dy_TK.size(1))},
                                    dy_TK.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_swiglu_lora_backward(
      const_cast<void*>(grad.const_data_ptr()), gate_up.const_data_ptr(), dy_TK.const_data_ptr(), dy_TK.stride(0),
      z_TZ ? z_TZ->const_data_ptr() : nullptr, z_TZ ? z_TZ->stride(0) : 0, dz_TR.const_data_ptr(), dz_TR.stride(0),
      A_RK.const_data_ptr(), dy_TK.size(0), dy_TK.size(1), A_RK.size(0), mask, grads,
      sums.mutable_data_ptr<float>(), dy_TK.scalar_type() == at::kBFloat16, c10::cuda::getCurrentCUDAStream()));
}

void swiglu_lora_backward_(const at::Tensor& dy_TK, const at::Tensor& gate_up, const at::Tensor& dz_TR,
                           const at::Tensor& A_RK, const at::Tensor& token_index_T, int64_t seed, int64_t site,
                           int64_t step, int64_t feature_offset, double p, const std::optional<at::Tensor>& live_step,
                           const at::Tensor& grad, const std::optional<at::Tensor>& x) {
  const LoraMask mask = make_mask(dy_TK, token_index_T, seed, site, step, feature_offset, p, live_step);
  check_gate_up(gate_up, dy_TK);
  check_gate_up(grad, dy_TK);
  if (x) {
    check_matrix(*x, dy_TK);
    MEGALORA_CHECK(x->is_contiguous() && x->sizes() == dy_TK.sizes(), x->sizes(), " for ", dy_TK.sizes());
  }
  input_grad(dy_TK, dy_TK, dz_TR, A_RK, mask,
             {gate_up.const_data_ptr(), grad.mutable_data_ptr(), x ? x->mutable_data_ptr() : nullptr});
}

#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalora, m) {
  m.def("lora_down_(Tensor(a!) z, Tensor x, Tensor A, Tensor token_index, int seed, int site, int step, "
        "int feature_offset, float p, Tensor? live_step=None, Tensor(b!)? copy=None) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def("lora_down_weight_grad(Tensor dz, Tensor x, Tensor token_index, int seed, int site, int step, "
        "int feature_offset, float p, Tensor? live_step=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("lora_down_input_grad_(Tensor(a!) dx, Tensor dz, Tensor A, Tensor token_index, int seed, int site, int step, "
        "int feature_offset, float p, Tensor? live_step=None, Tensor(b!)? out=None) -> ()",
        {at::Tag::pt2_compliant_tag});
  // grad [T, 2 K] = that of gate_up where x [T, K] = silu(gate) * up has the gradient dy plus the term of the branch;
  // x is made again, 0 where it is dropped.
  m.def("swiglu_lora_backward_(Tensor dy, Tensor gate_up, Tensor dz, Tensor A, Tensor token_index, int seed, int site, "
        "int step, int feature_offset, float p, Tensor? live_step, Tensor(a!) grad, Tensor(b!)? x) -> ()",
        {at::Tag::pt2_compliant_tag});
  // x = silu(gate) * up, and z as lora_down_ makes it of x.
  m.def("swiglu_lora_down_(Tensor(a!) z, Tensor gate_up, Tensor A, Tensor token_index, int seed, int site, int step, "
        "int feature_offset, float p, Tensor? live_step, Tensor(b!) x) -> ()",
        {at::Tag::pt2_compliant_tag});
  // lora_down_input_grad_, and dA, cut into those of its branches, += dz^T dropout(x).
  m.def("lora_backward_(Tensor(a!) dx, Tensor dz, Tensor x, Tensor A, Tensor token_index, int seed, int site, int step, "
        "int feature_offset, float p, Tensor? live_step, Tensor(b!)[] dA, Tensor(c!)? out=None) -> ()",
        {at::Tag::pt2_compliant_tag});
  // swiglu_lora_backward_, and dA as well; and where z is given, of gate and up: dB += scaling grad^T z, each of its part.
  m.def("swiglu_lora_gradients_(Tensor dy, Tensor gate_up, Tensor dz, Tensor A, Tensor token_index, int seed, int site, "
        "int step, int feature_offset, float p, Tensor? live_step, Tensor(a!) grad, Tensor(b!)[] dA, Tensor? z, "
        "Tensor(c!)[] dB, float[] scaling) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def("lora_up_weight_grad(Tensor dy, Tensor z, float scaling) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(megalora, Meta, m) {
  m.impl("lora_down_", &lora_down_meta_);
  m.impl("lora_down_weight_grad", &lora_down_weight_grad_meta);
  m.impl("lora_down_input_grad_", &lora_down_input_grad_meta_);
  m.impl("swiglu_lora_down_", &swiglu_lora_down_meta_);
  m.impl("lora_backward_", &lora_backward_meta_);
  m.impl("swiglu_lora_gradients_", &swiglu_lora_gradients_meta_);
  m.impl("swiglu_lora_backward_", &swiglu_lora_backward_meta_);
  m.impl("lora_up_weight_grad", &lora_up_weight_grad_meta);
}

#if defined(MEGALORA_CUDA)
TORCH_LIBRARY_IMPL(megalora, CUDA, m) {
  m.impl("lora_down_", &lora_down_);
  m.impl("lora_down_weight_grad", &lora_down_weight_grad);
  m.impl("lora_down_input_grad_", &lora_down_input_grad_);
  m.impl("swiglu_lora_down_", &swiglu_lora_down_);
  m.impl("lora_backward_", &lora_backward_);
  m.impl("swiglu_lora_gradients_", &swiglu_lora_gradients_);
  m.impl("swiglu_lora_backward_", &swiglu_lora_backward_);
  m.impl("lora_up_weight_grad", &lora_up_weight_grad);
}
#endif

}  // namespace megalora
