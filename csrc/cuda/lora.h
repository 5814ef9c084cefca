// Launchers of the LoRA kernels. What the parameters mean is said in lora_params.h; all are for bfloat16 or float16.
#pragma once

#include <cuda_runtime_api.h>

#include "lora_params.h"

namespace megalora {

cudaError_t launch_lora_down(const LoraDownParams& params, cudaStream_t stream);
cudaError_t launch_lora_weight_grad(const LoraWeightGradParams& params, cudaStream_t stream);
cudaError_t launch_lora_input_grad(const LoraInputGradParams& params, cudaStream_t stream);

cudaError_t launch_lora_backward(const LoraBackwardParams& params, cudaStream_t stream);
// How many elements of `sums` that wants.
int64_t lora_backward_sums(const LoraBackwardParams& params);

}  // namespace megalora
