// Launchers of the memory-bound kernels, cuda/*.cu. What the parameters mean is said in params.h.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace megalora {

void launch_dropout(const DropoutParams& params, cudaStream_t stream);
void launch_swiglu(const SwiGluParams& params, cudaStream_t stream);
void launch_swiglu_backward(const SwiGluBackwardParams& params, cudaStream_t stream);
void launch_scale_columns(const ColumnScaleParams& params, cudaStream_t stream);
void launch_scale_columns_backward(const ColumnScaleBackwardParams& params, cudaStream_t stream);
void launch_split_rope(const SplitRopeParams& params, cudaStream_t stream);
void launch_cross_entropy_stats(const CrossEntropyStatsParams& params, cudaStream_t stream);
void launch_cross_entropy_grad(const CrossEntropyGradParams& params, cudaStream_t stream);

// bfloat16 or float16.
void launch_fp8_quantise(const Fp8QuantiseParams& params, cudaStream_t stream);
void launch_fp8_branch(const Fp8BranchParams& params, cudaStream_t stream);
void launch_turn(const TurnParams& params, cudaStream_t stream);
void launch_fp8_decode(const Fp8DecodeParams& params, cudaStream_t stream);
void launch_nf4_decode(const Nf4DecodeParams& params, cudaStream_t stream);
void launch_nf4_to_e4m3(const Nf4ToE4m3Params& params, cudaStream_t stream);
void launch_fp8_skinny(const Fp8SkinnyParams& params, cudaStream_t stream);
void launch_nf4_skinny(Nf4SkinnyParams params, cudaStream_t stream);  // sets the blocks of the parts

// bfloat16 or float16.
void launch_step_down(const StepDownParams& params, cudaStream_t stream);
void launch_skinny_linear(const SkinnyLinearParams& params, cudaStream_t stream);

// bfloat16 or float16; heads of kSmallHeadDim or kLargeHeadDim, group at most kMostQueriesPerHead.
void launch_decode_attention(const DecodeAttentionParams& params, cudaStream_t stream);
// How many parts the keys of one sequence and head are cut into, for a cache of this capacity: fixed by shapes alone.
int64_t decode_splits(int64_t sequences, int64_t kv_heads, int64_t capacity);

}  // namespace megalora
