// Small functions that host and device code share. Needs nothing of torch, so that plain CUDA can include it.
#pragma once

#if defined(__CUDACC__)
#define MEGALORA_INLINE __host__ __device__ __forceinline__
#else
#define MEGALORA_INLINE inline __attribute__((always_inline))
#endif
// The same for a lambda, between its parameters and its body.
#define MEGALORA_INLINE_LAMBDA __attribute__((always_inline))
