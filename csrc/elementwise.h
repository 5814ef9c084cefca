// Launchers of the memory-bound kernels, csrc/*_cuda.cu: raw pointers and a stream (cudaStream_t as void*), so that no CUDA
// header is needed.
// Strides count elements. Every row that is read or written starts on 16 bytes, and sizes are multiples of 8.
#pragma once

#include <cstdint>

namespace megalora {

enum class Type { bfloat16, float16, float32 };

struct MaskSpec {
  uint32_t key0, site, step, threshold;
  const int64_t* live_step;  // where it is not null, the step is read there when the kernel runs
  int64_t feature_offset;
  float scale;
};

// out [T, F] = mask * scale * x, or out += that.
void launch_dropout(Type type, bool accumulate, const void* x, int64_t x_stride, void* out, int64_t out_stride,
                    const int64_t* token, int64_t tokens, int64_t features, MaskSpec mask, void* stream);

// sum = x + delta (delta null: sum is not written, x is normed); y = weight * sum * inverse; inverse [T].
void launch_rms_norm(Type type, const void* x, const void* delta, const void* weight, float eps, void* sum, void* y,
                     int64_t y_stride, float* inverse, int64_t rows, int64_t size, int64_t x_stride, void* stream);

// dx = d(rms_norm)(dy) + residual (null: none). x, residual, dx have rows of stride `size`.
void launch_rms_norm_backward(Type type, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                              const void* weight, const float* inverse, const void* residual, void* dx, int64_t rows,
                              int64_t size, void* stream);

// out [T, I] = silu(gate) * up with gate_up [T, 2 I], gate before up.
void launch_swiglu(Type type, const void* gate_up, void* out, int64_t out_stride, int64_t rows, int64_t size,
                   void* stream);
void launch_swiglu_backward(Type type, const void* dy, int64_t dy_stride, const void* gate_up, void* grad, int64_t rows,
                            int64_t size, void* stream);

// Cuts qkv [T, (H + 2 K) D] into heads and rotates q and k by (cos, sin) [T, D / 2]; `backward` goes the other way.
struct Heads {
  void* data;
  int64_t token_stride, head_stride;
};
void launch_split_rope(Type type, bool backward, void* qkv, Heads q, Heads k, Heads v, const void* cos, const void* sin,
                       int64_t tokens, int heads, int kv_heads, int head_dim, void* stream);

// Over each row of logits [N, V] (V any size): statistics [3, N] float32 = (max, sum of exp(logit - max), logit of the
// label, or 0 where it is not in this part of the vocabulary: label < 0 or >= V).
void launch_cross_entropy_stats(Type type, const void* logits, int64_t row_stride, const int64_t* label, float* stats,
                                int64_t rows, int64_t vocab, void* stream);
// logits = exp(logit - max) / total - (1 at the label), in place; max, total [N] float32.
void launch_cross_entropy_grad(Type type, void* logits, int64_t row_stride, const int64_t* label, const float* max,
                               const float* total, int64_t rows, int64_t vocab, void* stream);

}  // namespace megalora
