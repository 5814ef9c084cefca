// Words of two 16-bit floats, the low half first: bfloat16 or, where `bfloat16` is false, float16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace megalora {

template <bool bfloat16>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <bool bfloat16>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (bfloat16) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
}

template <bool bfloat16>
__device__ __forceinline__ void unpack(const uint4& words, float (&to)[8]) {
  const uint32_t each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<bfloat16>(each[i]);
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}

// Element i of such floats, as float32.
template <bool bfloat16>
__device__ __forceinline__ float widen(const void* from, int64_t i) {
  if constexpr (bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
  return __half2float(static_cast<const __half*>(from)[i]);
}

template <bool bfloat16>
__device__ __forceinline__ void narrow(void* to, int64_t i, float x) {
  if constexpr (bfloat16) {
    static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(x);
  } else {
    static_cast<__half*>(to)[i] = __float2half_rn(x);
  }
}

}  // namespace megalora
