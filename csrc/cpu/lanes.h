// The lanes of a dropout mask for some features of one token.
#pragma once

#include "inline.h"
#include "mask.h"
#include "philox.h"

namespace megalora::cpu {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "16-bit lanes are read from 32-bit words in memory");

using lane_t __attribute__((may_alias)) = uint16_t;

// Room for the lanes of `features` features, wherever in a block of eight they begin.
constexpr int64_t words_for(int64_t features) { return 4 * ((features + 14) / 8); }

// Draws into `words`; returns the lanes of the features [feature, feature + n), counted without the offset.
MEGALORA_INLINE const lane_t* draw_lanes(uint32_t* words, int64_t token_index, int64_t feature, int64_t n,
                                         const Mask& mask) {
  const auto token = static_cast<uint64_t>(token_index);
  const auto token_low = static_cast<uint32_t>(token), token_high = static_cast<uint32_t>(token >> 32);
  const int64_t global_feature = mask.feature_offset + feature, skip = global_feature % 8;
  const auto first_block = static_cast<uint32_t>(global_feature / 8);
  const auto blocks = static_cast<uint32_t>((skip + n + 7) / 8);
  for (uint32_t block = 0; block < blocks; ++block) {
    const auto drawn = philox4x32({token_low, first_block + block, mask.step, token_high}, mask.key, mask.site);
    words[4 * block] = drawn.w0;
    words[4 * block + 1] = drawn.w1;
    words[4 * block + 2] = drawn.w2;
    words[4 * block + 3] = drawn.w3;
  }
  return reinterpret_cast<const lane_t*>(words) + skip;
}

}  // namespace megalora::cpu
