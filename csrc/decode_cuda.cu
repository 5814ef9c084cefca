// One new token of each of a few sequences, on a GPU. Both kernels are bound by what they read, once: weights, or keys
// and values. Their grids depend on shapes alone, so that a CUDA graph can hold them; lengths are read on the device.
#include "decode_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "halves.h"

namespace megalora {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAll = 0xFFFFFFFF;

template <bool bfloat16>
__device__ __forceinline__ float widen(const void* from, int64_t i) {
  if constexpr (bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
  return __half2float(static_cast<const __half*>(from)[i]);
}

template <bool bfloat16>
__device__ __forceinline__ void narrow(void* to, int64_t i, float x) {
  if constexpr (bfloat16) {
    static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(x);
  } else {
    static_cast<__half*>(to)[i] = __float2half_rn(x);
  }
}

// The weight is read once and by nobody else soon.
__device__ __forceinline__ uint4 stream(const uint4* from) {
  uint4 words;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
      : "l"(from));
  return words;
}

// ---- skinny_linear: a warp makes kOutputs outputs of each row of x

constexpr int kWarps = 8, kOutputs = 2, kUnrolled = 4;

struct Skinny {
  void* y;
  const uint16_t *x, *weight;
  const void* bias;
  int64_t x_stride, weight_stride, in_features, out_features;
};

template <int M, bool bfloat16>
__global__ void __launch_bounds__(kWarps* kLanes) skinny_kernel(Skinny job) {
  const int lane = threadIdx.x % kLanes;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes) * kOutputs;
  if (first >= job.out_features) return;
  const uint4* weights[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const int64_t row = min(first + o, job.out_features - 1);
    weights[o] = reinterpret_cast<const uint4*>(job.weight + row * job.weight_stride);
  }
  float sums[kOutputs][M] = {};
  const int octets = static_cast<int>(job.in_features / 8);
  int at = lane;
  for (; at + (kUnrolled - 1) * kLanes < octets; at += kUnrolled * kLanes) {
    uint4 words[kUnrolled][kOutputs];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) words[u][o] = stream(weights[o] + at + u * kLanes);
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float x[8];
        unpack<bfloat16>(*(reinterpret_cast<const uint4*>(job.x + m * job.x_stride) + at + u * kLanes), x);
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
          float w[8];
          unpack<bfloat16>(words[u][o], w);
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[o][m] = fmaf(w[i], x[i], sums[o][m]);
        }
      }
    }
  }
  for (; at < octets; at += kLanes) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      float w[8];
      unpack<bfloat16>(stream(weights[o] + at), w);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float x[8];
        unpack<bfloat16>(*(reinterpret_cast<const uint4*>(job.x + m * job.x_stride) + at), x);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[o][m] = fmaf(w[i], x[i], sums[o][m]);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float total = sums[o][m];
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(kAll, total, step);
      if (lane == 0 && first + o < job.out_features) {
        if (job.bias != nullptr) total += widen<bfloat16>(job.bias, first + o);
        narrow<bfloat16>(job.y, m * job.out_features + first + o, total);
      }
    }
  }
}

template <int M>
cudaError_t launch_skinny(const Skinny& job, bool bfloat16, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((job.out_features + kWarps * kOutputs - 1) / (kWarps * kOutputs));
  if (bfloat16) {
    skinny_kernel<M, true><<<blocks, kWarps * kLanes, 0, stream>>>(job);
  } else {
    skinny_kernel<M, false><<<blocks, kWarps * kLanes, 0, stream>>>(job);
  }
  return cudaGetLastError();
}

// ---- decode_attention: a block takes a part of the keys of one sequence and key/value head, for all queries that read
// it. D / 8 lanes hold one key; online softmax (Milakov and Gimelshein 2018) in each such team, then over the teams of
// the block, then (reduce_kernel) over the parts.

constexpr int kAttentionThreads = 128;
constexpr int kSmallestPart = 64;

template <int G, int D, bool bfloat16>
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(DecodeAttention job) {
  constexpr int kTeam = D / 8, kTeams = kAttentionThreads / kTeam;
  const int split = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z;
  const int position = static_cast<int>(job.positions[sequence]);
  const int length = static_cast<int>((job.capacity + job.splits - 1) / job.splits);
  const int oldest = job.window > 0 ? max(0, position + 1 - static_cast<int>(job.window)) : 0;
  const int begin = max(split * length, oldest), end = min((split + 1) * length, position + 1);
  float* partial = job.partial + ((sequence * job.kv_heads + kv_head) * job.splits + split) * G * (2 + D);
  if (begin >= end) {
    for (int g = threadIdx.x; g < G; g += kAttentionThreads) {
      partial[g * (2 + D)] = -INFINITY;
      partial[g * (2 + D) + 1] = 0;
    }
    return;
  }
  const int team = threadIdx.x / kTeam, member = threadIdx.x % kTeam;
  const int64_t head = (job.slots[sequence] * job.kv_heads + kv_head) * job.capacity * D;
  uint16_t* keys = static_cast<uint16_t*>(job.keys) + head;
  uint16_t* values = static_cast<uint16_t*>(job.values) + head;
  if (position < end && team == 0) {  // the part that ends with the new token keeps it
    const auto* k = static_cast<const uint16_t*>(job.k.data) + sequence * job.k.sequence + kv_head * job.k.head;
    const auto* v = static_cast<const uint16_t*>(job.v.data) + sequence * job.v.sequence + kv_head * job.v.head;
    reinterpret_cast<uint4*>(keys + static_cast<int64_t>(position) * D)[member] = reinterpret_cast<const uint4*>(k)[member];
    reinterpret_cast<uint4*>(values + static_cast<int64_t>(position) * D)[member] = reinterpret_cast<const uint4*>(v)[member];
  }
  __syncthreads();

  const float scale = rsqrtf(static_cast<float>(D));
  float q[G][8], sum[G][8] = {}, largest[G], total[G] = {};
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const auto* query =
        static_cast<const uint16_t*>(job.q.data) + sequence * job.q.sequence + (kv_head * G + g) * job.q.head;
    unpack<bfloat16>(reinterpret_cast<const uint4*>(query)[member], q[g]);
    largest[g] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 8; ++i) q[g][i] *= scale;
  }
  const unsigned teammates = kTeam == kLanes ? kAll : ((1u << kTeam) - 1) << (threadIdx.x % kLanes / kTeam * kTeam);
  for (int j = begin + team; j < end; j += kTeams) {
    float key[8], value[8];
    const uint4 key_words = reinterpret_cast<const uint4*>(keys + static_cast<int64_t>(j) * D)[member];
    const uint4 value_words = reinterpret_cast<const uint4*>(values + static_cast<int64_t>(j) * D)[member];
    unpack<bfloat16>(key_words, key);
    unpack<bfloat16>(value_words, value);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float score = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) score = fmaf(q[g][i], key[i], score);
#pragma unroll
      for (int step = kTeam / 2; step > 0; step /= 2) score += __shfl_xor_sync(teammates, score, step);
      const float now = fmaxf(largest[g], score);
      const float shrink = __expf(largest[g] - now), weight = __expf(score - now);
      largest[g] = now;
      total[g] = total[g] * shrink + weight;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[g][i] = sum[g][i] * shrink + weight * value[i];
    }
  }

  __shared__ float all_largest[kTeams][G], all_total[kTeams][G], all_sum[kTeams][D];
  if (member == 0) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      all_largest[team][g] = largest[g];
      all_total[team][g] = total[g];
    }
  }
  __syncthreads();
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float most = -INFINITY;
    for (int t = 0; t < kTeams; ++t) most = fmaxf(most, all_largest[t][g]);
    const float share = __expf(largest[g] - most);  // 0 of a team that had no key
#pragma unroll
    for (int i = 0; i < 8; ++i) all_sum[team][member * 8 + i] = sum[g][i] * share;
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += kAttentionThreads) {
      float merged = 0;
      for (int t = 0; t < kTeams; ++t) merged += all_sum[t][d];
      partial[g * (2 + D) + 2 + d] = merged;
    }
    if (threadIdx.x == 0) {
      float merged = 0;
      for (int t = 0; t < kTeams; ++t) merged += all_total[t][g] * __expf(all_largest[t][g] - most);
      partial[g * (2 + D)] = most;
      partial[g * (2 + D) + 1] = merged;
    }
    __syncthreads();
  }
}

template <bool bfloat16>
__global__ void reduce_kernel(DecodeAttention job) {
  const int dim = static_cast<int>(job.dim), d = threadIdx.x, head = blockIdx.x;
  const int64_t sequence = blockIdx.y, kv_head = head / job.group, g = head % job.group;
  const int64_t stride = job.group * (2 + dim);
  const float* partial =
      job.partial + (sequence * job.kv_heads + kv_head) * job.splits * stride + g * (2 + dim);
  float most = -INFINITY, total = 0, sum = 0;
  for (int s = 0; s < job.splits; ++s) most = fmaxf(most, partial[s * stride]);
  for (int s = 0; s < job.splits; ++s) {
    const float share = __expf(partial[s * stride] - most);
    if (share > 0) {  // a part without keys left its values unset
      total += partial[s * stride + 1] * share;
      sum += partial[s * stride + 2 + d] * share;
    }
  }
  narrow<bfloat16>(job.out, (sequence * job.kv_heads * job.group + head) * dim + d, sum / total);
}

template <int G, int D>
cudaError_t launch_attention(const DecodeAttention& job, bool bfloat16, cudaStream_t stream) {
  const dim3 parts(static_cast<unsigned>(job.splits), static_cast<unsigned>(job.kv_heads),
                   static_cast<unsigned>(job.sequences));
  const dim3 heads(static_cast<unsigned>(job.kv_heads * job.group), static_cast<unsigned>(job.sequences));
  if (bfloat16) {
    attention_kernel<G, D, true><<<parts, kAttentionThreads, 0, stream>>>(job);
    reduce_kernel<true><<<heads, D, 0, stream>>>(job);
  } else {
    attention_kernel<G, D, false><<<parts, kAttentionThreads, 0, stream>>>(job);
    reduce_kernel<false><<<heads, D, 0, stream>>>(job);
  }
  return cudaGetLastError();
}

template <int D>
cudaError_t launch_attention(const DecodeAttention& job, bool bfloat16, cudaStream_t stream) {
  switch (job.group) {
    case 1: return launch_attention<1, D>(job, bfloat16, stream);
    case 2: return launch_attention<2, D>(job, bfloat16, stream);
    case 3: return launch_attention<3, D>(job, bfloat16, stream);
    case 4: return launch_attention<4, D>(job, bfloat16, stream);
    case 5: return launch_attention<5, D>(job, bfloat16, stream);
    case 6: return launch_attention<6, D>(job, bfloat16, stream);
    case 7: return launch_attention<7, D>(job, bfloat16, stream);
    case 8: return launch_attention<8, D>(job, bfloat16, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_skinny_linear(void* y, const void* x, int64_t x_stride, const void* weight, int64_t weight_stride,
                                 const void* bias, int64_t rows, int64_t in_features, int64_t out_features,
                                 bool bfloat16, cudaStream_t stream) {
  const Skinny job{y,        static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(weight), bias,
                   x_stride, weight_stride,                   in_features,                          out_features};
  switch (rows) {
    case 1: return launch_skinny<1>(job, bfloat16, stream);
    case 2: return launch_skinny<2>(job, bfloat16, stream);
    case 3: return launch_skinny<3>(job, bfloat16, stream);
    case 4: return launch_skinny<4>(job, bfloat16, stream);
    default: return cudaErrorInvalidValue;
  }
}

int64_t decode_splits(int64_t sequences, int64_t kv_heads, int64_t capacity) {
  constexpr int64_t kBlocks = 4 * 132;  // a few for each multiprocessor of a large GPU
  const int64_t wanted = std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, sequences * kv_heads));
  return std::max<int64_t>(1, std::min(wanted, (capacity + kSmallestPart - 1) / kSmallestPart));
}

cudaError_t launch_decode_attention(const DecodeAttention& job, bool bfloat16, cudaStream_t stream) {
  if (job.dim == 64) return launch_attention<64>(job, bfloat16, stream);
  if (job.dim == 128) return launch_attention<128>(job, bfloat16, stream);
  return cudaErrorInvalidValue;
}

}  // namespace megalora
