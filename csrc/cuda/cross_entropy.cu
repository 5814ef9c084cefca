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

// A logit of what it is made of, and its slope there.
template <bool capped>
struct Former {
  float scale, cap, inverse_cap, inner;  // inner: 2 scale / cap

  explicit Former(const LogitForm& form)
      : scale(static_cast<float>(form.scale)),
        cap(static_cast<float>(form.softcap)),
        inverse_cap(capped ? static_cast<float>(1 / form.softcap) : 0.f),
        inner(capped ? static_cast<float>(2 * form.scale / form.softcap) : 0.f) {}

  // tanh(scale * s / cap) = 1 - 2 / (1 + exp(2 scale s / cap)), within rounding of 1.
  __device__ __forceinline__ float tanh_of(float s) const { return 1.f - __fdividef(2.f, 1.f + __expf(inner * s)); }
  __device__ __forceinline__ float logit(float s) const { return capped ? cap * tanh_of(s) : scale * s; }
  __device__ __forceinline__ float slope(float logit) const {
    const float t = logit * inverse_cap;
    return capped ? scale * (1.f - t * t) : scale;
  }
};

template <typename T, bool capped>
__global__ void cross_entropy_stats_kernel(const __grid_constant__ CrossEntropyStatsParams params,
                                           const Former<capped> former) {
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
#pragma unroll
      for (int j = 0; j < each; ++j) v.at[j] = line[j < count ? at + j : at];
    }
    float x[each], top = -INFINITY, part = 0;
#pragma unroll
    for (int j = 0; j < each; ++j) {
      x[j] = former.logit(to_float(v.at[j]));
      if (j < count) top = fmaxf(top, x[j]);
    }
#pragma unroll
    for (int j = 0; j < each; ++j) {
      if (j < count) part += x[j] == top ? 1.f : __expf(x[j] - top);
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
    stats[2 * rows + row] = place >= 0 && place < vocab ? former.logit(to_float(line[place])) : 0.f;
  }
}

template <typename T, bool capped>
__global__ void cross_entropy_grad_kernel(const __grid_constant__ CrossEntropyGradParams params,
                                          const Former<capped> former) {
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
        const float x = former.logit(to_float(v[k].at[j]));
        const float d = __expf(x - top) * inverse - (at + j == place ? 1.f : 0.f);
        v[k].at[j] = from_float<T>(d * former.slope(x));
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

template <typename Body>
void with_form(const LogitForm& form, Body body) {
  form.softcap == 0 ? body(Former<false>(form)) : body(Former<true>(form));
}

}  // namespace

void launch_cross_entropy_stats(const CrossEntropyStatsParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    with_form(params.form, [&](const auto& former) {
      cross_entropy_stats_kernel<decltype(zero)>
          <<<static_cast<unsigned>(params.rows), kLossThreads, 0, stream>>>(params, former);
    });
  });
}

void launch_cross_entropy_grad(const CrossEntropyGradParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    with_form(params.form, [&](const auto& former) {
      cross_entropy_grad_kernel<decltype(zero)>
          <<<static_cast<unsigned>(params.rows), kLossThreads, 0, stream>>>(params, former);
    });
  });
}

}  // namespace megalora
