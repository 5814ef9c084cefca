// Softmax cross entropy of rows of logits, statistics and gradient, on the CPU.
#include <limits>

#include "cpu_kernels.h"
#include "exp.h"

namespace megalora {
namespace {

template <typename scalar_t>
MEGALORA_INLINE wide_t<scalar_t> maximum_of(const scalar_t* x, int64_t size) {
  using wide = wide_t<scalar_t>;
  wide lanes[kLanes];
  for (wide& lane : lanes) lane = -std::numeric_limits<wide>::infinity();
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const wide value = static_cast<wide>(x[i + j]);
      lanes[j] = lanes[j] > value ? lanes[j] : value;
    }
  }
  for (int64_t i = whole; i < size; ++i) {
    const wide value = static_cast<wide>(x[i]);
    lanes[0] = lanes[0] > value ? lanes[0] : value;
  }
  wide maximum = lanes[0];
  for (const wide lane : lanes) maximum = maximum > lane ? maximum : lane;
  return maximum;
}

template <typename scalar_t>
MEGALORA_INLINE void stats(const CrossEntropyStats& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  auto* out = static_cast<wide*>(a.stats);
  for (int64_t row = begin; row < end; ++row) {
    const auto* x = static_cast<const scalar_t*>(a.logits) + row * a.row_stride;
    const wide maximum = maximum_of(x, a.vocab);
    wide lanes[kLanes] = {};
    const int64_t whole = a.vocab / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += exp_nonpositive(static_cast<wide>(x[i + j]) - maximum);
    }
    for (int64_t i = whole; i < a.vocab; ++i) lanes[i - whole] += exp_nonpositive(static_cast<wide>(x[i]) - maximum);
    const int64_t label = a.label[row];
    out[row] = maximum;
    out[a.rows + row] = sum_lanes(lanes);
    out[2 * a.rows + row] = label >= 0 && label < a.vocab ? static_cast<wide>(x[label]) : 0;
  }
}

template <typename scalar_t>
MEGALORA_INLINE void grad(const CrossEntropyGrad& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  for (int64_t row = begin; row < end; ++row) {
    auto* x = static_cast<scalar_t*>(a.logits) + row * a.row_stride;
    const wide maximum = static_cast<const wide*>(a.max)[row], scale = 1 / static_cast<const wide*>(a.total)[row];
    const int64_t label = a.label[row];
    const bool mine = label >= 0 && label < a.vocab;
    const wide of_label = mine ? exp_nonpositive(static_cast<wide>(x[label]) - maximum) * scale - 1 : 0;
    for (int64_t i = 0; i < a.vocab; ++i) {
      x[i] = static_cast<scalar_t>(exp_nonpositive(static_cast<wide>(x[i]) - maximum) * scale);
    }
    if (mine) x[label] = static_cast<scalar_t>(of_label);
  }
}

}  // namespace

MEGALORA_MULTIVERSION void cross_entropy_stats_rows(const CrossEntropyStats& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&](auto zero) MEGALORA_INLINE_LAMBDA { stats<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void cross_entropy_grad_rows(const CrossEntropyGrad& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&](auto zero) MEGALORA_INLINE_LAMBDA { grad<decltype(zero)>(a, begin, end); });
}

}  // namespace megalora
