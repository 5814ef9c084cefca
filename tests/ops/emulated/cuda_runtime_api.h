// As much of CUDA as kernels in tests need on a CPU: a thread for each of a block's, blocks one after another.
#pragma once

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
#define __device__
#define __global__
#define __forceinline__ inline
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
using std::max;
using std::min;

inline thread_local dim3 threadIdx, blockIdx;
inline std::barrier<>* block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
// Of all lanes of a warp.
inline float __shfl_xor_sync(unsigned, float x, int step) {
  static float all[32][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  all[warp][lane] = x;
  warp_barriers[warp]->arrive_and_wait();
  const float theirs = all[warp][lane ^ step];
  warp_barriers[warp]->arrive_and_wait();
  return theirs;
}
// Of the lane-th of `width` lanes that follow each other.
inline uint32_t __shfl_sync(unsigned, uint32_t x, int lane, int width) {
  static uint32_t all[32][32];
  const int warp = threadIdx.x / 32, mine = threadIdx.x % 32;
  all[warp][mine] = x;
  warp_barriers[warp]->arrive_and_wait();
  const uint32_t theirs = all[warp][mine / width * width + lane];
  warp_barriers[warp]->arrive_and_wait();
  return theirs;
}
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
// glibc's math.h has an __expf of its own.
#define __expf exp_of
inline float exp_of(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t{b} << 32;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= uint32_t(bytes >> (8 * (selector >> 4 * i & 7)) & 255) << 8 * i;
  return picked;
}
