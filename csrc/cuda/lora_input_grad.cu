// dx += mask * scale * (dz A) on tensor cores, alone or with the backward pass of what made x of gate and up; bound by
// one pass over dx. What all LoRA kernels have in common is said in lora_down.cu.
#include "cuda/clusters.h"
#include "cuda/draw.h"
#include "cuda/lora.h"
#include "cuda/swiglu_words.h"
#include "cuda/tensor_cores.h"

namespace megalora {
namespace {

struct InputGradArguments {
  HalfMatrix dx, dz;
  const uint16_t* A;
  Draw draw;
  int tokens, features, rank;
  HalfMatrix out;  // where dx + the term goes: dx itself or another place
  // With gate_up [T, 2 F]: dx + the term goes on to grad [T, 2 F] instead; and where `made` [T, F] is not null, mask *
  // x is made again there. All contiguous.
  const uint16_t* gate_up;
  uint16_t* grad;
  uint16_t* made;
};

// ---- the tiles by rank, as measured on an H200
//
// Eight warps, each by itself, with four stages of dx under way. As many groups of 64 features as leave room for two
// blocks on a multiprocessor beside their part of A, which grows with the rank.

struct InputGradTiles {
  static constexpr int groups = 4, warps = 8, stages = 4, blocks_per_sm = 2;
};
struct InputGradRank16 : InputGradTiles {
  static constexpr int rank_steps = 1;
};
struct InputGradRank32 : InputGradTiles {
  static constexpr int rank_steps = 2;
};
struct InputGradRank64 : InputGradTiles {
  static constexpr int rank_steps = 4;
};
struct InputGradRank128 : InputGradTiles {
  static constexpr int rank_steps = 8, groups = 2;
};
struct InputGradRank192 : InputGradTiles {
  static constexpr int rank_steps = 12, groups = 2, blocks_per_sm = 1;
};

// A block has 64·groups features, whose part of A lies in shared memory in the order of the mma's operand, and goes
// through its share of the tokens: each warp by itself, 16 tokens and 64 features at a time, with dx copied ahead into
// shared memory by the threads that read it.
//
// In a block of 32 features, thread (g, t) owns features 8t .. 8t + 7 of rows g and g + 8: columns 2t, 2t + 1 of four
// mma. Its ranks in the inner dimension are 4t .. 4t + 3 of each sixteen.
template <typename Tiles>
struct InputGradShape : Tiles {
  using Tiles::rank_steps, Tiles::groups, Tiles::warps, Tiles::stages, Tiles::blocks_per_sm;
  static constexpr int threads = kLanes * warps, features = 64 * groups;
  static constexpr int A_octets = groups * rank_steps * 4 * kLanes, dx_octets = 4 * threads;
  static constexpr int shared_bytes = (A_octets + stages * dx_octets) * 16;
};

// ---- the kernel, in parts

// Where a thread stands, and the block's share: `tiles` of 16 tokens a warp, each in `groups` units of 64 features.
template <typename Shape>
struct InputGradPlace {
  const InputGradArguments& arguments;
  int thread, lane, g, t, first_feature, first_column, groups;
  int stride, first_token, tiles, units;

  __device__ __forceinline__ explicit InputGradPlace(const InputGradArguments& arguments) : arguments(arguments) {
    thread = threadIdx.x, lane = thread % kLanes, g = lane / 4, t = lane % 4;
    const int warp = thread / kLanes;
    first_feature = blockIdx.x * Shape::features, first_column = first_feature + 8 * t;
    groups = min(Shape::groups, (arguments.features - first_feature + 63) / 64);
    stride = gridDim.y * Shape::warps * 16;
    first_token = (blockIdx.y * Shape::warps + warp) * 16;
    tiles = (max(0, arguments.tokens - first_token) + stride - 1) / stride, units = tiles * groups;
  }

  // The thread's i-th row of a tile, and its place there.
  __device__ __forceinline__ int row_of(int tile, int i) const { return first_token + tile * stride + g + 8 * i; }
  __device__ __forceinline__ uint16_t* place_of(const HalfMatrix& m, int tile, int i) const {
    return m.data + row_of(tile, i) * m.stride + first_column;
  }
};

// Copies the next unit of dx.
template <typename Shape>
struct InputGradLoader {
  const InputGradPlace<Shape>& at;
  uint32_t dx_to;
  int tile = 0, group = 0;
  const uint16_t* from[2];

  __device__ __forceinline__ InputGradLoader(const InputGradPlace<Shape>& at, const uint4* dx)
      : at(at),
        dx_to(shared_address(dx)),
        from{at.place_of(at.arguments.dx, 0, 0), at.place_of(at.arguments.dx, 0, 1)} {}

  __device__ __forceinline__ void copy(int stage) {
    const InputGradArguments& arguments = at.arguments;
    const uint32_t to = dx_to + stage * (Shape::dx_octets * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = at.row_of(tile, i) < arguments.tokens;
      const int column = at.first_column + 64 * group;
      copy_async(to + i * Shape::threads * 16, from[i], there && column < arguments.features);
      copy_async(to + (2 + i) * Shape::threads * 16, from[i] + 32, there && column + 32 < arguments.features);
      from[i] += 64;
    }
    if (++group == at.groups) {
      group = 0, ++tile;
      from[0] = at.place_of(arguments.dx, tile, 0), from[1] = at.place_of(arguments.dx, tile, 1);
    }
  }
};

// What is read of the next tile's rows g, g + 8 ahead of time: four ranks of dz each, and the token.
template <typename Shape>
struct InputGradRows {
  uint2 dz[2][Shape::rank_steps];
  int64_t token[2];

  __device__ __forceinline__ void read(const InputGradPlace<Shape>& at, int tile) {
    const InputGradArguments& arguments = at.arguments;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = at.row_of(tile, i);
      token[i] = arguments.draw.on ? __ldg(arguments.draw.token + min(row, arguments.tokens - 1)) : 0;
#pragma unroll
      for (int k = 0; k < Shape::rank_steps; ++k) {
        const int rank = 16 * k + 4 * at.t;
        const bool there = row < arguments.tokens && rank < arguments.rank;
        const auto* place = reinterpret_cast<const uint2*>(arguments.dz.data + row * arguments.dz.stride + rank);
        dz[i][k] = there ? __ldg(place) : uint2{0, 0};
      }
    }
  }
};

// Puts the block's part of A into shared memory, [groups, rank_steps, 4 pairs of columns of 8, lanes]. A thread takes
// eight features of four ranks at a time and writes each feature's two pairs of ranks.
template <typename Shape>
__device__ __forceinline__ void place_A(uint4* A, const InputGradPlace<Shape>& at) {
  const InputGradArguments& arguments = at.arguments;
  for (int i = at.thread; i < Shape::rank_steps * 4 * Shape::groups * 8; i += Shape::threads) {
    const int octet = i % (Shape::groups * 8), quad = i / (Shape::groups * 8);
    uint4 v[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int rank = 4 * quad + r, column = at.first_feature + 8 * octet;
      const bool there = rank < arguments.rank && column < arguments.features;
      const auto* place = reinterpret_cast<const uint4*>(arguments.A + int64_t{rank} * arguments.features + column);
      v[r] = there ? __ldg(place) : uint4{0, 0, 0, 0};
    }
    const int half = octet / 4 % 2, step = octet / 8 * Shape::rank_steps + quad / 4;
#pragma unroll
    for (int e = 0; e < 8; ++e) {  // feature 32·half + 8·(octet % 4) + e: column 2·(octet % 4) + e % 2 of mma e / 2
      const uint32_t w[4] = {word(v[0], e / 2), word(v[1], e / 2), word(v[2], e / 2), word(v[3], e / 2)};
      const uint2 pairs = e % 2 ? uint2{high_halves(w[0], w[1]), high_halves(w[2], w[3])}
                                : uint2{low_halves(w[0], w[1]), low_halves(w[2], w[3])};
      const int column = 2 * (octet % 4) + e % 2, reader = 4 * column + quad % 4;
      reinterpret_cast<uint2*>(A + (step * 4 + 2 * half + e / 4) * kLanes + reader)[e / 2 % 2] = pairs;
    }
  }
}

// Reads a thread's gate and up of a unit: [halves of 32 features][rows].
template <typename Shape>
__device__ __forceinline__ void read_gate_up(uint4 (&gate)[2][2], uint4 (&up)[2][2], const InputGradPlace<Shape>& at,
                                             const bool (&there)[2], int tile, int group) {
  const InputGradArguments& arguments = at.arguments;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = at.first_column + 64 * group + 32 * half;
      const int64_t place = int64_t{at.row_of(tile, i)} * 2 * arguments.features + column;
      if (there[i] && column < arguments.features) {
        gate[half][i] = __ldg(reinterpret_cast<const uint4*>(arguments.gate_up + place));
        up[half][i] = __ldg(reinterpret_cast<const uint4*>(arguments.gate_up + place + arguments.features));
      }
    }
  }
}

// Passes dx's octet at (row, column) on to gate and up, and makes x again.
template <bool bfloat16, Gate act>
__device__ __forceinline__ void write_gated(const InputGradArguments& arguments, const uint32_t (&after)[4],
                                            const uint4& kept, const uint4& gate, const uint4& up, int row,
                                            int column) {
  uint32_t dgate[4], dup[4], made[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    swiglu_backward<bfloat16, act>(after[q], word(gate, q), word(up, q), dgate[q], dup[q], made[q]);
    made[q] &= word(kept, q);
  }
  const int64_t place = int64_t{row} * arguments.features + column;
  uint16_t* grad = arguments.grad + int64_t{row} * arguments.features + place;
  *reinterpret_cast<uint4*>(grad) = {dgate[0], dgate[1], dgate[2], dgate[3]};
  *reinterpret_cast<uint4*>(grad + arguments.features) = {dup[0], dup[1], dup[2], dup[3]};
  if (arguments.made != nullptr) {
    *reinterpret_cast<uint4*>(arguments.made + place) = {made[0], made[1], made[2], made[3]};
  }
}

// dz A of 32 features and 16 tokens. A: that of the unit and half, from this lane on.
template <bool bfloat16, int rank_steps>
__device__ __forceinline__ void multiply_dz(float (&sum)[4][4], const uint32_t (&dz)[rank_steps][4], const uint4* A) {
#pragma unroll
  for (int k = 0; k < rank_steps; ++k) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint4 b = A[(k * 4 + j / 2) * kLanes];
      mma<bfloat16>(sum[j], dz[k][0], dz[k][1], dz[k][2], dz[k][3], b.x, b.y);
      mma<bfloat16>(sum[j + 1], dz[k][0], dz[k][1], dz[k][2], dz[k][3], b.z, b.w);
    }
  }
}

// before + scale * term where kept, else before, eight features of one row.
template <bool bfloat16>
__device__ __forceinline__ void add_term(uint32_t (&after)[4], const float (&sum)[4][4], int i, const uint4& before,
                                         const uint4& kept, float scale) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float2 old = unpack<bfloat16>(word(before, q));
    const float* d = sum[q] + 2 * i;
    const uint32_t total = pack<bfloat16>(fmaf(d[0], scale, old.x), fmaf(d[1], scale, old.y));
    after[q] = (total & word(kept, q)) | (word(before, q) & ~word(kept, q));
  }
}

// act: Gate::none where dx goes no further.
template <bool bfloat16, Gate act, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_sm)
    input_grad_kernel(const __grid_constant__ InputGradArguments arguments) {
  constexpr bool gated = act != Gate::none;
  constexpr int rank_steps = Shape::rank_steps, stages = Shape::stages;
  extern __shared__ __align__(16) uint4 shared[];
  const Draw& draw = arguments.draw;
  const StepDraw step_draw(draw);
  const InputGradPlace<Shape> at(arguments);
  const uint4* dx = shared + Shape::A_octets + at.thread;  // [stages, 4, threads]
  InputGradLoader<Shape> loader(at, dx);
#pragma unroll
  for (int unit = 0; unit < stages - 1; ++unit) {
    if (unit < at.units) loader.copy(unit);
    commit_copies();
  }
  InputGradRows<Shape> ahead;
  ahead.read(at, 0);
  place_A<Shape>(shared, at);
  __syncthreads();

  TokenDraw token[2];
  uint32_t dz[rank_steps][4];
  int unit = 0;
  Turn<stages> reading{0}, writing{stages - 1};
#pragma unroll 1
  for (int tile = 0; tile < at.tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (draw.on) token[i].init(draw, step_draw, ahead.token[i]);
#pragma unroll
      for (int k = 0; k < rank_steps; ++k) dz[k][i] = ahead.dz[i][k].x, dz[k][2 + i] = ahead.dz[i][k].y;
    }
    ahead.read(at, tile + 1);
    uint16_t* row[2] = {at.place_of(arguments.out, tile, 0), at.place_of(arguments.out, tile, 1)};
    const bool there[2] = {at.row_of(tile, 0) < arguments.tokens, at.row_of(tile, 1) < arguments.tokens};
#pragma unroll 1
    for (int group = 0; group < at.groups; ++group, ++unit) {
      if (unit + stages - 1 < at.units) loader.copy(writing.stage);
      commit_copies();
      uint4 gate[2][2], up[2][2];
      if constexpr (gated) read_gate_up(gate, up, at, there, tile, group);
      wait_copies<stages - 1>();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = at.first_column + 64 * group + 32 * half;
        float sum[4][4] = {};
        multiply_dz<bfloat16>(sum, dz, shared + (group * rank_steps * 4 + 2 * half) * kLanes + at.lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 before = dx[reading.stage * Shape::dx_octets + (half * 2 + i) * Shape::threads];
          uint4 kept = kAll;
          if (draw.on) kept = token[i].keep_block(draw, step_draw, draw.first_block + column / 8);
          uint32_t after[4];
          add_term<bfloat16>(after, sum, i, before, kept, draw.scale);
          if (!there[i] || column >= arguments.features) continue;
          if constexpr (gated) {
            write_gated<bfloat16, act>(arguments, after, kept, gate[half][i], up[half][i], at.row_of(tile, i), column);
          } else {
            *reinterpret_cast<uint4*>(row[i] + 32 * half) = {after[0], after[1], after[2], after[3]};
          }
        }
      }
      row[0] += 64, row[1] += 64;
      reading.next(), writing.next();
    }
  }
}

// ---- launches

template <bool bfloat16, Gate act, typename Shape>
cudaError_t run_shape(const InputGradArguments& arguments, cudaStream_t stream) {
  static_assert(Shape::shared_bytes <= kSharedMemory);
  const auto kernel = &input_grad_kernel<bfloat16, act, Shape>;
  int device, sms;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::shared_bytes);
  }
  if (error != cudaSuccess) return error;
  const int64_t columns = divide_up(arguments.features, Shape::features);
  const int64_t slots = std::max<int64_t>(1, int64_t{sms} * Shape::blocks_per_sm / columns);
  const int64_t rows = std::min(divide_up(arguments.tokens, 16 * Shape::warps), slots);
  kernel<<<dim3(columns, rows), Shape::threads, Shape::shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <bool bfloat16, typename Tiles>
cudaError_t run(const InputGradArguments& arguments, Gate gate, cudaStream_t stream) {
  using Shape = InputGradShape<Tiles>;
  if (gate == Gate::none) return run_shape<bfloat16, Gate::none, Shape>(arguments, stream);
  return dispatch_gate(gate,
                       [&](auto made) { return run_shape<bfloat16, decltype(made)::value, Shape>(arguments, stream); });
}

template <bool bfloat16>
cudaError_t run_by_rank(const InputGradArguments& arguments, Gate gate, cudaStream_t stream) {
  static_assert(16 * InputGradRank192::rank_steps >= kLargestRank);
  if (arguments.rank <= 16) return run<bfloat16, InputGradRank16>(arguments, gate, stream);
  if (arguments.rank <= 32) return run<bfloat16, InputGradRank32>(arguments, gate, stream);
  if (arguments.rank <= 64) return run<bfloat16, InputGradRank64>(arguments, gate, stream);
  if (arguments.rank <= 128) return run<bfloat16, InputGradRank128>(arguments, gate, stream);
  return run<bfloat16, InputGradRank192>(arguments, gate, stream);
}

}  // namespace

cudaError_t launch_lora_input_grad(const LoraInputGradParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.features == 0) return cudaSuccess;
  InputGradArguments arguments{};
  arguments.dx = half_matrix(params.dx);
  arguments.dz = half_matrix(params.dz);
  arguments.A = static_cast<const uint16_t*>(params.A);
  arguments.draw = make_draw(params.mask);
  arguments.tokens = static_cast<int>(params.tokens);
  arguments.features = static_cast<int>(params.features);
  arguments.rank = static_cast<int>(params.rank);
  arguments.out = half_matrix(params.out);
  arguments.gate_up = static_cast<const uint16_t*>(params.gate_up);
  arguments.grad = static_cast<uint16_t*>(params.grad);
  arguments.made = static_cast<uint16_t*>(params.x);
  return dispatch_half(params.type,
                       [&](auto bfloat16) { return run_by_rank<bfloat16>(arguments, params.gate, stream); });
}

}  // namespace megalora
