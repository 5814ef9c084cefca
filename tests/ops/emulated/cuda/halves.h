// Words of two bfloat16, the low half first.
#pragma once

#include "cuda_runtime_api.h"

namespace megalora {

inline uint16_t rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline float widened(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
template <bool bfloat16>
uint32_t pack(float low, float high) {
  return rounded(low) | uint32_t{rounded(high)} << 16;
}
template <bool bfloat16>
float widen(const void* from, int64_t i) {
  return widened(static_cast<const uint16_t*>(from)[i]);
}
template <bool bfloat16>
void narrow(void* to, int64_t i, float x) {
  static_cast<uint16_t*>(to)[i] = rounded(x);
}
template <bool bfloat16>
void unpack(const uint4& words, float (&to)[8]) {
  const uint32_t each[4] = {words.x, words.y, words.z, words.w};
  for (int i = 0; i < 8; ++i) to[i] = widened(each[i / 2] >> 16 * (i % 2) & 0xFFFF);
}

}  // namespace megalora
