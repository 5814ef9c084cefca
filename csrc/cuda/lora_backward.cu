// The backward pass of a LoRA branch in one read of what it reads:
//
//   out   = dx + mask * scale * (dz A)
//   dA   += dz^T dropout(x)
//
// or, where x = act(gate) * up is made again, from gate and up:
//
//   [dgate | dup] = the gradient of gate and up where dx + mask * scale * (dz A) is that of x
//   dA   += dz^T dropout(x),    dB_gate += s dgate^T z_gate,    dB_up += s dup^T z_up
//
// or the same of x = act(up), without a gate,
//
// so that each mask is drawn once, and neither x nor the sum passes through memory. What all LoRA kernels have in
// common is said in lora_down.cu.
#include "cuda/factor_sums.h"
#include "cuda/lora.h"
#include "cuda/lora_backward_tile.h"
#include "cuda/swiglu_words.h"

namespace megalora {
namespace {

template <typename Shape>
using BackwardSum = float[Shape::sums][8][4];

// Adds to sums of 16 ranks the q-th two features of a thread's four tokens.
template <bool bfloat16>
__device__ __forceinline__ void add_pairs(float (&total)[8][4], const uint4& a, int q, uint32_t v0, uint32_t v1,
                                          uint32_t v2, uint32_t v3) {
  mma<bfloat16>(total[2 * q], a.x, a.y, a.z, a.w, low_halves(v0, v1), low_halves(v2, v3));
  mma<bfloat16>(total[2 * q + 1], a.x, a.y, a.z, a.w, high_halves(v0, v1), high_halves(v2, v3));
}

// Does a tile, in registers: d becomes dx + the term, or gate and up become their gradients; and adds to the sums.
template <bool bfloat16, typename Shape>
__device__ __forceinline__ void do_tile(BackwardSum<Shape>& sum, BackwardTile<Shape>& tile, const uint4* A,
                                        const uint4 (&kept)[4], float scale) {
  constexpr int rank_tiles = Shape::rank_tiles;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    float term[2][4] = {};
#pragma unroll
    for (int k = 0; k < rank_tiles; ++k) {
      const uint4 part = A[(k * 4 + q) * kLanes];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        mma<bfloat16>(term[h], part.x, part.y, part.z, part.w, tile.ranks[k][h].x, tile.ranks[k][h].y);
      }
    }
    uint32_t dropped[4];  // two features of x of each token
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t before = word(tile.d[i], q), keep = word(kept[i], q);
      const float2 old = unpack<bfloat16>(before);
      const float* added = term[i / 2] + i % 2;  // and two places on that of the other feature
      const uint32_t total = pack<bfloat16>(fmaf(added[0], scale, old.x), fmaf(added[2], scale, old.y));
      const uint32_t after = (total & keep) | (before & ~keep);
      if constexpr (Shape::gated) {
        uint32_t dgate, dup, made;
        swiglu_backward<bfloat16, Shape::act>(after, word(tile.gate[i], q), word(tile.up[i], q), dgate, dup, made);
        set_word(tile.gate[i], q, dgate);
        set_word(tile.up[i], q, dup);
        dropped[i] = made & keep;
      } else if constexpr (Shape::made) {
        uint32_t dup, made;
        activated_backward<bfloat16, Shape::act>(after, word(tile.up[i], q), dup, made);
        set_word(tile.up[i], q, dup);
        dropped[i] = made & keep;
      } else {
        set_word(tile.d[i], q, after);
        dropped[i] = word(tile.x[i], q) & keep;
      }
    }
#pragma unroll
    for (int m = 0; m < rank_tiles; ++m) {
      add_pairs<bfloat16>(sum[m], tile.a[m], q, dropped[0], dropped[1], dropped[2], dropped[3]);
    }
    if constexpr (Shape::gated) {
      const uint4* gate = tile.gate;
      add_pairs<bfloat16>(sum[rank_tiles], tile.a[rank_tiles], q, word(gate[0], q), word(gate[1], q), word(gate[2], q),
                          word(gate[3], q));
    }
    if constexpr (Shape::made) {
      const uint4* up = tile.up;
      add_pairs<bfloat16>(sum[Shape::sums - 1], tile.a[Shape::sums - 1], q, word(up[0], q), word(up[1], q),
                          word(up[2], q), word(up[3], q));
    }
  }
}

// Leaves what the block has of the sums over tokens: its warps' added up in shared memory, in order.
template <typename Shape>
__device__ __forceinline__ void write_sums(const BackwardArguments& arguments, uint4* shared,
                                           const BackwardSum<Shape>& sum, const BackwardPlace<Shape>& at) {
  float* sums = reinterpret_cast<float*>(shared);  // [16 sums, features]
#pragma unroll 1
  for (int turn = 0; turn < Shape::token_warps; ++turn) {
    __syncthreads();
    if (turn != at.token_warp) continue;
#pragma unroll
    for (int m = 0; m < Shape::sums; ++m) {
      add_rank_tile<Shape::pitch>(sums + 16 * m * Shape::pitch + 64 * at.feature_warp, sum[m], at.g, at.t, turn == 0);
    }
  }
  __syncthreads();
  constexpr int quads = Shape::features / 4, rows = 16 * Shape::sums;
  for (int i = at.thread; i < rows * quads; i += Shape::threads) {
    const int rank = i / quads, column = at.first_feature + 4 * (i % quads);
    if (column >= arguments.features) continue;
    const int64_t to = (int64_t{blockIdx.y} * rows + rank) * arguments.features + column;
    *reinterpret_cast<float4*>(arguments.sums + to) =
        *reinterpret_cast<const float4*>(sums + rank * Shape::pitch + 4 * (i % quads));
  }
}

template <bool bfloat16, typename Shape>
__global__ void __launch_bounds__(Shape::threads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  constexpr int stages = Shape::stages;
  extern __shared__ __align__(16) uint4 shared[];
  const Draw& draw = arguments.draw;
  const StepDraw step_draw(draw);
  const BackwardPlace<Shape> at(arguments);
  uint4* token_draws = shared + Shape::A_octets + at.warp * 2 * 16;
  uint4* first_stage = shared + Shape::A_octets + Shape::draw_octets;
  BackwardLoader<Shape> loader(arguments, at, first_stage);
  const int64_t out_stride = Shape::made ? (Shape::gated ? 2 : 1) * int64_t{arguments.features} : arguments.out.stride;
  uint16_t* out_to = (Shape::made ? arguments.grad : arguments.out.data) +
                     int64_t{at.first_token + at.lane_token} * out_stride + at.lane_feature;
#pragma unroll
  for (int step = 0; step < stages - 1; ++step) {
    if (step < at.steps) loader.copy(step);
    commit_copies();
  }
  const TokenDraws<Shape> draws{draw, step_draw, at, arguments.tokens, token_draws};
  draws.write(0, draws.read_token(0));
  int64_t next_token = draws.read_token(1);
  place_A<Shape>(shared, arguments, at.first_feature);
  __syncthreads();

  const uint4* A = shared + at.feature_warp * Shape::rank_tiles * 4 * kLanes + at.lane;
  const uint32_t block = draw.first_block + (at.first_feature + 64 * at.feature_warp + 8 * at.g) / 8;
  const int own_octet = 2 * at.t * 8 + (at.g ^ 2 * at.t);  // of token 2t; r & 6 is 2t for all four
  BackwardSum<Shape> sum = {};
  Turn<stages> reading{0}, writing{stages - 1};
#pragma unroll 1
  for (int step = 0; step < at.steps; ++step) {
    wait_copies<stages - 2>();
    __syncthreads();  // the threads have copied what others read, and have read what is written next
    if (step + stages - 1 < at.steps) loader.copy(writing.stage);
    commit_copies();
    uint4* stage = first_stage + reading.stage * Shape::stage_octets;
    uint4* tile = stage + at.warp * Shape::inputs * Shape::tile_octets;
    reading.next(), writing.next();

    uint4 kept[4] = {kAll, kAll, kAll, kAll};
    if (draw.on) {
#pragma unroll
      for (int i = 0; i < 4; ++i) kept[i] = draws.read(step, i).keep_block(draw, step_draw, block);
      draws.write(step + 1, next_token);
      next_token = draws.read_token(step + 2);
    }
    BackwardTile<Shape> own;
    own.read(stage, tile, at, own_octet);
    do_tile<bfloat16, Shape>(sum, own, A, kept, draw.scale);
    own.leave(tile, own_octet);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!at.there || step * Shape::tokens + at.lane_token + 4 * k >= at.span) continue;
      uint16_t* to = out_to + 4 * k * out_stride;
      *reinterpret_cast<uint4*>(to) = tile[(Shape::made ? Shape::tile_octets : 0) + at.octet_of(k)];
      if constexpr (Shape::gated) {
        *reinterpret_cast<uint4*>(to + int64_t{arguments.features}) = tile[2 * Shape::tile_octets + at.octet_of(k)];
      }
    }
    out_to += Shape::tokens * out_stride;
  }
  wait_copies<0>();
  write_sums<Shape>(arguments, shared, sum, at);
}

// ---- launches

using SmallestShape = BackwardShape<Read, BackwardRank16>;  // features and tokens are those of every shape
constexpr int kGatedSums = BackwardShape<Origin<Gate::silu, true>, BackwardRank16>::sums;
constexpr int kUngatedSums = BackwardShape<Origin<Gate::silu, false>, BackwardRank16>::sums;

int64_t splits_for(int64_t tokens, int64_t features, int64_t sums) {
  return factor_splits(tokens, features, sums, SmallestShape::features, SmallestShape::tokens);
}

// ups: how many of the sums are those of gate and up.
cudaError_t finish(const BackwardArguments& arguments, int64_t splits, int64_t sums, int64_t ups, cudaStream_t stream) {
  FactorSums last{};
  last.sums = arguments.sums;
  last.blocks = static_cast<int>(splits);
  last.rows = static_cast<int>(16 * sums);
  last.features = arguments.features;
  last.down_ranks = arguments.rank;
  last.down_scale = arguments.draw.scale;
  last.grads = arguments.grads;
  const bool idle_rows = arguments.grads.up.data == nullptr;  // no dB is wanted
  return finish_factor_sums(last, idle_rows ? sums - ups : sums, stream);
}

template <bool bfloat16, typename Shape>
cudaError_t run_shape(BackwardArguments arguments, cudaStream_t stream) {
  static_assert(Shape::features == SmallestShape::features && Shape::tokens == SmallestShape::tokens);
  const auto kernel = &backward_kernel<bfloat16, Shape>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::shared_bytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = divide_up(arguments.features, Shape::features);
  const int64_t splits = splits_for(arguments.tokens, arguments.features, Shape::sums);
  const int64_t steps = divide_up(divide_up(arguments.tokens, Shape::tokens), splits);
  arguments.tokens_per_block = static_cast<int>(steps * Shape::tokens);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
  kernel<<<grid, Shape::threads, Shape::shared_bytes, stream>>>(arguments);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? finish(arguments, splits, Shape::sums, Shape::ups, stream) : launched;
}

template <bool bfloat16, typename Origin, typename Tiles>
cudaError_t run(const BackwardArguments& arguments, cudaStream_t stream) {
  using Deep = BackwardShape<Origin, Tiles>;
  using Flat = BackwardShape<Origin, BackwardFlat<Tiles>>;
  static_assert(Flat::shared_bytes <= kSharedMemory);
  return grants_shared_memory(Deep::shared_bytes) ? run_shape<bfloat16, Deep>(arguments, stream)
                                                  : run_shape<bfloat16, Flat>(arguments, stream);
}

template <bool bfloat16>
cudaError_t run_by_rank(const BackwardArguments& arguments, Gate gate, bool gated, cudaStream_t stream) {
  static_assert(16 * BackwardRank48::rank_tiles >= kLargestRankBackward);
  static_assert(16 * BackwardRank16::rank_tiles >= kLargestRankGatedBackward);
  if (gate != Gate::none) {
    return dispatch_origin(gate, gated,
                           [&](auto made) { return run<bfloat16, decltype(made), BackwardRank16>(arguments, stream); });
  }
  if (arguments.rank <= 16) return run<bfloat16, Read, BackwardRank16>(arguments, stream);
  if (arguments.rank <= 32) return run<bfloat16, Read, BackwardRank32>(arguments, stream);
  return run<bfloat16, Read, BackwardRank48>(arguments, stream);
}

}  // namespace

int64_t lora_backward_sums(const LoraBackwardParams& params) {
  const int64_t sums = params.gate == Gate::none ? divide_up(params.rank, 16)
                       : params.gated            ? kGatedSums
                                                 : kUngatedSums;
  return splits_for(params.tokens, params.features, sums) * 16 * sums * params.features;
}

cudaError_t launch_lora_backward(const LoraBackwardParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.features == 0) return cudaSuccess;
  BackwardArguments arguments{};
  arguments.dx = half_matrix(params.dx);
  arguments.dz = half_matrix(params.dz);
  arguments.A = static_cast<const uint16_t*>(params.A);
  arguments.draw = make_draw(params.mask);
  arguments.tokens = static_cast<int>(params.tokens);
  arguments.features = static_cast<int>(params.features);
  arguments.rank = static_cast<int>(params.rank);
  arguments.out = half_matrix(params.out);
  arguments.x = half_matrix(params.x);
  arguments.gate_up = static_cast<const uint16_t*>(params.gate_up);
  arguments.grad = static_cast<uint16_t*>(params.grad);
  arguments.z = half_matrix(params.z);
  arguments.up_first = params.up_first;
  arguments.grads = params.grads;
  arguments.sums = params.sums;
  return dispatch_half(
      params.type, [&](auto bfloat16) { return run_by_rank<bfloat16>(arguments, params.gate, params.gated, stream); });
}

}  // namespace megalora
