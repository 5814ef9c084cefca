// The attention of one new token of each of a few sequences over a cache, on a GPU. Bound by what it reads once: keys
// and values. Its grids depend on shapes alone, so that a CUDA graph can hold them; lengths are read on the device.
//
// A block takes a part of the keys of one sequence and key/value head, for all queries that read it. D / 8 lanes, a
// team, hold one key; online softmax (Milakov and Gimelshein 2018) in each team, then over the teams of the block, then
// (reduce_kernel) over the parts.
#include <algorithm>

#include "cuda/decode_step.h"
#include "cuda/halves.h"
#include "cuda/launch.h"
#include "kernel_limits.h"

namespace megalora {
namespace {

constexpr int kLanes = 32;
constexpr int kAttentionThreads = 128;
constexpr int kSmallestPart = 64;  // keys; smaller parts leave teams idle
constexpr unsigned kAllLanes = 0xFFFFFFFF;

template <int D>
struct Teams {
  static constexpr int lanes = D / 8, count = kAttentionThreads / lanes;
};

// What a team has of the softmax of each of G queries: of eight features a lane.
template <int G>
struct Softmax {
  float sum[G][8], largest[G], total[G];
};

// Keeps the new token's key and value in the cache: eight features a lane of one team.
template <int D>
__device__ __forceinline__ void keep_token(const DecodeAttentionParams& params, uint16_t* keys, uint16_t* values,
                                           int sequence, int kv_head, int position, int member) {
  const auto* k =
      static_cast<const uint16_t*>(params.k.data) + sequence * params.k.token_stride + kv_head * params.k.head_stride;
  const auto* v =
      static_cast<const uint16_t*>(params.v.data) + sequence * params.v.token_stride + kv_head * params.v.head_stride;
  const int64_t place = static_cast<int64_t>(position) * D;
  reinterpret_cast<uint4*>(keys + place)[member] = reinterpret_cast<const uint4*>(k)[member];
  reinterpret_cast<uint4*>(values + place)[member] = reinterpret_cast<const uint4*>(v)[member];
}

// Takes the keys [begin, end) of this team into its softmax; q is scaled.
template <int G, int D, bool bfloat16>
__device__ __forceinline__ void take_keys(Softmax<G>& softmax, const float (&q)[G][8], const uint16_t* keys,
                                          const uint16_t* values, int begin, int end) {
  constexpr int kTeam = Teams<D>::lanes, kTeams = Teams<D>::count;
  const int team = threadIdx.x / kTeam, member = threadIdx.x % kTeam;
  const unsigned teammates =
      kTeam == kLanes ? kAllLanes : ((1u << kTeam) - 1) << (threadIdx.x % kLanes / kTeam * kTeam);
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
      const float now = fmaxf(softmax.largest[g], score);
      const float shrink = __expf(softmax.largest[g] - now), weight = __expf(score - now);
      softmax.largest[g] = now;
      softmax.total[g] = softmax.total[g] * shrink + weight;
#pragma unroll
      for (int i = 0; i < 8; ++i) softmax.sum[g][i] = softmax.sum[g][i] * shrink + weight * value[i];
    }
  }
}

// Merges the teams' softmax into that of the block: partial [G, 2 + D].
template <int G, int D>
__device__ __forceinline__ void merge_teams(float* partial, const Softmax<G>& softmax) {
  constexpr int kTeams = Teams<D>::count;
  const int team = threadIdx.x / Teams<D>::lanes, member = threadIdx.x % Teams<D>::lanes;
  __shared__ float all_largest[kTeams][G], all_total[kTeams][G], all_sum[kTeams][D];
  if (member == 0) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      all_largest[team][g] = softmax.largest[g];
      all_total[team][g] = softmax.total[g];
    }
  }
  __syncthreads();
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float most = -INFINITY;
    for (int t = 0; t < kTeams; ++t) most = fmaxf(most, all_largest[t][g]);
    const float share = __expf(softmax.largest[g] - most);  // 0 of a team that had no key
#pragma unroll
    for (int i = 0; i < 8; ++i) all_sum[team][member * 8 + i] = softmax.sum[g][i] * share;
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

template <int G, int D, bool bfloat16>
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(DecodeAttentionParams params) {
  let_next_start();
  await_previous();
  constexpr int kTeam = Teams<D>::lanes;
  const int split = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z;
  const int position = static_cast<int>(params.positions[sequence]);
  const int length = static_cast<int>((params.capacity + params.splits - 1) / params.splits);
  const int oldest = params.window > 0 ? max(0, position + 1 - static_cast<int>(params.window)) : 0;
  const int begin = max(split * length, oldest), end = min((split + 1) * length, position + 1);
  float* partial = params.partial + ((sequence * params.kv_heads + kv_head) * params.splits + split) * G * (2 + D);
  if (begin >= end) {
    for (int g = threadIdx.x; g < G; g += kAttentionThreads) {
      partial[g * (2 + D)] = -INFINITY;
      partial[g * (2 + D) + 1] = 0;
    }
    return;
  }
  const int team = threadIdx.x / kTeam, member = threadIdx.x % kTeam;
  const int64_t head = (params.slots[sequence] * params.kv_heads + kv_head) * params.capacity * D;
  uint16_t* keys = static_cast<uint16_t*>(params.keys) + head;
  uint16_t* values = static_cast<uint16_t*>(params.values) + head;
  // The part that ends with the new token keeps it.
  if (position < end && team == 0) keep_token<D>(params, keys, values, sequence, kv_head, position, member);
  __syncthreads();

  const float scale = rsqrtf(static_cast<float>(D));
  float q[G][8];
  Softmax<G> softmax = {};
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const auto* query = static_cast<const uint16_t*>(params.q.data) + sequence * params.q.token_stride +
                        (kv_head * G + g) * params.q.head_stride;
    unpack<bfloat16>(reinterpret_cast<const uint4*>(query)[member], q[g]);
    softmax.largest[g] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 8; ++i) q[g][i] *= scale;
  }
  take_keys<G, D, bfloat16>(softmax, q, keys, values, begin, end);
  merge_teams<G, D>(partial, softmax);
}

template <bool bfloat16>
__global__ void reduce_kernel(DecodeAttentionParams params) {
  let_next_start();
  await_previous();
  const int dim = static_cast<int>(params.head_dim), d = threadIdx.x, head = blockIdx.x;
  const int64_t sequence = blockIdx.y, kv_head = head / params.group, g = head % params.group;
  const int64_t stride = params.group * (2 + dim);
  const float* partial =
      params.partial + (sequence * params.kv_heads + kv_head) * params.splits * stride + g * (2 + dim);
  float most = -INFINITY, total = 0, sum = 0;
  for (int s = 0; s < params.splits; ++s) most = fmaxf(most, partial[s * stride]);
  for (int s = 0; s < params.splits; ++s) {
    const float share = __expf(partial[s * stride] - most);
    if (share > 0) {  // a part without keys left its values unset
      total += partial[s * stride + 1] * share;
      sum += partial[s * stride + 2 + d] * share;
    }
  }
  narrow<bfloat16>(params.out.data, (sequence * params.kv_heads * params.group + head) * dim + d, sum / total);
}

template <int G, int D>
void launch_group(const DecodeAttentionParams& params, cudaStream_t stream) {
  const dim3 parts(static_cast<unsigned>(params.splits), static_cast<unsigned>(params.kv_heads),
                   static_cast<unsigned>(params.sequences));
  const dim3 heads(static_cast<unsigned>(params.kv_heads * params.group), static_cast<unsigned>(params.sequences));
  const bool bfloat16 = params.type == Type::bfloat16;
  const auto attention = bfloat16 ? attention_kernel<G, D, true> : attention_kernel<G, D, false>;
  const auto reduce = bfloat16 ? reduce_kernel<true> : reduce_kernel<false>;
  launch_following(attention, parts, kAttentionThreads, params.sequences, stream, params);
  launch_following(reduce, heads, D, params.sequences, stream, params);
}

template <int D>
void launch_groups(const DecodeAttentionParams& params, cudaStream_t stream) {
  static_assert(kMostQueriesPerHead == 8);
  switch (params.group) {
    case 1: return launch_group<1, D>(params, stream);
    case 2: return launch_group<2, D>(params, stream);
    case 3: return launch_group<3, D>(params, stream);
    case 4: return launch_group<4, D>(params, stream);
    case 5: return launch_group<5, D>(params, stream);
    case 6: return launch_group<6, D>(params, stream);
    case 7: return launch_group<7, D>(params, stream);
    case 8: return launch_group<8, D>(params, stream);
  }
}

}  // namespace

int64_t decode_splits(int64_t sequences, int64_t kv_heads, int64_t capacity) {
  constexpr int64_t kBlocks = 4 * 132;  // a few for each multiprocessor of a large GPU
  const int64_t wanted = std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, sequences * kv_heads));
  return std::max<int64_t>(1, std::min(wanted, (capacity + kSmallestPart - 1) / kSmallestPart));
}

void launch_decode_attention(const DecodeAttentionParams& params, cudaStream_t stream) {
  if (params.head_dim == kSmallHeadDim) return launch_groups<kSmallHeadDim>(params, stream);
  if (params.head_dim == kLargeHeadDim) return launch_groups<kLargeHeadDim>(params, stream);
}

}  // namespace megalora
