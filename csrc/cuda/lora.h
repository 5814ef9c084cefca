// Launchers of the LoRA kernels. What the parameters mean is said in lora_params.h; all are for bfloat16 or float16.
#pragma once

#include <cuda_runtime_api.h>

#include "lora_params.h"

namespace megalora {

cudaError_t launch_lora_down(const LoraDownParams& params, cudaStream_t stream);
cudaError_t launch_lora_weight_grad(const LoraWeightGradParams& params, cudaStream_t stream);
cudaError_t launch_lora_input_grad(const LoraInputGradParams& params, cudaStream_t stream);

cudaError_t launch_lora_backward(const LoraBackwardParams& params, cudaStream_t stream);
// How many elements of `sums` that wants; `gated`: with gate_up.
int64_t lora_backward_sums(int64_t tokens, int64_t features, int64_t rank, bool gated);

}  // namespace megalora
