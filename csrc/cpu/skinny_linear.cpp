// A linear of a few rows on the CPU. Bound by reading the weight, so what counts is that all threads stream it at once.
//
// Legend: M rows, I in_features, O out_features.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "cpu/checks.h"
#include "cpu/multiversion.h"
#include "inline.h"
#include "kernel_limits.h"

namespace megalora::cpu {
namespace {

constexpr int kTogether = 4;  // outputs under way at a time: enough sums to hide the latency of an addition
constexpr int64_t kWeightsPerTask = 32768;

using v16 __attribute__((vector_size(64))) = float;

MEGALORA_INLINE void load(v16& to, const float* from) { std::memcpy(&to, from, sizeof(v16)); }

MEGALORA_INLINE void load(v16& to, const at::BFloat16* from) {
  using half_words __attribute__((vector_size(32))) = uint16_t;
  using words __attribute__((vector_size(64))) = uint32_t;
  half_words bits;
  std::memcpy(&bits, from, sizeof(bits));
  const words wide = __builtin_convertvector(bits, words) << 16;
  std::memcpy(&to, &wide, sizeof(to));
}

MEGALORA_INLINE float sum(const v16& lanes) {
  float half[8], total = 0;
  for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) half[i] += half[i + 4];
  for (int i = 0; i < 4; ++i) total += half[i];
  return total;
}

template <int M, int R, typename scalar_t>
MEGALORA_INLINE void outputs(const SkinnyLinearParams& a, int64_t first) {
  const auto* x = static_cast<const scalar_t*>(a.x.data);
  const auto* weight = static_cast<const scalar_t*>(a.weight.data) + first * a.weight.stride;
  v16 sums[R][M] = {};
  int64_t i = 0;
  for (; i + 16 <= a.in_features; i += 16) {
    v16 rows[M];
    for (int m = 0; m < M; ++m) load(rows[m], x + m * a.x.stride + i);
    for (int r = 0; r < R; ++r) {
      v16 weights;
      load(weights, weight + r * a.weight.stride + i);
      for (int m = 0; m < M; ++m) sums[r][m] += weights * rows[m];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      float total = sum(sums[r][m]);
      for (int64_t j = i; j < a.in_features; ++j) {
        total += static_cast<float>(weight[r * a.weight.stride + j]) * static_cast<float>(x[m * a.x.stride + j]);
      }
      if (a.bias != nullptr) total += static_cast<float>(static_cast<const scalar_t*>(a.bias)[first + r]);
      static_cast<scalar_t*>(a.y)[m * a.out_features + first + r] = static_cast<scalar_t>(total);
    }
  }
}

template <int M, typename scalar_t>
MEGALORA_INLINE void outputs_between(const SkinnyLinearParams& a, int64_t begin, int64_t end) {
  int64_t o = begin;
  for (; o + kTogether <= end; o += kTogether) outputs<M, kTogether, scalar_t>(a, o);
  for (; o < end; ++o) outputs<M, 1, scalar_t>(a, o);
}

template <typename scalar_t>
MEGALORA_INLINE void some_rows(const SkinnyLinearParams& a, int64_t begin, int64_t end) {
  static_assert(kMostSkinnyRows == 4);
  switch (a.rows) {
    case 1: return outputs_between<1, scalar_t>(a, begin, end);
    case 2: return outputs_between<2, scalar_t>(a, begin, end);
    case 3: return outputs_between<3, scalar_t>(a, begin, end);
    default: return outputs_between<4, scalar_t>(a, begin, end);
  }
}

MEGALORA_MULTIVERSION void linear_float(const SkinnyLinearParams& a, int64_t begin, int64_t end) {
  some_rows<float>(a, begin, end);
}

MEGALORA_MULTIVERSION void linear_bfloat16(const SkinnyLinearParams& a, int64_t begin, int64_t end) {
  some_rows<at::BFloat16>(a, begin, end);
}

}  // namespace

Tensor skinny_linear(const Tensor& x_MI, const Tensor& weight_OI, const OptionalTensor& bias_O) {
  MEGALORA_CHECK(x_MI.dim() == 2 && weight_OI.dim() == 2, x_MI.sizes(), " and ", weight_OI.sizes());
  MEGALORA_CHECK(x_MI.size(0) <= kMostSkinnyRows, x_MI.sizes());
  MEGALORA_CHECK(x_MI.size(1) == weight_OI.size(1), x_MI.sizes(), " and ", weight_OI.sizes());
  MEGALORA_CHECK(x_MI.stride(1) == 1 && weight_OI.stride(1) == 1, x_MI.strides(), " and ", weight_OI.strides());
  MEGALORA_CHECK(x_MI.scalar_type() == weight_OI.scalar_type(), x_MI.scalar_type(), " and ", weight_OI.scalar_type());
  const bool is_float = x_MI.scalar_type() == at::kFloat;
  MEGALORA_CHECK(is_float || x_MI.scalar_type() == at::kBFloat16, x_MI.scalar_type());
  Tensor bias;
  if (bias_O.has_value()) {
    bias = bias_O->contiguous();
    MEGALORA_CHECK(bias.dim() == 1 && bias.size(0) == weight_OI.size(0), bias.sizes());
    MEGALORA_CHECK(bias.scalar_type() == x_MI.scalar_type(), bias.scalar_type());
  }
  Tensor y = at::empty({x_MI.size(0), weight_OI.size(0)}, x_MI.options());
  if (y.numel() == 0) return y;
  SkinnyLinearParams params{};
  params.x = matrix_of(x_MI);
  params.weight = matrix_of(weight_OI);
  params.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  params.y = y.mutable_data_ptr();
  params.rows = x_MI.size(0);
  params.in_features = x_MI.size(1);
  params.out_features = weight_OI.size(0);
  params.type = type_of(x_MI);
  const int64_t grain = std::max<int64_t>(kTogether, kWeightsPerTask / std::max<int64_t>(1, x_MI.size(1)));
  at::parallel_for(0, params.out_features, grain, [&](int64_t begin, int64_t end) {
    (is_float ? linear_float : linear_bfloat16)(params, begin, end);
  });
  return y;
}

}  // namespace megalora::cpu
