// Adds up what the blocks of lora_backward.cu have of the sums over tokens: dA, and dB of gate and up.
#include "cuda/factor_sums.h"

#include "cuda/clusters.h"

namespace megalora {
namespace {

// A thread has one rank and one feature at a time; what is transposed passes through shared memory.
constexpr int kTile = 32;

__global__ void __launch_bounds__(kTile * 8) finish_kernel(const __grid_constant__ FactorSums finish) {
  __shared__ float tile[16][kTile + 1];
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int first_row = 16 * blockIdx.y, first_feature = kTile * blockIdx.x, feature = first_feature + x;
  const int up_row = finish.rows - 16, first_transposed = finish.grads.gate.data == nullptr ? up_row : up_row - 16;
  const bool transposed = finish.grads.up.data != nullptr && first_row >= first_transposed;
  for (int i = y; i < 16; i += 8) {
    float total = 0;
    if (feature < finish.features) {
      const float* from = finish.sums + int64_t{first_row + i} * finish.features + feature;
#pragma unroll 4
      for (int block = 0; block < finish.blocks; ++block) total += from[int64_t{block} * finish.rows * finish.features];
    }
    if (transposed) {
      tile[i][x] = total;
      continue;
    }
    const int rank = first_row + i;
    if (rank >= finish.down_ranks || feature >= finish.features) continue;
    int part = 0, first = 0;
    while (rank >= first + finish.grads.down[part].ranks) first += finish.grads.down[part++].ranks;
    finish.grads.down[part].data[int64_t{rank - first} * finish.features + feature] += total * finish.down_scale;
  }
  if (!transposed) return;
  __syncthreads();
  const FactorGrad& factor = first_row == up_row ? finish.grads.up : finish.grads.gate;
  for (int i = threadIdx.x; i < factor.ranks * kTile; i += kTile * 8) {
    const int rank = i % factor.ranks, column = i / factor.ranks;
    if (first_feature + column >= finish.features) continue;
    factor.data[int64_t{first_feature + column} * factor.ranks + rank] += tile[rank][column] * factor.scaling;
  }
}

constexpr int64_t kMostTiles = 48;  // of all blocks of the same features: what they leave is written and read
constexpr int64_t kIdle = 64;       // a block costs as much as so many tokens besides its own

}  // namespace

int64_t factor_splits(int64_t tokens, int64_t features, int64_t tiles, int64_t tile_features, int64_t step_tokens) {
  int device = 0, sms = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const int64_t columns = divide_up(features, tile_features), step = step_tokens;
  int64_t best = 1, least = INT64_MAX;  // what fills the multiprocessors best
  for (int64_t splits = 1; splits <= kMostTiles / tiles && (splits == 1 || divide_up(tokens, splits) >= step);
       ++splits) {
    const int64_t waves = divide_up(columns * splits, sms);
    const int64_t time = waves * (divide_up(divide_up(tokens, splits), step) * step + kIdle);
    if (time < least) least = time, best = splits;
  }
  return best;
}

cudaError_t finish_factor_sums(const FactorSums& sums, int64_t tiles, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(sums.features, kTile)), static_cast<unsigned>(tiles));
  finish_kernel<<<grid, kTile * 8, 0, stream>>>(sums);
  return cudaGetLastError();
}

}  // namespace megalora
