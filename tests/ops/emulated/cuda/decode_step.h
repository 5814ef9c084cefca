// Launches, and reads of weights that must stay inside the tensors.
#pragma once

#include "cuda_runtime_api.h"

namespace megalora {

inline std::vector<std::pair<uintptr_t, uintptr_t>> tensors;

inline void allow(const void* from, int64_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(from);
  if (bytes > 0) tensors.push_back({start, start + bytes});
}
// slack: bytes beside a tensor that do no harm
inline void check(const void* from, uint64_t bytes, uint64_t slack) {
  const auto start = reinterpret_cast<uintptr_t>(from);
  const bool inside = std::any_of(tensors.begin(), tensors.end(), [&](const auto& one) {
    return start + slack >= one.first && start + bytes <= one.second + slack;
  });
  if (inside && start % 16 == 0 && bytes % 16 == 0 && bytes > 0) return;
  fprintf(stderr, "%lu bytes outside of the tensors, or not on 16 bytes\n", static_cast<unsigned long>(bytes));
  abort();
}

inline void await_previous() {}
inline void let_next_start() {}
inline void prefetch(const void* from, uint32_t bytes) { check(from, bytes, 15); }
inline uint4 stream_octet(const uint4* from) {
  check(from, 16, 0);
  return *from;
}

template <typename Kernel, typename... Arguments>
void launch_following(Kernel kernel, dim3 grid, unsigned threads, int64_t, cudaStream_t, Arguments... arguments) {
  for (unsigned block = 0; block < grid.x * grid.y; ++block) {
    std::barrier<> all(threads);
    block_barrier = &all;
    warp_barriers.clear();
    for (unsigned warp = 0; warp < threads / 32; ++warp) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; ++thread) {
      running.emplace_back([=] {
        threadIdx = dim3(thread);
        blockIdx = dim3(block % grid.x, block / grid.x);
        kernel(arguments...);
      });
    }
    for (auto& one : running) one.join();
  }
}

}  // namespace megalora
