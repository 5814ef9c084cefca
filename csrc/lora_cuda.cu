// The skinny products of a LoRA linear on tensor cores, each bound by one pass over the activations:
//
//   z   = dropout(x) A^T            down_kernel
//   dA  = dz^T dropout(x)           weight_grad_kernel    (and dB^T = z^T dy, without a mask)
//   dx += mask * scale * (dz A)     input_grad_kernel, alone or with the backward pass of the SwiGLU that made x
//
// The mask is drawn in registers: one Philox call gives the eight 16-bit lanes of eight consecutive features of one
// token, which is one 16-byte load. The operands of mma.m16n8k16 are laid out so that each thread owns such octets: the
// places of features in a product's inner dimension (or in its columns) are permuted, alike in both operands, which
// changes no sum but its order. So no element's mask is drawn twice and none passes between threads.
//
// Results repeat bit for bit: sums run in a fixed order, those that are split over blocks meet in a thread block
// cluster's shared memory (sm_90 on; before that a sum is not split). The scale of kept values is applied once, to the
// float32 sum.
#include "lora_cuda.h"

#include "draw.h"
#include "swiglu_words.h"
#include "tensor_cores.h"

namespace megalora {
namespace {

// ---- z = dropout(x) A^T

struct DownArguments {
  Matrix z, x;
  Matrix copy;              // of x, as far as it goes; null: none
  const uint16_t* gate_up;  // [T, 2 F], where x = silu(gate) * up is made, into `copy`, instead of read
  const uint16_t* A;
  Draw draw;
  int tokens, features, rank, z_columns;
  int features_per_block;  // of the sum over features, that the blocks of a cluster share; a multiple of 64
};

// A block has 16·row_tiles·row_warps tokens and all ranks (in 8·rank_tiles columns). Stages of 64·feature_warps features
// pass through shared memory: x by rows of 64 features, eight lanes a row, octet c of row r at c ^ 4 (r & 1), so that
// neither side meets a bank twice; and A in the order of the mma's operand, shared by the warps of the same features. The
// feature_warps sums are added at the end, in order.
//
// In a block of 32 features, thread (g, t) owns features 8t .. 8t + 7 of its rows: words 0, 1 of these are its pairs of
// the first mma's inner dimension, words 2, 3 of the second's.
template <bool gated_, int rank_tiles_, int row_tiles_, int row_warps_, int feature_warps_, int stages_>
struct DownShape {
  static constexpr bool gated = gated_;
  static constexpr int rank_tiles = rank_tiles_, row_tiles = row_tiles_, row_warps = row_warps_, stages = stages_;
  static constexpr int feature_warps = feature_warps_, stage_features = 64 * feature_warps;
  static constexpr int threads = kLanes * row_warps * feature_warps, rows = 16 * row_tiles * row_warps;
  static constexpr int tile_octets = 16 * row_tiles * 8;  // of a warp
  static constexpr int input_octets = row_warps * feature_warps * tile_octets;
  static constexpr int x_octets = (gated ? 2 : 1) * input_octets, A_octets = feature_warps * 2 * rank_tiles * kLanes;
  static constexpr int stage_octets = x_octets + A_octets;
  static constexpr int pitch = 8 * rank_tiles + 8;  // of the float32 sums, skewed over the banks
  static constexpr int shared_bytes = std::max(stages * stage_octets * 16, rows * pitch * 4);
};

template <bool bfloat16, typename Shape>
__global__ void __launch_bounds__(Shape::threads, 1) down_kernel(const __grid_constant__ DownArguments arguments) {
  constexpr int rank_tiles = Shape::rank_tiles, row_tiles = Shape::row_tiles, stages = Shape::stages;
  constexpr int threads = Shape::threads, A_copies = (Shape::A_octets + threads - 1) / threads;
  extern __shared__ __align__(16) uint4 shared[];
  const Draw& draw = arguments.draw;
  const StepDraw step_draw(draw);
  const int thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes, g = lane / 4, t = lane % 4;
  const int row_warp = warp % Shape::row_warps, feature_warp = warp / Shape::row_warps;
  const int first_row = blockIdx.x * Shape::rows, warp_row = first_row + row_warp * 16 * row_tiles;
  const int first_feature = blockIdx.y * arguments.features_per_block;
  const int last_feature = min(arguments.features, first_feature + arguments.features_per_block);
  const int span = max(0, last_feature - first_feature);
  const int steps = (span + Shape::stage_features - 1) / Shape::stage_features;

  // Where the next stage comes from: pointers that move on, and up to which feature (from first_feature) they may. Of x
  // a lane copies an octet of rows lane / 8 + 4k, as far as there are tokens.
  const int lane_row = warp_row + lane / 8, rows_left = arguments.tokens - lane_row;
  const int lane_feature = 64 * feature_warp + 8 * (lane % 8), x_limit = span - lane_feature;
  const int64_t x_stride = Shape::gated ? 2 * int64_t{arguments.features} : arguments.x.stride;
  const uint16_t* x_from = (Shape::gated ? arguments.gate_up : arguments.x.data) + lane_row * x_stride +
                           first_feature + lane_feature;
  const uint16_t* A_from[A_copies];
  int A_limit[A_copies], ahead = 0;
#pragma unroll
  for (int i = 0; i < A_copies; ++i) {
    const int tile = warp + i * (threads / kLanes), rank = tile % rank_tiles * 8 + g;
    const int column = tile / rank_tiles * 32 + 8 * t;
    A_from[i] = arguments.A + int64_t{rank} * arguments.features + first_feature + column;
    A_limit[i] = rank < arguments.rank ? span - column : 0;
  }
  const uint32_t thread_place = shared_address(shared + thread);
  // Where in its warp's tile a lane copies to (of k = 0: rows lane / 8), and reads from (of row g, the first half).
  const int lane_place = warp * Shape::tile_octets + lane / 8 * 8 + (lane % 8 ^ (lane / 8 & 1) * 4);
  const int read_place = warp * Shape::tile_octets + g * 8 + (t ^ (g & 1) * 4);
  uint16_t* copy_to = arguments.copy.data + lane_row * arguments.copy.stride + first_feature + lane_feature;

  auto copy_stage = [&](int stage) {
    const uint32_t to = thread_place + stage * (Shape::stage_octets * 16);
    const uint32_t to_x = shared_address(shared + stage * Shape::stage_octets + lane_place);
#pragma unroll
    for (int k = 0; k < 4 * row_tiles; ++k) {
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
      if (Shape::A_octets % threads == 0 || i * threads + thread < Shape::A_octets) {
        copy_async(to + (Shape::x_octets + i * threads) * 16, A_from[i], ahead < A_limit[i]);
      }
      A_from[i] += Shape::stage_features;
    }
    ahead += Shape::stage_features;
  };

#pragma unroll
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) copy_stage(step);
    commit_copies();
  }
  TokenDraw token[2 * row_tiles];
  if (draw.on) {
#pragma unroll
    for (int i = 0; i < 2 * row_tiles; ++i) {
      token[i].init(draw, step_draw, __ldg(draw.token + min(warp_row + 8 * i + g, arguments.tokens - 1)));
    }
  }
  uint32_t block = draw.first_block + (first_feature + 64 * feature_warp) / 8 + t;
  float sum[row_tiles][rank_tiles][4] = {};
  Turn<stages> reading{0}, writing{stages - 1};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<stages - 2>();
    __syncthreads();
    if (step + stages - 1 < steps) copy_stage(writing.stage);
    commit_copies();
    uint4* x = shared + reading.stage * Shape::stage_octets;
    const uint4* A = shared + reading.stage * Shape::stage_octets + Shape::x_octets + lane +
                     feature_warp * 2 * rank_tiles * kLanes;
    reading.next(), writing.next();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 v[2 * row_tiles];
#pragma unroll
      for (int i = 0; i < 2 * row_tiles; ++i) {
        // Always masked, if by ones: the results can then be computed right into the registers that an mma wants.
        uint4 kept = kAll;
        if (draw.on) kept = token[i].keep_block(draw, step_draw, block + 4 * half);
        const int octet = (read_place ^ 4 * half) + i * 8 * 8;  // row g + 8i; the other half is four octets apart
        uint4 all = x[octet];
        if constexpr (Shape::gated) {
          const uint4 up = x[Shape::input_octets + octet];
          all = {swiglu<bfloat16>(all.x, up.x), swiglu<bfloat16>(all.y, up.y), swiglu<bfloat16>(all.z, up.z),
                 swiglu<bfloat16>(all.w, up.w)};
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
    block += Shape::stage_features / 8;
    if (arguments.copy.data == nullptr) continue;
    if (Shape::gated) __syncwarp();  // the lanes have put there what they made
#pragma unroll
    for (int k = 0; k < 4 * row_tiles; ++k) {
      if (step * Shape::stage_features >= x_limit || 4 * k >= rows_left) continue;
      *reinterpret_cast<uint4*>(copy_to + 4 * k * arguments.copy.stride) = x[lane_place + k * 4 * 8];
    }
    copy_to += Shape::stage_features;
  }

  wait_copies<0>();
  float* sums = reinterpret_cast<float*>(shared);  // [rows, ranks]
#pragma unroll 1
  for (int turn = 0; turn < Shape::feature_warps; ++turn) {
    __syncthreads();
    if (turn != feature_warp) continue;
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
      for (int j = 0; j < rank_tiles; ++j) {
#pragma unroll
        for (int c = 0; c < 4; c += 2) {
          float* place = sums + ((row_warp * row_tiles + i) * 16 + g + 4 * c) * Shape::pitch + 8 * j + 2 * t;
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
  const int blocks = gridDim.y;
  cluster_barrier(blocks);
  const int quads = arguments.z_columns / 4;
  for (int i = blockIdx.y * threads + thread; i < Shape::rows * quads; i += blocks * threads) {
    const int row = i / quads, column = 4 * (i % quads);
    if (first_row + row >= arguments.tokens) break;
    float4 v = {0, 0, 0, 0};
    if (column < arguments.rank) v = cluster_sum(sums + row * Shape::pitch + column, blocks);
    const uint2 words = {pack<bfloat16>(v.x * draw.scale, v.y * draw.scale),
                         pack<bfloat16>(v.z * draw.scale, v.w * draw.scale)};
    *reinterpret_cast<uint2*>(arguments.z.data + (first_row + row) * arguments.z.stride + column) = words;
  }
  if (blocks > 1) cluster_barrier(blocks);  // a block's shared memory must outlast the others' reads
}

// ---- dA = dz^T dropout(x)

struct WeightGradArguments {
  float* out;
  bool transposed;
  float scaling;
  Matrix dz, x;
  Draw draw;
  int tokens, features, rank;
  int tokens_per_block;  // of the sum over tokens, that the blocks of a cluster share
};

// A block has 64·feature_warps features and all ranks, in rank_warps groups of 16·rank_tiles. Stages of 16·token_warps
// tokens pass through shared memory; each warp has 16 tokens of each stage, and the token_warps sums are added at the
// end, in order. Warps of the same tokens and features, but other ranks, share the work of copying and masking x: eight
// lanes move 128 bytes of one row at a time, and each masks what it copied. A tile lies in shared memory by rows, octet c
// of row r at c ^ (r & 6), so that neither side meets a bank twice.
//
// In a tile of 16 tokens and 64 features, thread (g, t) owns features 8g .. 8g + 7 of tokens 2t, 2t + 1, 2t + 8, 2t + 9:
// its pairs of tokens in the inner dimension, and column g of eight mma, the j-th of which has feature 8g + j there.
template <int rank_tiles_, int rank_warps_, int feature_warps_, int token_warps_, int stages_>
struct WeightGradShape {
  static constexpr int rank_tiles = rank_tiles_, rank_warps = rank_warps_, feature_warps = feature_warps_;
  static constexpr int token_warps = token_warps_, stages = stages_;
  static constexpr int threads = kLanes * rank_warps * feature_warps * token_warps;
  static constexpr int features = 64 * feature_warps, tokens = 16 * token_warps;  // of a stage
  static constexpr int ranks = 16 * rank_tiles * rank_warps;
  static constexpr int x_octets = tokens * features / 8;
  static constexpr int dz_pitch = ranks / 8 + 1;  // octets, skewed over the banks
  static constexpr int dz_octets = tokens * dz_pitch, stage_octets = x_octets + dz_octets;
  static constexpr int pitch = features + 4;  // of the float32 sums
  static constexpr int shared_bytes = std::max(stages * stage_octets * 16, ranks * pitch * 4);
};

template <bool bfloat16, typename Shape>
__global__ void __launch_bounds__(Shape::threads, 1)
    weight_grad_kernel(const __grid_constant__ WeightGradArguments arguments) {
  constexpr int rank_tiles = Shape::rank_tiles, rank_warps = Shape::rank_warps, stages = Shape::stages;
  constexpr int threads = Shape::threads, row_octets = Shape::ranks / 8, octets = Shape::tokens * row_octets;
  constexpr int dz_copies = (octets + threads - 1) / threads;
  extern __shared__ __align__(16) uint4 shared[];
  const Draw& draw = arguments.draw;
  const StepDraw step_draw(draw);
  const int thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes, g = lane / 4, t = lane % 4;
  const int rank_warp = warp % rank_warps, tile = warp / rank_warps;
  const int feature_warp = tile % Shape::feature_warps, token_warp = tile / Shape::feature_warps;
  const int first_token = blockIdx.y * arguments.tokens_per_block;
  const int span = max(0, min(arguments.tokens, first_token + arguments.tokens_per_block) - first_token);
  const int steps = (span + Shape::tokens - 1) / Shape::tokens;

  // Where the next stage comes from: pointers that move on, and up to which token (from first_token) they may. Of x a
  // lane copies its octet of rows lane / 8 + 4k.
  const int lane_row = lane / 8, lane_token = 16 * token_warp + lane_row;
  const int lane_feature = blockIdx.x * Shape::features + 64 * feature_warp + 8 * (lane % 8);
  const uint16_t* x_from = arguments.x.data + (first_token + lane_token) * arguments.x.stride + lane_feature;
  const int x_limit = lane_feature < arguments.features ? span - lane_token : 0;
  auto octet_of = [&](int k) { return (4 * k + lane_row) * 8 + (lane % 8 ^ (4 * (k & 1) | (lane_row & 2))); };
  const uint16_t* dz_from[dz_copies];
  int dz_limit[dz_copies], ahead = 0;
  uint32_t dz_to[dz_copies];
#pragma unroll
  for (int i = 0; i < dz_copies; ++i) {
    const int row = (i * threads + thread) / row_octets, column = (i * threads + thread) % row_octets;
    dz_from[i] = arguments.dz.data + (first_token + row) * arguments.dz.stride + 8 * column;
    dz_limit[i] = 8 * column < arguments.rank ? span - row : 0;
    dz_to[i] = shared_address(shared + Shape::x_octets + row * Shape::dz_pitch + column);
  }

  auto offset = [](int i) { return (i & 1) + 8 * (i >> 1); };  // of a thread's i-th token from its first
  auto copy_stage = [&](int stage) {
    const uint32_t to = stage * (Shape::stage_octets * 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k % rank_warps != rank_warp) continue;
      copy_async(shared_address(shared + tile * 4 * kLanes + octet_of(k)) + to, x_from + 4 * k * arguments.x.stride,
                 ahead + 4 * k < x_limit);
    }
    x_from += Shape::tokens * arguments.x.stride;
#pragma unroll
    for (int i = 0; i < dz_copies; ++i) {
      if (octets % threads == 0 || i * threads + thread < octets) {
        copy_async(dz_to[i] + to, dz_from[i], ahead < dz_limit[i]);
      }
      dz_from[i] += Shape::tokens * arguments.dz.stride;
    }
    ahead += Shape::tokens;
  };

  // A lane reads one of the warp's next sixteen tokens ahead of time, and the others ask it.
  auto read_token = [&](int step) {
    const int token = first_token + step * Shape::tokens + 16 * token_warp + lane % 16;
    return draw.on ? __ldg(draw.token + min(token, arguments.tokens - 1)) : 0;
  };

#pragma unroll
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) copy_stage(step);
    commit_copies();
  }
  int64_t token_of_lane = read_token(0);
  const uint32_t block = draw.first_block + lane_feature / 8;
  const int own_octet = 2 * t * 8 + (g ^ 2 * t);  // of token 2t; r & 6 is 2t for all four
  float sum[rank_tiles][8][4] = {};
  Turn<stages> reading{0}, writing{stages - 1};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    uint4* x = shared + reading.stage * Shape::stage_octets + tile * 4 * kLanes;
    const uint4* dz = shared + reading.stage * Shape::stage_octets + Shape::x_octets;
    wait_copies<stages - 2>();
    if (draw.on) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t its_token = __shfl_sync(0xFFFFFFFF, token_of_lane, 4 * k + lane_row);
        if (k % rank_warps != rank_warp) continue;
        TokenDraw token;
        token.init(draw, step_draw, its_token);
        x[octet_of(k)] = x[octet_of(k)] & token.keep_block(draw, step_draw, block);
      }
      token_of_lane = read_token(step + 1);
    }
    __syncthreads();
    if (step + stages - 1 < steps) copy_stage(writing.stage);
    commit_copies();
    reading.next(), writing.next();
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = x[own_octet + 8 * offset(i)];
    uint4 a[rank_tiles];
#pragma unroll
    for (int m = 0; m < rank_tiles; ++m) {
      const int row = 16 * token_warp + lane % 8 + lane / 16 * 8;
      a[m] = load_transposed(dz + row * Shape::dz_pitch + (rank_warp * rank_tiles + m) * 2 + lane / 8 % 2);
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

  wait_copies<0>();
  float* sums = reinterpret_cast<float*>(shared);  // [ranks, features]
#pragma unroll 1
  for (int turn = 0; turn < Shape::token_warps; ++turn) {
    __syncthreads();
    if (turn != token_warp) continue;
#pragma unroll
    for (int m = 0; m < rank_tiles; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {  // rank g + 8·(c / 2), column 2t + c % 2: eight features, one from each mma
        const int rank = (rank_warp * rank_tiles + m) * 16 + g + 8 * (c / 2);
        float4* place = reinterpret_cast<float4*>(sums + rank * Shape::pitch + 64 * feature_warp + 8 * (2 * t + c % 2));
        float4 low = {sum[m][0][c], sum[m][1][c], sum[m][2][c], sum[m][3][c]};
        float4 high = {sum[m][4][c], sum[m][5][c], sum[m][6][c], sum[m][7][c]};
        if (turn > 0) {
          const float4 l = place[0], h = place[1];
          low = {l.x + low.x, l.y + low.y, l.z + low.z, l.w + low.w};
          high = {h.x + high.x, h.y + high.y, h.z + high.z, h.w + high.w};
        }
        place[0] = low;
        place[1] = high;
      }
    }
  }
  const int blocks = gridDim.y;
  const float scale = draw.scale * arguments.scaling;
  cluster_barrier(blocks);
  constexpr int quads = Shape::features / 4;
  for (int i = blockIdx.y * threads + thread; i < arguments.rank * quads; i += blocks * threads) {
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

// ---- dx += mask * scale * (dz A)

struct InputGradArguments {
  Matrix dx, dz;
  const uint16_t* A;
  Draw draw;
  int tokens, features, rank;
  Matrix out;  // where dx + the term goes: dx itself or another place
  // With gate_up [T, 2 F]: dx + the term goes on to grad [T, 2 F] instead; and where `made` [T, F] is not null, mask * x is
  // made again there. All contiguous.
  const uint16_t* gate_up;
  uint16_t* grad;
  uint16_t* made;
};

// A block has 64·groups features, whose part of A lies in shared memory in the order of the mma's operand, and goes
// through its share of the tokens: each warp by itself, 16 tokens and 64 features at a time, with dx copied ahead into
// shared memory by the threads that read it.
//
// In a block of 32 features, thread (g, t) owns features 8t .. 8t + 7 of rows g and g + 8: columns 2t, 2t + 1 of four
// mma. Its ranks in the inner dimension are 4t .. 4t + 3 of each sixteen.
template <int rank_steps_, int groups_, int warps_, int stages_, int blocks_per_sm_>
struct InputGradShape {
  static constexpr int rank_steps = rank_steps_, groups = groups_, warps = warps_, stages = stages_;
  static constexpr int blocks_per_sm = blocks_per_sm_;
  static constexpr int threads = kLanes * warps, features = 64 * groups;
  static constexpr int A_octets = groups * rank_steps * 4 * kLanes, dx_octets = 4 * threads;
  static constexpr int shared_bytes = (A_octets + stages * dx_octets) * 16;
};

template <bool bfloat16, bool gated, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_sm)
    input_grad_kernel(const __grid_constant__ InputGradArguments arguments) {
  constexpr int rank_steps = Shape::rank_steps, stages = Shape::stages, threads = Shape::threads;
  extern __shared__ __align__(16) uint4 shared[];
  const Draw& draw = arguments.draw;
  const StepDraw step_draw(draw);
  const int thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes, g = lane / 4, t = lane % 4;
  const int first_feature = blockIdx.x * Shape::features;
  const int groups = min(Shape::groups, (arguments.features - first_feature + 63) / 64);
  uint4* A = shared;                                    // [groups, rank_steps, 4 pairs of columns of 8, lanes]
  const uint4* dx = shared + Shape::A_octets + thread;  // [stages, 4, threads]
  const uint32_t dx_to = shared_address(dx);
  const int stride = gridDim.y * Shape::warps * 16;
  const int first_token = (blockIdx.y * Shape::warps + warp) * 16;
  const int tiles = (max(0, arguments.tokens - first_token) + stride - 1) / stride, units = tiles * groups;

  auto row_of = [&](int tile, int i) { return first_token + tile * stride + g + 8 * i; };
  const int first_column = first_feature + 8 * t;
  auto place_of = [&](const Matrix& m, int tile, int i) { return m.data + row_of(tile, i) * m.stride + first_column; };

  int ahead_tile = 0, ahead_group = 0;  // of the next unit to copy
  const uint16_t* from[2] = {place_of(arguments.dx, 0, 0), place_of(arguments.dx, 0, 1)};
  auto copy_stage = [&](int stage) {
    const uint32_t to = dx_to + stage * (Shape::dx_octets * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = row_of(ahead_tile, i) < arguments.tokens;
      const int column = first_column + 64 * ahead_group;
      copy_async(to + i * threads * 16, from[i], there && column < arguments.features);
      copy_async(to + (2 + i) * threads * 16, from[i] + 32, there && column + 32 < arguments.features);
      from[i] += 64;
    }
    if (++ahead_group == groups) {
      ahead_group = 0, ++ahead_tile;
      from[0] = place_of(arguments.dx, ahead_tile, 0), from[1] = place_of(arguments.dx, ahead_tile, 1);
    }
  };
#pragma unroll
  for (int unit = 0; unit < stages - 1; ++unit) {
    if (unit < units) copy_stage(unit);
    commit_copies();
  }

  uint2 dz_ahead[2][rank_steps];  // four ranks of rows g, g + 8
  int64_t token_ahead[2];
  auto read_rows = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of(tile, i);
      token_ahead[i] = draw.on ? __ldg(draw.token + min(row, arguments.tokens - 1)) : 0;
#pragma unroll
      for (int k = 0; k < rank_steps; ++k) {
        const int rank = 16 * k + 4 * t;
        const bool there = row < arguments.tokens && rank < arguments.rank;
        const auto* place = reinterpret_cast<const uint2*>(arguments.dz.data + row * arguments.dz.stride + rank);
        dz_ahead[i][k] = there ? __ldg(place) : uint2{0, 0};
      }
    }
  };
  read_rows(0);

  // A thread takes eight features of four ranks at a time and writes each feature's two pairs of ranks.
  for (int i = thread; i < rank_steps * 4 * Shape::groups * 8; i += threads) {
    const int octet = i % (Shape::groups * 8), quad = i / (Shape::groups * 8);
    uint4 v[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int rank = 4 * quad + r, column = first_feature + 8 * octet;
      const bool there = rank < arguments.rank && column < arguments.features;
      const auto* place = reinterpret_cast<const uint4*>(arguments.A + int64_t{rank} * arguments.features + column);
      v[r] = there ? __ldg(place) : uint4{0, 0, 0, 0};
    }
    const int half = octet / 4 % 2, step = octet / 8 * rank_steps + quad / 4;
#pragma unroll
    for (int e = 0; e < 8; ++e) {  // feature 32·half + 8·(octet % 4) + e: column 2·(octet % 4) + e % 2 of mma e / 2
      const uint32_t w[4] = {word(v[0], e / 2), word(v[1], e / 2), word(v[2], e / 2), word(v[3], e / 2)};
      const uint2 pairs = e % 2 ? uint2{high_halves(w[0], w[1]), high_halves(w[2], w[3])}
                                : uint2{low_halves(w[0], w[1]), low_halves(w[2], w[3])};
      const int column = 2 * (octet % 4) + e % 2, reader = 4 * column + quad % 4;
      reinterpret_cast<uint2*>(A + (step * 4 + 2 * half + e / 4) * kLanes + reader)[e / 2 % 2] = pairs;
    }
  }
  __syncthreads();

  TokenDraw token[2];
  uint32_t dz[rank_steps][4];
  int unit = 0;
  Turn<stages> reading{0}, writing{stages - 1};
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (draw.on) token[i].init(draw, step_draw, token_ahead[i]);
#pragma unroll
      for (int k = 0; k < rank_steps; ++k) dz[k][i] = dz_ahead[i][k].x, dz[k][2 + i] = dz_ahead[i][k].y;
    }
    read_rows(tile + 1);
    uint16_t* row[2] = {place_of(arguments.out, tile, 0), place_of(arguments.out, tile, 1)};
    const bool there[2] = {row_of(tile, 0) < arguments.tokens, row_of(tile, 1) < arguments.tokens};
#pragma unroll 1
    for (int group = 0; group < groups; ++group, ++unit) {
      if (unit + stages - 1 < units) copy_stage(writing.stage);
      commit_copies();
      uint4 gate[2][2], up[2][2];
      if constexpr (gated) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = first_column + 64 * group + 32 * half;
            const int64_t place = int64_t{row_of(tile, i)} * 2 * arguments.features + column;
            if (there[i] && column < arguments.features) {
              gate[half][i] = __ldg(reinterpret_cast<const uint4*>(arguments.gate_up + place));
              up[half][i] = __ldg(reinterpret_cast<const uint4*>(arguments.gate_up + place + arguments.features));
            }
          }
        }
      }
      wait_copies<stages - 1>();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = first_column + 64 * group + 32 * half;
        float sum[4][4] = {};
#pragma unroll
        for (int k = 0; k < rank_steps; ++k) {
#pragma unroll
          for (int j = 0; j < 4; j += 2) {
            const uint4 b = A[((group * rank_steps + k) * 4 + 2 * half + j / 2) * kLanes + lane];
            mma<bfloat16>(sum[j], dz[k][0], dz[k][1], dz[k][2], dz[k][3], b.x, b.y);
            mma<bfloat16>(sum[j + 1], dz[k][0], dz[k][1], dz[k][2], dz[k][3], b.z, b.w);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 before = dx[reading.stage * Shape::dx_octets + (half * 2 + i) * threads];
          uint4 kept = kAll;
          if (draw.on) kept = token[i].keep_block(draw, step_draw, draw.first_block + column / 8);
          uint32_t after[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const float2 old = unpack<bfloat16>(word(before, q));
            const float* d = sum[q] + 2 * i;
            const uint32_t total = pack<bfloat16>(fmaf(d[0], draw.scale, old.x), fmaf(d[1], draw.scale, old.y));
            after[q] = (total & word(kept, q)) | (word(before, q) & ~word(kept, q));
          }
          if (!there[i] || column >= arguments.features) continue;
          if constexpr (gated) {
            uint32_t dgate[4], dup[4], made[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
              swiglu_backward<bfloat16>(after[q], word(gate[half][i], q), word(up[half][i], q), dgate[q], dup[q],
                                        made[q]);
              made[q] &= word(kept, q);
            }
            const int64_t place = int64_t{row_of(tile, i)} * arguments.features + column;
            uint16_t* grad = arguments.grad + int64_t{row_of(tile, i)} * arguments.features + place;
            *reinterpret_cast<uint4*>(grad) = {dgate[0], dgate[1], dgate[2], dgate[3]};
            *reinterpret_cast<uint4*>(grad + arguments.features) = {dup[0], dup[1], dup[2], dup[3]};
            if (arguments.made != nullptr) {
              *reinterpret_cast<uint4*>(arguments.made + place) = {made[0], made[1], made[2], made[3]};
            }
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

template <bool bfloat16, typename Shape>
cudaError_t run_down(DownArguments arguments, cudaStream_t stream) {
  const auto kernel = &down_kernel<bfloat16, Shape>;
  const Capacity& known = capacity<Shape>(kernel);
  if (known.error != cudaSuccess) return known.error;
  const int64_t tiles = divide_up(arguments.tokens, Shape::rows);
  const int splits = known.splits(tiles);
  const int64_t stages = divide_up(divide_up(arguments.features, Shape::stage_features), splits);
  arguments.features_per_block = static_cast<int>(stages * Shape::stage_features);
  return launch_clusters<Shape>(kernel, tiles, splits, arguments, stream);
}

template <bool bfloat16, typename Shape>
cudaError_t run_weight_grad(WeightGradArguments arguments, cudaStream_t stream) {
  const auto kernel = &weight_grad_kernel<bfloat16, Shape>;
  const Capacity& known = capacity<Shape>(kernel);
  if (known.error != cudaSuccess) return known.error;
  const int64_t tiles = divide_up(arguments.features, Shape::features);
  const int splits = known.splits(tiles);
  const int64_t stages = divide_up(divide_up(arguments.tokens, Shape::tokens), splits);
  arguments.tokens_per_block = static_cast<int>(stages * Shape::tokens);
  return launch_clusters<Shape>(kernel, tiles, splits, arguments, stream);
}

template <bool bfloat16, bool gated, typename Shape>
cudaError_t run_input_grad_kernel(const InputGradArguments& arguments, cudaStream_t stream) {
  static_assert(Shape::shared_bytes <= kLeastSharedMemory);
  const auto kernel = &input_grad_kernel<bfloat16, gated, Shape>;
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

template <bool bfloat16, typename Shape>
cudaError_t run_input_grad(const InputGradArguments& arguments, cudaStream_t stream) {
  return arguments.gate_up == nullptr ? run_input_grad_kernel<bfloat16, false, Shape>(arguments, stream)
                                      : run_input_grad_kernel<bfloat16, true, Shape>(arguments, stream);
}

// The shapes by rank, as measured on an H200; where its stages ask for more than every GPU grants, with one less there.

template <bool bfloat16, typename Shape, typename Flat = Shape>
cudaError_t run_deepest_down(const DownArguments& arguments, cudaStream_t stream) {
  static_assert(Flat::shared_bytes <= kLeastSharedMemory);
  return grants_shared_memory(Shape::shared_bytes) ? run_down<bfloat16, Shape>(arguments, stream)
                                                   : run_down<bfloat16, Flat>(arguments, stream);
}

template <bool bfloat16, typename Shape, typename Flat = Shape>
cudaError_t run_deepest_weight_grad(const WeightGradArguments& arguments, cudaStream_t stream) {
  static_assert(Flat::shared_bytes <= kLeastSharedMemory);
  return grants_shared_memory(Shape::shared_bytes) ? run_weight_grad<bfloat16, Shape>(arguments, stream)
                                                   : run_weight_grad<bfloat16, Flat>(arguments, stream);
}

template <bool bfloat16>
cudaError_t down_by_rank(const DownArguments& arguments, cudaStream_t stream) {
  if (arguments.gate_up != nullptr) {
    if (arguments.rank <= 16) return run_deepest_down<bfloat16, DownShape<true, 2, 1, 8, 1, 4>>(arguments, stream);
    if (arguments.rank <= 32) return run_deepest_down<bfloat16, DownShape<true, 4, 1, 8, 1, 4>>(arguments, stream);
    return run_deepest_down<bfloat16, DownShape<true, 8, 1, 8, 1, 4>>(arguments, stream);
  }
  if (arguments.rank <= 16) return run_deepest_down<bfloat16, DownShape<false, 2, 1, 8, 2, 4>>(arguments, stream);
  if (arguments.rank <= 32) return run_deepest_down<bfloat16, DownShape<false, 4, 1, 8, 2, 4>>(arguments, stream);
  if (arguments.rank <= 64) {
    return run_deepest_down<bfloat16, DownShape<false, 8, 1, 8, 2, 4>, DownShape<false, 8, 1, 8, 2, 3>>(arguments,
                                                                                                        stream);
  }
  if (arguments.rank <= 128) return run_deepest_down<bfloat16, DownShape<false, 16, 1, 8, 1, 4>>(arguments, stream);
  return run_deepest_down<bfloat16, DownShape<false, 24, 1, 8, 1, 4>>(arguments, stream);
}

template <bool bfloat16>
cudaError_t weight_grad_by_rank(const WeightGradArguments& arguments, cudaStream_t stream) {
  if (arguments.rank <= 16) return run_deepest_weight_grad<bfloat16, WeightGradShape<1, 1, 2, 8, 4>>(arguments, stream);
  if (arguments.rank <= 32) {
    return run_deepest_weight_grad<bfloat16, WeightGradShape<2, 1, 2, 8, 4>, WeightGradShape<2, 1, 2, 8, 3>>(arguments,
                                                                                                             stream);
  }
  if (arguments.rank <= 64) return run_deepest_weight_grad<bfloat16, WeightGradShape<2, 2, 2, 4, 4>>(arguments, stream);
  if (arguments.rank <= 128) return run_deepest_weight_grad<bfloat16, WeightGradShape<2, 4, 2, 2, 4>>(arguments, stream);
  return run_deepest_weight_grad<bfloat16, WeightGradShape<3, 4, 3, 1, 4>>(arguments, stream);
}

template <bool bfloat16>
cudaError_t input_grad_by_rank(const InputGradArguments& arguments, cudaStream_t stream) {
  if (arguments.rank <= 16) return run_input_grad<bfloat16, InputGradShape<1, 4, 8, 4, 2>>(arguments, stream);
  if (arguments.rank <= 32) return run_input_grad<bfloat16, InputGradShape<2, 4, 8, 4, 2>>(arguments, stream);
  if (arguments.rank <= 64) return run_input_grad<bfloat16, InputGradShape<4, 4, 8, 4, 2>>(arguments, stream);
  if (arguments.rank <= 128) return run_input_grad<bfloat16, InputGradShape<8, 2, 8, 4, 2>>(arguments, stream);
  return run_input_grad<bfloat16, InputGradShape<12, 2, 8, 4, 1>>(arguments, stream);
}

}  // namespace

cudaError_t launch_lora_down(void* z, int64_t z_stride, int64_t z_columns, const void* x, int64_t x_stride, void* copy,
                             int64_t copy_stride, const void* gate_up, const void* A, int64_t tokens, int64_t features,
                             int64_t rank, const LoraMask& mask, bool bfloat16, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  const DownArguments arguments{matrix(z, z_stride),
                                matrix(x, x_stride),
                                matrix(copy, copy_stride),
                                static_cast<const uint16_t*>(gate_up),
                                static_cast<const uint16_t*>(A),
                                make_draw(mask),
                                static_cast<int>(tokens),
                                static_cast<int>(features),
                                static_cast<int>(rank),
                                static_cast<int>(z_columns),
                                0};
  return bfloat16 ? down_by_rank<true>(arguments, stream) : down_by_rank<false>(arguments, stream);
}

cudaError_t launch_lora_weight_grad(float* out, bool transposed, float scaling, const void* dz, int64_t dz_stride,
                                    const void* x, int64_t x_stride, int64_t tokens, int64_t features, int64_t rank,
                                    const LoraMask& mask, bool bfloat16, cudaStream_t stream) {
  if (features == 0) return cudaSuccess;
  if (tokens == 0) return cudaMemsetAsync(out, 0, sizeof(float) * rank * features, stream);
  const WeightGradArguments arguments{out,
                                      transposed,
                                      scaling,
                                      matrix(dz, dz_stride),
                                      matrix(x, x_stride),
                                      make_draw(mask),
                                      static_cast<int>(tokens),
                                      static_cast<int>(features),
                                      static_cast<int>(rank),
                                      0};
  return bfloat16 ? weight_grad_by_rank<true>(arguments, stream) : weight_grad_by_rank<false>(arguments, stream);
}

cudaError_t launch_lora_down_input_grad(void* out, int64_t out_stride, const void* dx, int64_t dx_stride, const void* dz,
                                        int64_t dz_stride, const void* A, int64_t tokens, int64_t features,
                                        int64_t rank, const LoraMask& mask, const SwiGluMade& made, bool bfloat16, cudaStream_t stream) {
  if (tokens == 0 || features == 0) return cudaSuccess;
  const InputGradArguments arguments{matrix(dx, dx_stride),
                                     matrix(dz, dz_stride),
                                     static_cast<const uint16_t*>(A),
                                     make_draw(mask),
                                     static_cast<int>(tokens),
                                     static_cast<int>(features),
                                     static_cast<int>(rank),
                                     matrix(out, out_stride),
                                     static_cast<const uint16_t*>(made.gate_up),
                                     static_cast<uint16_t*>(made.grad),
                                     static_cast<uint16_t*>(made.x)};
  return bfloat16 ? input_grad_by_rank<true>(arguments, stream) : input_grad_by_rank<false>(arguments, stream);
}

}  // namespace megalora
