// e4m3 to two floats, by the format.
#pragma once

#include "cuda_runtime_api.h"

using __nv_fp8x2_storage_t = uint16_t;
enum { __NV_E4M3 };
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
