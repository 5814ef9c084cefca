// Quantised weights on a GPU: rows to e4m3, codes turned for the product of the backward pass, codes back to 16-bit
// floats. Every kernel is bound by memory: it reads and writes each byte once.
#include <cuda_fp8.h>

#include "cuda/decode_step.h"
#include "cuda/halves.h"
#include "cuda/launch.h"
#include "cuda/nf4.h"
#include "kernel_limits.h"

namespace megalora {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;
constexpr float kLargest = 448.0f;  // of e4m3

__device__ __forceinline__ uint32_t e4m3(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

__device__ __forceinline__ float2 e4m3_pair(uint32_t codes) {
  const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return __half22float2(__half2(pair));
}

// x as a sum of two numbers in e4m3: the second is the rounding error of the first.
struct Terms {
  uint8_t first, second;
};
__device__ __forceinline__ Terms terms_of(float x) {
  const __nv_fp8_storage_t first = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  const float rounded = __half2float(__half(__nv_cvt_fp8_to_halfraw(first, __NV_E4M3)));
  return {first, __nv_cvt_float_to_fp8(x - rounded, __NV_SATFINITE, __NV_E4M3)};
}

// ---- a block quantises a row, which it holds in registers: kHeld octets a thread

template <bool bfloat16, int kRowThreads, int kHeld>
__global__ void __launch_bounds__(kRowThreads) fp8_quantise_kernel(Fp8QuantiseParams params) {
  let_next_start();
  await_previous();
  const int64_t row = blockIdx.x;
  const auto* x = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(params.x.data) + row * params.x.stride);
  const auto* factor = reinterpret_cast<const float4*>(params.factor);
  const int octets = static_cast<int>(params.columns / 8);
  uint4 held[kHeld];
  float largest = 0.0f;
  const auto values = [&](int i, int at, float (&v)[8]) {
    unpack<bfloat16>(held[i], v);
    if (factor == nullptr) return;
    const float4 low = factor[2 * at], high = factor[2 * at + 1];
    v[0] *= low.x, v[1] *= low.y, v[2] *= low.z, v[3] *= low.w;
    v[4] *= high.x, v[5] *= high.y, v[6] *= high.z, v[7] *= high.w;
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = threadIdx.x + i * kRowThreads;
    if (at < octets) held[i] = x[at];
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = threadIdx.x + i * kRowThreads;
    if (at >= octets) break;
    float v[8];
    values(i, at, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(v[j]));
  }
  float z = 0.0f;
  if (threadIdx.x < params.rank) {
    z = widen<bfloat16>(params.z.data, row * params.z.stride + threadIdx.x) * params.z_factor[threadIdx.x];
    largest = fmaxf(largest, fabsf(z));
  }
  __shared__ float warps[kRowThreads / kLanes];
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
  }
  if (threadIdx.x % kLanes == 0) warps[threadIdx.x / kLanes] = largest;
  __syncthreads();
  largest = warps[threadIdx.x % (kRowThreads / kLanes)];
#pragma unroll
  for (int step = kRowThreads / kLanes / 2; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
  }
  const float inverse = largest == 0.0f ? 1.0f : kLargest / largest;
  if (threadIdx.x == 0) params.scale[row] = largest == 0.0f ? 1.0f : largest / kLargest;
  uint8_t* line = params.codes + row * (params.columns + params.terms);
  auto* codes = reinterpret_cast<uint2*>(line);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = threadIdx.x + i * kRowThreads;
    if (at >= octets) break;
    float v[8];
    values(i, at, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= inverse;
    codes[at] = {e4m3(v[0], v[1], v[2], v[3]), e4m3(v[4], v[5], v[6], v[7])};
  }
  line += params.columns;
  const int rank = static_cast<int>(params.rank);
  if (threadIdx.x < rank) {
    const Terms terms = terms_of(z * inverse);
    line[threadIdx.x] = line[rank + threadIdx.x] = terms.first;
    line[2 * rank + threadIdx.x] = terms.second;
  }
  for (int i = 3 * rank + threadIdx.x; i < params.terms; i += kRowThreads) line[i] = 0;
}

template <bool bfloat16>
void launch_rows(const Fp8QuantiseParams& params, cudaStream_t stream) {
  const auto launch = [&](auto kernel, int threads) {
    launch_following(kernel, dim3(static_cast<unsigned>(params.rows)), threads, params.rows, stream, params);
  };
  static_assert(kLargestFp8Row == 8 * 8 * 1024);
  const int64_t octets = params.columns / 8;
  if (octets <= 512) return launch(fp8_quantise_kernel<bfloat16, 512, 1>, 512);
  if (octets <= 2 * 512) return launch(fp8_quantise_kernel<bfloat16, 512, 2>, 512);
  if (octets <= 4 * 512) return launch(fp8_quantise_kernel<bfloat16, 512, 4>, 512);
  if (octets <= 4 * 1024) return launch(fp8_quantise_kernel<bfloat16, 1024, 4>, 1024);
  return launch(fp8_quantise_kernel<bfloat16, 1024, 8>, 1024);
}

// ---- the terms of a branch: the largest of each column, then the codes

constexpr int kBranchThreads = 256, kBranchRows = 128, kBranchColumns = 64;
constexpr float kTypical = 64.0f;  // as _TYPICAL in megalora/ops/fp8.py

template <bool bfloat16>
__global__ void __launch_bounds__(kBranchThreads) branch_largest_kernel(Fp8BranchParams params) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBranchRows, last = min(first + kBranchRows, params.rows);
  for (int64_t column = threadIdx.x % kBranchColumns; column < params.rank; column += kBranchColumns) {
    float largest = 0.0f;
    for (int64_t row = first + threadIdx.x / kBranchColumns; row < last; row += kBranchThreads / kBranchColumns) {
      const float v = widen<bfloat16>(params.branch.data, row * params.branch.stride + column) / params.scale[row];
      largest = fmaxf(largest, fabsf(v));
    }
    // Positive floats are ordered as their bits are.
    atomicMax(reinterpret_cast<int*>(params.largest) + column, __float_as_int(largest));
  }
}

template <bool bfloat16>
__global__ void __launch_bounds__(kBranchThreads) branch_terms_kernel(Fp8BranchParams params) {
  const int64_t padding = params.terms - 3 * params.rank, width = params.rank + padding;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kBranchThreads + threadIdx.x;
  const int64_t row = at / width, column = at % width;
  if (row >= params.rows) return;
  uint8_t* codes = static_cast<uint8_t*>(params.codes.data) + row * params.codes.stride;
  if (column >= params.rank) {
    codes[2 * params.rank + column] = 0;
    return;
  }
  const float largest = params.largest[column];
  const float factor = largest == 0.0f ? 1.0f : fmaxf(sqrtf(largest / kTypical) / 4, largest / kLargest);
  if (row == 0) params.factor[column] = factor;
  const float v = widen<bfloat16>(params.branch.data, row * params.branch.stride + column) / params.scale[row];
  const Terms terms = terms_of(v / factor);
  codes[column] = codes[2 * params.rank + column] = terms.first;
  codes[params.rank + column] = terms.second;
}

template <bool bfloat16>
void launch_branch(const Fp8BranchParams& params, cudaStream_t stream) {
  const auto blocks = [](int64_t work, int64_t each) { return static_cast<unsigned>((work + each - 1) / each); };
  branch_largest_kernel<bfloat16><<<blocks(params.rows, kBranchRows), kBranchThreads, 0, stream>>>(params);
  const int64_t width = params.terms - 2 * params.rank;
  branch_terms_kernel<bfloat16><<<blocks(params.rows * width, kBranchThreads), kBranchThreads, 0, stream>>>(params);
}

// ---- a block turns a square of kSquare x kSquare bytes, a thread 4 x 4 of it

constexpr int kSquare = 64, kWords = kSquare / 4;

__global__ void __launch_bounds__(kWords* kWords) turn_kernel(TurnParams params) {
  __shared__ uint32_t square[kSquare][kWords + 1];
  const auto* in = static_cast<const uint8_t*>(params.in.data);
  const int64_t left = static_cast<int64_t>(blockIdx.x) * kSquare, top = static_cast<int64_t>(blockIdx.y) * kSquare;
  const int down = threadIdx.x / kWords, across = threadIdx.x % kWords;
  const int64_t row = top + 4 * down, column = left + 4 * across;
  if (row < params.rows && column < params.columns) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = *reinterpret_cast<const uint32_t*>(in + (row + i) * params.in.stride + column);
    const uint32_t a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
    const uint32_t c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
    square[4 * across][down] = __byte_perm(a, b, 0x5410);
    square[4 * across + 1][down] = __byte_perm(a, b, 0x7632);
    square[4 * across + 2][down] = __byte_perm(c, d, 0x5410);
    square[4 * across + 3][down] = __byte_perm(c, d, 0x7632);
  }
  __syncthreads();
  const int line = threadIdx.x / 4, quarter = threadIdx.x % 4;
  if (left + line >= params.columns || top + 16 * quarter >= params.rows) return;
  const uint32_t* words = &square[line][4 * quarter];
  auto* out = static_cast<uint8_t*>(params.out.data) + (left + line) * params.out.stride + top + 16 * quarter;
  *reinterpret_cast<uint4*>(out) = {words[0], words[1], words[2], words[3]};
}

// ---- codes to 16-bit floats, eight a thread, kDecodedRows rows a block

constexpr int kDecodeThreads = 256, kDecodedRows = 8;

template <bool bfloat16>
__device__ __forceinline__ void write(const Matrix& out, int64_t row, int64_t column, const float (&v)[8]) {
  const uint4 words = {pack<bfloat16>(v[0], v[1]), pack<bfloat16>(v[2], v[3]), pack<bfloat16>(v[4], v[5]),
                       pack<bfloat16>(v[6], v[7])};
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out.data) + row * out.stride + column) = words;
}

template <bool bfloat16>
__global__ void __launch_bounds__(kDecodeThreads) fp8_decode_kernel(Fp8DecodeParams params) {
  const int64_t column = 8 * (static_cast<int64_t>(blockIdx.y) * kDecodeThreads + threadIdx.x);
  if (column >= params.columns) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDecodedRows;
  const auto* codes = static_cast<const uint8_t*>(params.codes.data) + column;
#pragma unroll
  for (int i = 0; i < kDecodedRows; ++i) {
    const int64_t row = first + i;
    if (row >= params.rows) return;
    const uint2 words = *reinterpret_cast<const uint2*>(codes + row * params.codes.stride);
    const float* scale = params.scale + row * params.blocks;
    float v[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = e4m3_pair((j < 2 ? words.x : words.y) >> (j % 2 * 16) & 0xFFFF);
      v[2 * j] = pair.x, v[2 * j + 1] = pair.y;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      v[j] *= scale[params.blocks == 1 ? 0 : (column + j + params.phase) / params.block];
    }
    write<bfloat16>(params.out, row, column, v);
  }
}

template <bool bfloat16>
__global__ void __launch_bounds__(kDecodeThreads) nf4_decode_kernel(Nf4DecodeParams params) {
  __shared__ float numbers[kNumbers], nested[kNestedNumbers];
  if (threadIdx.x < kNumbers) numbers[threadIdx.x] = kNf4[threadIdx.x];
  if (params.scale != nullptr && threadIdx.x < kNestedNumbers) nested[threadIdx.x] = params.numbers[threadIdx.x];
  __syncthreads();
  const int64_t column = 8 * (static_cast<int64_t>(blockIdx.y) * kDecodeThreads + threadIdx.x);
  if (column >= params.columns) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDecodedRows, blocks = params.columns / kBlock;
#pragma unroll
  for (int i = 0; i < kDecodedRows; ++i) {
    const int64_t row = first + i;
    if (row >= params.rows) return;
    const uint32_t word = *reinterpret_cast<const uint32_t*>(params.codes + (row * params.columns + column) / 2);
    const int64_t at = row * blocks + column / kBlock;
    float absmax;
    if (params.scale == nullptr) {
      absmax = static_cast<const float*>(params.absmax)[at];
    } else {  // rounded after each step, as in the reference
      const int64_t weight = row / params.weight_rows;
      const int64_t block = params.first + (row - weight * params.weight_rows) * params.width + column / kBlock;
      const float number = nested[static_cast<const uint8_t*>(params.absmax)[at]];
      const float scale = params.scale[weight * params.scales + block / params.nested_block];
      absmax = __fadd_rn(__fmul_rn(number, scale), params.offset[weight]);
    }
    float v[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // the first of two is in the high half of a byte
      v[2 * j] = numbers[word >> (8 * j + 4) & 15] * absmax;
      v[2 * j + 1] = numbers[word >> (8 * j) & 15] * absmax;
    }
    write<bfloat16>(params.out, row, column, v);
  }
}

dim3 decode_grid(int64_t rows, int64_t columns) {  // the second dimension has 65,535 blocks at most
  return {static_cast<unsigned>((rows + kDecodedRows - 1) / kDecodedRows),
          static_cast<unsigned>((columns / 8 + kDecodeThreads - 1) / kDecodeThreads)};
}

}  // namespace

void launch_fp8_quantise(const Fp8QuantiseParams& params, cudaStream_t stream) {
  return params.type == Type::bfloat16 ? launch_rows<true>(params, stream) : launch_rows<false>(params, stream);
}

void launch_fp8_branch(const Fp8BranchParams& params, cudaStream_t stream) {
  return params.type == Type::bfloat16 ? launch_branch<true>(params, stream) : launch_branch<false>(params, stream);
}

void launch_turn(const TurnParams& params, cudaStream_t stream) {
  const dim3 grid{static_cast<unsigned>((params.columns + kSquare - 1) / kSquare),
                  static_cast<unsigned>((params.rows + kSquare - 1) / kSquare)};
  turn_kernel<<<grid, kWords * kWords, 0, stream>>>(params);
}

void launch_fp8_decode(const Fp8DecodeParams& params, cudaStream_t stream) {
  const auto kernel = params.type == Type::bfloat16 ? fp8_decode_kernel<true> : fp8_decode_kernel<false>;
  kernel<<<decode_grid(params.rows, params.columns), kDecodeThreads, 0, stream>>>(params);
}

void launch_nf4_decode(const Nf4DecodeParams& params, cudaStream_t stream) {
  const auto kernel = params.type == Type::bfloat16 ? nf4_decode_kernel<true> : nf4_decode_kernel<false>;
  kernel<<<decode_grid(params.rows, params.columns), kDecodeThreads, 0, stream>>>(params);
}

}  // namespace megalora
