// The lanes of a dropout mask for some features of one token.
#pragma once

#include "inline.h"
#include "mask.h"
#include "philox.h"

namespace megalora::cpu {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "16-bit lanes are read from 32-bit words in memory");

using lane_t __attribute__((may_alias)) = uint16_t;

// Blocks of eight features that are drawn at a time: as many as the 32-bit lanes of the widest vectors.
constexpr int64_t kDrawnBlocks = 16;

// Room for the lanes of `features` features, wherever in a block of eight they begin; the last draw is a whole one.
constexpr int64_t words_for(int64_t features) {
  const int64_t blocks = (features + 14) / 8;
  return 4 * ((blocks + kDrawnBlocks - 1) / kDrawnBlocks * kDrawnBlocks);
}

// Draws into `words`; returns the lanes of the features [feature, feature + n), counted without the offset.
MEGALORA_INLINE const lane_t* draw_lanes(uint32_t* words, int64_t token_index, int64_t feature, int64_t n,
                                         const Mask& mask) {
  const auto token = static_cast<uint64_t>(token_index);
  const auto token_low = static_cast<uint32_t>(token), token_high = static_cast<uint32_t>(token >> 32);
  const int64_t global_feature = mask.feature_offset + feature, skip = global_feature % 8;
  const auto first_block = static_cast<uint32_t>(global_feature / 8);
  const auto blocks = static_cast<uint32_t>((skip + n + 7) / 8);
  const uint32_t step = mask.step, key = mask.key, site = mask.site;
  for (uint32_t block = 0; block < blocks; block += kDrawnBlocks) {
    // Word by word, which compilers turn into vectors of blocks, and then block by block.
    alignas(64) uint32_t drawn[4][kDrawnBlocks];
    for (uint32_t i = 0; i < kDrawnBlocks; ++i) {
      const auto one = philox4x32({token_low, first_block + block + i, step, token_high}, key, site);
      drawn[0][i] = one.w0;
      drawn[1][i] = one.w1;
      drawn[2][i] = one.w2;
      drawn[3][i] = one.w3;
    }
    for (uint32_t i = 0; i < kDrawnBlocks; ++i) {
      for (int word = 0; word < 4; ++word) words[4 * (block + i) + word] = drawn[word][i];
    }
  }
  return reinterpret_cast<const lane_t*>(words) + skip;
}

}  // namespace megalora::cpu
