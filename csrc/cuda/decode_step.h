// What the kernels of a decoding step share. Such a step is a chain of some three hundred kernels of a few microseconds
// each: on GPUs of compute capability 9.0 a kernel is launched while the one before it ends (programmatic dependent
// launch), and fetches its weights into the L2 cache meanwhile.
//
// A kernel that is launched by launch_following calls await_previous before it touches what another kernel writes, in
// every thread that goes on to do so and in at least one thread of every grid: its end then says that all before it
// have ended. What it fetches before is only brought nearer: a later write reaches the L2 cache too.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

namespace megalora {

// Rows up to which a kernel is taken to be one of a decoding step: those of training and of prompts are longer than
// what a launch costs.
constexpr int64_t kMostDecodedRows = 64;

#if defined(__CUDACC__)

// Waits until all kernels before have ended and what they wrote can be read.
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel be launched, as soon as all blocks have come here or have ended.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Fetches bytes into the L2 cache; from and bytes are multiples of 16.
__device__ __forceinline__ void prefetch(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// Load 16 bytes that are read once, past the L1 cache. Volatile: not before a wait for the kernel that writes them.
__device__ __forceinline__ uint4 stream_octet(const uint4* from) {
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return words;
}

#endif

// Return whether kernels may start while the one before ends (programmatic dependent launch). Found once: the devices
// of one process are taken to be alike.
inline bool launches_early() {
  static const bool known = [] {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
  }();
  return known;
}

// Launches a kernel of `rows` rows that calls await_previous: early, where the rows are few.
template <typename... Parameters, typename... Arguments>
void launch_following(void (*kernel)(Parameters...), dim3 grid, unsigned threads, int64_t rows, cudaStream_t stream,
                      Arguments... arguments) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = rows <= kMostDecodedRows && launches_early() ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);  // an error shows in the check that follows every launch
}

}  // namespace megalora
