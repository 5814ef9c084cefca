// What the tensor-core kernels of LoRA share: the mma and its operands, copies into shared memory, sums over warps and
// over the blocks of a cluster. Launches are in clusters.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/halves.h"

namespace megalora {

constexpr int kLanes = 32;

__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// d [16, 8] += a [16, 16] b [16, 8]. Thread 4g + t holds rows g, g + 8 and columns 2t, 2t + 1 of d in d[0..1], d[2..3];
// the pairs {2t, 2t + 1}, {2t + 8, 2t + 9} of the inner dimension in a0 (row g), a1 (row g + 8), a2 (g), a3 (g + 8)
// and, for column g, in b0, b1.
template <bool bfloat16>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  if constexpr (bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// ---- shared memory: copies into it, transposed reads

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float load_shared(uint32_t address) {
  float x;
  asm("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
  return x;
}
// Behind a barrier: what is read at this address is read behind it too.
__device__ __forceinline__ uint32_t written(uint32_t address) {
  asm volatile("" : "+r"(address)::"memory");
  return address;
}

// Copies 16 bytes in the background, or writes zeros where there is nothing to copy.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ uint4 load_transposed(const void* row) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(row))
               : "memory");
  return v;
}

// Which of the stages in shared memory a step uses.
template <int stages>
struct Turn {
  int stage;
  __device__ __forceinline__ void next() { stage = stage == stages - 1 ? 0 : stage + 1; }
};

// ---- thread block clusters along gridDim.y

__device__ __forceinline__ void cluster_barrier(int blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// The sum, in order, of four floats at the same place in the shared memory of each block of the cluster.
__device__ __forceinline__ float4 cluster_sum(const float* place, int blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    float4 sum = {0, 0, 0, 0};
    for (int block = 0; block < blocks; ++block) {
      uint32_t address;
      float4 v;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(place)), "r"(block));
      asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                   : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                   : "r"(address)
                   : "memory");
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    return sum;
  }
#endif
  return *reinterpret_cast<const float4*>(place);
}

// The sums of eight mma over features: adds those of rank g, g + 8 from `ranks` on (a row of `pitch` floats each), or
// writes them, where they are the first. Columns 2t, 2t + 1 hold eight features each, one from each mma.
template <int pitch>
__device__ __forceinline__ void add_rank_tile(float* ranks, const float (&sum)[8][4], int g, int t, bool first) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float4* place = reinterpret_cast<float4*>(ranks + (g + 8 * (c / 2)) * pitch + 8 * (2 * t + c % 2));
    float4 low = {sum[0][c], sum[1][c], sum[2][c], sum[3][c]};
    float4 high = {sum[4][c], sum[5][c], sum[6][c], sum[7][c]};
    if (!first) {
      const float4 l = place[0], h = place[1];
      low = {l.x + low.x, l.y + low.y, l.z + low.z, l.w + low.w};
      high = {h.x + high.x, h.y + high.y, h.z + high.z, h.w + high.w};
    }
    place[0] = low;
    place[1] = high;
  }
}

}  // namespace megalora
