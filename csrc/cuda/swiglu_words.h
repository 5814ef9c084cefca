// Activations, gated or not, on words of two 16-bit floats, in registers; in the order of operations of swiglu.cu.
#pragma once

#include <cstdint>

#include "cuda/gates.h"
#include "cuda/halves.h"

namespace megalora {

// x = act(gate) * up, two at a time.
template <bool bfloat16, Gate act>
__device__ __forceinline__ uint32_t swiglu(uint32_t gate, uint32_t up) {
  const float2 g = unpack<bfloat16>(gate), u = unpack<bfloat16>(up);
  const float low = Activated<act>(g.x).value(), high = Activated<act>(g.y).value();
  const float2 opened = unpack<bfloat16>(pack<bfloat16>(low, high));
  return pack<bfloat16>(opened.x * u.x, opened.y * u.y);
}

// x = act(up), two at a time.
template <bool bfloat16, Gate act>
__device__ __forceinline__ uint32_t activated(uint32_t up) {
  const float2 u = unpack<bfloat16>(up);
  return pack<bfloat16>(Activated<act>(u.x).value(), Activated<act>(u.y).value());
}

// The octet of x that an Origin makes of these of gate and up; gate is not read where there is none.
template <bool bfloat16, typename Origin>
__device__ __forceinline__ uint4 made_of(const uint4& gate, const uint4& up) {
  constexpr Gate act = Origin::act;
  if constexpr (Origin::gated) {
    return {swiglu<bfloat16, act>(gate.x, up.x), swiglu<bfloat16, act>(gate.y, up.y),
            swiglu<bfloat16, act>(gate.z, up.z), swiglu<bfloat16, act>(gate.w, up.w)};
  } else {
    return {activated<bfloat16, act>(up.x), activated<bfloat16, act>(up.y), activated<bfloat16, act>(up.z),
            activated<bfloat16, act>(up.w)};
  }
}

// (d up, x) of x = act(up), two at a time.
template <bool bfloat16, Gate act>
__device__ __forceinline__ void activated_backward(uint32_t d, uint32_t up, uint32_t& dup, uint32_t& made) {
  const float2 ds = unpack<bfloat16>(d), ups = unpack<bfloat16>(up);
  const Activated<act> low(ups.x), high(ups.y);
  dup = pack<bfloat16>(low.backward(ds.x), high.backward(ds.y));
  made = pack<bfloat16>(low.value(), high.value());
}

// (d gate, d up, x) of x = act(gate) * up, two at a time.
template <bool bfloat16, Gate act>
__device__ __forceinline__ void swiglu_backward(uint32_t d, uint32_t gate, uint32_t up, uint32_t& dgate, uint32_t& dup,
                                                uint32_t& made) {
  const float2 ds = unpack<bfloat16>(d), gates = unpack<bfloat16>(gate), ups = unpack<bfloat16>(up);
  const float dj[2] = {ds.x, ds.y}, g[2] = {gates.x, gates.y}, u[2] = {ups.x, ups.y};
  float to_gate[2], to_up[2], values[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const Activated<act> opened(g[j]);
    values[j] = opened.value();
    to_up[j] = dj[j] * values[j];
    to_gate[j] = opened.backward(dj[j] * u[j]);
  }
  dgate = pack<bfloat16>(to_gate[0], to_gate[1]);
  dup = pack<bfloat16>(to_up[0], to_up[1]);
  const float2 rounded = unpack<bfloat16>(pack<bfloat16>(values[0], values[1]));
  made = pack<bfloat16>(rounded.x * u[0], rounded.y * u[1]);
}

}  // namespace megalora
