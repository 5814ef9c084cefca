// What the CPU kernels share. Each works on a range [begin, end) of the rows (or tasks) that its parameters describe,
// so that any cut over threads gives the same bits. dtype: float, double or bfloat16; arithmetic is in float, in double
// for double.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

#include "check.h"
#include "cpu/multiversion.h"
#include "inline.h"
#include "params.h"

namespace megalora::cpu {

// What sums and products of a type are worked out in.
template <typename scalar_t>
using wide_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Calls `body` with a value of the C++ type of `type`.
template <typename Body>
MEGALORA_INLINE void dispatch(Type type, Body&& body) {
  switch (type) {
    case Type::float32: return body(float{});
    case Type::float64: return body(double{});
    case Type::bfloat16: return body(c10::BFloat16{});
    case Type::float16: MEGALORA_CHECK(false, "no CPU kernel for float16");
  }
}

// Sums have one order, whatever the width of the vectors: element i goes to lane i % kLanes, then the lanes in pairs.
constexpr int64_t kLanes = 32;

// The sum of `count` lanes, a power of 2; overwrites them.
template <typename T>
MEGALORA_INLINE T add_halves(T* lanes, int64_t count) {
  for (int64_t half = count / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
template <typename T>
MEGALORA_INLINE T sum_lanes(T* lanes) {
  return add_halves(lanes, kLanes);
}

// Numbers that loops work out before any of them is rounded: where results of one loop go to several places of a type
// of 16 bits, compilers make no vector code of it.
constexpr int64_t kWideChunk = 256;

// out = in, rounded to their type.
template <typename scalar_t>
MEGALORA_INLINE void narrow(scalar_t* out, const wide_t<scalar_t>* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<scalar_t>(in[i]);
}

// Rows of `wide` numbers that kernels read whole vectors of: their stride, a multiple of a cache line.
constexpr int64_t padded(int64_t features) { return (features + 15) / 16 * 16; }

}  // namespace megalora::cpu
