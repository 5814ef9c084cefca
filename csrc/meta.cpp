// Shapes and types of what the ops return, for tracing (the Meta device).
#include <ATen/ops/empty.h>

#include "ops.h"

namespace megalora::meta {
namespace {

// Gradients of the adapters are float32, float64 where the tensors are.
at::TensorOptions grad_options(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// What is left of the outputs where half of them are gates.
c10::SymInt step_outputs(const Tensor& weight, std::string_view gate) {
  return gate == "none" ? weight.sym_size(0) : weight.sym_size(0) / 2;
}

}  // namespace

Tensor dropout(const Tensor& x_TF, const MaskArguments&) { return at::empty_symint(x_TF.sym_sizes(), x_TF.options()); }

Tensor lora_down_weight_grad(const Tensor& dz_TR, const Tensor& x_TK, const MaskArguments&) {
  return at::empty_symint({dz_TR.sym_size(1), x_TK.sym_size(1)}, grad_options(x_TK));
}

Tensor lora_up_weight_grad(const Tensor& dy_TO, const Tensor& z_TR, double) {
  return at::empty_symint({dy_TO.sym_size(1), z_TR.sym_size(1)}, grad_options(dy_TO));
}

Tensor skinny_linear(const Tensor& x_MI, const Tensor& weight_OI, const OptionalTensor&) {
  return at::empty_symint({x_MI.sym_size(0), weight_OI.sym_size(0)}, x_MI.options());
}

Tensor fp8_skinny_linear(const Tensor& x, const Tensor& codes, const Tensor&, const Tensor&, const OptionalTensor&,
                         bool) {
  return at::empty_symint({x.sym_size(0), codes.sym_size(0)}, x.options());
}

Tensor nf4_skinny_linear(const Tensor& x, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                         at::TensorList, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, const Tensor& branch,
                         const OptionalTensor&) {
  return at::empty_symint({x.sym_size(0), branch.sym_size(0)}, x.options());
}

Tensor step_linear(const Tensor& x, const Tensor& weight, const OptionalTensor&, const OptionalTensor&,
                   const OptionalTensor&, const OptionalTensor&, double, bool, bool, std::string_view gate) {
  return at::empty_symint({x.sym_size(0), step_outputs(weight, gate)}, x.options());
}

Tensor fp8_step_linear(const Tensor& x, const Tensor& codes, const Tensor&, const Tensor&, const OptionalTensor&, bool,
                       const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double, bool, bool,
                       std::string_view gate) {
  return at::empty_symint({x.sym_size(0), step_outputs(codes, gate)}, x.options());
}

}  // namespace megalora::meta
