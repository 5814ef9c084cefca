// The backward pass of a LoRA branch in one read of what it reads:
//
//   out   = dx + mask * scale * (dz A)
//   dA   += dz^T dropout(x)
//
// or, where x = silu(gate) * up is made again, from gate and up:
//
//   [dgate | dup] = the gradient of gate and up where dx + mask * scale * (dz A) is that of x
//   dA   += dz^T dropout(x),    dB_gate += s dgate^T z_gate,    dB_up += s dup^T z_up
//
// so that each mask is drawn once, and neither x nor the sum passes through memory. What is alike in lora_cuda.cu is
// said there: who owns which features, how masks are drawn, why sums repeat.
#include <algorithm>

#include "draw.h"
#include "lora_cuda.h"
#include "swiglu_words.h"
#include "tensor_cores.h"

namespace megalora {
namespace {

struct Arguments {
  Matrix dx, dz;
  const uint16_t* A;
  Draw draw;
  int tokens, features, rank;
  Matrix out, x;            // where x is read
  const uint16_t* gate_up;  // [T, 2 F], where it is made
  uint16_t* grad;           // [T, 2 F]
  Matrix z;                 // gate's columns, then up's
  FactorGrads grads;
  float* sums;           // [gridDim.y, 16 ranks a sum, features]: what each block has of the sums over tokens
  int tokens_per_block;  // gridDim.y blocks share the tokens
};

// A block has 64·feature_warps features and all ranks, and goes through its share of the tokens: 16 tokens and 64 features
// a warp at a time, copied ahead into shared memory. The token_warps sums are added at the end, in order, and those of
// the blocks of other tokens by finish_kernel.
//
// Thread (g, t) owns features 8g .. 8g + 7 of tokens 2t, 2t + 1, 2t + 8, 2t + 9. In the term dz A features are the rows
// of four mma, the q-th of which has features 8g + 2q, 8g + 2q + 1 in rows g, g + 8, and tokens are its columns; the ranks
// of thread t are 4t .. 4t + 3 of each sixteen. In the sums over tokens features are the columns of eight mma, the j-th
// of which has feature 8g + j in column g, and pairs of tokens lie in the inner dimension.
//
// To and from memory eight lanes move 128 bytes of one row at a time, else requests of 32 bytes are what bounds the
// kernel. A tile lies in shared memory by rows, octet c of row r at c ^ (r & 6): neither side meets a bank twice.
template <int rank_tiles_, bool gated_, int feature_warps_, int token_warps_, int stages_>
struct Shape {
  static constexpr int rank_tiles = rank_tiles_, feature_warps = feature_warps_, token_warps = token_warps_;
  static constexpr int stages = stages_;
  static constexpr bool gated = gated_;
  static constexpr int sums = rank_tiles + (gated ? 2 : 0);  // of 16 ranks each: dA's, dB_gate's, dB_up's
  static constexpr int warps = feature_warps * token_warps, threads = kLanes * warps;
  static constexpr int features = 64 * feature_warps, tokens = 16 * token_warps;  // of a step
  static constexpr int inputs = gated ? 3 : 2;                                    // dx and x; dx, gate and up
  static constexpr int tile_octets = 16 * 8;
  static constexpr int dz_pitch = 2 * rank_tiles + 1, z_pitch = 5;  // octets, skewed over the banks
  static constexpr int dz_octets = tokens * dz_pitch, z_octets = gated ? tokens * z_pitch : 0;
  static constexpr int stage_octets = warps * inputs * tile_octets + dz_octets + z_octets;
  static constexpr int draw_octets = 2 * 16 * warps;  // of two tiles' tokens, by warp
  static constexpr int A_octets = feature_warps * rank_tiles * 4 * kLanes;
  static constexpr int pitch = features + 4;  // of the float32 sums
  static constexpr int shared_bytes = std::max((A_octets + draw_octets + stages * stage_octets) * 16,
                                               16 * sums * pitch * static_cast<int>(sizeof(float)));
};

__device__ __forceinline__ void set_word(uint4& v, int i, uint32_t value) {
  if (i == 0) v.x = value;
  if (i == 1) v.y = value;
  if (i == 2) v.z = value;
  if (i == 3) v.w = value;
}

__device__ __forceinline__ int offset_of(int i) { return (i & 1) + 8 * (i >> 1); }  // of a thread's i-th token

template <bool bfloat16, typename Shape>
__global__ void __launch_bounds__(Shape::threads, 1) backward_kernel(const __grid_constant__ Arguments arguments) {
  constexpr int rank_tiles = Shape::rank_tiles, stages = Shape::stages;
  constexpr bool gated = Shape::gated;
  extern __shared__ __align__(16) uint4 shared[];
  const Draw& draw = arguments.draw;
  const StepDraw step_draw(draw);
  const int thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes, g = lane / 4, t = lane % 4;
  const int feature_warp = warp % Shape::feature_warps, token_warp = warp / Shape::feature_warps;
  const int first_feature = blockIdx.x * Shape::features, feature = first_feature + 64 * feature_warp + 8 * g;
  const int first_token = blockIdx.y * arguments.tokens_per_block;
  const int span = max(0, min(arguments.tokens, first_token + arguments.tokens_per_block) - first_token);
  const int steps = (span + Shape::tokens - 1) / Shape::tokens;

  uint4* A = shared;  // [feature_warps, rank_tiles, 4 mma, lanes]
  uint4* token_draws = shared + Shape::A_octets + warp * 2 * 16;  // [2, 16]
  uint4* first_stage = shared + Shape::A_octets + Shape::draw_octets;

  // Where the next tile comes from, and what has been made of one goes: this lane's octet of rows lane / 8 + 4k.
  const int lane_row = lane / 8, lane_token = 16 * token_warp + lane_row;
  const int lane_feature = first_feature + 64 * feature_warp + 8 * (lane % 8);
  const bool there = lane_feature < arguments.features;
  const int64_t up_from_gate = arguments.features, double_row = 2 * up_from_gate;
  const int64_t lane_first = first_token + lane_token;
  const uint16_t* dx_from = arguments.dx.data + lane_first * arguments.dx.stride + lane_feature;
  const int64_t x_stride = gated ? double_row : arguments.x.stride;
  const uint16_t* x_from = (gated ? arguments.gate_up : arguments.x.data) + lane_first * x_stride + lane_feature;
  const int64_t out_stride = gated ? double_row : arguments.out.stride;
  uint16_t* out_to = (gated ? arguments.grad : arguments.out.data) + lane_first * out_stride + lane_feature;
  auto octet_of = [&](int k) { return (4 * k + lane_row) * 8 + (lane % 8 ^ (4 * (k & 1) | (lane_row & 2))); };
  int ahead = 0;
  auto copy_stage = [&](int stage) {
    const uint32_t to = shared_address(first_stage + stage * Shape::stage_octets);
    const uint32_t to_tile = to + warp * (Shape::inputs * Shape::tile_octets * 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool is = there && ahead + lane_token + 4 * k < span;
      const uint32_t octet = to_tile + octet_of(k) * 16;
      copy_async(octet, dx_from + 4 * k * arguments.dx.stride, is);
      copy_async(octet + Shape::tile_octets * 16, x_from + 4 * k * x_stride, is);
      if constexpr (gated) {
        copy_async(octet + 2 * Shape::tile_octets * 16, x_from + 4 * k * x_stride + up_from_gate, is);
      }
    }
    dx_from += Shape::tokens * arguments.dx.stride;
    x_from += Shape::tokens * x_stride;
    // The ranks of the block's tokens: an octet of eight ranks a thread at a time.
    const uint32_t to_dz = to + Shape::warps * Shape::inputs * Shape::tile_octets * 16;
    for (int i = thread; i < Shape::tokens * 2 * rank_tiles; i += Shape::threads) {
      const int row = i / (2 * rank_tiles), column = i % (2 * rank_tiles);
      const bool is = 8 * column < arguments.rank && ahead + row < span;
      const int64_t token = first_token + ahead + row;
      copy_async(to_dz + (row * Shape::dz_pitch + column) * 16,
                 arguments.dz.data + token * arguments.dz.stride + 8 * column, is);
    }
    if constexpr (gated) {  // columns 0, 1 of eight ranks each are gate's, 2, 3 up's
      const uint32_t to_z = to_dz + Shape::dz_octets * 16;
      for (int i = thread; i < Shape::tokens * 4; i += Shape::threads) {
        const int row = i / 4, column = i % 4, rank = 8 * (column % 2);
        const int gate_ranks = arguments.grads.gate.ranks;
        const bool is = rank < (column < 2 ? gate_ranks : arguments.grads.up.ranks) && ahead + row < span;
        const int64_t token = first_token + ahead + row;
        copy_async(to_z + (row * Shape::z_pitch + column) * 16,
                   arguments.z.data + token * arguments.z.stride + (column < 2 ? 0 : gate_ranks) + rank, is);
      }
    }
    ahead += Shape::tokens;
  };
#pragma unroll
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) copy_stage(step);
    commit_copies();
  }

  // Each lane of sixteen works out one token's part of the draw for the four that read it.
  auto read_token = [&](int step) {
    const int token = first_token + step * Shape::tokens + 16 * token_warp + lane % 16;
    return draw.on ? __ldg(draw.token + min(token, arguments.tokens - 1)) : 0;
  };
  auto write_draw = [&](int step, int64_t token) {
    if (!draw.on || lane >= 16) return;
    TokenDraw made;
    made.init(draw, step_draw, token);
    token_draws[step % 2 * 16 + lane] = {made.round1, made.round2a, made.round2b, made.round2c};
  };
  write_draw(0, read_token(0));
  int64_t next_token = read_token(1);

  // A in the order of the mma's operand: rows (features) 8g + 2q, 8g + 2q + 1, inner (ranks) 4t .. 4t + 3.
  for (int i = thread; i < Shape::feature_warps * rank_tiles * kLanes; i += Shape::threads) {
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
  __syncthreads();
  A += feature_warp * rank_tiles * 4 * kLanes + lane;

  const uint32_t block = draw.first_block + feature / 8;
  const int own_octet = 2 * t * 8 + (g ^ 2 * t);  // of token 2t; r & 6 is 2t for all four
  float sum[Shape::sums][8][4] = {};
  Turn<stages> reading{0}, writing{stages - 1};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<stages - 2>();
    __syncthreads();  // the threads have copied what others read, and have read what is written next
    if (step + stages - 1 < steps) copy_stage(writing.stage);
    commit_copies();
    uint4* stage = first_stage + reading.stage * Shape::stage_octets;
    uint4* tile = stage + warp * Shape::inputs * Shape::tile_octets;
    reading.next(), writing.next();

    uint4 kept[4] = {kAll, kAll, kAll, kAll};
    if (draw.on) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 words = token_draws[step % 2 * 16 + 2 * t + offset_of(i)];
        const TokenDraw token{words.x, words.y, words.z, words.w};
        kept[i] = token.keep_block(draw, step_draw, block);
      }
      write_draw(step + 1, next_token);
      next_token = read_token(step + 2);
    }

    uint4 d[4], x[gated ? 1 : 4], gate[gated ? 4 : 1], up[gated ? 4 : 1];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int octet = own_octet + 8 * offset_of(i);
      d[i] = tile[octet];
      if constexpr (gated) {
        gate[i] = tile[Shape::tile_octets + octet];
        up[i] = tile[2 * Shape::tile_octets + octet];
      } else {
        x[i] = tile[Shape::tile_octets + octet];
      }
    }
    const uint4* ranks_of_block = stage + Shape::warps * Shape::inputs * Shape::tile_octets;
    const uint4* dz = ranks_of_block + 16 * token_warp * Shape::dz_pitch;
    const uint4* z = ranks_of_block + Shape::dz_octets + 16 * token_warp * Shape::z_pitch;
    const int row = lane % 8 + lane / 16 * 8;
    uint4 a[Shape::sums];  // the ranks by the tile's tokens, as the sums' operand
    uint2 ranks[rank_tiles][2];
#pragma unroll
    for (int m = 0; m < rank_tiles; ++m) {
      a[m] = load_transposed(dz + row * Shape::dz_pitch + 2 * m + lane / 8 % 2);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ranks[m][h] = reinterpret_cast<const uint2*>(dz + (g + 8 * h) * Shape::dz_pitch + 2 * m)[t];
      }
    }
    if constexpr (gated) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        a[rank_tiles + m] = load_transposed(z + row * Shape::z_pitch + 2 * m + lane / 8 % 2);
      }
    }

#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float term[2][4] = {};
#pragma unroll
      for (int k = 0; k < rank_tiles; ++k) {
        const uint4 part = A[(k * 4 + q) * kLanes];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          mma<bfloat16>(term[h], part.x, part.y, part.z, part.w, ranks[k][h].x, ranks[k][h].y);
        }
      }
      uint32_t dropped[4];  // two features of x of each token
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t before = word(d[i], q), keep = word(kept[i], q);
        const float2 old = unpack<bfloat16>(before);
        const float* added = term[i / 2] + i % 2;  // and two places on that of the other feature
        const uint32_t total = pack<bfloat16>(fmaf(added[0], draw.scale, old.x), fmaf(added[2], draw.scale, old.y));
        const uint32_t after = (total & keep) | (before & ~keep);
        if constexpr (gated) {
          uint32_t dgate, dup, made;
          swiglu_backward<bfloat16>(after, word(gate[i], q), word(up[i], q), dgate, dup, made);
          set_word(gate[i], q, dgate);
          set_word(up[i], q, dup);
          dropped[i] = made & keep;
        } else {
          set_word(d[i], q, after);
          dropped[i] = word(x[i], q) & keep;
        }
      }
      auto add = [&](float(&total)[8][4], const uint4& a, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
        mma<bfloat16>(total[2 * q], a.x, a.y, a.z, a.w, low_halves(v0, v1), low_halves(v2, v3));
        mma<bfloat16>(total[2 * q + 1], a.x, a.y, a.z, a.w, high_halves(v0, v1), high_halves(v2, v3));
      };
#pragma unroll
      for (int m = 0; m < rank_tiles; ++m) add(sum[m], a[m], dropped[0], dropped[1], dropped[2], dropped[3]);
      if constexpr (gated) {
        add(sum[rank_tiles], a[rank_tiles], word(gate[0], q), word(gate[1], q), word(gate[2], q), word(gate[3], q));
        add(sum[rank_tiles + 1], a[rank_tiles + 1], word(up[0], q), word(up[1], q), word(up[2], q), word(up[3], q));
      }
    }

    // Out again by rows, through the places that the thread read.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int octet = own_octet + 8 * offset_of(i);
      if constexpr (gated) {
        tile[Shape::tile_octets + octet] = gate[i];
        tile[2 * Shape::tile_octets + octet] = up[i];
      } else {
        tile[octet] = d[i];
      }
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!there || step * Shape::tokens + lane_token + 4 * k >= span) continue;
      uint16_t* to = out_to + 4 * k * out_stride;
      if constexpr (gated) {
        *reinterpret_cast<uint4*>(to) = tile[Shape::tile_octets + octet_of(k)];
        *reinterpret_cast<uint4*>(to + up_from_gate) = tile[2 * Shape::tile_octets + octet_of(k)];
      } else {
        *reinterpret_cast<uint4*>(to) = tile[octet_of(k)];
      }
    }
    out_to += Shape::tokens * out_stride;
  }

  wait_copies<0>();
  float* sums = reinterpret_cast<float*>(shared);  // [16 sums, features]
#pragma unroll 1
  for (int turn = 0; turn < Shape::token_warps; ++turn) {
    __syncthreads();
    if (turn != token_warp) continue;
#pragma unroll
    for (int m = 0; m < Shape::sums; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {  // rank g + 8·(c / 2), column 2t + c % 2: eight features, one from each mma
        const int rank = 16 * m + g + 8 * (c / 2);
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
  __syncthreads();
  constexpr int quads = Shape::features / 4, rows = 16 * Shape::sums;
  for (int i = thread; i < rows * quads; i += Shape::threads) {
    const int rank = i / quads, column = first_feature + 4 * (i % quads);
    if (column >= arguments.features) continue;
    const int64_t to = (int64_t{blockIdx.y} * rows + rank) * arguments.features + column;
    *reinterpret_cast<float4*>(arguments.sums + to) =
        *reinterpret_cast<const float4*>(sums + rank * Shape::pitch + 4 * (i % quads));
  }
}

// ---- the sums over blocks

// A thread has one rank and one feature at a time; what is transposed passes through shared memory.
constexpr int kTile = 32;

struct Finish {
  const float* sums;  // [blocks, rows, features]
  int blocks, rows, features;
  int down_ranks;  // the first rows are of dA, cut into grads.down; the last, where there are any, 16 each of gate and up
  float down_scale;
  FactorGrads grads;
};

__global__ void __launch_bounds__(kTile * 8) finish_kernel(const __grid_constant__ Finish finish) {
  __shared__ float tile[16][kTile + 1];
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int first_row = 16 * blockIdx.y, first_feature = kTile * blockIdx.x, feature = first_feature + x;
  const int gate_row = finish.rows - 32;
  const bool transposed = finish.grads.gate.data != nullptr && first_row >= gate_row;
  for (int i = y; i < 16; i += 8) {
    float total = 0;
    if (feature < finish.features) {
      const float* from = finish.sums + int64_t{first_row + i} * finish.features + feature;
#pragma unroll 4
      for (int block = 0; block < finish.blocks; ++block) total += from[int64_t{block} * finish.rows * finish.features];
    }
    if (transposed) {
      tile[i][x] = total;
      continue;
    }
    const int rank = first_row + i;
    if (rank >= finish.down_ranks || feature >= finish.features) continue;
    int part = 0, first = 0;
    while (rank >= first + finish.grads.down[part].ranks) first += finish.grads.down[part++].ranks;
    finish.grads.down[part].data[int64_t{rank - first} * finish.features + feature] += total * finish.down_scale;
  }
  if (!transposed) return;
  __syncthreads();
  const FactorGrad& factor = first_row == gate_row ? finish.grads.gate : finish.grads.up;
  for (int i = threadIdx.x; i < factor.ranks * kTile; i += kTile * 8) {
    const int rank = i % factor.ranks, column = i / factor.ranks;
    if (first_feature + column >= finish.features) continue;
    factor.data[int64_t{first_feature + column} * factor.ranks + rank] += tile[rank][column] * factor.scaling;
  }
}

constexpr int kFeatureWarps = 4, kTokenWarps = 2;  // of every shape
constexpr int kGatedSums = 3;
constexpr int64_t kMostSums = 48;  // of all blocks of the same features
constexpr int64_t kIdle = 64;      // a block costs as much as so many tokens besides its own

// In how many parts the tokens are cut, where a block leaves `sums` of sixteen ranks each: what fills the
// multiprocessors best.
int64_t splits_for(int64_t tokens, int64_t features, int64_t sums) {
  int device = 0, sms = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const int64_t tiles = divide_up(features, 64 * kFeatureWarps), step = 16 * kTokenWarps;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= kMostSums / sums && (splits == 1 || divide_up(tokens, splits) >= step); ++splits) {
    const int64_t waves = divide_up(tiles * splits, sms);
    const int64_t time = waves * (divide_up(divide_up(tokens, splits), step) * step + kIdle);
    if (time < least) least = time, best = splits;
  }
  return best;
}

int64_t room_for_sums(int64_t tokens, int64_t features, int64_t sums) {
  return splits_for(tokens, features, sums) * 16 * sums * features;
}

// Adds up the blocks' sums, in order, and adds them to the gradients.
cudaError_t finish(const Arguments& arguments, int64_t splits, int64_t sums, cudaStream_t stream) {
  const Finish last{arguments.sums,   static_cast<int>(splits), static_cast<int>(16 * sums), arguments.features,
                    arguments.rank, arguments.draw.scale,     arguments.grads};
  const bool idle_rows = arguments.gate_up != nullptr && arguments.grads.gate.data == nullptr;  // no dB is wanted
  const dim3 grid(static_cast<unsigned>(divide_up(arguments.features, kTile)),
                  static_cast<unsigned>(sums - (idle_rows ? 2 : 0)));
  finish_kernel<<<grid, kTile * 8, 0, stream>>>(last);
  return cudaGetLastError();
}

template <bool bfloat16, typename Shape>
cudaError_t run(Arguments arguments, cudaStream_t stream) {
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
  return launched == cudaSuccess ? finish(arguments, splits, Shape::sums, stream) : launched;
}

// The deeper pipeline where the multiprocessor's shared memory has room for it.
template <bool bfloat16, int rank_tiles, bool gated, int stages>
cudaError_t run_deepest(const Arguments& arguments, cudaStream_t stream) {
  using Deep = Shape<rank_tiles, gated, kFeatureWarps, kTokenWarps, stages>;
  using Flat = Shape<rank_tiles, gated, kFeatureWarps, kTokenWarps, 2>;
  static_assert(Flat::shared_bytes <= kLeastSharedMemory);
  return grants_shared_memory(Deep::shared_bytes) ? run<bfloat16, Deep>(arguments, stream)
                                                  : run<bfloat16, Flat>(arguments, stream);
}

template <bool bfloat16>
cudaError_t run_by_rank(const Arguments& arguments, cudaStream_t stream) {
  if (arguments.gate_up != nullptr) return run_deepest<bfloat16, 1, true, 3>(arguments, stream);
  if (arguments.rank <= 16) return run_deepest<bfloat16, 1, false, 3>(arguments, stream);
  if (arguments.rank <= 32) return run_deepest<bfloat16, 2, false, 4>(arguments, stream);
  return run_deepest<bfloat16, 3, false, 4>(arguments, stream);
}

// What both entries have.
Arguments make_arguments(const void* dx, int64_t dx_stride, const void* dz, int64_t dz_stride, const void* A,
                         int64_t tokens, int64_t features, int64_t rank, const LoraMask& mask,
                         const FactorGrads& grads, float* sums) {
  Arguments arguments{};
  arguments.dx = matrix(dx, dx_stride);
  arguments.dz = matrix(dz, dz_stride);
  arguments.A = static_cast<const uint16_t*>(A);
  arguments.draw = make_draw(mask);
  arguments.tokens = static_cast<int>(tokens);
  arguments.features = static_cast<int>(features);
  arguments.rank = static_cast<int>(rank);
  arguments.grads = grads;
  arguments.sums = sums;
  return arguments;
}

}  // namespace

int64_t sums_of_lora_backward(int64_t tokens, int64_t features, int64_t rank) {
  return room_for_sums(tokens, features, divide_up(rank, 16));
}

int64_t sums_of_swiglu_lora_backward(int64_t tokens, int64_t features) {
  return room_for_sums(tokens, features, kGatedSums);
}

cudaError_t launch_lora_backward(void* out, int64_t out_stride, const void* dx, int64_t dx_stride, const void* x,
                                 int64_t x_stride, const void* dz, int64_t dz_stride, const void* A, int64_t tokens,
                                 int64_t features, int64_t rank, const LoraMask& mask, const FactorGrads& grads,
                                 float* sums, bool bfloat16, cudaStream_t stream) {
  if (tokens == 0 || features == 0) return cudaSuccess;
  Arguments arguments = make_arguments(dx, dx_stride, dz, dz_stride, A, tokens, features, rank, mask, grads, sums);
  arguments.out = matrix(out, out_stride);
  arguments.x = matrix(x, x_stride);
  return bfloat16 ? run_by_rank<true>(arguments, stream) : run_by_rank<false>(arguments, stream);
}

cudaError_t launch_swiglu_lora_backward(void* grad, const void* gate_up, const void* dx, int64_t dx_stride,
                                        const void* z, int64_t z_stride, const void* dz, int64_t dz_stride,
                                        const void* A, int64_t tokens, int64_t features, int64_t rank,
                                        const LoraMask& mask, const FactorGrads& grads, float* sums, bool bfloat16,
                                        cudaStream_t stream) {
  if (tokens == 0 || features == 0) return cudaSuccess;
  Arguments arguments = make_arguments(dx, dx_stride, dz, dz_stride, A, tokens, features, rank, mask, grads, sums);
  arguments.gate_up = static_cast<const uint16_t*>(gate_up);
  arguments.grad = static_cast<uint16_t*>(grad);
  arguments.z = matrix(z, z_stride);
  return bfloat16 ? run_by_rank<true>(arguments, stream) : run_by_rank<false>(arguments, stream);
}

}  // namespace megalora
