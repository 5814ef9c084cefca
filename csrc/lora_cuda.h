// Launchers of the LoRA kernels: plain pointers and a stream. What each computes is in megalora/ops/lora_linear.py.
//
// T tokens, F features, R the rank. Matrices are bfloat16 or float16 with adjacent columns; strides are elements
// between rows. Base pointers are 16-byte aligned; strides, F, R and feature offsets are multiples of 8; R <= 192.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace megalora {

constexpr int64_t kLargestRank = 192;
constexpr int64_t kLargestRankGatedDown = 64;      // where launch_lora_down makes x
constexpr int64_t kLargestRankBackward = 48;       // of launch_lora_backward
constexpr int64_t kLargestRankGatedBackward = 16;  // of launch_swiglu_lora_backward, each of the three
constexpr int64_t kLargestParts = 4;               // branches that read one input

// What a dropout mask depends on (megalora/ops/dropout.py). threshold 0: nothing is dropped and nothing is drawn.
struct LoraMask {
  const int64_t* token;  // [T]
  uint32_t key, site, step;
  const int64_t* live_step;  // where it is not null, the step is read there when a kernel runs
  uint32_t first_block;  // feature_offset / 8
  uint32_t threshold;
};

// z [T, z_columns] = dropout(x [T, F]) A [R, F]^T, and zeros in the columns from R on; copy [T, F] = x where not null.
// With gate_up [T, 2 F], contiguous, gate before up: x = silu(gate) * up, made into `copy` (x is not read; R <= 64).
cudaError_t launch_lora_down(void* z, int64_t z_stride, int64_t z_columns, const void* x, int64_t x_stride, void* copy,
                             int64_t copy_stride, const void* gate_up, const void* A, int64_t tokens, int64_t features,
                             int64_t rank, const LoraMask& mask, bool bfloat16, cudaStream_t stream);

// out = scaling * dz [T, R]^T dropout(x [T, F]) in float32: [R, F], or [F, R] if `transposed`; contiguous.
cudaError_t launch_lora_weight_grad(float* out, bool transposed, float scaling, const void* dz, int64_t dz_stride,
                                    const void* x, int64_t x_stride, int64_t tokens, int64_t features, int64_t rank,
                                    const LoraMask& mask, bool bfloat16, cudaStream_t stream);

// out [T, F] = dx [T, F] + dropout's mask and scale * (dz [T, R] A [R, F]); out may be dx.
//
// Where x = silu(gate) * up, with gate_up [T, 2 F] and gate before up, and gate_up is not null: that sum goes on to
// grad [T, 2 F], the gradient of gate_up, and out is not written; x is made again where it is not null, and is 0 where it
// is dropped. All contiguous.
struct SwiGluMade {
  const void* gate_up;
  void *grad, *x;
};
cudaError_t launch_lora_down_input_grad(void* out, int64_t out_stride, const void* dx, int64_t dx_stride, const void* dz,
                                        int64_t dz_stride, const void* A, int64_t tokens, int64_t features,
                                        int64_t rank, const LoraMask& mask, const SwiGluMade& made, bool bfloat16,
                                        cudaStream_t stream);

// What the gradient of one factor is added to: float32, contiguous; ranks 0: there is none.
struct FactorGrad {
  float* data;
  int ranks;
  float scaling;
};
struct FactorGrads {
  FactorGrad down[kLargestParts];  // [ranks, F] each: of the branches that read x, in the order of dz's columns
  FactorGrad gate, up;             // [F, ranks]
};

// Both want room for what their blocks sum up, in float32: so many elements.
int64_t sums_of_lora_backward(int64_t tokens, int64_t features, int64_t rank);
int64_t sums_of_swiglu_lora_backward(int64_t tokens, int64_t features);

// out [T, F] = dx + mask * scale * (dz A), out may be dx; and down += dz^T dropout(x).
cudaError_t launch_lora_backward(void* out, int64_t out_stride, const void* dx, int64_t dx_stride, const void* x,
                                 int64_t x_stride, const void* dz, int64_t dz_stride, const void* A, int64_t tokens,
                                 int64_t features, int64_t rank, const LoraMask& mask, const FactorGrads& grads,
                                 float* sums, bool bfloat16, cudaStream_t stream);

// The same where x = silu(gate) * up is made again from gate_up [T, 2 F] and the sum goes on to grad [T, 2 F], its
// gradient; and gate += s dgate^T z[:, : ranks of gate], up += s dup^T z[:, those of gate : and of up]. gate_up and
// grad are contiguous.
cudaError_t launch_swiglu_lora_backward(void* grad, const void* gate_up, const void* dx, int64_t dx_stride,
                                        const void* z, int64_t z_stride, const void* dz, int64_t dz_stride,
                                        const void* A, int64_t tokens, int64_t features, int64_t rank,
                                        const LoraMask& mask, const FactorGrads& grads, float* sums, bool bfloat16,
                                        cudaStream_t stream);

}  // namespace megalora
