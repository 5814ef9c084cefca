// Stateless dropout on the CPU: the bits of megalora/ops/dropout.py, which defines them.
//
// Each element depends on its own token and feature alone, so results are the same for any number of threads and any
// split of the features. Products and sums are rounded one after the other (setup.py forbids their contraction to fma).
#include <ATen/ops/empty.h>

#include <algorithm>
#include <type_traits>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace megalora::cpu {
namespace {

constexpr int64_t kTile = 1024;  // features drawn at a time into a 2 KiB buffer

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
MEGALORA_INLINE void mask_rows_of(const DropoutParams& a, int64_t begin, int64_t end) {
  alignas(64) uint32_t words[words_for(kTile)];
  for (int64_t row = begin; row < end; ++row) {
    const auto* in = static_cast<const scalar_t*>(a.in.data) + row * a.in.stride;
    auto* out = static_cast<scalar_t*>(a.out.data) + row * a.out.stride;
    for (int64_t feature = 0; feature < a.features; feature += kTile) {
      const int64_t n = std::min(a.features - feature, kTile);
      const lane_t* lanes = draw_lanes(words, a.mask.token[row], feature, n, a.mask);
      mask_row<accumulate>(out + feature, in + feature, lanes, n, a.mask);
    }
  }
}

template <bool accumulate>
MEGALORA_INLINE void mask_rows(const DropoutParams& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case Type::float32: return mask_rows_of<accumulate, float>(a, begin, end);
    case Type::float64: return mask_rows_of<accumulate, double>(a, begin, end);
    case Type::bfloat16: return mask_rows_of<accumulate, at::BFloat16>(a, begin, end);
    case Type::float16: return mask_rows_of<accumulate, at::Half>(a, begin, end);
  }
}

// GCC clones functions, not templates.
MEGALORA_MULTIVERSION void write_rows(const DropoutParams& a, int64_t begin, int64_t end) {
  mask_rows<false>(a, begin, end);
}

MEGALORA_MULTIVERSION void add_rows(const DropoutParams& a, int64_t begin, int64_t end) {
  mask_rows<true>(a, begin, end);
}

// out (+)= mask * scale * in, for inputs whose features may lie apart.
void dropout_into(bool accumulate, const Tensor& out, const Tensor& x, MaskArguments mask) {
  MEGALORA_CHECK(x.dim() == 2, "got ", x.dim(), " dimensions");
  MEGALORA_CHECK(at::isFloatingType(x.scalar_type()), "got ", x.scalar_type());
  const Tensor in = x.stride(1) == 1 ? x : x.contiguous();
  mask.token_index = mask.token_index.contiguous();
  DropoutParams params{};
  params.in = matrix_of(in);
  params.out = matrix_of(out);
  params.mask = make_mask(mask, x);
  params.tokens = x.size(0);
  params.features = x.size(1);
  params.accumulate = accumulate;
  params.type = type_of(x);
  for_rows(accumulate ? add_rows : write_rows, params, params.tokens, params.features);
}

}  // namespace

Tensor dropout(const Tensor& x_TF, const MaskArguments& mask) {
  Tensor out = at::empty(x_TF.sizes(), x_TF.options());
  dropout_into(false, out, x_TF, mask);
  return out;
}

void dropout_add_(const Tensor& out_TF, const Tensor& g_TF, const MaskArguments& mask) {
  MEGALORA_CHECK(g_TF.sizes() == out_TF.sizes(), g_TF.sizes(), " for ", out_TF.sizes());
  MEGALORA_CHECK(g_TF.scalar_type() == out_TF.scalar_type(), g_TF.scalar_type(), " for ", out_TF.scalar_type());
  MEGALORA_CHECK(out_TF.dim() == 2, "got ", out_TF.dim(), " dimensions");
  MEGALORA_CHECK(out_TF.stride(1) == 1 || out_TF.size(1) < 2, "features must be adjacent, strides ", out_TF.strides());
  dropout_into(true, out_TF, g_TF, mask);
}

}  // namespace megalora::cpu
