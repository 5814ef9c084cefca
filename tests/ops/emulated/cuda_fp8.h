// e4m3 to two floats and back, by the format.
#pragma once

#include "cuda_runtime_api.h"

using __nv_fp8x2_storage_t = uint16_t;
enum { __NV_E4M3, __NV_SATFINITE };
struct __half2_raw {
  float low, high;
};
struct __half2 {
  float low, high;
  explicit __half2(__half2_raw raw) : low(raw.low), high(raw.high) {}
};
inline float of_e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return code & 128 ? -size : size;
}
inline __half2_raw __nv_cvt_fp8x2_to_halfraw2(uint16_t codes, int) { return {of_e4m3(codes & 255), of_e4m3(codes >> 8)}; }
inline float2 __half22float2(__half2 pair) { return {pair.low, pair.high}; }
// The nearest, of two as near the even one, which is found by trying: codes are ordered as their values are.
inline uint8_t to_e4m3(float x) {
  const float size = std::min(std::fabs(x), 448.0f);
  uint8_t below = 0;
  while (below < 126 && of_e4m3(below + 1) <= size) ++below;
  const float down = size - of_e4m3(below), up = below < 126 ? of_e4m3(below + 1) - size : INFINITY;
  const uint8_t code = up < down || (up == down && below % 2) ? below + 1 : below;
  return code | (std::signbit(x) ? 128 : 0);
}
inline uint16_t __nv_cvt_float2_to_fp8x2(float2 pair, int, int) { return to_e4m3(pair.x) | to_e4m3(pair.y) << 8; }
