// exp of numbers that are not positive, and tanh, in a form that compilers turn into vector code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "inline.h"

namespace megalora::cpu {

// To about 1 unit in the last place; 0 below -87 (the smallest normal floats). The split of ln 2 and the polynomial are
// those of Cephes' expf (Moshier).
MEGALORA_INLINE float exp_nonpositive(float x) {
  const float clamped = x < -87.f ? -87.f : x;
  const float rounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (clamped * 1.44269504f + rounder) - rounder;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.f ? 0.f : p * power;
}

MEGALORA_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// tanh to about 2 units in the last place; the polynomial for small x is that of Cephes' tanhf.
MEGALORA_INLINE float tanh_of(float x) {
  const float size = x < 0 ? -x : x, z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = (p * z) * x + x;
  const float e = exp_nonpositive(-2 * size), large = (1 - e) / (1 + e);
  return size < 0.625f ? small : x < 0 ? -large : large;
}

MEGALORA_INLINE double tanh_of(double x) { return std::tanh(x); }

// 1 / (1 + exp(-x)) and 1 minus that, each to its own precision.
template <typename T>
struct Sigmoid {
  T value, rest;
};
template <typename T>
MEGALORA_INLINE Sigmoid<T> sigmoid(T x) {
  const T e = exp_nonpositive(x < 0 ? x : -x);
  const T larger = 1 / (1 + e), smaller = e * larger;
  return {x < 0 ? smaller : larger, x < 0 ? larger : smaller};
}

}  // namespace megalora::cpu
