// Softmax cross entropy of rows of logits, statistics and gradient, on the CPU.
#include <limits>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/exp.h"

namespace megalora::cpu {
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
MEGALORA_INLINE void stats(const CrossEntropyStatsParams& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  auto* out = static_cast<wide*>(a.stats);
  for (int64_t row = begin; row < end; ++row) {
    const auto* x = static_cast<const scalar_t*>(a.logits.data) + row * a.logits.stride;
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
MEGALORA_INLINE void grad(const CrossEntropyGradParams& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  for (int64_t row = begin; row < end; ++row) {
    auto* x = static_cast<scalar_t*>(a.logits.data) + row * a.logits.stride;
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

MEGALORA_MULTIVERSION void stats_rows(const CrossEntropyStatsParams& a, int64_t begin, int64_t end) {
  dispatch(a.type, [&](auto zero) MEGALORA_INLINE_LAMBDA { stats<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void grad_rows(const CrossEntropyGradParams& a, int64_t begin, int64_t end) {
  dispatch(a.type, [&](auto zero) MEGALORA_INLINE_LAMBDA { grad<decltype(zero)>(a, begin, end); });
}

void check_labels(const Tensor& label, int64_t rows) {
  MEGALORA_CHECK(label.scalar_type() == at::kLong && label.is_contiguous(), "label: contiguous int64");
  MEGALORA_CHECK(label.numel() == rows, label.sizes(), " for ", rows, " rows");
}

}  // namespace

void cross_entropy_stats_(const Tensor& logits, const Tensor& label, const Tensor& stats, double scale,
                          double softcap) {
  MEGALORA_CHECK(scale == 1 && softcap == 0, "scale ", scale, ", softcap ", softcap, ": on CUDA alone");
  MEGALORA_CHECK(logits.dim() == 2 && logits.size(1) > 0, logits.sizes());
  check_rows(logits, logits);
  check_labels(label, logits.size(0));
  check_wide(stats, 3 * logits.size(0), logits);
  CrossEntropyStatsParams params{};
  params.logits = matrix_of(logits);
  params.label = label.const_data_ptr<int64_t>();
  params.stats = stats.mutable_data_ptr();
  params.rows = logits.size(0);
  params.vocab = logits.size(1);
  params.type = type_of(logits);
  for_rows(stats_rows, params, params.rows, params.vocab);
}

void cross_entropy_grad_(const Tensor& logits, const Tensor& label, const Tensor& max, const Tensor& total,
                         double scale, double softcap) {
  MEGALORA_CHECK(scale == 1 && softcap == 0, "scale ", scale, ", softcap ", softcap, ": on CUDA alone");
  MEGALORA_CHECK(logits.dim() == 2, logits.sizes());
  check_rows(logits, logits);
  check_labels(label, logits.size(0));
  check_wide(max, logits.size(0), logits);
  check_wide(total, logits.size(0), logits);
  CrossEntropyGradParams params{};
  params.logits = matrix_of(logits);
  params.label = label.const_data_ptr<int64_t>();
  params.max = max.const_data_ptr();
  params.total = total.const_data_ptr();
  params.rows = logits.size(0);
  params.vocab = logits.size(1);
  params.type = type_of(logits);
  for_rows(grad_rows, params, params.rows, params.vocab);
}

}  // namespace megalora::cpu
