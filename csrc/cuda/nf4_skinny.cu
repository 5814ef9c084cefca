// A linear of a few rows on NF4 weights, with the columns of its branch in 16 bits. Bound by reading the weight: a
// quarter of the bytes of a dense one, each code decoded once for all rows of x. What a code stands for is rounded to
// 16 bits as decoding the weight rounds it; sums are in float32 on tensor cores.
//
// A block makes kOutputs outputs of all rows of x; its warps share the columns and add their sums up at the end, always
// in one order. Thread 4g + q of a warp decodes 16 bytes of rows g and g + 8 at a time, and takes for the inner
// dimension of each mma the four columns of which it has the codes: which columns the mma calls its 2q, 2q + 1, 2q + 8,
// 2q + 9 does not matter, as long as both factors agree (see tensor_cores.h).
#include "cuda/decode_step.h"
#include "cuda/launch.h"
#include "cuda/nf4.h"
#include "cuda/tensor_cores.h"
#include "kernel_limits.h"

namespace megalora {
namespace {

constexpr int kWarps = 8, kOutputs = 16;
constexpr int64_t kPrefetched = 2048;  // bytes of a row, before the kernel before has ended

// Brings the bytes from `from` to `to` nearer, and what stands beside them in words of 16 bytes.
__device__ __forceinline__ void prefetch_span(const void* from, const void* to) {
  const auto start = reinterpret_cast<uintptr_t>(from) / 16 * 16,
             end = (reinterpret_cast<uintptr_t>(to) + 15) / 16 * 16;
  if (end > start) prefetch(reinterpret_cast<const void*>(start), static_cast<uint32_t>(end - start));
}

// Knows which outputs its block makes, [first, last), and which two of them its thread reads. Held: kCodes codes of
// each of the two. fetch: brings nearer what the block reads; load(column): starts reading from a column on; start:
// reads what the block needs once, behind the first loads; settle(held, counts): what comes between loading and
// decoding, all zeros where it does not count; decode<i>(held, row): the i-th eight codes of a row as four pairs of
// 16-bit floats.
template <bool bfloat16>
struct Reader {
  static constexpr int kCodes = 32, kAhead = 2;
  struct Held {
    uint4 codes[2];
    uint32_t code[2];  // of the absmax
    float scale[2], absmax[2];
  };
  int64_t first, last;
  const uint4* rows[2];
  const uint8_t* stored[2];  // of the absmax of a row's blocks
  uint32_t place[2];         // of a row's first block among all of the weight
  float offset;
  const Nf4Part& part;
  const float* nested;
  uint32_t numbers;  // their address in shared memory, a multiple of 256

  __device__ __forceinline__ static int part_of(const Nf4SkinnyParams& params, int block) {
    int found = 0;
    while (block >= params.parts[found].blocks) block -= params.parts[found++].blocks;
    return found;
  }
  __device__ __forceinline__ Reader(const Nf4SkinnyParams& params, int block, int group)
      : part(params.parts[part_of(params, block)]) {
    first = part.first_output + (static_cast<int64_t>(block) - part.first_block) * kOutputs;
    last = min(first + kOutputs, part.first_output + part.outputs);
    const int64_t blocks = params.in_features / kBlock;
    for (int i = 0; i < 2; ++i) {
      const int64_t row = output(group, i) - part.first_output;
      rows[i] = reinterpret_cast<const uint4*>(part.codes + row * (params.in_features / 2));
      stored[i] = part.absmax + row * blocks;
      place[i] = static_cast<uint32_t>(part.first + row * part.width);
    }
  }
  __device__ __forceinline__ int64_t output(int group, int i) const { return min(first + group + 8 * i, last - 1); }
  __device__ __forceinline__ void fetch(const Nf4SkinnyParams& params) const {
    const int64_t bytes = params.in_features / 2, row = first - part.first_output, count = last - first;
    const int64_t blocks = params.in_features / kBlock;
    if (threadIdx.x < count) {
      prefetch(part.codes + (row + threadIdx.x) * bytes, static_cast<uint32_t>(min(bytes, kPrefetched)));
    } else if (threadIdx.x == kLanes) {
      prefetch_span(part.absmax + row * blocks, part.absmax + (row + count) * blocks);
    } else if (threadIdx.x == 2 * kLanes) {
      const int64_t start = part.first + row * part.width, end = start + (count - 1) * part.width + blocks - 1;
      prefetch_span(part.scale + (start >> part.nested_shift), part.scale + (end >> part.nested_shift) + 1);
    }
  }
  __device__ __forceinline__ Held load(int column) const {
    Held held;
    const uint32_t block = static_cast<uint32_t>(column) / kBlock;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      held.codes[i] = stream_octet(rows[i] + column / kCodes);
      held.code[i] = stored[i][block];
      held.scale[i] = part.scale[(place[i] + block) >> part.nested_shift];
    }
    return held;
  }
  __device__ __forceinline__ void start() {
    alignas(256) __shared__ float all_numbers[kNumbers];
    __shared__ float all_nested[kNestedNumbers];
    if (threadIdx.x < kNumbers) all_numbers[threadIdx.x] = kNf4[threadIdx.x];
    all_nested[threadIdx.x] = part.numbers[threadIdx.x];
    static_assert(kNestedNumbers == kWarps * kLanes);
    offset = *part.offset;
    nested = all_nested;
    __syncthreads();
    numbers = written(shared_address(all_numbers));
  }
  __device__ __forceinline__ void settle(Held& held, bool counts) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // rounded after each step, as in the reference
      const float absmax = __fadd_rn(__fmul_rn(nested[held.code[i]], held.scale[i]), offset);
      held.absmax[i] = counts ? absmax : 0.0f;
    }
  }
  template <int i>
  __device__ __forceinline__ void decode(const Held& held, int row, uint32_t (&pairs)[4]) const {
    const uint4& words = held.codes[row];
    const uint32_t word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
    // Four codes at a time as offsets in bytes: the first of two is in the high half of a byte.
    const uint32_t high = word >> 2 & 0x3C3C3C3C, low = word << 2 & 0x3C3C3C3C;
    const auto number = [&](uint32_t offsets, int j) {
      return load_shared(__byte_perm(offsets, numbers, 0x7650 + j)) * held.absmax[row];
    };
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = pack<bfloat16>(number(high, j), number(low, j));
  }
};

// ---- the kernel

// Where a thread reads x: rows g, g + 8, ... from some column on. Beyond the last row it reads that one again: nobody
// asks for what comes of it.
template <int tiles>
struct RowsOfX {
  const uint16_t* rows[tiles];

  __device__ __forceinline__ RowsOfX(const Nf4SkinnyParams& params, int group) {
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      const int64_t row = min(static_cast<int64_t>(group + 8 * t), params.rows - 1);
      rows[t] = static_cast<const uint16_t*>(params.x.data) + row * params.x.stride;
    }
  }
};

// The i-th and further eight codes of what is held, times their columns of x, those from `column` on.
template <bool bfloat16, int tiles, int i>
__device__ __forceinline__ void take_octets(float (&sums)[tiles][4], const Reader<bfloat16>& reader,
                                            const typename Reader<bfloat16>::Held& held, const RowsOfX<tiles>& x,
                                            int column) {
  uint32_t a[2][4];
  reader.template decode<i>(held, 0, a[0]);
  reader.template decode<i>(held, 1, a[1]);
#pragma unroll
  for (int t = 0; t < tiles; ++t) {
    const uint4 b = reinterpret_cast<const uint4*>(x.rows[t] + column)[i];
    mma<bfloat16>(sums[t], a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
    mma<bfloat16>(sums[t], a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
  }
  if constexpr (i + 1 < Reader<bfloat16>::kCodes / 8)
    take_octets<bfloat16, tiles, i + 1>(sums, reader, held, x, column);
}

// The branch: four columns a thread and mma, straight from memory.
template <bool bfloat16, int tiles>
__device__ __forceinline__ void take_branch(float (&sums)[tiles][4], const Reader<bfloat16>& reader,
                                            const RowsOfX<tiles>& x, const Nf4SkinnyParams& params) {
  const int warp = threadIdx.x / kLanes, g = threadIdx.x % kLanes / 4, q = threadIdx.x % 4;
  const auto* branch = static_cast<const uint16_t*>(params.branch.data);
  const auto four = [](const uint16_t* from) { return *reinterpret_cast<const uint2*>(from); };
  for (int column = 16 * warp; column < params.room; column += 16 * kWarps) {
    const int at = column + 4 * q;
    const bool there = at < params.room;
    uint2 w[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (there) w[i] = four(branch + reader.output(g, i) * params.branch.stride + at);
    }
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      uint2 z = {};
      if (there) z = four(x.rows[t] + params.in_features + at);
      mma<bfloat16>(sums[t], w[0].x, w[1].x, w[0].y, w[1].y, z.x, z.y);
    }
  }
}

// Adds up the sums of the warps and writes them.
template <bool bfloat16, int tiles>
__device__ __forceinline__ void write_sums(const float (&sums)[tiles][4], int64_t first, int64_t last,
                                           const Nf4SkinnyParams& params) {
  const int warp = threadIdx.x / kLanes, g = threadIdx.x % kLanes / 4, q = threadIdx.x % 4;
  __shared__ float all[kWarps][8 * tiles][kOutputs + 1];
#pragma unroll
  for (int t = 0; t < tiles; ++t) {
#pragma unroll
    for (int c = 0; c < 4; ++c) all[warp][8 * t + 2 * q + c % 2][g + 8 * (c / 2)] = sums[t][c];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < params.rows * kOutputs; i += kWarps * kLanes) {
    const int row = i / kOutputs, output = i % kOutputs;
    if (first + output >= last) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += all[w][row][output];
    if (params.bias != nullptr) total += widen<bfloat16>(params.bias, first + output);
    narrow<bfloat16>(params.y, row * params.out_features + first + output, total);
  }
}

template <int tiles, bool bfloat16>
__global__ void __launch_bounds__(kWarps* kLanes, tiles == 1 ? 3 : 2)
    nf4_skinny_kernel(const __grid_constant__ Nf4SkinnyParams params) {
  constexpr int kAhead = Reader<bfloat16>::kAhead, kCodes = Reader<bfloat16>::kCodes;
  constexpr int kColumns = 4 * kCodes, kStep = kWarps * kColumns;  // of a warp at a time, of the block
  const int warp = threadIdx.x / kLanes, g = threadIdx.x % kLanes / 4, q = threadIdx.x % 4;
  Reader<bfloat16> reader(params, static_cast<int>(blockIdx.x), g);
  reader.fetch(params);
  if (params.room > 0 && threadIdx.x == 3 * kLanes) {
    const auto* branch = static_cast<const uint16_t*>(params.branch.data);
    prefetch_span(branch + reader.first * params.branch.stride, branch + reader.last * params.branch.stride);
  }
  let_next_start();
  await_previous();
  // The threads of a warp go on together: where the columns end within what it takes, some take those of another
  // thread, with zeros for the weight.
  const int first = warp * kColumns, columns = static_cast<int>(params.in_features);
  const int mine = q * kCodes, last = columns - kCodes;
  typename Reader<bfloat16>::Held held[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (first + i * kStep < columns) held[i] = reader.load(min(first + i * kStep + mine, last));
  }
  reader.start();
  const RowsOfX<tiles> x(params, g);
  float sums[tiles][4] = {};
  for (int start = first; start < columns; start += kAhead * kStep) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int here = start + i * kStep, next = here + kAhead * kStep;
      if (here >= columns) break;
      reader.settle(held[i], here + mine <= last);
      take_octets<bfloat16, tiles, 0>(sums, reader, held[i], x, min(here + mine, last));
      if (next < columns) held[i] = reader.load(min(next + mine, last));
    }
  }
  take_branch<bfloat16, tiles>(sums, reader, x, params);
  write_sums<bfloat16, tiles>(sums, reader.first, reader.last, params);
}

template <int tiles>
void launch_tiles(const Nf4SkinnyParams& params, int64_t blocks, cudaStream_t stream) {
  const auto kernel = params.type == Type::bfloat16 ? nf4_skinny_kernel<tiles, true> : nf4_skinny_kernel<tiles, false>;
  launch_following(kernel, dim3(static_cast<unsigned>(blocks)), kWarps * kLanes, params.rows, stream, params);
}

}  // namespace

void launch_nf4_skinny(Nf4SkinnyParams params, cudaStream_t stream) {
  int64_t blocks = 0;
  for (int i = 0; i < params.count; ++i) {
    Nf4Part& part = params.parts[i];
    part.first_block = blocks;
    part.blocks = (part.outputs + kOutputs - 1) / kOutputs;
    blocks += part.blocks;
  }
  static_assert(kMostNf4Rows == 32);
  if (params.rows <= 8) return launch_tiles<1>(params, blocks, stream);
  if (params.rows <= 16) return launch_tiles<2>(params, blocks, stream);
  launch_tiles<4>(params, blocks, stream);
}

}  // namespace megalora
