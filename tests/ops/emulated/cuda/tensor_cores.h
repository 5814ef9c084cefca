// The mma by its definition, bfloat16 alone, and tables in shared memory by 32-bit addresses.
#pragma once

#include "cuda/halves.h"
#include "cuda_runtime_api.h"

namespace megalora {

constexpr int kLanes = 32;

inline uintptr_t shared_top;  // the upper half of shared addresses
inline uint32_t shared_address(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  shared_top = address >> 32 << 32;
  return static_cast<uint32_t>(address);
}
inline float load_shared(uint32_t address) { return *reinterpret_cast<const float*>(shared_top | address); }
inline uint32_t written(uint32_t address) { return address; }

// d [16, 8] += a [16, 16] b [16, 8], fragments as in the PTX manual (mma.m16n8k16).
template <bool bfloat16>
void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  static uint32_t all_a[8][kLanes][4], all_b[8][kLanes][2];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  memcpy(all_a[warp][lane], a, sizeof(a));
  memcpy(all_b[warp][lane], b, sizeof(b));
  warp_barriers[warp]->arrive_and_wait();
  const auto half = [](uint32_t word, int k) { return widened(k % 2 ? word >> 16 : word & 0xFFFF); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2;
      d[i] += half(all_a[warp][row % 8 * 4 + pair][row / 8 + 2 * (k / 8)], k) *
              half(all_b[warp][column * 4 + pair][k / 8], k);
    }
  }
  warp_barriers[warp]->arrive_and_wait();
}

}  // namespace megalora
