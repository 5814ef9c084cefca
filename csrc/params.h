// Parameters of the kernels of both devices: pointers, strides and sizes, and nothing of torch, so that nvcc alone can
// compile what includes this. An op (cpu/*.cpp, cuda/*_op.cpp) checks its tensors and fills them in.
//
// Strides count elements; the elements of a row are adjacent. On CUDA rows start on kAlignment bytes and their sizes
// are multiples of kOctet. "Wide" is the type of the arithmetic: float64 where the tensors are, else float32. What is
// computed is said in megalora/ops/*.py.
#pragma once

#include <cstdint>

#include "kernel_limits.h"
#include "mask.h"

namespace megalora {

enum class Type { float64, float32, bfloat16, float16 };

// The activation of an MLP that makes x, act(gate) * up or act(up); none: x is read.
enum class Gate { none, silu, gelu_tanh, gelu };

// A matrix by its rows.
struct Matrix {
  void* data;
  int64_t stride;
};

// [T, heads, D] by its strides.
struct Heads {
  void* data;
  int64_t count, token_stride, head_stride;
};

// out [T, F] = mask * scale * in, or out += that.
struct DropoutParams {
  Matrix in, out;
  Mask mask;
  int64_t tokens, features;
  bool accumulate;
  Type type;
};

// Where y is rounded: before the weight is applied, or behind it (`precise`), when the weight may be 1 + w (`offset`).
struct NormRounding {
  bool precise, offset;
};

// On the CPU (on CUDA: cuda/norm_params.h). sum = x + delta (delta null: sum is not written, x is normed); y = weight *
// sum * inverse; inverse [N] wide. Rows of delta and sum are `size` apart.
struct RmsNormParams {
  Matrix x, y;
  const void *delta, *weight;
  void *sum, *inverse;
  double eps;
  int64_t rows, size;
  NormRounding rounding;
  Type type;
};

// On the CPU. dx = d(rms_norm)(dy) + residual (null: none); inverse [N] wide. Rows of residual and dx are `size` apart.
struct RmsNormBackwardParams {
  Matrix dy, x;
  const void *weight, *inverse, *residual;
  void* dx;
  int64_t rows, size;
  NormRounding rounding;
  Type type;
};

// out [N, I] = act(gate) * up, gate_up [N, 2 I] contiguous, gate before up; or act(up), gate_up [N, I], if not `gated`.
struct SwiGluParams {
  const void* gate_up;
  Matrix out;
  int64_t rows, size;
  Gate gate;
  bool gated;
  Type type;
};

// grad, like gate_up, of dy [N, I].
struct SwiGluBackwardParams {
  Matrix dy;
  const void* gate_up;
  void* grad;
  int64_t rows, size;
  Gate gate;
  bool gated;
  Type type;
};

// x [N, O] = x * factors [O], float32, in place.
struct ColumnScaleParams {
  Matrix x;
  const float* factors;
  int64_t rows, size;
  Type type;
};

// dx [N, O] = dy * factors; sums [parts, O] (null: none) of dy * y over kColumnScaleRows rows each.
struct ColumnScaleBackwardParams {
  Matrix dy, y, dx;
  const float* factors;
  float* sums;
  int64_t rows, size;
  Type type;
};

// Between qkv [T, (H + 2 K) D] contiguous and its heads, q and k rotated by (cos, sin) [T, D / 2], contiguous;
// `backward` goes the other way and turns back.
struct SplitRopeParams {
  void* qkv;
  Heads q, k, v;
  const void *cos, *sin;
  int64_t tokens, head_dim;
  bool backward;
  Type type;
};

// What logits are made of, s: softcap * tanh(scale * s / softcap), or scale * s where softcap is 0. On the CPU s
// itself.
struct LogitForm {
  double scale, softcap;
};

// Over each row of logits [N, V] (V any size), made of `logits`: stats [3, N] wide = maximum, sum of exp(logit -
// maximum), logit of the label (0 where it is outside 0 .. V-1: it stands in another part of the vocabulary).
struct CrossEntropyStatsParams {
  LogitForm form;
  Matrix logits;
  const int64_t* label;
  void* stats;
  int64_t rows, vocab;
  Type type;
};

// logits = exp(logit - max) / total - (1 at the label), times the slope of what the logits are made of, in place; max,
// total [N] wide.
struct CrossEntropyGradParams {
  LogitForm form;
  Matrix logits;
  const int64_t* label;
  const void *max, *total;
  int64_t rows, vocab;
  Type type;
};

// What a linear of a few rows does beside its product, on CUDA (megalora/ops/step_linear.py). It reads norm(x + delta),
// and gives gate(the first half of its outputs) * the second half: y [M, O / 2].
struct BesideParams {
  const void *delta, *norm;  // delta [M, I], null: none; norm [I], RMSNorm's weight, null: x is read as it is
  void* sum;                 // x + delta [M, I], kept where there is a delta
  float eps;
  NormRounding rounding;
  Gate gate;  // none: y [M, O]
};

// X [M, I + C] = [norm(x + delta) | z | 0] with z = norm(x + delta) A^T, A [R, I]; a norm and a delta as BesideParams
// has them. Without a norm X's first I columns may be x themselves. 1 <= M <= kMostSkinnyRows.
struct StepDownParams {
  Matrix x, A, X;
  BesideParams beside;  // without a gate
  int64_t rows, in_features, rank, room;
  Type type;
};

// y [M, O] contiguous = x [M, I] weight [O, I]^T + bias [O] (null: none), summed in float32; 1 <= M <= kMostSkinnyRows.
struct SkinnyLinearParams {
  Matrix x, weight;
  const void* bias;
  void* y;
  int64_t rows, in_features, out_features;
  Type type;
  BesideParams beside;  // on CUDA
};

// codes [T, I + terms] e4m3, scale [T] float32: x [T, I] (times factor [I] float32, null: 1) = codes * scale, row by
// row. Behind x the terms of z [T, rank] times z_factor [rank] with the same scale (z null: none), see
// fp8.branch_terms_.
struct Fp8QuantiseParams {
  Matrix x, z;
  const float *factor, *z_factor;
  uint8_t* codes;  // rows are `columns` + `terms` apart
  float* scale;
  int64_t rows, columns, rank, terms;
  Type type;
};

// codes [O, terms] e4m3 of branch [O, rank] / scale [O] / factor [rank], and that factor; largest [rank]: zeros, for
// the largest of each column.
struct Fp8BranchParams {
  Matrix branch, codes;
  const float* scale;
  float *largest, *factor;
  int64_t rows, rank, terms;
  Type type;
};

// out [columns, rows] = in [rows, columns], of bytes; both sizes are multiples of kTurned.
struct TurnParams {
  Matrix in, out;
  int64_t rows, columns;
};

// out [rows, columns] = codes * scale [rows, blocks a row]: block (column + phase) / block of each row.
struct Fp8DecodeParams {
  Matrix codes, out;
  const float* scale;
  int64_t rows, columns, blocks, block, phase;
  Type type;
};

// out [rows, columns] of NF4 codes [rows, columns / 2], whose absmax [rows, columns / 64] are codes with scale, numbers
// and offset, or float32 (then `scale` is null). first: the number of the first block in the whole weight, of
// which a row has `width`. Parts of several weights may lie one below the other, alike in all that: `weight_rows` rows
// of each, with `scales` scales and an offset of its own.
struct Nf4DecodeParams {
  const uint8_t* codes;
  const void* absmax;
  const float *scale, *numbers, *offset;
  Matrix out;
  int64_t rows, columns, first, width, nested_block;
  int64_t weight_rows, scales;
  Type type;
};

// out [rows, columns + term_columns], or [columns, rows] where `turned`: e4m3 codes of NF4 values over row_scale
// [rows], powers of two, and behind them terms [rows, term_columns]. The values as Nf4DecodeParams has them, of one
// weight and with nested blocks of 2^nested_shift blocks.
struct Nf4ToE4m3Params {
  const uint8_t* codes;
  const void* absmax;
  const float *scale, *numbers, *offset, *row_scale;
  Matrix terms, out;
  int64_t rows, columns, term_columns, first, width, nested_shift;
  bool turned;
};

// y [M, O] contiguous = x [M, I + C] [codes * scale | branch]^T + bias [O] (null: none); codes [O, I] e4m3, scale [O]
// float32, branch [O, C]; 1 <= M <= kMostSkinnyRows. kept: no kernel has written codes and scale since long before.
struct Fp8SkinnyParams {
  Matrix x, codes, branch;
  const float* scale;
  const void* bias;
  void* y;
  int64_t rows, in_features, out_features, room;
  Type type;
  bool kept;
  BesideParams beside;  // a norm without a branch alone: room is 0
};

// Some outputs of an NF4 weight, as Nf4DecodeParams has them, with scales: from `first_output` on of those that are
// multiplied. Nested blocks have 2^nested_shift blocks. first_block, blocks: of the kernel's grid.
struct Nf4Part {
  const uint8_t *codes, *absmax;
  const float *scale, *numbers, *offset;
  int64_t outputs, first_output, first, width, nested_shift;
  int64_t first_block, blocks;
};

// As Fp8SkinnyParams, with `count` parts of NF4 one below the other; 1 <= M <= kMostNf4Rows.
struct Nf4SkinnyParams {
  Matrix x, branch;
  Nf4Part parts[kMostNf4Parts];
  const void* bias;
  void* y;
  int64_t count, rows, in_features, out_features, room;
  Type type;
};

// The attention of one new token of each of B sequences over a cache. q, out [B, H, D]; k, v [B, K, D]: their "tokens"
// are the sequences. `group` query heads read one key/value head; window 0: none.
struct DecodeAttentionParams {
  Heads q, k, v, out;                // out is contiguous on CUDA
  void *keys, *values;               // [S, K, C, D] contiguous
  const int64_t *slots, *positions;  // [B]
  int64_t sequences, kv_heads, group, capacity, head_dim, window;
  Type type;
  // On CUDA: q and k are rotated by (cos, sin) [B, D / 2], contiguous, before all else; null: they are as they come.
  const void *cos, *sin;
  // On CUDA: [B, K, splits, group, 2 + D]: largest score, sum of weights and weighted values of each part of the keys;
  // and how many parts of each head have arrived [B, K], zero before and behind.
  float* partial;
  int* arrived;
  int64_t splits;
};

}  // namespace megalora
