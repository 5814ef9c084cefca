// The sums over tokens of lora_backward.cu: each block of its grid leaves what it has of them, finish_factor_sums adds
// up.
#pragma once

#include <cuda_runtime_api.h>

#include "lora_params.h"

namespace megalora {

struct FactorSums {
  const float* sums;  // [blocks, rows, features]
  int blocks, rows, features;
  int down_ranks;  // the first rows are of dA, cut into grads.down; with gate and up, or up, the last are theirs, 16
                   // each
  float down_scale;
  FactorGrads grads;
};

// In how many parts the tokens are cut, where a block has tile_features features, takes step_tokens tokens at a time
// and leaves `tiles` sums of sixteen ranks each.
int64_t factor_splits(int64_t tokens, int64_t features, int64_t tiles, int64_t tile_features, int64_t step_tokens);

// Adds up the blocks' sums, in order, and adds them to the gradients. `tiles` of sixteen rows are looked at.
cudaError_t finish_factor_sums(const FactorSums& sums, int64_t tiles, cudaStream_t stream);

}  // namespace megalora
