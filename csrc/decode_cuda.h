// Launchers of the decoding kernels: plain pointers and a stream. What each computes is in megalora/ops/matmul.py and
// megalora/ops/decode_attention.py. All numbers are bfloat16 or float16; sums are float32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace megalora {

constexpr int64_t kMostSkinnyRows = 4;
constexpr int64_t kMostQueriesPerHead = 8;

// y [rows, out_features] = x [rows, in_features] weight [out_features, in_features]^T + bias. Rows of x and weight lie on
// 16 bytes, in_features is a multiple of 8; bias may be null; 1 <= rows <= kMostSkinnyRows.
cudaError_t launch_skinny_linear(void* y, const void* x, int64_t x_stride, const void* weight, int64_t weight_stride,
                                 const void* bias, int64_t rows, int64_t in_features, int64_t out_features,
                                 bool bfloat16, cudaStream_t stream);

// Strides in elements: of a sequence and of a head.
struct DecodeHeads {
  const void* data;
  int64_t sequence, head;
};

struct DecodeAttention {
  DecodeHeads q, k, v;
  void* out;                        // [B, H, D], contiguous
  void *keys, *values;              // [S, K, C, D], contiguous
  const int64_t *slots, *positions; // [B]
  float* partial;                   // [B, K, splits, group, 2 + D]: largest score, sum of weights, weighted values
  int64_t sequences, kv_heads, group, capacity, dim, window, splits;
};

// How many parts the keys of one sequence and head are cut into, for a cache of this capacity: fixed by shapes alone.
int64_t decode_splits(int64_t sequences, int64_t kv_heads, int64_t capacity);

// dim is 64 or 128, group at most kMostQueriesPerHead.
cudaError_t launch_decode_attention(const DecodeAttention& job, bool bfloat16, cudaStream_t stream);

}  // namespace megalora
