// dA = dz^T dropout(x) on tensor cores, and dB^T = z^T dy, without a mask; bound by one pass over x. What all LoRA
// kernels have in common is said in lora_down.cu.
#include "cuda/clusters.h"
#include "cuda/draw.h"
#include "cuda/lora.h"
#include "cuda/tensor_cores.h"

namespace megalora {
namespace {

struct WeightGradArguments {
  float* out;
  bool transposed;
  float scaling;
  HalfMatrix dz, x;
  Draw draw;
  int tokens, features, rank;
  int tokens_per_block;  // of the sum over tokens, that the blocks of a cluster share
};

// ---- the tiles by rank, as measured on an H200
//
// Sixteen warps a block: 16 ranks by 64 features a warp and rank tile is what its registers hold of the sums, so larger
// ranks have more warps beside each other (rank_warps) and fewer behind each other (token_warps). Four stages; one less
// where a GPU grants too little shared memory (8.0). Up to rank 192: three features by four ranks, twelve warps.

struct WeightGradRank16 {
  static constexpr int rank_tiles = 1, rank_warps = 1, feature_warps = 2, token_warps = 8, stages = 4;
};
struct WeightGradRank32 {
  static constexpr int rank_tiles = 2, rank_warps = 1, feature_warps = 2, token_warps = 8, stages = 4;
};
struct WeightGradRank32Flat : WeightGradRank32 {
  static constexpr int stages = 3;
};
struct WeightGradRank64 {
  static constexpr int rank_tiles = 2, rank_warps = 2, feature_warps = 2, token_warps = 4, stages = 4;
};
struct WeightGradRank128 {
  static constexpr int rank_tiles = 2, rank_warps = 4, feature_warps = 2, token_warps = 2, stages = 4;
};
struct WeightGradRank192 {
  static constexpr int rank_tiles = 3, rank_warps = 4, feature_warps = 3, token_warps = 1, stages = 4;
};

// A block has 64·feature_warps features and all ranks, in rank_warps groups of 16·rank_tiles. Stages of 16·token_warps
// tokens pass through shared memory; each warp has 16 tokens of each stage, and the token_warps sums are added at the
// end, in order. Warps of the same tokens and features, but other ranks, share the work of copying and masking x: eight
// lanes move 128 bytes of one row at a time, and each masks what it copied. A tile lies in shared memory by rows, octet
// c of row r at c ^ (r & 6), so that neither side meets a bank twice.
//
// In a tile of 16 tokens and 64 features, thread (g, t) owns features 8g .. 8g + 7 of tokens 2t, 2t + 1, 2t + 8, 2t +
// 9: its pairs of tokens in the inner dimension, and column g of eight mma, the j-th of which has feature 8g + j there.
template <typename Tiles>
struct WeightGradShape : Tiles {
  using Tiles::rank_tiles, Tiles::rank_warps, Tiles::feature_warps, Tiles::token_warps, Tiles::stages;
  static constexpr int threads = kLanes * rank_warps * feature_warps * token_warps;
  static constexpr int features = 64 * feature_warps, tokens = 16 * token_warps;  // of a stage
  static constexpr int ranks = 16 * rank_tiles * rank_warps;
  static constexpr int x_octets = tokens * features / 8;
  static constexpr int dz_pitch = ranks / 8 + 1;  // octets, skewed over the banks
  static constexpr int dz_octets = tokens * dz_pitch, stage_octets = x_octets + dz_octets;
  static constexpr int pitch = features + 4;  // of the float32 sums
  static constexpr int shared_bytes = std::max(stages * stage_octets * 16, ranks * pitch * 4);
};

// ---- the kernel, in parts

// Where a thread stands, and the block's share of the tokens.
template <typename Shape>
struct WeightGradPlace {
  int thread, lane, g, t, rank_warp, tile, feature_warp, token_warp;
  int first_token, span, steps;
  int lane_row, lane_token, lane_feature;  // of x a lane copies its octet of rows lane / 8 + 4k

  __device__ __forceinline__ explicit WeightGradPlace(const WeightGradArguments& arguments) {
    thread = threadIdx.x, lane = thread % kLanes, g = lane / 4, t = lane % 4;
    const int warp = thread / kLanes;
    rank_warp = warp % Shape::rank_warps, tile = warp / Shape::rank_warps;
    feature_warp = tile % Shape::feature_warps, token_warp = tile / Shape::feature_warps;
    first_token = blockIdx.y * arguments.tokens_per_block;
    span = max(0, min(arguments.tokens, first_token + arguments.tokens_per_block) - first_token);
    steps = (span + Shape::tokens - 1) / Shape::tokens;
    lane_row = lane / 8, lane_token = 16 * token_warp + lane_row;
    lane_feature = blockIdx.x * Shape::features + 64 * feature_warp + 8 * (lane % 8);
  }

  // In its tile, of its row 4k.
  __device__ __forceinline__ int octet_of(int k) const {
    return (4 * k + lane_row) * 8 + (lane % 8 ^ (4 * (k & 1) | (lane_row & 2)));
  }
};

// Copies the next stage: pointers that move on, and up to which token (from first_token) they may.
template <typename Shape>
struct WeightGradLoader {
  static constexpr int row_octets = Shape::ranks / 8, octets = Shape::tokens * row_octets;
  static constexpr int dz_copies = (octets + Shape::threads - 1) / Shape::threads;
  const WeightGradArguments& arguments;
  const WeightGradPlace<Shape>& at;
  uint4* shared;
  const uint16_t *x_from, *dz_from[dz_copies];
  int x_limit, dz_limit[dz_copies], ahead = 0;
  uint32_t dz_to[dz_copies];

  __device__ __forceinline__ WeightGradLoader(const WeightGradArguments& arguments, const WeightGradPlace<Shape>& at,
                                              uint4* shared)
      : arguments(arguments), at(at), shared(shared) {
    x_from = arguments.x.data + (at.first_token + at.lane_token) * arguments.x.stride + at.lane_feature;
    x_limit = at.lane_feature < arguments.features ? at.span - at.lane_token : 0;
#pragma unroll
    for (int i = 0; i < dz_copies; ++i) {
      const int row = (i * Shape::threads + at.thread) / row_octets;
      const int column = (i * Shape::threads + at.thread) % row_octets;
      dz_from[i] = arguments.dz.data + (at.first_token + row) * arguments.dz.stride + 8 * column;
      dz_limit[i] = 8 * column < arguments.rank ? at.span - row : 0;
      dz_to[i] = shared_address(shared + Shape::x_octets + row * Shape::dz_pitch + column);
    }
  }

  __device__ __forceinline__ void copy(int stage) {
    const uint32_t to = stage * (Shape::stage_octets * 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k % Shape::rank_warps != at.rank_warp) continue;
      copy_async(shared_address(shared + at.tile * 4 * kLanes + at.octet_of(k)) + to,
                 x_from + 4 * k * arguments.x.stride, ahead + 4 * k < x_limit);
    }
    x_from += Shape::tokens * arguments.x.stride;
#pragma unroll
    for (int i = 0; i < dz_copies; ++i) {
      if (octets % Shape::threads == 0 || i * Shape::threads + at.thread < octets) {
        copy_async(dz_to[i] + to, dz_from[i], ahead < dz_limit[i]);
      }
      dz_from[i] += Shape::tokens * arguments.dz.stride;
    }
    ahead += Shape::tokens;
  }
};

template <typename Shape>
using WeightGradSum = float[Shape::rank_tiles][8][4];

// Adds a tile of 16 tokens and 64 features, masked already, to the sums.
template <bool bfloat16, typename Shape>
__device__ __forceinline__ void multiply_tile(WeightGradSum<Shape>& sum, const uint4* x, const uint4* dz,
                                              const WeightGradPlace<Shape>& at, int own_octet) {
  constexpr int rank_tiles = Shape::rank_tiles;
  auto offset = [](int i) { return (i & 1) + 8 * (i >> 1); };  // of a thread's i-th token from its first
  uint4 v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = x[own_octet + 8 * offset(i)];
  uint4 a[rank_tiles];
#pragma unroll
  for (int m = 0; m < rank_tiles; ++m) {
    const int row = 16 * at.token_warp + at.lane % 8 + at.lane / 16 * 8;
    a[m] = load_transposed(dz + row * Shape::dz_pitch + (at.rank_warp * rank_tiles + m) * 2 + at.lane / 8 % 2);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    auto pair = [&](int i) {
      const uint32_t even = word(v[i], j / 2), odd = word(v[i + 1], j / 2);
      return j % 2 ? high_halves(even, odd) : low_halves(even, odd);
    };
    const uint32_t b0 = pair(0), b1 = pair(2);
#pragma unroll
    for (int m = 0; m < rank_tiles; ++m) mma<bfloat16>(sum[m][j], a[m].x, a[m].y, a[m].z, a[m].w, b0, b1);
  }
}

// Writes this block's share of the sums [ranks, features], added up over the cluster.
template <typename Shape>
__device__ __forceinline__ void write_grad(const WeightGradArguments& arguments, const float* sums) {
  const int blocks = gridDim.y;
  const float scale = arguments.draw.scale * arguments.scaling;
  cluster_barrier(blocks);
  constexpr int quads = Shape::features / 4;
  for (int i = blockIdx.y * Shape::threads + threadIdx.x; i < arguments.rank * quads; i += blocks * Shape::threads) {
    const int rank = arguments.transposed ? i % arguments.rank : i / quads;
    const int quad = arguments.transposed ? i / arguments.rank : i % quads;
    const int column = blockIdx.x * Shape::features + 4 * quad;
    if (column >= arguments.features) continue;
    float4 v = cluster_sum(sums + rank * Shape::pitch + 4 * quad, blocks);
    v = {v.x * scale, v.y * scale, v.z * scale, v.w * scale};
    if (arguments.transposed) {
      float* out = arguments.out + int64_t{column} * arguments.rank + rank;
      out[0] = v.x;
      out[arguments.rank] = v.y;
      out[2 * arguments.rank] = v.z;
      out[3 * arguments.rank] = v.w;
    } else {
      *reinterpret_cast<float4*>(arguments.out + int64_t{rank} * arguments.features + column) = v;
    }
  }
  if (blocks > 1) cluster_barrier(blocks);
}

template <bool bfloat16, typename Shape>
__global__ void __launch_bounds__(Shape::threads, 1)
    weight_grad_kernel(const __grid_constant__ WeightGradArguments arguments) {
  constexpr int rank_tiles = Shape::rank_tiles, stages = Shape::stages;
  extern __shared__ __align__(16) uint4 shared[];
  const Draw& draw = arguments.draw;
  const StepDraw step_draw(draw);
  const WeightGradPlace<Shape> at(arguments);
  WeightGradLoader<Shape> loader(arguments, at, shared);
  // A lane reads one of the warp's next sixteen tokens ahead of time, and the others ask it.
  auto read_token = [&](int step) {
    const int token = at.first_token + step * Shape::tokens + 16 * at.token_warp + at.lane % 16;
    return draw.on ? __ldg(draw.token + min(token, arguments.tokens - 1)) : 0;
  };

#pragma unroll
  for (int step = 0; step < stages - 1; ++step) {
    if (step < at.steps) loader.copy(step);
    commit_copies();
  }
  int64_t token_of_lane = read_token(0);
  const uint32_t block = draw.first_block + at.lane_feature / 8;
  const int own_octet = 2 * at.t * 8 + (at.g ^ 2 * at.t);  // of token 2t; r & 6 is 2t for all four
  WeightGradSum<Shape> sum = {};
  Turn<stages> reading{0}, writing{stages - 1};
#pragma unroll 1
  for (int step = 0; step < at.steps; ++step) {
    uint4* x = shared + reading.stage * Shape::stage_octets + at.tile * 4 * kLanes;
    const uint4* dz = shared + reading.stage * Shape::stage_octets + Shape::x_octets;
    wait_copies<stages - 2>();
    if (draw.on) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t its_token = __shfl_sync(0xFFFFFFFF, token_of_lane, 4 * k + at.lane_row);
        if (k % Shape::rank_warps != at.rank_warp) continue;
        TokenDraw token;
        token.init(draw, step_draw, its_token);
        x[at.octet_of(k)] = x[at.octet_of(k)] & token.keep_block(draw, step_draw, block);
      }
      token_of_lane = read_token(step + 1);
    }
    __syncthreads();
    if (step + stages - 1 < at.steps) loader.copy(writing.stage);
    commit_copies();
    reading.next(), writing.next();
    multiply_tile<bfloat16, Shape>(sum, x, dz, at, own_octet);
  }

  wait_copies<0>();
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll 1
  for (int turn = 0; turn < Shape::token_warps; ++turn) {
    __syncthreads();
    if (turn != at.token_warp) continue;
#pragma unroll
    for (int m = 0; m < rank_tiles; ++m) {
      float* ranks = sums + (at.rank_warp * rank_tiles + m) * 16 * Shape::pitch + 64 * at.feature_warp;
      add_rank_tile<Shape::pitch>(ranks, sum[m], at.g, at.t, turn == 0);
    }
  }
  write_grad<Shape>(arguments, sums);
}

// ---- launches

template <bool bfloat16, typename Shape>
cudaError_t run_shape(WeightGradArguments arguments, cudaStream_t stream) {
  const auto kernel = &weight_grad_kernel<bfloat16, Shape>;
  const Capacity& known = capacity<Shape>(kernel);
  if (known.error != cudaSuccess) return known.error;
  const int64_t tiles = divide_up(arguments.features, Shape::features);
  const int splits = known.splits(tiles);
  const int64_t stages = divide_up(divide_up(arguments.tokens, Shape::tokens), splits);
  arguments.tokens_per_block = static_cast<int>(stages * Shape::tokens);
  return launch_clusters<Shape>(kernel, tiles, splits, arguments, stream);
}

// Flat: for a GPU that grants a block no more than kSharedMemory, where Tiles ask for more.
template <bool bfloat16, typename Tiles, typename Flat = Tiles>
cudaError_t run(const WeightGradArguments& arguments, cudaStream_t stream) {
  using Deep = WeightGradShape<Tiles>;
  static_assert(WeightGradShape<Flat>::shared_bytes <= kSharedMemory);
  return grants_shared_memory(Deep::shared_bytes) ? run_shape<bfloat16, Deep>(arguments, stream)
                                                  : run_shape<bfloat16, WeightGradShape<Flat>>(arguments, stream);
}

template <bool bfloat16>
cudaError_t run_by_rank(const WeightGradArguments& arguments, cudaStream_t stream) {
  static_assert(WeightGradShape<WeightGradRank192>::ranks >= kLargestRank);
  if (arguments.rank <= 16) return run<bfloat16, WeightGradRank16>(arguments, stream);
  if (arguments.rank <= 32) return run<bfloat16, WeightGradRank32, WeightGradRank32Flat>(arguments, stream);
  if (arguments.rank <= 64) return run<bfloat16, WeightGradRank64>(arguments, stream);
  if (arguments.rank <= 128) return run<bfloat16, WeightGradRank128>(arguments, stream);
  return run<bfloat16, WeightGradRank192>(arguments, stream);
}

}  // namespace

cudaError_t launch_lora_weight_grad(const LoraWeightGradParams& params, cudaStream_t stream) {
  if (params.features == 0) return cudaSuccess;
  if (params.tokens == 0) {
    return cudaMemsetAsync(params.out, 0, sizeof(float) * params.rank * params.features, stream);
  }
  WeightGradArguments arguments{};
  arguments.out = static_cast<float*>(params.out);
  arguments.transposed = params.transposed;
  arguments.scaling = static_cast<float>(params.scaling);
  arguments.dz = half_matrix(params.dz);
  arguments.x = half_matrix(params.x);
  arguments.draw = make_draw(params.mask);
  arguments.tokens = static_cast<int>(params.tokens);
  arguments.features = static_cast<int>(params.features);
  arguments.rank = static_cast<int>(params.rank);
  return dispatch_half(params.type, [&](auto bfloat16) { return run_by_rank<bfloat16>(arguments, stream); });
}

}  // namespace megalora
