// Stateless dropout on the CPU: the bits of megalora/ops/dropout.py, which defines them.
//
// Each element depends on its own token and feature alone, so results are the same for any number of threads and any
// split of the features. Products and sums are rounded one after the other (setup.py forbids their contraction to fma).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>

#include "common.h"
#include "mask.h"

namespace megalora {
namespace {

constexpr int64_t kTile = 1024;              // features drawn at a time into a 2 KiB buffer
constexpr int64_t kElementsPerTask = 16384;  // below this (about 10 us of work) another thread does not pay

// `rows` of `features` elements, and a token for each row.
struct Rows {
  const void* in;
  int64_t in_stride;
  void* out;
  int64_t out_stride;
  int64_t features;
  const int64_t* token;
  at::ScalarType dtype;
};

template <bool accumulate, typename scalar_t>
MEGALORA_INLINE void mask_row(scalar_t* out, const scalar_t* in, const lane_t* lanes, int64_t n, const Mask& mask) {
  using arithmetic_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  const auto scale = static_cast<arithmetic_t>(mask.scale);
  const auto threshold = static_cast<uint16_t>(mask.threshold);
  for (int64_t i = 0; i < n; ++i) {
    const arithmetic_t product = static_cast<arithmetic_t>(in[i]) * scale;
    const arithmetic_t before = accumulate ? static_cast<arithmetic_t>(out[i]) : 0;
    const arithmetic_t kept = accumulate ? before + product : product;
    out[i] = static_cast<scalar_t>(lanes[i] >= threshold ? kept : before);
  }
}

template <bool accumulate, typename scalar_t>
MEGALORA_INLINE void mask_rows_of(const Rows& rows, const Mask& mask, int64_t begin, int64_t end) {
  alignas(64) uint32_t words[words_for(kTile)];
  for (int64_t row = begin; row < end; ++row) {
    const auto* in = static_cast<const scalar_t*>(rows.in) + row * rows.in_stride;
    auto* out = static_cast<scalar_t*>(rows.out) + row * rows.out_stride;
    for (int64_t feature = 0; feature < rows.features; feature += kTile) {
      const int64_t n = std::min(rows.features - feature, kTile);
      const lane_t* lanes = draw_lanes(words, rows.token[row], feature, n, mask);
      mask_row<accumulate>(out + feature, in + feature, lanes, n, mask);
    }
  }
}

template <bool accumulate>
MEGALORA_INLINE void mask_rows(const Rows& rows, const Mask& mask, int64_t begin, int64_t end) {
  switch (rows.dtype) {
    case at::kFloat: return mask_rows_of<accumulate, float>(rows, mask, begin, end);
    case at::kDouble: return mask_rows_of<accumulate, double>(rows, mask, begin, end);
    case at::kBFloat16: return mask_rows_of<accumulate, at::BFloat16>(rows, mask, begin, end);
    case at::kHalf: return mask_rows_of<accumulate, at::Half>(rows, mask, begin, end);
    default: MEGALORA_CHECK(false, "dropout of dtype ", rows.dtype);
  }
}

// GCC clones functions, not templates.
MEGALORA_MULTIVERSION void write_rows(const Rows& rows, const Mask& mask, int64_t begin, int64_t end) {
  mask_rows<false>(rows, mask, begin, end);
}

MEGALORA_MULTIVERSION void add_rows(const Rows& rows, const Mask& mask, int64_t begin, int64_t end) {
  mask_rows<true>(rows, mask, begin, end);
}

}  // namespace

Mask make_mask(int64_t seed, int64_t site, int64_t step, int64_t feature_offset, double p,
               const std::optional<at::Tensor>& live_step) {
  if (live_step) {
    MEGALORA_CHECK(live_step->scalar_type() == at::kLong && live_step->numel() == 1, "live_step: one int64");
    step = *live_step->const_data_ptr<int64_t>();
  }
  MEGALORA_CHECK(seed >= 0 && seed <= UINT32_MAX, "seed ", seed, " (fold it to 32 bits)");
  MEGALORA_CHECK(site >= 0 && site <= UINT32_MAX, "site ", site);
  MEGALORA_CHECK(step >= 0 && step <= UINT32_MAX, "step ", step);
  MEGALORA_CHECK(feature_offset >= 0, "feature_offset ", feature_offset);
  MEGALORA_CHECK(p >= 0 && std::nearbyint(p * 65536) < 65536, "p ", p);
  const double threshold = std::nearbyint(p * 65536);  // ties to even, as Python's round
  return {static_cast<uint32_t>(seed),      static_cast<uint32_t>(site), static_cast<uint32_t>(step),
          static_cast<uint32_t>(threshold), feature_offset,              65536 / (65536 - threshold)};
}

namespace {

void check_inputs(const at::Tensor& x, const at::Tensor& token_index) {
  MEGALORA_CHECK(x.dim() == 2, "got ", x.dim(), " dimensions");
  MEGALORA_CHECK(at::isFloatingType(x.scalar_type()), "got ", x.scalar_type());
  MEGALORA_CHECK(token_index.dim() == 1 && token_index.size(0) == x.size(0), token_index.sizes(), " for ", x.sizes());
  MEGALORA_CHECK(token_index.scalar_type() == at::kLong, "got ", token_index.scalar_type());
}

at::Tensor with_adjacent_features(const at::Tensor& x) { return x.stride(1) == 1 ? x : x.contiguous(); }

template <typename Function>
void for_rows(const at::Tensor& x, Function&& function) {
  if (x.numel() == 0) return;
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, kElementsPerTask / x.size(1)), function);
}

at::Tensor dropout(const at::Tensor& x_TF, const at::Tensor& token_index_T, int64_t seed, int64_t site, int64_t step,
                   int64_t feature_offset, double p, const std::optional<at::Tensor>& live_step) {
  check_inputs(x_TF, token_index_T);
  const Mask mask = make_mask(seed, site, step, feature_offset, p, live_step);
  const at::Tensor in = with_adjacent_features(x_TF), token = token_index_T.contiguous();
  at::Tensor out = at::empty(x_TF.sizes(), x_TF.options());
  const Rows rows{in.const_data_ptr(), in.stride(0), out.mutable_data_ptr(), out.stride(0), out.size(1),
                  token.const_data_ptr<int64_t>(), out.scalar_type()};
  for_rows(out, [&](int64_t begin, int64_t end) { write_rows(rows, mask, begin, end); });
  return out;
}

void dropout_add_(at::Tensor& out_TF, const at::Tensor& g_TF, const at::Tensor& token_index_T, int64_t seed,
                  int64_t site, int64_t step, int64_t feature_offset, double p,
                  const std::optional<at::Tensor>& live_step) {
  check_inputs(out_TF, token_index_T);
  MEGALORA_CHECK(g_TF.sizes() == out_TF.sizes(), g_TF.sizes(), " for ", out_TF.sizes());
  MEGALORA_CHECK(g_TF.scalar_type() == out_TF.scalar_type(), g_TF.scalar_type(), " for ", out_TF.scalar_type());
  MEGALORA_CHECK(out_TF.stride(1) == 1 || out_TF.size(1) < 2, "features must be adjacent, strides ", out_TF.strides());
  const Mask mask = make_mask(seed, site, step, feature_offset, p, live_step);
  const at::Tensor in = with_adjacent_features(g_TF), token = token_index_T.contiguous();
  const Rows rows{in.const_data_ptr(), in.stride(0), out_TF.mutable_data_ptr(), out_TF.stride(0), out_TF.size(1),
                  token.const_data_ptr<int64_t>(), out_TF.scalar_type()};
  for_rows(out_TF, [&](int64_t begin, int64_t end) { add_rows(rows, mask, begin, end); });
}

at::Tensor dropout_meta(const at::Tensor& x_TF, const at::Tensor&, int64_t, int64_t, int64_t, int64_t, double,
                        const std::optional<at::Tensor>&) {
  return at::empty_symint(x_TF.sym_sizes(), x_TF.options());
}

void dropout_add_meta_(at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t, int64_t, double,
                       const std::optional<at::Tensor>&) {}

}  // namespace

TORCH_LIBRARY_IMPL(megalora, CPU, m) {
  m.impl("dropout", &dropout);
  m.impl("dropout_add_", &dropout_add_);
}

TORCH_LIBRARY_IMPL(megalora, Meta, m) {
  m.impl("dropout", &dropout_meta);
  m.impl("dropout_add_", &dropout_add_meta_);
}

}  // namespace megalora
