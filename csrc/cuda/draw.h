// Dropout masks in registers: what depends on the run, the step and the token is worked out apart from what depends on
// the feature.
#pragma once

#include <cstdint>

#include "mask.h"
#include "philox.h"

namespace megalora {

// What of the generator is alike for all threads, worked out on the host.
struct Draw {
  const int64_t* token;
  uint32_t k0[10], k1[10];  // the key words of each round
  uint32_t step;
  const int64_t* live_step;
  uint32_t first_block;
  uint32_t threshold_low;   // both halves: the threshold's low 15 bits
  uint32_t threshold_high;  // all ones if its highest bit is clear
  float scale;
  bool on;
};

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;

inline Draw make_draw(const Mask& mask) {
  Draw draw{};
  draw.token = mask.token;
  for (uint32_t round = 0; round < 10; ++round) {
    draw.k0[round] = mask.key + round * 0x9E3779B9;
    draw.k1[round] = mask.site + round * 0xBB67AE85;
  }
  draw.step = mask.step;
  draw.live_step = mask.live_step;
  draw.first_block = static_cast<uint32_t>(mask.feature_offset / 8);
  draw.threshold_low = (mask.threshold & 0x7FFF) * 0x10001;
  draw.threshold_high = mask.threshold & 0x8000 ? 0 : 0xFFFFFFFF;
  draw.scale = static_cast<float>(mask.scale);
  draw.on = mask.threshold != 0;
  return draw;
}

// All ones in each half of `lanes` that is at least the threshold: kept. Per half, with b the threshold:
// a >= b is the top bit of majority(a, (a | top) - (b & ~top), ~b).
__device__ __forceinline__ uint32_t keep(uint32_t lanes, const Draw& draw) {
  const uint32_t difference = (lanes | 0x80008000) - draw.threshold_low;
  const uint32_t other = draw.threshold_high;
  const uint32_t decided = (lanes & difference) | (other & (lanes | difference));
  uint32_t mask;
  asm("prmt.b32 %0, %1, %1, 0xBB99;" : "=r"(mask) : "r"(decided));  // spreads the sign of bytes 1 and 3
  return mask;
}

// The product of the counter's third word, the step: alike for all tokens.
struct StepDraw {
  uint32_t first, second;

  __device__ __forceinline__ explicit StepDraw(const Draw& draw) {
    const auto step = draw.live_step == nullptr ? draw.step : static_cast<uint32_t>(__ldg(draw.live_step));
    const uint64_t product = uint64_t{kMultiplier1} * step;
    first = static_cast<uint32_t>(product >> 32) ^ draw.k0[0];
    second = static_cast<uint32_t>(product);
  }
};

// One token's masks. philox4x32 (philox.h) with all that does not depend on the feature worked out once: of the first
// three rounds' six products only two are left for each block.
struct TokenDraw {
  uint32_t round1, round2a, round2b, round2c;

  __device__ __forceinline__ void init(const Draw& draw, const StepDraw& step, int64_t token) {
    const uint64_t product0 = uint64_t{kMultiplier0} * static_cast<uint32_t>(token);
    const uint32_t c2 = static_cast<uint32_t>(product0 >> 32) ^ static_cast<uint32_t>(token >> 32) ^ draw.k1[0];
    const uint64_t product1 = uint64_t{kMultiplier1} * c2;
    const uint32_t c0 = static_cast<uint32_t>(product1 >> 32) ^ step.second ^ draw.k0[1];
    const uint64_t product2 = uint64_t{kMultiplier0} * c0;
    round1 = static_cast<uint32_t>(product0) ^ draw.k1[1];
    round2a = static_cast<uint32_t>(product1) ^ draw.k0[2];
    round2b = static_cast<uint32_t>(product2 >> 32) ^ draw.k1[2];
    round2c = static_cast<uint32_t>(product2);
  }

  // The keep masks of features 8·block .. + 7 of the whole input.
  __device__ __forceinline__ uint4 keep_block(const Draw& draw, const StepDraw& step, uint32_t block) const {
    const uint64_t first = uint64_t{kMultiplier0} * (step.first ^ block);
    const uint64_t second = uint64_t{kMultiplier1} * (static_cast<uint32_t>(first >> 32) ^ round1);
    PhiloxWords c = {static_cast<uint32_t>(second >> 32) ^ round2a, static_cast<uint32_t>(second),
                     static_cast<uint32_t>(first) ^ round2b, round2c};
#pragma unroll
    for (int round = 3; round < 10; ++round) {
      const uint64_t product0 = uint64_t{kMultiplier0} * c.w0;
      const uint64_t product2 = uint64_t{kMultiplier1} * c.w2;
      c = {static_cast<uint32_t>(product2 >> 32) ^ c.w1 ^ draw.k0[round], static_cast<uint32_t>(product2),
           static_cast<uint32_t>(product0 >> 32) ^ c.w3 ^ draw.k1[round], static_cast<uint32_t>(product0)};
    }
    return {keep(c.w0, draw), keep(c.w1, draw), keep(c.w2, draw), keep(c.w3, draw)};
  }
};

constexpr uint4 kAll = {~0u, ~0u, ~0u, ~0u};

__device__ __forceinline__ uint4 operator&(uint4 a, uint4 b) { return {a.x & b.x, a.y & b.y, a.z & b.z, a.w & b.w}; }

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

}  // namespace megalora
