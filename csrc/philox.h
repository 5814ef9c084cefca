// Philox4x32-10, the counter-based random generator of Salmon et al., SC 2011: four words from a counter and a key.
// Plain inline code on values, for host and device alike.
#pragma once

#include <cstdint>

#include "inline.h"

namespace megalora {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

MEGALORA_INLINE PhiloxWords philox4x32(PhiloxWords c, uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c.w0;
    const uint64_t product2 = uint64_t{0xCD9E8D57} * c.w2;
    c = {static_cast<uint32_t>(product2 >> 32) ^ c.w1 ^ k0, static_cast<uint32_t>(product2),
         static_cast<uint32_t>(product0 >> 32) ^ c.w3 ^ k1, static_cast<uint32_t>(product0)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

}  // namespace megalora
