// What the kernel of lora_backward.cu is made of: its arguments and tiles, and how they come into registers.
#pragma once

#include "cuda/clusters.h"
#include "cuda/draw.h"
#include "cuda/tensor_cores.h"
#include "lora_params.h"

namespace megalora {

struct BackwardArguments {
  HalfMatrix dx, dz;
  const uint16_t* A;
  Draw draw;
  int tokens, features, rank;
  HalfMatrix out, x;        // where x is read
  const uint16_t* gate_up;  // [T, 2 F] or [T, F], where it is made
  uint16_t* grad;           // of the same shape
  HalfMatrix z;             // gate's columns, and up's from up_first on
  int up_first;
  FactorGrads grads;
  float* sums;           // [gridDim.y, 16 ranks a sum, features]: what each block has of the sums over tokens
  int tokens_per_block;  // gridDim.y blocks share the tokens
};

// ---- the tiles by rank, as measured on an H200
//
// Eight warps, 256 features by 32 tokens: registers hold the sums of three tiles of sixteen ranks at most (with gate
// and up, whose sums are two of the three, one is left for A's). As many stages as fit; two where a GPU grants too
// little shared memory (8.0).

struct BackwardTiles {
  static constexpr int feature_warps = 4, token_warps = 2;
};
struct BackwardRank16 : BackwardTiles {
  static constexpr int rank_tiles = 1, stages = 3;
};
struct BackwardRank32 : BackwardTiles {
  static constexpr int rank_tiles = 2, stages = 4;
};
struct BackwardRank48 : BackwardTiles {
  static constexpr int rank_tiles = 3, stages = 4;
};
template <typename Tiles>
struct BackwardFlat : Tiles {
  static constexpr int stages = 2;
};

// A block has 64·feature_warps features and all ranks, and goes through its share of the tokens: 16 tokens and 64
// features a warp at a time, copied ahead into shared memory. The token_warps sums are added at the end, in order, and
// those of the blocks of other tokens by finish_factor_sums.
//
// Thread (g, t) owns features 8g .. 8g + 7 of tokens 2t, 2t + 1, 2t + 8, 2t + 9. In the term dz A features are the rows
// of four mma, the q-th of which has features 8g + 2q, 8g + 2q + 1 in rows g, g + 8, and tokens are its columns; the
// ranks of thread t are 4t .. 4t + 3 of each sixteen. In the sums over tokens features are the columns of eight mma,
// the j-th of which has feature 8g + j in column g, and pairs of tokens lie in the inner dimension.
//
// To and from memory eight lanes move 128 bytes of one row at a time, else requests of 32 bytes are what bounds the
// kernel. A tile lies in shared memory by rows, octet c of row r at c ^ (r & 6): neither side meets a bank twice.
template <typename Origin, typename Tiles>
struct BackwardShape : Tiles {
  static constexpr Gate act = Origin::act;
  static constexpr bool gated = Origin::gated, made = Origin::made;
  using Tiles::rank_tiles, Tiles::feature_warps, Tiles::token_warps, Tiles::stages;
  static constexpr int ups = gated + made;       // factors whose dB are summed here, dB_gate and dB_up
  static constexpr int sums = rank_tiles + ups;  // of 16 ranks each: dA's, then those
  static constexpr int warps = feature_warps * token_warps, threads = kLanes * warps;
  static constexpr int features = 64 * feature_warps, tokens = 16 * token_warps;  // of a step
  static constexpr int inputs = gated ? 3 : 2;                                    // dx and x (or up); dx, gate and up
  static constexpr int tile_octets = 16 * 8;
  static constexpr int dz_pitch = 2 * rank_tiles + 1, z_pitch = 2 * ups + 1;  // octets, skewed over the banks
  static constexpr int dz_octets = tokens * dz_pitch, z_octets = made ? tokens * z_pitch : 0;
  static constexpr int stage_octets = warps * inputs * tile_octets + dz_octets + z_octets;
  static constexpr int draw_octets = 2 * 16 * warps;  // of two tiles' tokens, by warp
  static constexpr int A_octets = feature_warps * rank_tiles * 4 * kLanes;
  static constexpr int pitch = features + 4;  // of the float32 sums
  static constexpr int shared_bytes = std::max((A_octets + draw_octets + stages * stage_octets) * 16,
                                               16 * sums * pitch * static_cast<int>(sizeof(float)));
};

// ---- the kernel, in parts

__device__ __forceinline__ void set_word(uint4& v, int i, uint32_t value) {
  if (i == 0) v.x = value;
  if (i == 1) v.y = value;
  if (i == 2) v.z = value;
  if (i == 3) v.w = value;
}

__device__ __forceinline__ int offset_of(int i) { return (i & 1) + 8 * (i >> 1); }  // of a thread's i-th token

// Where a thread stands, and the block's share of the tokens.
template <typename Shape>
struct BackwardPlace {
  int thread, lane, warp, g, t, feature_warp, token_warp, first_feature, first_token, span, steps;
  int lane_row, lane_token, lane_feature;  // to and from memory a lane moves its octet of rows lane / 8 + 4k
  bool there;

  __device__ __forceinline__ explicit BackwardPlace(const BackwardArguments& arguments) {
    thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes, g = lane / 4, t = lane % 4;
    feature_warp = warp % Shape::feature_warps, token_warp = warp / Shape::feature_warps;
    first_feature = blockIdx.x * Shape::features, first_token = blockIdx.y * arguments.tokens_per_block;
    span = max(0, min(arguments.tokens, first_token + arguments.tokens_per_block) - first_token);
    steps = (span + Shape::tokens - 1) / Shape::tokens;
    lane_row = lane / 8, lane_token = 16 * token_warp + lane_row;
    lane_feature = first_feature + 64 * feature_warp + 8 * (lane % 8);
    there = lane_feature < arguments.features;
  }

  __device__ __forceinline__ int octet_of(int k) const {
    return (4 * k + lane_row) * 8 + (lane % 8 ^ (4 * (k & 1) | (lane_row & 2)));
  }
};

// Copies the next stage: tiles of dx and x (or gate and up, or up), the ranks of their tokens in dz, and in z those of
// gate and up.
template <typename Shape>
struct BackwardLoader {
  const BackwardArguments& arguments;
  const BackwardPlace<Shape>& at;
  uint4* first_stage;
  const uint16_t *dx_from, *x_from;
  int64_t x_stride;
  int ahead = 0;

  __device__ __forceinline__ BackwardLoader(const BackwardArguments& arguments, const BackwardPlace<Shape>& at,
                                            uint4* first_stage)
      : arguments(arguments), at(at), first_stage(first_stage) {
    const int64_t lane_first = at.first_token + at.lane_token;
    dx_from = arguments.dx.data + lane_first * arguments.dx.stride + at.lane_feature;
    x_stride = Shape::made ? (Shape::gated ? 2 : 1) * int64_t{arguments.features} : arguments.x.stride;
    x_from = (Shape::made ? arguments.gate_up : arguments.x.data) + lane_first * x_stride + at.lane_feature;
  }

  __device__ __forceinline__ void copy(int stage) {
    const uint32_t to = shared_address(first_stage + stage * Shape::stage_octets);
    const uint32_t to_tile = to + at.warp * (Shape::inputs * Shape::tile_octets * 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool is = at.there && ahead + at.lane_token + 4 * k < at.span;
      const uint32_t octet = to_tile + at.octet_of(k) * 16;
      copy_async(octet, dx_from + 4 * k * arguments.dx.stride, is);
      copy_async(octet + Shape::tile_octets * 16, x_from + 4 * k * x_stride, is);
      if constexpr (Shape::gated) {
        copy_async(octet + 2 * Shape::tile_octets * 16, x_from + 4 * k * x_stride + int64_t{arguments.features}, is);
      }
    }
    dx_from += Shape::tokens * arguments.dx.stride;
    x_from += Shape::tokens * x_stride;
    copy_ranks(to + Shape::warps * Shape::inputs * Shape::tile_octets * 16);
    ahead += Shape::tokens;
  }

 private:
  // An octet of eight ranks a thread at a time.
  __device__ __forceinline__ void copy_ranks(uint32_t to_dz) {
    constexpr int rank_tiles = Shape::rank_tiles;
    for (int i = at.thread; i < Shape::tokens * 2 * rank_tiles; i += Shape::threads) {
      const int row = i / (2 * rank_tiles), column = i % (2 * rank_tiles);
      const bool is = 8 * column < arguments.rank && ahead + row < at.span;
      const int64_t token = at.first_token + ahead + row;
      copy_async(to_dz + (row * Shape::dz_pitch + column) * 16,
                 arguments.dz.data + token * arguments.dz.stride + 8 * column, is);
    }
    if constexpr (Shape::made) {  // two columns of eight ranks each are gate's, where there is one, the last two up's
      const uint32_t to_z = to_dz + Shape::dz_octets * 16;
      constexpr int columns = 2 * Shape::ups;
      for (int i = at.thread; i < Shape::tokens * columns; i += Shape::threads) {
        const int row = i / columns, column = i % columns, rank = 8 * (column % 2);
        const bool of_up = column >= columns - 2;
        const bool is = rank < (of_up ? arguments.grads.up.ranks : arguments.grads.gate.ranks) && ahead + row < at.span;
        const int64_t token = at.first_token + ahead + row;
        copy_async(to_z + (row * Shape::z_pitch + column) * 16,
                   arguments.z.data + token * arguments.z.stride + (of_up ? arguments.up_first : 0) + rank, is);
      }
    }
  }
};

// The tokens' part of the draws: each lane of sixteen works out one token's, for the four that read it.
template <typename Shape>
struct TokenDraws {
  const Draw& draw;
  const StepDraw& step_draw;
  const BackwardPlace<Shape>& at;
  int tokens;
  uint4* words;  // [2 steps, 16], of this warp

  __device__ __forceinline__ int64_t read_token(int step) const {
    const int token = at.first_token + step * Shape::tokens + 16 * at.token_warp + at.lane % 16;
    return draw.on ? __ldg(draw.token + min(token, tokens - 1)) : 0;
  }
  __device__ __forceinline__ void write(int step, int64_t token) const {
    if (!draw.on || at.lane >= 16) return;
    TokenDraw made;
    made.init(draw, step_draw, token);
    words[step % 2 * 16 + at.lane] = {made.round1, made.round2a, made.round2b, made.round2c};
  }
  __device__ __forceinline__ TokenDraw read(int step, int i) const {
    const uint4 of_token = words[step % 2 * 16 + 2 * at.t + offset_of(i)];
    return {of_token.x, of_token.y, of_token.z, of_token.w};
  }
};

// Puts the block's part of A into shared memory, [feature_warps, rank_tiles, 4 mma, lanes], in the order of the mma's
// operand: rows (features) 8g + 2q, 8g + 2q + 1, inner (ranks) 4t .. 4t + 3.
template <typename Shape>
__device__ __forceinline__ void place_A(uint4* A, const BackwardArguments& arguments, int first_feature) {
  constexpr int rank_tiles = Shape::rank_tiles;
  for (int i = threadIdx.x; i < Shape::feature_warps * rank_tiles * kLanes; i += Shape::threads) {
    const int its_lane = i % kLanes, k = i / kLanes % rank_tiles, part = i / kLanes / rank_tiles;
    const int column = first_feature + 64 * part + 8 * (its_lane / 4);
    uint4 v[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int rank = 16 * k + 4 * (its_lane % 4) + r;
      const bool is = rank < arguments.rank && column < arguments.features;
      const auto* place = reinterpret_cast<const uint4*>(arguments.A + int64_t{rank} * arguments.features + column);
      v[r] = is ? __ldg(place) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint32_t w[4] = {word(v[0], q), word(v[1], q), word(v[2], q), word(v[3], q)};
      A[((part * rank_tiles + k) * 4 + q) * kLanes + its_lane] = {low_halves(w[0], w[1]), high_halves(w[0], w[1]),
                                                                  low_halves(w[2], w[3]), high_halves(w[2], w[3])};
    }
  }
}

// A thread's four octets of a tile, and the ranks of the tile's tokens.
template <typename Shape>
struct BackwardTile {
  static constexpr bool gated = Shape::gated, made = Shape::made;
  static constexpr int of_up = (gated ? 2 : 1) * Shape::tile_octets;  // where up lies
  uint4 d[4], x[made ? 1 : 4], gate[gated ? 4 : 1], up[made ? 4 : 1];
  uint4 a[Shape::sums];  // as the sums' operand
  uint2 ranks[Shape::rank_tiles][2];

  __device__ __forceinline__ void read(const uint4* stage, const uint4* tile, const BackwardPlace<Shape>& at,
                                       int own_octet) {
    constexpr int rank_tiles = Shape::rank_tiles;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int octet = own_octet + 8 * offset_of(i);
      d[i] = tile[octet];
      if constexpr (gated) gate[i] = tile[Shape::tile_octets + octet];
      if constexpr (made) up[i] = tile[of_up + octet];
      if constexpr (!made) x[i] = tile[Shape::tile_octets + octet];
    }
    const uint4* ranks_of_block = stage + Shape::warps * Shape::inputs * Shape::tile_octets;
    const uint4* dz = ranks_of_block + 16 * at.token_warp * Shape::dz_pitch;
    const uint4* z = ranks_of_block + Shape::dz_octets + 16 * at.token_warp * Shape::z_pitch;
    const int row = at.lane % 8 + at.lane / 16 * 8;
#pragma unroll
    for (int m = 0; m < rank_tiles; ++m) {
      a[m] = load_transposed(dz + row * Shape::dz_pitch + 2 * m + at.lane / 8 % 2);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ranks[m][h] = reinterpret_cast<const uint2*>(dz + (at.g + 8 * h) * Shape::dz_pitch + 2 * m)[at.t];
      }
    }
#pragma unroll
    for (int m = 0; m < Shape::ups; ++m) {
      a[rank_tiles + m] = load_transposed(z + row * Shape::z_pitch + 2 * m + at.lane / 8 % 2);
    }
  }

  // Out again by rows, through the places that the thread read.
  __device__ __forceinline__ void leave(uint4* tile, int own_octet) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int octet = own_octet + 8 * offset_of(i);
      if constexpr (gated) tile[Shape::tile_octets + octet] = gate[i];
      if constexpr (made) tile[of_up + octet] = up[i];
      if constexpr (!made) tile[octet] = d[i];
    }
  }
};

}  // namespace megalora
