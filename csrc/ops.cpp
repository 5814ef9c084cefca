// Every op: its schema, and the function that is it on each device. What an op computes is in megalora/ops/*.py.
#include <torch/library.h>

#include "masked.h"
#include "ops.h"

// The arguments of a mask (MaskArguments), which some ops may be given none of. Macros, so that schemas stay literals.
#define DRAW "int seed, int site, int step, int feature_offset, float p, Tensor? live_step"
#define MASK "Tensor token_index, " DRAW
// What a linear of a few rows does beside its product (BesideParams).
#define BESIDE "Tensor? delta, Tensor(a!)? sum, Tensor? norm, float eps, bool precise, bool offset, str gate"

namespace {

// The Meta function of an op that only writes into its arguments: nothing to do.
void write_nothing(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
}

}  // namespace

TORCH_LIBRARY(megalora, m) {
  const auto def = [&m](const char* schema) { m.def(schema, {at::Tag::pt2_compliant_tag}); };

  // x, out, g [T, F], token_index [T] int64.
  def("dropout(Tensor x, " MASK "=None) -> Tensor");
  def("dropout_add_(Tensor(a!) out, Tensor g, " MASK "=None) -> ()");

  // On the CPU. x, delta, sum [N, D]; weight [D]; y [N, D], rows of any stride; inverse [N] float32.
  def("rms_norm_(Tensor x, Tensor? delta, Tensor weight, float eps, Tensor(a!)? sum, Tensor(b!) y, Tensor(c!) inverse, "
      "bool precise=False, bool offset=False) -> ()");
  def("rms_norm_backward_(Tensor dy, Tensor x, Tensor weight, Tensor inverse, Tensor? residual, Tensor(a!) dx, "
      "bool precise=False, bool offset=False) -> ()");

  // On CUDA. The same shapes, and for RMSNorm and LayerNorm; kind: rms, precise or layer (statistics [2, N]),
  // with _offset behind it where the weight is 1 + w. sum = x + mask(scale * own(delta)), own a norm of delta, or none.
  def("norm_(Tensor x, str kind, Tensor? weight, Tensor? bias, float eps, Tensor? delta, str own_kind, "
      "Tensor? own_weight, float own_eps, float scale, Tensor? token_index, " DRAW
      ", Tensor(a!)? own_inverse, Tensor(b!)? sum, Tensor(c!) y, Tensor(d!) statistics) -> ()");
  def("norm_backward_(Tensor dy, Tensor x, str kind, Tensor? weight, Tensor statistics, Tensor? residual, "
      "Tensor? delta, str own_kind, Tensor? own_weight, Tensor? own_inverse, float scale, Tensor? token_index, " DRAW
      ", Tensor(a!) dx, Tensor(b!)? ddelta) -> ()");

  // gate_up, grad [T, 2 I]; out, dy [T, I], rows of any stride. gate, here and below: silu, or on CUDA also gelu_tanh
  // and gelu. Here and below, on CUDA but for swiglu_lora_backward_: gate_up may be up [T, I], without a gate.
  def("swiglu_(Tensor gate_up, Tensor(a!) out, str gate='silu') -> ()");
  def("swiglu_backward_(Tensor dy, Tensor gate_up, Tensor(a!) grad, str gate='silu') -> ()");

  // qkv [T, (H + 2 K) D]; q [T, H, D], k, v [T, K, D], heads and tokens of any stride; cos, sin [T, D / 2].
  def("split_rope_(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) q, Tensor(b!) k, Tensor(c!) v) -> ()");
  def("split_rope_backward_(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) qkv) -> ()");

  // logits [N, V]; label [N] int64, of this part of the vocabulary where 0 <= label < V; stats [3, N] float32.
  // On CUDA of softcap * tanh(scale * logits / softcap); softcap 0: none.
  def("cross_entropy_stats_(Tensor logits, Tensor label, Tensor(a!) stats, float scale=1, float softcap=0) -> ()");
  def("cross_entropy_grad_(Tensor(a!) logits, Tensor label, Tensor max, Tensor total, float scale=1, "
      "float softcap=0) -> ()");

  // q, out, dout, dq [T, H, D]; k, v [T, K, D]; heads and tokens of any stride; lse [H, T]; dk, dv [T, H, D], the share
  // of each query head, of the type of the arithmetic; softcap 0: none; slopes, sinks [H], of that type too.
  def("attention_(Tensor q, Tensor k, Tensor v, int[] bounds, int window, float scale, float softcap, Tensor? slopes, "
      "Tensor? sinks, Tensor(a!) out, Tensor(b!) lse) -> ()");
  def("attention_backward_(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] bounds, "
      "int window, float scale, float softcap, Tensor? slopes, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");

  // The branches of LoRA linears that read one input x [T, K]: A [R, K], dz [T, R], z [T, R or more].
  def("lora_down_(Tensor(a!) z, Tensor x, Tensor A, " MASK "=None, Tensor(b!)? copy=None) -> ()");
  def("lora_down_weight_grad(Tensor dz, Tensor x, " MASK "=None) -> Tensor");
  def("lora_down_input_grad_(Tensor(a!) dx, Tensor dz, Tensor A, " MASK "=None, Tensor(b!)? out=None) -> ()");
  def("lora_up_weight_grad(Tensor dy, Tensor z, float scaling) -> Tensor");
  // lora_down_input_grad_, and dA, cut into those of its branches, += dz^T dropout(x).
  def("lora_backward_(Tensor(a!) dx, Tensor dz, Tensor x, Tensor A, " MASK
      ", Tensor(b!)[] dA, Tensor(c!)? out=None) -> ()");
  // x = act(gate) * up, and z as lora_down_ makes it of x.
  def("swiglu_lora_down_(Tensor(a!) z, Tensor gate_up, Tensor A, " MASK ", Tensor(b!) x, str gate='silu') -> ()");
  // grad [T, 2 K] = that of gate_up where x [T, K] = act(gate) * up has the gradient dy plus the term of the branch;
  // x is made again, 0 where it is dropped.
  def("swiglu_lora_backward_(Tensor dy, Tensor gate_up, Tensor dz, Tensor A, " MASK
      ", Tensor(a!) grad, Tensor(b!)? x, str gate='silu') -> ()");
  // swiglu_lora_backward_, and dA as well; and where z is given, of gate and up: dB += scaling grad^T z, each of its
  // part, or of one linear of both.
  def("swiglu_lora_gradients_(Tensor dy, Tensor gate_up, Tensor dz, Tensor A, " MASK
      ", Tensor(a!) grad, Tensor(b!)[] dA, Tensor? z, Tensor(c!)[] dB, float[] scaling, str gate='silu') "
      "-> ()");

  // x, dy, y, dx [T, O], rows of any stride; g [O] float32; sums [parts, O] float32, where y is given.
  def("scale_columns_(Tensor(a!) x, Tensor g) -> ()");
  def("scale_columns_backward_(Tensor dy, Tensor? y, Tensor g, Tensor(a!) dx, Tensor(b!)? sums) -> ()");

  // outs of one dtype, rows of any stride; sources float32, contiguous, of the same shapes.
  def("scaled_copy_(Tensor(a!)[] outs, Tensor[] sources, float[] scales) -> ()");

  // Quantised weights (megalora/ops/fp8.py, nf4.py), on CUDA: x [T, I], factor [I] float32, codes [T, I + terms] e4m3,
  // scale [T] float32, z [T, R], z_factor [R]; branch [O, R], scale [O], codes [O, terms], factor [R]; codes [R, C] of
  // bytes, out [C, R]; codes [R, C], scale [R, blocks], out [R, C]; codes [R, C / 2], absmax [R, C / 64]; x [M, I + C],
  // codes [O, I], scale [O], branch [O, C] -> [M, O].
  def("fp8_quantise_(Tensor x, Tensor? factor, Tensor(a!) codes, Tensor(b!) scale, Tensor? z, Tensor? z_factor) -> ()");
  def("fp8_branch_(Tensor branch, Tensor scale, Tensor(a!) codes, Tensor(b!) factor) -> ()");
  def("fp8_turn_(Tensor codes, Tensor(a!) out) -> ()");
  def("fp8_decode_(Tensor codes, Tensor scale, int block, int phase, Tensor(a!) out) -> ()");
  def("nf4_decode_(Tensor codes, Tensor absmax, Tensor? scale, Tensor? numbers, Tensor? offset, int nested_block, "
      "int first, int width, Tensor(a!) out) -> ()");
  // out [R, C + terms], or [C, R] where turned, of e4m3; row_scale [R] float32, powers of two; terms [R, terms] e4m3.
  def("nf4_to_e4m3_(Tensor codes, Tensor absmax, Tensor? scale, Tensor? numbers, Tensor? offset, int nested_block, "
      "int first, int width, Tensor row_scale, Tensor? terms, Tensor(a!) out, bool turned) -> ()");
  // kept: codes and scale are not written between steps; they are then read before the kernel before has ended.
  def("fp8_skinny_linear(Tensor x, Tensor codes, Tensor scale, Tensor branch, Tensor? bias, bool kept) -> Tensor");
  // The same, and skinny_linear, of norm(x + delta): norm [I] (none: x as it is, with its branch behind), delta, sum
  // [M, I]; y [M, O / 2] = gate(the first half of the outputs) * the second, or [M, O] where gate is none.
  def("fp8_step_linear(Tensor x, Tensor codes, Tensor scale, Tensor branch, Tensor? bias, bool kept, " BESIDE
      ") -> Tensor");
  def("step_linear(Tensor x, Tensor weight, Tensor? bias, " BESIDE ") -> Tensor");
  // X [M, I + C] = [norm(x + delta) | z | 0], z of A [R, I]; without a norm X may begin with x itself.
  def("step_down_(Tensor x, Tensor A, Tensor? delta, Tensor(a!)? sum, Tensor? norm, float eps, bool precise, "
      "bool offset, Tensor(b!) X) -> ()");
  // Of several weights one below the other, each as nf4_decode_ takes it.
  def("nf4_skinny_linear(Tensor x, Tensor[] codes, Tensor[] absmax, Tensor[] scale, Tensor[] numbers, Tensor[] offset, "
      "int[] nested_block, int[] first, int[] width, Tensor branch, Tensor? bias) -> Tensor");

  // x [M, I], weight [O, I], bias [O] -> [M, O]; few rows, summed in float32.
  def("skinny_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  // The same in float32, of any number of rows, on CPUs with AMX tiles; weight [O, I] or the transpose of such.
  def("tile_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  // q, out [B, H, D], k, v [B, K, D], keys, values [S, K, C, D], slots, positions [B] int64; window 0: none. On CUDA:
  // cos, sin [B, D / 2], by which q and k are rotated first, or none; arrived [B K] int32, zeros before and behind.
  def("decode_attention_(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor slots, "
      "Tensor positions, int window, Tensor(c!) out, Tensor? cos=None, Tensor? sin=None, "
      "Tensor(d!)? arrived=None) -> ()");
}

namespace megalora {

#define MEGALORA_IMPLEMENT_OPS_OF_CPU_AND_CUDA(device, m)                  \
  m.impl("dropout", masked<&device::dropout>);                             \
  m.impl("dropout_add_", masked<&device::dropout_add_>);                   \
  m.impl("swiglu_", &device::swiglu_);                                     \
  m.impl("swiglu_backward_", &device::swiglu_backward_);                   \
  m.impl("split_rope_", &device::split_rope_);                             \
  m.impl("split_rope_backward_", &device::split_rope_backward_);           \
  m.impl("cross_entropy_stats_", &device::cross_entropy_stats_);           \
  m.impl("cross_entropy_grad_", &device::cross_entropy_grad_);             \
  m.impl("lora_down_", masked<&device::lora_down_>);                       \
  m.impl("lora_down_weight_grad", masked<&device::lora_down_weight_grad>); \
  m.impl("lora_down_input_grad_", masked<&device::lora_down_input_grad_>); \
  m.impl("lora_up_weight_grad", &device::lora_up_weight_grad);             \
  m.impl("skinny_linear", &device::skinny_linear);                         \
  m.impl("decode_attention_", &device::decode_attention_)

TORCH_LIBRARY_IMPL(megalora, CPU, m) {
  MEGALORA_IMPLEMENT_OPS_OF_CPU_AND_CUDA(cpu, m);
  m.impl("rms_norm_", &cpu::rms_norm_);
  m.impl("rms_norm_backward_", &cpu::rms_norm_backward_);
  m.impl("attention_", &cpu::attention_);
  m.impl("attention_backward_", &cpu::attention_backward_);
  m.impl("tile_linear", &cpu::tile_linear);
}

#if defined(MEGALORA_CUDA)
TORCH_LIBRARY_IMPL(megalora, CUDA, m) {
  MEGALORA_IMPLEMENT_OPS_OF_CPU_AND_CUDA(cuda, m);
  m.impl("norm_", masked<&cuda::norm_>);
  m.impl("norm_backward_", masked<&cuda::norm_backward_>);
  m.impl("swiglu_lora_down_", masked<&cuda::swiglu_lora_down_>);
  m.impl("lora_backward_", masked<&cuda::lora_backward_>);
  m.impl("swiglu_lora_backward_", masked<&cuda::swiglu_lora_backward_>);
  m.impl("swiglu_lora_gradients_", masked<&cuda::swiglu_lora_gradients_>);
  m.impl("scaled_copy_", &cuda::scaled_copy_);
  m.impl("fp8_quantise_", &cuda::fp8_quantise_);
  m.impl("fp8_branch_", &cuda::fp8_branch_);
  m.impl("fp8_turn_", &cuda::fp8_turn_);
  m.impl("fp8_decode_", &cuda::fp8_decode_);
  m.impl("nf4_decode_", &cuda::nf4_decode_);
  m.impl("nf4_to_e4m3_", &cuda::nf4_to_e4m3_);
  m.impl("fp8_skinny_linear", &cuda::fp8_skinny_linear);
  m.impl("nf4_skinny_linear", &cuda::nf4_skinny_linear);
  m.impl("step_linear", &cuda::step_linear);
  m.impl("fp8_step_linear", &cuda::fp8_step_linear);
  m.impl("step_down_", &cuda::step_down_);
  m.impl("scale_columns_", &cuda::scale_columns_);
  m.impl("scale_columns_backward_", &cuda::scale_columns_backward_);
}
#endif

TORCH_LIBRARY_IMPL(megalora, Meta, m) {
  m.impl("dropout", masked<&meta::dropout>);
  m.impl("lora_down_weight_grad", masked<&meta::lora_down_weight_grad>);
  m.impl("lora_up_weight_grad", &meta::lora_up_weight_grad);
  m.impl("skinny_linear", &meta::skinny_linear);
  m.impl("tile_linear", &meta::skinny_linear);
  m.impl("fp8_skinny_linear", &meta::fp8_skinny_linear);
  m.impl("nf4_skinny_linear", &meta::nf4_skinny_linear);
  m.impl("step_linear", &meta::step_linear);
  m.impl("fp8_step_linear", &meta::fp8_step_linear);
  for (const char* name : {"dropout_add_",
                           "rms_norm_",
                           "rms_norm_backward_",
                           "norm_",
                           "norm_backward_",
                           "swiglu_",
                           "swiglu_backward_",
                           "split_rope_",
                           "split_rope_backward_",
                           "cross_entropy_stats_",
                           "cross_entropy_grad_",
                           "attention_",
                           "attention_backward_",
                           "lora_down_",
                           "lora_down_input_grad_",
                           "lora_backward_",
                           "swiglu_lora_down_",
                           "swiglu_lora_backward_",
                           "swiglu_lora_gradients_",
                           "scaled_copy_",
                           "decode_attention_",
                           "step_down_",
                           "fp8_quantise_",
                           "fp8_branch_",
                           "fp8_turn_",
                           "fp8_decode_",
                           "nf4_decode_",
                           "nf4_to_e4m3_",
                           "scale_columns_",
                           "scale_columns_backward_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&write_nothing>());
  }
}

}  // namespace megalora
