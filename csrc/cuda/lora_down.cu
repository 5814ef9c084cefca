// z = dropout(x) A^T on tensor cores, bound by one pass over x: x is read, or made of gate and up, or of up.
//
// For all LoRA kernels (lora_*.cu): the mask is drawn in registers. One Philox call gives the eight 16-bit lanes of
// eight consecutive features of one token, which is one 16-byte load. The operands of mma.m16n8k16 are laid out so that
// each thread owns such octets: the places of features in a product's inner dimension (or in its columns) are permuted,
// alike in both operands, which changes no sum but its order. So no element's mask is drawn twice and none passes
// between threads.
//
// Results repeat bit for bit: sums run in a fixed order, those that are split over blocks meet in a thread block
// cluster's shared memory (sm_90 on; before that a sum is not split). The scale of kept values is applied once, to the
// float32 sum.
#include "cuda/clusters.h"
#include "cuda/draw.h"
#include "cuda/lora.h"
#include "cuda/swiglu_words.h"
#include "cuda/tensor_cores.h"

namespace megalora {
namespace {

struct DownArguments {
  HalfMatrix z, x;
  HalfMatrix copy;          // of x, as far as it goes; null: none
  const uint16_t* gate_up;  // [T, 2 F] or [T, F], where x is made, into `copy`, instead of read
  const uint16_t* A;
  Draw draw;
  int tokens, features, rank, z_columns;
  int features_per_block;  // of the sum over features, that the blocks of a cluster share; a multiple of 64
};

// ---- the tiles by rank, as measured on an H200
//
// Eight warps of 16 tokens each make 128 tokens a block, few enough to give every multiprocessor work at 4096 tokens
// once clusters split the features. A second warp of the same tokens, on other features, hides more of the latency as
// long as its sums fit: up to rank 64. Four stages keep 3 · 32 KB of x under way; one less where a GPU grants too
// little shared memory (8.0). Gate and up are twice as much to copy: one warp of the same tokens.

struct DownTiles {
  static constexpr int row_tiles = 1, row_warps = 8, feature_warps = 2, stages = 4;
};
struct DownRank16 : DownTiles {
  static constexpr int rank_tiles = 2;
};
struct DownRank32 : DownTiles {
  static constexpr int rank_tiles = 4;
};
struct DownRank64 : DownTiles {
  static constexpr int rank_tiles = 8;
};
struct DownRank64Flat : DownRank64 {
  static constexpr int stages = 3;
};
struct DownRank128 : DownTiles {
  static constexpr int rank_tiles = 16, feature_warps = 1;
};
struct DownRank192 : DownTiles {
  static constexpr int rank_tiles = 24, feature_warps = 1;
};
struct GatedDownRank16 : DownRank16 {
  static constexpr int feature_warps = 1;
};
struct GatedDownRank32 : DownRank32 {
  static constexpr int feature_warps = 1;
};
struct GatedDownRank64 : DownRank64 {
  static constexpr int feature_warps = 1;
};

// A block has 16·row_tiles·row_warps tokens and all ranks (in 8·rank_tiles columns). Stages of 64·feature_warps
// features pass through shared memory: x by rows of 64 features, eight lanes a row, octet c of row r at c ^ 4 (r & 1),
// so that neither side meets a bank twice; and A in the order of the mma's operand, shared by the warps of the same
// features. The feature_warps sums are added at the end, in order.
//
// In a block of 32 features, thread (g, t) owns features 8t .. 8t + 7 of its rows: words 0, 1 of these are its pairs of
// the first mma's inner dimension, words 2, 3 of the second's.
template <typename Origin_, typename Tiles>
struct DownShape : Tiles {
  using Origin = Origin_;
  static constexpr bool gated = Origin::gated, made = Origin::made;
  using Tiles::rank_tiles, Tiles::row_tiles, Tiles::row_warps, Tiles::feature_warps, Tiles::stages;
  static constexpr int stage_features = 64 * feature_warps;
  static constexpr int threads = kLanes * row_warps * feature_warps, rows = 16 * row_tiles * row_warps;
  static constexpr int tile_octets = 16 * row_tiles * 8;  // of a warp
  static constexpr int input_octets = row_warps * feature_warps * tile_octets;
  static constexpr int x_octets = (gated ? 2 : 1) * input_octets, A_octets = feature_warps * 2 * rank_tiles * kLanes;
  static constexpr int stage_octets = x_octets + A_octets;
  static constexpr int pitch = 8 * rank_tiles + 8;  // of the float32 sums, skewed over the banks
  static constexpr int shared_bytes = std::max(stages * stage_octets * 16, rows * pitch * 4);
};

// ---- the kernel, in parts

// Where a thread stands, and the block's share of tokens and features.
template <typename Shape>
struct DownPlace {
  int thread, lane, warp, g, t, row_warp, feature_warp;
  int first_row, warp_row, first_feature, span, steps;

  __device__ __forceinline__ explicit DownPlace(const DownArguments& arguments) {
    thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes, g = lane / 4, t = lane % 4;
    row_warp = warp % Shape::row_warps, feature_warp = warp / Shape::row_warps;
    first_row = blockIdx.x * Shape::rows, warp_row = first_row + row_warp * 16 * Shape::row_tiles;
    first_feature = blockIdx.y * arguments.features_per_block;
    const int last_feature = min(arguments.features, first_feature + arguments.features_per_block);
    span = max(0, last_feature - first_feature);
    steps = (span + Shape::stage_features - 1) / Shape::stage_features;
  }
};

// Copies the next stage: pointers that move on, and up to which feature (from first_feature) they may. Of x a lane
// copies an octet of rows lane / 8 + 4k, as far as there are tokens.
template <typename Shape>
struct DownLoader {
  static constexpr int A_copies = (Shape::A_octets + Shape::threads - 1) / Shape::threads;
  const DownArguments& arguments;
  uint4* shared;
  int thread, lane_row, rows_left, lane_feature, x_limit;
  int64_t x_stride;
  const uint16_t *x_from, *A_from[A_copies];
  int A_limit[A_copies], ahead = 0;
  uint32_t thread_place;
  int lane_place;  // where in its warp's tile a lane copies to (of k = 0: rows lane / 8)

  __device__ __forceinline__ DownLoader(const DownArguments& arguments, const DownPlace<Shape>& at, uint4* shared)
      : arguments(arguments), shared(shared), thread(at.thread) {
    lane_row = at.warp_row + at.lane / 8, rows_left = arguments.tokens - lane_row;
    lane_feature = 64 * at.feature_warp + 8 * (at.lane % 8), x_limit = at.span - lane_feature;
    x_stride = Shape::made ? (Shape::gated ? 2 : 1) * int64_t{arguments.features} : arguments.x.stride;
    x_from =
        (Shape::made ? arguments.gate_up : arguments.x.data) + lane_row * x_stride + at.first_feature + lane_feature;
#pragma unroll
    for (int i = 0; i < A_copies; ++i) {
      const int tile = at.warp + i * (Shape::threads / kLanes), rank = tile % Shape::rank_tiles * 8 + at.g;
      const int column = tile / Shape::rank_tiles * 32 + 8 * at.t;
      A_from[i] = arguments.A + int64_t{rank} * arguments.features + at.first_feature + column;
      A_limit[i] = rank < arguments.rank ? at.span - column : 0;
    }
    thread_place = shared_address(shared + thread);
    lane_place = at.warp * Shape::tile_octets + at.lane / 8 * 8 + (at.lane % 8 ^ (at.lane / 8 & 1) * 4);
  }

  __device__ __forceinline__ void copy(int stage) {
    const uint32_t to = thread_place + stage * (Shape::stage_octets * 16);
    const uint32_t to_x = shared_address(shared + stage * Shape::stage_octets + lane_place);
#pragma unroll
    for (int k = 0; k < 4 * Shape::row_tiles; ++k) {
      const bool there = ahead < x_limit && 4 * k < rows_left;
      copy_async(to_x + k * 4 * 8 * 16, x_from + 4 * k * x_stride, there);
      if constexpr (Shape::gated) {
        copy_async(to_x + (Shape::input_octets + k * 4 * 8) * 16, x_from + 4 * k * x_stride + arguments.features,
                   there);
      }
    }
    x_from += Shape::stage_features;
#pragma unroll
    for (int i = 0; i < A_copies; ++i) {
      if (Shape::A_octets % Shape::threads == 0 || i * Shape::threads + thread < Shape::A_octets) {
        copy_async(to + (Shape::x_octets + i * Shape::threads) * 16, A_from[i], ahead < A_limit[i]);
      }
      A_from[i] += Shape::stage_features;
    }
    ahead += Shape::stage_features;
  }
};

template <typename Shape>
using DownSum = float[Shape::row_tiles][Shape::rank_tiles][4];

// Adds 32 features of a stage to the sums: the first half of a warp's 64, or the other. read_place: where in x a lane
// reads row g of the first half. Where x is made it is left there.
template <bool bfloat16, typename Shape>
__device__ __forceinline__ void multiply_half(DownSum<Shape>& sum, uint4* x, const uint4* A, const Draw& draw,
                                              const StepDraw& step_draw, const TokenDraw (&token)[2 * Shape::row_tiles],
                                              uint32_t block, int read_place, int half) {
  constexpr int row_tiles = Shape::row_tiles, rank_tiles = Shape::rank_tiles;
  uint4 v[2 * row_tiles];
#pragma unroll
  for (int i = 0; i < 2 * row_tiles; ++i) {
    // Always masked, if by ones: the results can then be computed right into the registers that an mma wants.
    uint4 kept = kAll;
    if (draw.on) kept = token[i].keep_block(draw, step_draw, block + 4 * half);
    const int octet = (read_place ^ 4 * half) + i * 8 * 8;  // row g + 8i; the other half is four octets apart
    uint4 all = x[octet];
    if constexpr (Shape::made) {
      all = made_of<bfloat16, typename Shape::Origin>(all, x[(Shape::gated ? Shape::input_octets : 0) + octet]);
      x[octet] = all;
    }
    v[i] = all & kept;
  }
#pragma unroll
  for (int j = 0; j < rank_tiles; ++j) {
    const uint4 b = A[(half * rank_tiles + j) * kLanes];
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      mma<bfloat16>(sum[i][j], v[2 * i].x, v[2 * i + 1].x, v[2 * i].y, v[2 * i + 1].y, b.x, b.y);
    }
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      mma<bfloat16>(sum[i][j], v[2 * i].z, v[2 * i + 1].z, v[2 * i].w, v[2 * i + 1].w, b.z, b.w);
    }
  }
}

// Adds the feature_warps sums, in order, into sums [rows, ranks] in shared memory.
template <typename Shape>
__device__ __forceinline__ void add_warps(float* sums, const DownSum<Shape>& sum, const DownPlace<Shape>& at) {
  constexpr int row_tiles = Shape::row_tiles, rank_tiles = Shape::rank_tiles;
#pragma unroll 1
  for (int turn = 0; turn < Shape::feature_warps; ++turn) {
    __syncthreads();
    if (turn != at.feature_warp) continue;
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
      for (int j = 0; j < rank_tiles; ++j) {
#pragma unroll
        for (int c = 0; c < 4; c += 2) {
          float* place = sums + ((at.row_warp * row_tiles + i) * 16 + at.g + 4 * c) * Shape::pitch + 8 * j + 2 * at.t;
          float2 v = {sum[i][j][c], sum[i][j][c + 1]};
          if (turn > 0) {
            const float2 before = *reinterpret_cast<const float2*>(place);
            v = {before.x + v.x, before.y + v.y};
          }
          *reinterpret_cast<float2*>(place) = v;
        }
      }
    }
  }
}

// Writes this block's share of z, the sum over the cluster.
template <bool bfloat16, typename Shape>
__device__ __forceinline__ void write_z(const DownArguments& arguments, const float* sums, int first_row) {
  const int blocks = gridDim.y;
  cluster_barrier(blocks);
  const int quads = arguments.z_columns / 4;
  const float scale = arguments.draw.scale;
  for (int i = blockIdx.y * Shape::threads + threadIdx.x; i < Shape::rows * quads; i += blocks * Shape::threads) {
    const int row = i / quads, column = 4 * (i % quads);
    if (first_row + row >= arguments.tokens) break;
    float4 v = {0, 0, 0, 0};
    if (column < arguments.rank) v = cluster_sum(sums + row * Shape::pitch + column, blocks);
    const uint2 words = {pack<bfloat16>(v.x * scale, v.y * scale), pack<bfloat16>(v.z * scale, v.w * scale)};
    *reinterpret_cast<uint2*>(arguments.z.data + (first_row + row) * arguments.z.stride + column) = words;
  }
  if (blocks > 1) cluster_barrier(blocks);  // a block's shared memory must outlast the others' reads
}

template <bool bfloat16, typename Shape>
__global__ void __launch_bounds__(Shape::threads, 1) down_kernel(const __grid_constant__ DownArguments arguments) {
  constexpr int rank_tiles = Shape::rank_tiles, row_tiles = Shape::row_tiles, stages = Shape::stages;
  extern __shared__ __align__(16) uint4 shared[];
  const Draw& draw = arguments.draw;
  const StepDraw step_draw(draw);
  const DownPlace<Shape> at(arguments);
  DownLoader<Shape> loader(arguments, at, shared);
  const int read_place = at.warp * Shape::tile_octets + at.g * 8 + (at.t ^ (at.g & 1) * 4);
  uint16_t* copy_to =
      arguments.copy.data + loader.lane_row * arguments.copy.stride + at.first_feature + loader.lane_feature;

#pragma unroll
  for (int step = 0; step < stages - 1; ++step) {
    if (step < at.steps) loader.copy(step);
    commit_copies();
  }
  TokenDraw token[2 * row_tiles];
  if (draw.on) {
#pragma unroll
    for (int i = 0; i < 2 * row_tiles; ++i) {
      token[i].init(draw, step_draw, __ldg(draw.token + min(at.warp_row + 8 * i + at.g, arguments.tokens - 1)));
    }
  }
  uint32_t block = draw.first_block + (at.first_feature + 64 * at.feature_warp) / 8 + at.t;
  DownSum<Shape> sum = {};
  Turn<stages> reading{0}, writing{stages - 1};
#pragma unroll 1
  for (int step = 0; step < at.steps; ++step) {
    wait_copies<stages - 2>();
    __syncthreads();
    if (step + stages - 1 < at.steps) loader.copy(writing.stage);
    commit_copies();
    uint4* x = shared + reading.stage * Shape::stage_octets;
    const uint4* A = shared + reading.stage * Shape::stage_octets + Shape::x_octets + at.lane +
                     at.feature_warp * 2 * rank_tiles * kLanes;
    reading.next(), writing.next();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      multiply_half<bfloat16, Shape>(sum, x, A, draw, step_draw, token, block, read_place, half);
    }
    block += Shape::stage_features / 8;
    if (arguments.copy.data == nullptr) continue;
    if (Shape::made) __syncwarp();  // the lanes have put there what they made
#pragma unroll
    for (int k = 0; k < 4 * row_tiles; ++k) {
      if (step * Shape::stage_features >= loader.x_limit || 4 * k >= loader.rows_left) continue;
      *reinterpret_cast<uint4*>(copy_to + 4 * k * arguments.copy.stride) = x[loader.lane_place + k * 4 * 8];
    }
    copy_to += Shape::stage_features;
  }

  wait_copies<0>();
  float* sums = reinterpret_cast<float*>(shared);
  add_warps<Shape>(sums, sum, at);
  write_z<bfloat16, Shape>(arguments, sums, at.first_row);
}

// ---- launches

template <bool bfloat16, typename Shape>
cudaError_t run_shape(DownArguments arguments, cudaStream_t stream) {
  const auto kernel = &down_kernel<bfloat16, Shape>;
  const Capacity& known = capacity<Shape>(kernel);
  if (known.error != cudaSuccess) return known.error;
  const int64_t tiles = divide_up(arguments.tokens, Shape::rows);
  const int splits = known.splits(tiles);
  const int64_t stages = divide_up(divide_up(arguments.features, Shape::stage_features), splits);
  arguments.features_per_block = static_cast<int>(stages * Shape::stage_features);
  return launch_clusters<Shape>(kernel, tiles, splits, arguments, stream);
}

// Flat: for a GPU that grants a block no more than kSharedMemory, where Tiles ask for more.
template <bool bfloat16, typename Origin, typename Tiles, typename Flat = Tiles>
cudaError_t run(const DownArguments& arguments, cudaStream_t stream) {
  using Deep = DownShape<Origin, Tiles>;
  static_assert(DownShape<Origin, Flat>::shared_bytes <= kSharedMemory);
  return grants_shared_memory(Deep::shared_bytes) ? run_shape<bfloat16, Deep>(arguments, stream)
                                                  : run_shape<bfloat16, DownShape<Origin, Flat>>(arguments, stream);
}

template <bool bfloat16>
cudaError_t run_by_rank(const DownArguments& arguments, Gate gate, bool gated, cudaStream_t stream) {
  static_assert(8 * DownRank192::rank_tiles >= kLargestRank);
  static_assert(8 * GatedDownRank64::rank_tiles >= kLargestRankGatedDown);
  if (gate != Gate::none) {
    return dispatch_origin(gate, gated, [&](auto origin) {
      using Made = decltype(origin);
      if constexpr (Made::gated) {
        if (arguments.rank <= 16) return run<bfloat16, Made, GatedDownRank16>(arguments, stream);
        if (arguments.rank <= 32) return run<bfloat16, Made, GatedDownRank32>(arguments, stream);
        return run<bfloat16, Made, GatedDownRank64>(arguments, stream);
      } else {
        if (arguments.rank <= 16) return run<bfloat16, Made, DownRank16>(arguments, stream);
        if (arguments.rank <= 32) return run<bfloat16, Made, DownRank32>(arguments, stream);
        return run<bfloat16, Made, DownRank64, DownRank64Flat>(arguments, stream);
      }
    });
  }
  if (arguments.rank <= 16) return run<bfloat16, Read, DownRank16>(arguments, stream);
  if (arguments.rank <= 32) return run<bfloat16, Read, DownRank32>(arguments, stream);
  if (arguments.rank <= 64) return run<bfloat16, Read, DownRank64, DownRank64Flat>(arguments, stream);
  if (arguments.rank <= 128) return run<bfloat16, Read, DownRank128>(arguments, stream);
  return run<bfloat16, Read, DownRank192>(arguments, stream);
}

}  // namespace

cudaError_t launch_lora_down(const LoraDownParams& params, cudaStream_t stream) {
  if (params.tokens == 0) return cudaSuccess;
  DownArguments arguments{};
  arguments.z = half_matrix(params.z);
  arguments.x = half_matrix(params.x);
  arguments.copy = half_matrix(params.copy);
  arguments.gate_up = static_cast<const uint16_t*>(params.gate_up);
  arguments.A = static_cast<const uint16_t*>(params.A);
  arguments.draw = make_draw(params.mask);
  arguments.tokens = static_cast<int>(params.tokens);
  arguments.features = static_cast<int>(params.features);
  arguments.rank = static_cast<int>(params.rank);
  arguments.z_columns = static_cast<int>(params.z_columns);
  return dispatch_half(
      params.type, [&](auto bfloat16) { return run_by_rank<bfloat16>(arguments, params.gate, params.gated, stream); });
}

}  // namespace megalora
