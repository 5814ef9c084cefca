// Softmax cross entropy: one block a row.
#include "cuda/launch.h"
#include "cuda/vectors.h"

namespace megalora {
namespace {

constexpr int kLossThreads = 1024;

__device__ __forceinline__ void merge(float& max, float& sum, float other_max, float other_sum) {
  const float top = fmaxf(max, other_max);
  sum = (sum == 0.f ? 0.f : sum * __expf(max - top)) + (other_sum == 0.f ? 0.f : other_sum * __expf(other_max - top));
  max = top;
}

template <typename T>
__global__ void cross_entropy_stats_kernel(const __grid_constant__ CrossEntropyStatsParams params) {
  __shared__ float maxima[32], sums[32];
  constexpr int each = Vector<T>::size;
  const int64_t row = blockIdx.x;
  const int64_t rows = params.rows, vocab = params.vocab;
  const T* line = static_cast<const T*>(params.logits.data) + row * params.logits.stride;
  float max = -INFINITY, sum = 0;
  for (int64_t at = int64_t{threadIdx.x} * each; at < vocab; at += kLossThreads * each) {
    Vector<T> v;
    const int count = vocab - at < each ? static_cast<int>(vocab - at) : each;
    if (count == each) {
      v = load(line + at);
    } else {
      for (int j = 0; j < count; ++j) v.at[j] = line[at + j];
    }
    float top = -INFINITY;
    for (int j = 0; j < each; ++j) {
      if (j < count) top = fmaxf(top, to_float(v.at[j]));
    }
    float part = 0;
    for (int j = 0; j < each; ++j) {
      const float x = to_float(v.at[j]);
      if (j < count) part += x == top ? 1.f : __expf(x - top);
    }
    if (top > -INFINITY || isnan(part)) merge(max, sum, top, part);  // where all are -inf they add nothing
  }
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    merge(max, sum, __shfl_down_sync(0xFFFFFFFF, max, offset), __shfl_down_sync(0xFFFFFFFF, sum, offset));
  }
  if (threadIdx.x % 32 == 0) {
    maxima[threadIdx.x / 32] = max;
    sums[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kLossThreads / 32; ++warp) merge(max, sum, maxima[warp], sums[warp]);
    const int64_t place = params.label[row];
    auto* stats = static_cast<float*>(params.stats);
    stats[row] = max;
    stats[rows + row] = sum;
    stats[2 * rows + row] = place >= 0 && place < vocab ? to_float(line[place]) : 0.f;
  }
}

template <typename T>
__global__ void cross_entropy_grad_kernel(const __grid_constant__ CrossEntropyGradParams params) {
  constexpr int each = Vector<T>::size;
  const int64_t row = blockIdx.x;
  const int64_t vocab = params.vocab;
  T* line = static_cast<T*>(params.logits.data) + row * params.logits.stride;
  const float top = static_cast<const float*>(params.max)[row];
  const float inverse = 1.f / static_cast<const float*>(params.total)[row];
  const int64_t place = params.label[row];
  constexpr int ahead = 4;  // loads in flight before the first store, which they may not pass
  for (int64_t first = int64_t{threadIdx.x} * each; first < vocab; first += ahead * kLossThreads * each) {
    Vector<T> v[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      const int64_t at = first + k * kLossThreads * each;
      if (at + each <= vocab) {
        v[k] = load(line + at);
      } else {
        for (int j = 0; j < each; ++j) v[k].at[j] = at + j < vocab ? line[at + j] : from_float<T>(0.f);
      }
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      const int64_t at = first + k * kLossThreads * each;
#pragma unroll
      for (int j = 0; j < each; ++j) {
        v[k].at[j] = from_float<T>(__expf(to_float(v[k].at[j]) - top) * inverse - (at + j == place ? 1.f : 0.f));
      }
      if (at + each <= vocab) {
        store(line + at, v[k]);
      } else {
        for (int j = 0; j < each; ++j) {
          if (at + j < vocab) line[at + j] = v[k].at[j];
        }
      }
    }
  }
}

}  // namespace

void launch_cross_entropy_stats(const CrossEntropyStatsParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    cross_entropy_stats_kernel<decltype(zero)><<<static_cast<unsigned>(params.rows), kLossThreads, 0, stream>>>(params);
  });
}

void launch_cross_entropy_grad(const CrossEntropyGradParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    cross_entropy_grad_kernel<decltype(zero)><<<static_cast<unsigned>(params.rows), kLossThreads, 0, stream>>>(params);
  });
}

}  // namespace megalora
