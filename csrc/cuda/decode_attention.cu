// The attention of one new token of each of a few sequences over a cache, on a GPU. Bound by what it reads once: keys
// and values. Its grids depend on shapes alone, so that a CUDA graph can hold them; lengths are read on the device.
//
// A block takes a part of the keys of one sequence and key/value head, for all queries that read it. D / 8 lanes, a
// team, hold kAhead keys at a time; online softmax (Milakov and Gimelshein 2018) in each team, then over the teams of
// the block, then, by the block that arrives last, over the parts.
//
// Slots, positions and the keys and values of earlier tokens are not written by the kernels of a step: they are read
// before the kernel before has ended.
#include <algorithm>

#include "cuda/decode_step.h"
#include "cuda/halves.h"
#include "cuda/launch.h"
#include "kernel_limits.h"

namespace megalora {
namespace {

constexpr int kLanes = 32;
constexpr int kAttentionThreads = 128;
constexpr int kAhead = 4;          // keys of a team that are under way
constexpr int kSmallestPart = 32;  // keys; smaller parts leave teams idle
constexpr int kMostParts = 64;     // of the keys of one sequence and head
constexpr unsigned kAllLanes = 0xFFFFFFFF;

template <int D>
struct Teams {
  static constexpr int lanes = D / 8, count = kAttentionThreads / lanes;
  static constexpr int stride = kAhead * count;  // keys from one round of a team to the next
};

// What a team has of the softmax of each of G queries: of eight features a lane.
template <int G>
struct Softmax {
  float sum[G][8], largest[G], total[G];
};

// Keys or values of a team: eight features a lane.
using Held = uint4[kAhead];

// The eight features of a lane of one team, of a head at `from`, rotated where there are angles and rounded.
template <int D, bool bfloat16>
__device__ __forceinline__ uint4 turned(const DecodeAttentionParams& params, const uint16_t* from, int sequence,
                                        int member) {
  const auto* octets = reinterpret_cast<const uint4*>(from);
  if (params.cos == nullptr) return octets[member];
  constexpr int kHalf = Teams<D>::lanes / 2;  // lanes of the first half of a head
  const bool second = member >= kHalf;
  const int64_t angle = int64_t{sequence} * kHalf + member % kHalf;
  float x[8], partner[8], cosine[8], sine[8];
  unpack<bfloat16>(octets[member], x);
  unpack<bfloat16>(octets[second ? member - kHalf : member + kHalf], partner);
  unpack<bfloat16>(static_cast<const uint4*>(params.cos)[angle], cosine);
  unpack<bfloat16>(static_cast<const uint4*>(params.sin)[angle], sine);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = x[i] * cosine[i] + (second ? partner[i] : -partner[i]) * sine[i];
  return {pack<bfloat16>(x[0], x[1]), pack<bfloat16>(x[2], x[3]), pack<bfloat16>(x[4], x[5]),
          pack<bfloat16>(x[6], x[7])};
}

// Keeps the new token's key and value in the cache: eight features a lane of one team.
template <int D, bool bfloat16>
__device__ __forceinline__ void keep_token(const DecodeAttentionParams& params, uint16_t* keys, uint16_t* values,
                                           int sequence, int kv_head, int position, int member) {
  const auto* k =
      static_cast<const uint16_t*>(params.k.data) + sequence * params.k.token_stride + kv_head * params.k.head_stride;
  const auto* v =
      static_cast<const uint16_t*>(params.v.data) + sequence * params.v.token_stride + kv_head * params.v.head_stride;
  const int64_t place = static_cast<int64_t>(position) * D;
  reinterpret_cast<uint4*>(keys + place)[member] = turned<D, bfloat16>(params, k, sequence, member);
  reinterpret_cast<uint4*>(values + place)[member] = reinterpret_cast<const uint4*>(v)[member];
}

// Takes `count` keys of this team into its softmax; q is scaled. Values beyond them are finite.
template <int G, int D, bool bfloat16>
__device__ __forceinline__ void take_keys(Softmax<G>& softmax, const float (&q)[G][8], const Held& keys,
                                          const Held& values, int count) {
  constexpr int kTeam = Teams<D>::lanes;
  const unsigned teammates =
      kTeam == kLanes ? kAllLanes : ((1u << kTeam) - 1) << (threadIdx.x % kLanes / kTeam * kTeam);
  float scores[kAhead][G];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    float key[8];
    unpack<bfloat16>(keys[u], key);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      scores[u][g] = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[u][g] = fmaf(q[g][i], key[i], scores[u][g]);
    }
  }
#pragma unroll
  for (int step = kTeam / 2; step > 0; step /= 2) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
#pragma unroll
      for (int g = 0; g < G; ++g) scores[u][g] += __shfl_xor_sync(teammates, scores[u][g], step);
    }
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float now = softmax.largest[g];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (u >= count) scores[u][g] = -INFINITY;
      now = fmaxf(now, scores[u][g]);
    }
    const float shrink = __expf(softmax.largest[g] - now);
    softmax.largest[g] = now;
    softmax.total[g] *= shrink;
#pragma unroll
    for (int i = 0; i < 8; ++i) softmax.sum[g][i] *= shrink;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      scores[u][g] = __expf(scores[u][g] - now);
      softmax.total[g] += scores[u][g];
    }
  }
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    float value[8];
    unpack<bfloat16>(values[u], value);
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int i = 0; i < 8; ++i) softmax.sum[g][i] = fmaf(scores[u][g], value[i], softmax.sum[g][i]);
    }
  }
}

// What the parts of a softmax have: n of each of G queries.
template <int n, int G>
struct Parts {
  float largest[n][G], total[n][G];  // total becomes the share of a part in the whole
};

// Makes `total` of n parts the factor of their sums; returns, by query, the largest score and the total of all that
// thread g has to tell.
template <int n, int G>
__device__ __forceinline__ float2 share(Parts<n, G>& parts, int count) {
  float most = -INFINITY, all = 0;
  if (threadIdx.x < G) {
    const int g = threadIdx.x;
    for (int p = 0; p < count; ++p) most = fmaxf(most, parts.largest[p][g]);
    for (int p = 0; p < count; ++p) {
      const float factor = __expf(parts.largest[p][g] - most);  // 0 of a part that had no key
      all += parts.total[p][g] * factor;
      parts.total[p][g] = factor;
    }
  }
  __syncthreads();
  return {most, all};
}

// Return whether this block is the last of those of its sequence and head that comes here.
__device__ __forceinline__ bool arrives_last(int* arrived, int parts) {
  __shared__ bool last;
  __threadfence();  // what this thread has written is seen by whoever sees that the block has arrived
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrived, 1) == parts - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Merges the softmax of `parts` parts of the keys, those from `first` on of partial [parts, G, 2 + D], into out [G, D].
template <int G, int D, bool bfloat16>
__device__ __forceinline__ void merge_parts(uint16_t* out, const float* first, int parts) {
  constexpr int kStride = G * (2 + D), kEach = (G * D + kAttentionThreads - 1) / kAttentionThreads;
  __shared__ Parts<kMostParts, G> all;
  __shared__ float totals[G];
  for (int i = threadIdx.x; i < parts * G; i += kAttentionThreads) {  // past L1: of other multiprocessors
    const float* own = first + i / G * kStride + i % G * (2 + D);
    all.largest[i / G][i % G] = __ldcg(own);
    all.total[i / G][i % G] = __ldcg(own + 1);
  }
  __syncthreads();
  const float2 found = share(all, parts);
  if (threadIdx.x < G) totals[threadIdx.x] = found.y;
  __syncthreads();
  float sums[kEach] = {};
#pragma unroll 4
  for (int p = 0; p < parts; ++p) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x + e * kAttentionThreads;
      if (i < G * D) sums[e] += __ldcg(first + p * kStride + i / D * (2 + D) + 2 + i % D) * all.total[p][i / D];
    }
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = threadIdx.x + e * kAttentionThreads;
    if (i < G * D) narrow<bfloat16>(out, i, sums[e] / totals[i / D]);
  }
}

// Merges the teams' softmax: into out [G, D] where the block has all keys, else into partial [G, 2 + D].
template <int G, int D, bool bfloat16>
__device__ __forceinline__ void merge_teams(float* partial, uint16_t* out, const Softmax<G>& softmax, bool has_all) {
  constexpr int kTeams = Teams<D>::count;
  const int team = threadIdx.x / Teams<D>::lanes, member = threadIdx.x % Teams<D>::lanes;
  __shared__ Parts<kTeams, G> all;
  __shared__ float4 sums[kTeams][G * D / 4];
  __shared__ float totals[G];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const auto& sum = softmax.sum[g];
    float4* place = sums[team] + (g * D + member * 8) / 4;
    place[0] = {sum[0], sum[1], sum[2], sum[3]};
    place[1] = {sum[4], sum[5], sum[6], sum[7]};
    if (member == 0) {
      all.largest[team][g] = softmax.largest[g];
      all.total[team][g] = softmax.total[g];
    }
  }
  __syncthreads();
  const float2 found = share(all, kTeams);
  if (threadIdx.x < G) {
    totals[threadIdx.x] = found.y;
    partial[threadIdx.x * (2 + D)] = found.x;
    partial[threadIdx.x * (2 + D) + 1] = found.y;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < G * D; i += kAttentionThreads) {
    float merged = 0;
#pragma unroll
    for (int t = 0; t < kTeams; ++t) merged += reinterpret_cast<const float*>(sums[t])[i] * all.total[t][i / D];
    if (has_all) {
      narrow<bfloat16>(out, i, merged / totals[i / D]);
    } else {
      partial[i / D * (2 + D) + 2 + i % D] = merged;
    }
  }
}

template <int G, int D, bool bfloat16>
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(DecodeAttentionParams params) {
  let_next_start();
  using Team = Teams<D>;
  const int split = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z;
  const int team = threadIdx.x / Team::lanes, member = threadIdx.x % Team::lanes;
  const int position = static_cast<int>(params.positions[sequence]);
  const int length = static_cast<int>((params.capacity + params.splits - 1) / params.splits);
  const int oldest = params.window > 0 ? max(0, position + 1 - static_cast<int>(params.window)) : 0;
  const int begin = max(split * length, oldest), end = min((split + 1) * length, position + 1);
  const int first_part = oldest / length, parts = position / length + 1 - first_part;  // those that have keys
  const int64_t head = (params.slots[sequence] * params.kv_heads + kv_head) * params.capacity * D;
  uint16_t* keys = static_cast<uint16_t*>(params.keys) + head;
  uint16_t* values = static_cast<uint16_t*>(params.values) + head;
  Held key, value;
  const auto load = [&](int u, int j) {
    const int64_t place = static_cast<int64_t>(j) * D;
    key[u] = reinterpret_cast<const uint4*>(keys + place)[member];
    value[u] = reinterpret_cast<const uint4*>(values + place)[member];
  };
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    const int j = begin + team + u * Team::count;
    key[u] = value[u] = {0, 0, 0, 0};
    if (j < min(end, position)) load(u, j);
  }
  await_previous();
  if (begin >= end) return;
  // The part that ends with the new token keeps it.
  if (position < end && team == 0) keep_token<D, bfloat16>(params, keys, values, sequence, kv_head, position, member);
  __syncthreads();

  const float scale = rsqrtf(static_cast<float>(D));
  float q[G][8];
  Softmax<G> softmax = {};
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const auto* query = static_cast<const uint16_t*>(params.q.data) + sequence * params.q.token_stride +
                        (kv_head * G + g) * params.q.head_stride;
    unpack<bfloat16>(turned<D, bfloat16>(params, query, sequence, member), q[g]);
    softmax.largest[g] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 8; ++i) q[g][i] *= scale;
  }
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (begin + team + u * Team::count == position && position < end) load(u, position);
  }
  for (int start = begin + team; start < end; start += Team::stride) {
    const int count = (end - start + Team::count - 1) / Team::count;
    Held now_key, now_value;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      now_key[u] = key[u];
      now_value[u] = value[u];
      const int next = start + Team::stride + u * Team::count;
      if (next < end) load(u, next);
    }
    take_keys<G, D, bfloat16>(softmax, q, now_key, now_value, count);
  }
  float* all = params.partial + (sequence * params.kv_heads + kv_head) * params.splits * G * (2 + D);
  auto* out = static_cast<uint16_t*>(params.out.data) + (sequence * params.kv_heads + kv_head) * G * D;
  merge_teams<G, D, bfloat16>(all + split * G * (2 + D), out, softmax, parts == 1);
  if (parts == 1 || !arrives_last(params.arrived + sequence * params.kv_heads + kv_head, parts)) return;
  merge_parts<G, D, bfloat16>(out, all + first_part * G * (2 + D), parts);
}

template <int G, int D>
void launch_group(const DecodeAttentionParams& params, cudaStream_t stream) {
  const dim3 parts(static_cast<unsigned>(params.splits), static_cast<unsigned>(params.kv_heads),
                   static_cast<unsigned>(params.sequences));
  const bool bfloat16 = params.type == Type::bfloat16;
  const auto attention = bfloat16 ? attention_kernel<G, D, true> : attention_kernel<G, D, false>;
  launch_following(attention, parts, kAttentionThreads, params.sequences, stream, params);
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
  const int64_t most = std::min<int64_t>(kMostParts, (capacity + kSmallestPart - 1) / kSmallestPart);
  return std::max<int64_t>(1, std::min(wanted, most));
}

void launch_decode_attention(const DecodeAttentionParams& params, cudaStream_t stream) {
  if (params.head_dim == kSmallHeadDim) return launch_groups<kSmallHeadDim>(params, stream);
  if (params.head_dim == kLargeHeadDim) return launch_groups<kLargeHeadDim>(params, stream);
}

}  // namespace megalora
