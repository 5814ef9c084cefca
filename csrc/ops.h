// The ops as C++ functions: on CPU and CUDA, and for shapes alone (Meta). ops.cpp registers them under their schemas.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "check.h"
#include "mask.h"
#include "params.h"

namespace megalora {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments of an op that draws a mask, as its schema has them (megalora/ops/dropout.py, op_arguments).
struct MaskArguments {
  Tensor token_index;
  int64_t seed, site, step, feature_offset;
  double p;
  OptionalTensor live_step;
};

using OptionalMask = std::optional<MaskArguments>;

// The mask of the rows of x [T, F]. Checks the arguments. On the CPU the live step is read now, else by the kernels.
Mask make_mask(const MaskArguments& arguments, const Tensor& x);

// The arguments of an op that say what it computes, as the kernels take them.
inline Gate gate_of(std::string_view name) {
  MEGALORA_CHECK(name == "silu" || name == "gelu_tanh" || name == "gelu", name);
  return name == "silu" ? Gate::silu : name == "gelu" ? Gate::gelu : Gate::gelu_tanh;
}
inline NormRounding norm_rounding(bool precise, bool offset) {
  MEGALORA_CHECK(precise || !offset, "where it is rounded before the weight, give 1 + w");
  return {precise, offset};
}

#define MEGALORA_OPS_OF_CPU_AND_CUDA                                                                                  \
  Tensor dropout(const Tensor& x, const MaskArguments& mask);                                                         \
  void dropout_add_(const Tensor& out, const Tensor& g, const MaskArguments& mask);                                   \
  void swiglu_(const Tensor& gate_up, const Tensor& out, std::string_view gate);                                      \
  void swiglu_backward_(const Tensor& dy, const Tensor& gate_up, const Tensor& grad, std::string_view gate);          \
  void split_rope_(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& q, const Tensor& k,         \
                   const Tensor& v);                                                                                  \
  void split_rope_backward_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,  \
                            const Tensor& qkv);                                                                       \
  void cross_entropy_stats_(const Tensor& logits, const Tensor& label, const Tensor& stats, double scale,             \
                            double softcap);                                                                          \
  void cross_entropy_grad_(const Tensor& logits, const Tensor& label, const Tensor& max, const Tensor& total,         \
                           double scale, double softcap);                                                             \
  void lora_down_(const Tensor& z, const Tensor& x, const Tensor& A, const MaskArguments& mask,                       \
                  const OptionalTensor& copy);                                                                        \
  Tensor lora_down_weight_grad(const Tensor& dz, const Tensor& x, const MaskArguments& mask);                         \
  void lora_down_input_grad_(const Tensor& dx, const Tensor& dz, const Tensor& A, const MaskArguments& mask,          \
                             const OptionalTensor& out);                                                              \
  Tensor lora_up_weight_grad(const Tensor& dy, const Tensor& z, double scaling);                                      \
  Tensor skinny_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);                            \
  void decode_attention_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, \
                         const Tensor& slots, const Tensor& positions, int64_t window, const Tensor& out,             \
                         const OptionalTensor& cos, const OptionalTensor& sin, const OptionalTensor& arrived);

namespace cpu {

MEGALORA_OPS_OF_CPU_AND_CUDA
void rms_norm_(const Tensor& x, const OptionalTensor& delta, const Tensor& weight, double eps,
               const OptionalTensor& sum, const Tensor& y, const Tensor& inverse, bool precise, bool offset);
void rms_norm_backward_(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& inverse,
                        const OptionalTensor& residual, const Tensor& dx, bool precise, bool offset);
void attention_(const Tensor& q, const Tensor& k, const Tensor& v, at::IntArrayRef bounds, int64_t window, double scale,
                double softcap, const OptionalTensor& slopes, const OptionalTensor& sinks, const Tensor& out,
                const Tensor& lse);
void attention_backward_(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                         const Tensor& lse, at::IntArrayRef bounds, int64_t window, double scale, double softcap,
                         const OptionalTensor& slopes, const Tensor& dq, const Tensor& dk, const Tensor& dv);
Tensor tile_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

}  // namespace cpu

namespace cuda {

MEGALORA_OPS_OF_CPU_AND_CUDA
void norm_(const Tensor& x, std::string_view kind, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
           const OptionalTensor& delta, std::string_view own_kind, const OptionalTensor& own_weight, double own_eps,
           double scale, const OptionalMask& mask, const OptionalTensor& own_inverse, const OptionalTensor& sum,
           const Tensor& y, const Tensor& statistics);
void norm_backward_(const Tensor& dy, const Tensor& x, std::string_view kind, const OptionalTensor& weight,
                    const Tensor& statistics, const OptionalTensor& residual, const OptionalTensor& delta,
                    std::string_view own_kind, const OptionalTensor& own_weight, const OptionalTensor& own_inverse,
                    double scale, const OptionalMask& mask, const Tensor& dx, const OptionalTensor& ddelta);
void swiglu_lora_down_(const Tensor& z, const Tensor& gate_up, const Tensor& A, const MaskArguments& mask,
                       const Tensor& x, std::string_view gate);
void lora_backward_(const Tensor& dx, const Tensor& dz, const Tensor& x, const Tensor& A, const MaskArguments& mask,
                    at::TensorList dA, const OptionalTensor& out);
void swiglu_lora_backward_(const Tensor& dy, const Tensor& gate_up, const Tensor& dz, const Tensor& A,
                           const MaskArguments& mask, const Tensor& grad, const OptionalTensor& x,
                           std::string_view gate);
void swiglu_lora_gradients_(const Tensor& dy, const Tensor& gate_up, const Tensor& dz, const Tensor& A,
                            const MaskArguments& mask, const Tensor& grad, at::TensorList dA, const OptionalTensor& z,
                            at::TensorList dB, at::ArrayRef<double> scaling, std::string_view gate);
void scale_columns_(const Tensor& x, const Tensor& g);
void scale_columns_backward_(const Tensor& dy, const OptionalTensor& y, const Tensor& g, const Tensor& dx,
                             const OptionalTensor& sums);
void scaled_copy_(at::TensorList outs, at::TensorList sources, at::ArrayRef<double> scales);
void fp8_quantise_(const Tensor& x, const OptionalTensor& factor, const Tensor& codes, const Tensor& scale,
                   const OptionalTensor& z, const OptionalTensor& z_factor);
void fp8_branch_(const Tensor& branch, const Tensor& scale, const Tensor& codes, const Tensor& factor);
void fp8_turn_(const Tensor& codes, const Tensor& out);
void fp8_decode_(const Tensor& codes, const Tensor& scale, int64_t block, int64_t phase, const Tensor& out);
void nf4_decode_(const Tensor& codes, const Tensor& absmax, const OptionalTensor& scale, const OptionalTensor& numbers,
                 const OptionalTensor& offset, int64_t nested_block, int64_t first, int64_t width, const Tensor& out);
void nf4_to_e4m3_(const Tensor& codes, const Tensor& absmax, const OptionalTensor& scale, const OptionalTensor& numbers,
                  const OptionalTensor& offset, int64_t nested_block, int64_t first, int64_t width,
                  const Tensor& row_scale, const OptionalTensor& terms, const Tensor& out, bool turned);
Tensor fp8_skinny_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& branch,
                         const OptionalTensor& bias, bool kept);
Tensor nf4_skinny_linear(const Tensor& x, at::TensorList codes, at::TensorList absmax, at::TensorList scale,
                         at::TensorList numbers, at::TensorList offset, at::IntArrayRef nested_block,
                         at::IntArrayRef first, at::IntArrayRef width, const Tensor& branch,
                         const OptionalTensor& bias);
Tensor step_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& delta,
                   const OptionalTensor& sum, const OptionalTensor& norm, double eps, bool precise, bool offset,
                   std::string_view gate);
Tensor fp8_step_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& branch,
                       const OptionalTensor& bias, bool kept, const OptionalTensor& delta, const OptionalTensor& sum,
                       const OptionalTensor& norm, double eps, bool precise, bool offset, std::string_view gate);

void step_down_(const Tensor& x, const Tensor& A, const OptionalTensor& delta, const OptionalTensor& sum,
                const OptionalTensor& norm, double eps, bool precise, bool offset, const Tensor& X);

}  // namespace cuda

namespace meta {

Tensor dropout(const Tensor& x, const MaskArguments& mask);
Tensor lora_down_weight_grad(const Tensor& dz, const Tensor& x, const MaskArguments& mask);
Tensor lora_up_weight_grad(const Tensor& dy, const Tensor& z, double scaling);
Tensor skinny_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);
Tensor fp8_skinny_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& branch,
                         const OptionalTensor& bias, bool kept);
Tensor nf4_skinny_linear(const Tensor& x, at::TensorList codes, at::TensorList absmax, at::TensorList scale,
                         at::TensorList numbers, at::TensorList offset, at::IntArrayRef nested_block,
                         at::IntArrayRef first, at::IntArrayRef width, const Tensor& branch,
                         const OptionalTensor& bias);
Tensor step_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& delta,
                   const OptionalTensor& sum, const OptionalTensor& norm, double eps, bool precise, bool offset,
                   std::string_view gate);
Tensor fp8_step_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& branch,
                       const OptionalTensor& bias, bool kept, const OptionalTensor& delta, const OptionalTensor& sum,
                       const OptionalTensor& norm, double eps, bool precise, bool offset, std::string_view gate);

}  // namespace meta
}  // namespace megalora
