// What a dropout mask depends on, for the kernels of both devices. Bits and arithmetic are those of
// megalora/ops/dropout.py.
#pragma once

#include <cstdint>

namespace megalora {

struct Mask {
  const int64_t* token;  // [T]: each token's index in the global batch of the step
  uint32_t key, site;    // the key of Philox4x32
  uint32_t step;         // of its counter, beside the token and the block of eight features
  uint32_t threshold;    // a feature is dropped where its 16-bit lane is below; 0: nothing is dropped or drawn
  // On CUDA, where not null: the step is read there when a kernel runs (a CUDA graph is captured once for all steps).
  const int64_t* live_step;
  int64_t feature_offset;  // the global feature that is column 0 of this rank's slice
  double scale;            // of kept values: the inverse of the share that is kept
};

}  // namespace megalora
