// What the tensor-core kernels of LoRA share: the mma and its operands, copies into shared memory, sums over the blocks of
// a cluster, and launches of clusters.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "halves.h"

namespace megalora {

constexpr int kLanes = 32;
constexpr int kLargestCluster = 8;  // the portable limit

__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// d [16, 8] += a [16, 16] b [16, 8]. Thread 4g + t holds rows g, g + 8 and columns 2t, 2t + 1 of d in d[0..1], d[2..3];
// the pairs {2t, 2t + 1}, {2t + 8, 2t + 9} of the inner dimension in a0 (row g), a1 (row g + 8), a2 (g), a3 (g + 8) and,
// for column g, in b0, b1.
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

struct Matrix {  // rows of 16-bit floats
  uint16_t* data;
  int64_t stride;
};

inline Matrix matrix(const void* data, int64_t stride) {
  return {static_cast<uint16_t*>(const_cast<void*>(data)), stride};
}

// ---- launches

// What every GPU that the kernels are launched on grants a block (megalora/ops/lora_linear.py sees to it).
constexpr int kLeastSharedMemory = 163 << 10;

// Whether this GPU grants a block so much dynamic shared memory. An error shows at the launch.
inline bool grants_shared_memory(int bytes) {
  int device = 0, granted = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&granted, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
         granted >= bytes;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename Shape, typename Arguments>
cudaLaunchConfig_t configure(void (*kernel)(Arguments), dim3 grid, cudaLaunchAttribute& cluster, cudaStream_t stream,
                             cudaError_t& error) {
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::shared_bytes);
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = 1;
  cluster.val.clusterDim.y = grid.y;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(Shape::threads);
  config.dynamicSmemBytes = Shape::shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.y > 1 ? 1 : 0;
  return config;
}

// A grid of `tiles` sums, each split over a cluster of blocks.
template <typename Shape, typename Arguments>
cudaError_t launch_clusters(void (*kernel)(Arguments), int64_t tiles, int splits, const Arguments& arguments,
                            cudaStream_t stream) {
  cudaLaunchAttribute cluster;
  cudaError_t error;
  const dim3 grid(static_cast<unsigned>(tiles), splits);
  const cudaLaunchConfig_t config = configure<Shape>(kernel, grid, cluster, stream, error);
  return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, arguments) : error;
}

// How many clusters of each size run at once. A cluster lies within one group of multiprocessors, and groups differ, so
// this is not their number divided by the size.
struct Capacity {
  cudaError_t error;
  int clusters[kLargestCluster + 1];

  // The most blocks to split each of `tiles` sums into while all run at once.
  int splits(int64_t tiles) const {
    int size = kLargestCluster;
    while (size > 1 && clusters[size] < tiles) --size;
    return size;
  }
};

// Asked for once a kernel: the devices of one process are taken to be alike.
template <typename Shape, typename Arguments>
const Capacity& capacity(void (*kernel)(Arguments)) {
  static const Capacity known = [kernel] {
    Capacity found{};
    int device, major;
    found.error = cudaGetDevice(&device);
    if (found.error == cudaSuccess) {
      found.error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    }
    for (int size = 2; size <= kLargestCluster && found.error == cudaSuccess && major >= 9; ++size) {
      cudaLaunchAttribute cluster;
      const cudaLaunchConfig_t config = configure<Shape>(kernel, dim3(1, size), cluster, nullptr, found.error);
      if (found.error != cudaSuccess) break;
      found.error = cudaOccupancyMaxActiveClusters(&found.clusters[size], kernel, &config);
    }
    return found;
  }();
  return known;
}

}  // namespace megalora
