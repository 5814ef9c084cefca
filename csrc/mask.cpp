// The mask of an op's arguments, for both devices.
#include <cmath>

#include "check.h"
#include "ops.h"

namespace megalora {

Mask make_mask(const MaskArguments& arguments, const Tensor& x) {
  const auto& [token_index, seed, site, given_step, feature_offset, p, live_step] = arguments;
  int64_t step = given_step;
  const int64_t* read_later = nullptr;
  if (live_step) {
    MEGALORA_CHECK(live_step->scalar_type() == at::kLong && live_step->numel() == 1, "live_step: one int64");
    MEGALORA_CHECK(live_step->device() == x.device(), "live_step on ", live_step->device(), " beside ", x.device());
    const auto* place = live_step->const_data_ptr<int64_t>();
    if (x.is_cpu()) {
      step = *place;
    } else {
      read_later = place;
    }
  }
  MEGALORA_CHECK(seed >= 0 && seed <= UINT32_MAX, "seed ", seed, " (fold it to 32 bits)");
  MEGALORA_CHECK(site >= 0 && site <= UINT32_MAX, "site ", site);
  MEGALORA_CHECK(step >= 0 && step <= UINT32_MAX, "step ", step);
  MEGALORA_CHECK(feature_offset >= 0, "feature_offset ", feature_offset);
  MEGALORA_CHECK(p >= 0 && std::nearbyint(p * 65536) < 65536, "p ", p);
  MEGALORA_CHECK(token_index.dim() == 1 && token_index.size(0) == x.size(0), token_index.sizes(), " for ", x.sizes());
  MEGALORA_CHECK(token_index.scalar_type() == at::kLong, "got ", token_index.scalar_type());
  MEGALORA_CHECK(token_index.is_contiguous(), "strides ", token_index.strides());
  MEGALORA_CHECK(token_index.device() == x.device(), token_index.device(), " beside ", x.device());
  const double threshold = std::nearbyint(p * 65536);  // ties to even, as Python's round
  Mask mask{};
  mask.token = token_index.const_data_ptr<int64_t>();
  mask.key = static_cast<uint32_t>(seed);
  mask.site = static_cast<uint32_t>(site);
  mask.step = static_cast<uint32_t>(step);
  mask.threshold = static_cast<uint32_t>(threshold);
  mask.live_step = read_later;
  mask.feature_offset = feature_offset;
  mask.scale = 65536 / (65536 - threshold);
  return mask;
}

}  // namespace megalora
