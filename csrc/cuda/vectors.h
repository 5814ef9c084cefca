// What the memory-bound CUDA kernels share: 16 bytes a thread at a time, arithmetic in float32. Each kernel reads its
// inputs once and writes once; sums go through shuffles and shared memory in one order, so equal inputs give equal
// bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernel_limits.h"
#include "params.h"

namespace megalora {

template <typename T>
struct alignas(kAlignment) Vector {
  static constexpr int size = kAlignment / sizeof(T);
  T at[size];
};

template <typename T>
__device__ __forceinline__ Vector<T> load(const T* p) {
  Vector<T> v;
  *reinterpret_cast<uint4*>(&v) = *reinterpret_cast<const uint4*>(p);
  return v;
}
template <typename T>
__device__ __forceinline__ void store(T* p, const Vector<T>& v) {
  *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&v);
}
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}

// Calls `body` with a value of the element type.
template <typename Body>
void dispatch(Type type, Body body) {
  switch (type) {
    case Type::bfloat16: return body(__nv_bfloat16{});
    case Type::float16: return body(__half{});
    case Type::float32: return body(float{});
    case Type::float64: return;  // type_of (checks.h) has refused it
  }
}

inline unsigned blocks_for(int64_t work, int64_t each) { return static_cast<unsigned>((work + each - 1) / each); }

constexpr int kThreads = 256;  // of a block, where nothing else is said

}  // namespace megalora
