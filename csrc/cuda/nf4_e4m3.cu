// NF4 codes to e4m3 codes with a scale a row, for products in e4m3: as they lie, or turned for the product of the
// backward pass. Bound by memory: half a byte a value is read and one written.
//
// The 16 numbers of NF4 times the absmax of a block of 64 are 16 bytes in e4m3, a table of four registers: the lanes
// that share a block make a word of it each and pass it round, and byte permutes look the values up.
#include <cuda_fp8.h>

#include "cuda/decode_step.h"
#include "cuda/launch.h"
#include "cuda/nf4.h"
#include "kernel_limits.h"

namespace megalora {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;
constexpr int kCodes = 16, kSharing = kBlock / kCodes;  // of a lane at a time; lanes of one block
static_assert(kSharing == 4 && kNumbers == 4 * kSharing);

// Sixteen codes and what the largest value of their block is made of, in each of `count` rows that follow each other.
// All loads of a thread are under way before the first is waited for.
template <bool nested, int count>
struct Rows {
  uint2 codes[count];
  float row_scale[count], stored[count], scale[count];

  __device__ __forceinline__ Rows(const Nf4ToE4m3Params& params, unsigned row, unsigned column) {
    const unsigned columns = static_cast<unsigned>(params.columns), across = columns / kBlock, block = column / kBlock;
    const uint8_t* line = params.codes + (row * across + block) * (kBlock / 2) + column % kBlock / 2;
    const float* row_scales = params.row_scale + row;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      codes[i] = *reinterpret_cast<const uint2*>(line + i * (columns / 2));
      row_scale[i] = row_scales[i];
    }
    if constexpr (nested) {
      const auto* absmax = static_cast<const uint8_t*>(params.absmax) + row * across + block;
      const unsigned width = static_cast<unsigned>(params.width);
      const unsigned place = static_cast<unsigned>(params.first) + row * width + block;
      unsigned code[count];
#pragma unroll
      for (int i = 0; i < count; ++i) {
        code[i] = absmax[i * across];
        scale[i] = params.scale[(place + i * width) >> params.nested_shift];
      }
#pragma unroll
      for (int i = 0; i < count; ++i) stored[i] = params.numbers[code[i]];
    } else {
      const auto* absmax = static_cast<const float*>(params.absmax) + row * across + block;
#pragma unroll
      for (int i = 0; i < count; ++i) stored[i] = absmax[i * across];
    }
  }
  // In units of the row's scale, a power of two: its inverse by the exponent. Rounded after each step, as in the
  // reference.
  __device__ __forceinline__ float largest(int i, float offset) const {
    const float inverse = __uint_as_float(0x7F000000 - __float_as_uint(row_scale[i]));
    return __fmul_rn(nested ? __fadd_rn(__fmul_rn(stored[i], scale[i]), offset) : stored[i], inverse);
  }
};

template <bool nested>
__device__ __forceinline__ float offset_of(const Nf4ToE4m3Params& params) {
  if constexpr (nested) return *params.offset;
  return 0.0f;
}

// Four of the numbers, those of a lane: the q-th of the lanes that share a block.
struct Numbers {
  float at[4];
  __device__ __forceinline__ explicit Numbers(int q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i] = kNf4[4 * q + i];
  }
  // All sixteen times `largest` in e4m3. All lanes of a warp come here together.
  __device__ __forceinline__ uint4 table(float largest) const {
    const float2 low{__fmul_rn(at[0], largest), __fmul_rn(at[1], largest)};
    const float2 high{__fmul_rn(at[2], largest), __fmul_rn(at[3], largest)};
    const uint32_t word = __nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3) |
                          static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3)) << 16;
    const auto of = [&](int lane) { return __shfl_sync(kAllLanes, word, lane, kSharing); };
    return {of(0), of(1), of(2), of(3)};
  }
};

// Eight codes of NF4, the first of two in the high half of a byte, by a table.
__device__ __forceinline__ uint2 look_up(uint32_t word, const uint4& table) {
  const uint32_t codes = (word >> 4 & 0x0F0F0F0F) | (word << 4 & 0xF0F0F0F0);  // the first in the lowest bits
  // Three bits of a code say which byte of half a table, and the fourth, which half.
  const uint32_t bytes = codes & 0x77777777, halves = (codes >> 1 & 0x44444444) | 0x32103210;
  const auto four = [&](uint32_t bytes, uint32_t halves) {
    return __byte_perm(__byte_perm(table.x, table.y, bytes), __byte_perm(table.z, table.w, bytes), halves);
  };
  return {four(bytes, halves), four(bytes >> 16, halves >> 16)};
}

// Sixteen codes.
__device__ __forceinline__ uint4 look_up(const uint2& codes, const uint4& table) {
  const uint2 low = look_up(codes.x, table), high = look_up(codes.y, table);
  return {low.x, low.y, high.x, high.y};
}

// ---- as they lie: a thread takes 16 columns of kRows rows, or copies 16 terms of the branch behind them

constexpr int kThreads = 256, kRows = kLeastNf4ToE4m3Rows;
constexpr int kResident = 2048 / kThreads;  // blocks of a multiprocessor: with more rows a thread there would be fewer

template <bool nested>
__global__ void __launch_bounds__(kThreads, kResident) nf4_to_e4m3_kernel(Nf4ToE4m3Params params, unsigned across) {
  await_previous();
  const unsigned unit = blockIdx.x * kThreads + threadIdx.x, columns = static_cast<unsigned>(params.columns);
  // The last rows may be done twice. Lanes with nothing to decode read the last codes: all lanes go on together.
  const unsigned row = min(unit / across * kRows, static_cast<unsigned>(params.rows) - kRows);
  const unsigned column = unit % across * kCodes;
  const Numbers numbers(threadIdx.x % kSharing);
  const float offset = offset_of<nested>(params);
  const Rows<nested, kRows> rows(params, row, min(column, columns - kCodes));
  uint8_t* out = static_cast<uint8_t*>(params.out.data) + row * params.out.stride + column;
  const auto* terms = static_cast<const uint8_t*>(params.terms.data) + row * params.terms.stride + (column - columns);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const uint4 words = look_up(rows.codes[i], numbers.table(rows.largest(i, offset)));
    auto* to = reinterpret_cast<uint4*>(out + i * params.out.stride);
    if (column < columns) {
      *to = words;
    } else if (column - columns < params.term_columns) {
      *to = *reinterpret_cast<const uint4*>(terms + i * params.terms.stride);
    }
  }
}

// ---- turned: a block takes a square of kSquare x kSquare values, a thread 16 columns of four rows

constexpr unsigned kSquare = 128, kQuads = kSquare / 4, kAcross = kSquare / kCodes;
constexpr unsigned kTurnThreads = kQuads * kAcross;

// Where in a column's words, each of four rows, the quad-th lies: rotated by the chunk of 16 columns, so that the lanes
// of a warp, four chunks of eight quads, write into banks of their own, and 16 bytes of a column stay together.
__device__ __forceinline__ unsigned place_of(unsigned chunk, unsigned quad) { return (quad + 8 * chunk) % kQuads; }

template <bool nested>
__global__ void __launch_bounds__(kTurnThreads, kResident) nf4_to_e4m3_turned_kernel(Nf4ToE4m3Params params) {
  await_previous();
  alignas(16) __shared__ uint32_t square[kSquare][kQuads];
  const unsigned rows = static_cast<unsigned>(params.rows), columns = static_cast<unsigned>(params.columns);
  const unsigned left = blockIdx.x * kSquare, top = blockIdx.y * kSquare, thread = threadIdx.x, warp = thread / kLanes;
  const unsigned quad = warp % 4 * 8 + thread % kLanes / kSharing, chunk = warp / 4 * kSharing + thread % kSharing;
  const Numbers numbers(thread % kSharing);
  const float offset = offset_of<nested>(params);
  // Beyond the end some others, which are not written: all lanes go on together.
  const Rows<nested, 4> four(params, min(top + 4 * quad, rows - 4), min(left + kCodes * chunk, columns - kCodes));
  uint4 w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = look_up(four.codes[i], numbers.table(four.largest(i, offset)));
  const unsigned place = place_of(chunk, quad);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const auto word = [&](int i) { return j == 0 ? w[i].x : j == 1 ? w[i].y : j == 2 ? w[i].z : w[i].w; };
    const uint32_t a = __byte_perm(word(0), word(1), 0x5140), b = __byte_perm(word(2), word(3), 0x5140);
    const uint32_t c = __byte_perm(word(0), word(1), 0x7362), d = __byte_perm(word(2), word(3), 0x7362);
    auto* lines = &square[kCodes * chunk + 4 * j];
    lines[0][place] = __byte_perm(a, b, 0x5410);
    lines[1][place] = __byte_perm(a, b, 0x7632);
    lines[2][place] = __byte_perm(c, d, 0x5410);
    lines[3][place] = __byte_perm(c, d, 0x7632);
  }
  __syncthreads();
  constexpr unsigned kPieces = kSquare / 16, kLines = kTurnThreads / kPieces;  // of 16 rows; columns at a time
  const unsigned piece = thread % kPieces, line = thread / kPieces;
  if (top + 16 * piece >= rows) return;
  uint8_t* out = static_cast<uint8_t*>(params.out.data) + (left + line) * params.out.stride + (top + 16 * piece);
#pragma unroll
  for (unsigned i = 0; i < kSquare / kLines; ++i) {
    const unsigned column = line + i * kLines;
    if (left + column >= columns) return;
    const uint32_t* words = &square[column][place_of(column / kCodes, 4 * piece)];
    *reinterpret_cast<uint4*>(out + i * kLines * params.out.stride) = *reinterpret_cast<const uint4*>(words);
  }
}

template <bool nested>
void launch(const Nf4ToE4m3Params& params, cudaStream_t stream) {
  const auto up = [](int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); };
  if (params.turned) {
    const dim3 grid(up(params.columns, kSquare), up(params.rows, kSquare));
    launch_following(nf4_to_e4m3_turned_kernel<nested>, grid, kTurnThreads, params.rows, stream, params);
    return;
  }
  // Lanes that share a block lie within four: the terms begin with another four.
  const unsigned across = up(params.columns + params.term_columns, kBlock) * kSharing;
  const dim3 grid(up(int64_t{across} * up(params.rows, kRows), kThreads));
  launch_following(nf4_to_e4m3_kernel<nested>, grid, kThreads, params.rows, stream, params, across);
}

}  // namespace

void launch_nf4_to_e4m3(const Nf4ToE4m3Params& params, cudaStream_t stream) {
  return params.scale != nullptr ? launch<true>(params, stream) : launch<false>(params, stream);
}

}  // namespace megalora
