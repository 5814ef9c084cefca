// Launches of the tensor-core kernels of LoRA: rows as they take them, shared memory, clusters of blocks.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernel_limits.h"
#include "params.h"

namespace megalora {

constexpr int kLargestCluster = 8;  // the portable limit

struct HalfMatrix {  // rows of 16-bit floats
  uint16_t* data;
  int64_t stride;
};

inline HalfMatrix half_matrix(const Matrix& m) { return {static_cast<uint16_t*>(m.data), m.stride}; }

// Calls `body` with std::true_type for bfloat16, std::false_type for float16.
template <typename Body>
cudaError_t dispatch_half(Type type, Body body) {
  return type == Type::bfloat16 ? body(std::true_type{}) : body(std::false_type{});
}

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
