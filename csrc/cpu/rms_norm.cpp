// RMSNorm with the residual sum before it, and its backward pass, on the CPU.
#include <algorithm>
#include <cmath>

#include "cpu/checks.h"
#include "cpu/kernels.h"

namespace megalora::cpu {
namespace {

// x times the weight plus shift. What is not precise is rounded to the tensors' type before the weight and behind it,
// as in HF.
template <bool precise, typename scalar_t>
MEGALORA_INLINE wide_t<scalar_t> product(wide_t<scalar_t> x, scalar_t weight, wide_t<scalar_t> shift) {
  using wide = wide_t<scalar_t>;
  const wide w = static_cast<wide>(weight);
  return precise ? x * (w + shift) : static_cast<wide>(static_cast<scalar_t>(x * w));
}

template <typename scalar_t, bool precise>
MEGALORA_INLINE void forward(const RmsNormParams& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  const auto* weight = static_cast<const scalar_t*>(a.weight);
  const wide shift = a.rounding.offset;
  for (int64_t row = begin; row < end; ++row) {
    const auto* x = static_cast<const scalar_t*>(a.x.data) + row * a.x.stride;
    if (a.delta != nullptr) {
      const auto* delta = static_cast<const scalar_t*>(a.delta) + row * a.size;
      auto* sum = static_cast<scalar_t*>(a.sum) + row * a.size;
      for (int64_t i = 0; i < a.size; ++i) {
        sum[i] = static_cast<scalar_t>(static_cast<wide>(x[i]) + static_cast<wide>(delta[i]));
      }
      x = sum;
    }
    wide lanes[kLanes] = {};
    const int64_t whole = a.size / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) {
        const wide value = static_cast<wide>(x[i + j]);
        lanes[j] += value * value;
      }
    }
    for (int64_t i = whole; i < a.size; ++i) {
      const wide value = static_cast<wide>(x[i]);
      lanes[i - whole] += value * value;
    }
    const wide mean = sum_lanes(lanes) / static_cast<wide>(a.size);
    const wide inverse = 1 / std::sqrt(mean + static_cast<wide>(a.eps));
    static_cast<wide*>(a.inverse)[row] = inverse;
    auto* y = static_cast<scalar_t*>(a.y.data) + row * a.y.stride;
    for (int64_t i = 0; i < a.size; ++i) {
      const wide exact = static_cast<wide>(x[i]) * inverse;
      const wide normed = precise ? exact : static_cast<wide>(static_cast<scalar_t>(exact));
      y[i] = static_cast<scalar_t>(product<precise>(normed, weight[i], shift));
    }
  }
}

template <typename scalar_t, bool precise>
MEGALORA_INLINE void backward(const RmsNormBackwardParams& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  const auto* weight = static_cast<const scalar_t*>(a.weight);
  const wide shift = a.rounding.offset;
  for (int64_t row = begin; row < end; ++row) {
    const auto* dy = static_cast<const scalar_t*>(a.dy.data) + row * a.dy.stride;
    const auto* x = static_cast<const scalar_t*>(a.x.data) + row * a.x.stride;
    const wide inverse = static_cast<const wide*>(a.inverse)[row];
    wide lanes[kLanes] = {};
    const int64_t whole = a.size / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) {
        const wide dn = product<precise>(static_cast<wide>(dy[i + j]), weight[i + j], shift);
        lanes[j] += dn * (static_cast<wide>(x[i + j]) * inverse);
      }
    }
    for (int64_t i = whole; i < a.size; ++i) {
      const wide dn = product<precise>(static_cast<wide>(dy[i]), weight[i], shift);
      lanes[i - whole] += dn * (static_cast<wide>(x[i]) * inverse);
    }
    const wide mean = sum_lanes(lanes) / static_cast<wide>(a.size);
    const auto* residual = a.residual ? static_cast<const scalar_t*>(a.residual) + row * a.size : nullptr;
    auto* dx = static_cast<scalar_t*>(a.dx) + row * a.size;
    for (int64_t first = 0; first < a.size; first += kWideChunk) {
      const int64_t n = std::min(kWideChunk, a.size - first);
      alignas(64) wide through[kWideChunk];
      for (int64_t i = 0; i < n; ++i) {
        const wide dn = product<precise>(static_cast<wide>(dy[first + i]), weight[first + i], shift);
        through[i] = (dn - static_cast<wide>(x[first + i]) * inverse * mean) * inverse;
      }
      if (residual != nullptr) {
        for (int64_t i = 0; i < n; ++i) {
          const auto rounded = static_cast<scalar_t>(through[i]);
          through[i] = static_cast<wide>(rounded) + static_cast<wide>(residual[first + i]);
        }
      }
      narrow(dx + first, through, n);
    }
  }
}

MEGALORA_MULTIVERSION void norm_rows(const RmsNormParams& a, int64_t begin, int64_t end) {
  dispatch(a.type, [&](auto zero) MEGALORA_INLINE_LAMBDA {
    a.rounding.precise ? forward<decltype(zero), true>(a, begin, end) : forward<decltype(zero), false>(a, begin, end);
  });
}

MEGALORA_MULTIVERSION void norm_backward_rows(const RmsNormBackwardParams& a, int64_t begin, int64_t end) {
  dispatch(a.type, [&](auto zero) MEGALORA_INLINE_LAMBDA {
    a.rounding.precise ? backward<decltype(zero), true>(a, begin, end) : backward<decltype(zero), false>(a, begin, end);
  });
}

}  // namespace

void rms_norm_(const Tensor& x, const OptionalTensor& delta, const Tensor& weight, double eps,
               const OptionalTensor& sum, const Tensor& y, const Tensor& inverse, bool precise, bool offset) {
  MEGALORA_CHECK(x.dim() == 2, x.sizes());
  MEGALORA_CHECK(delta.has_value() == sum.has_value(), "delta and sum go together");
  check_rows(x, x);
  check_matrix(y, x.sizes(), x);
  check_dense(weight, {x.size(1)}, x);
  check_wide(inverse, x.size(0), x);
  if (delta) {
    check_dense(*delta, x.sizes(), x);
    check_dense(*sum, x.sizes(), x);
  }
  RmsNormParams params{};
  params.x = matrix_of(x);
  params.y = matrix_of(y);
  params.delta = data_or_null(delta);
  params.weight = weight.const_data_ptr();
  params.sum = data_or_null(sum);
  params.inverse = inverse.mutable_data_ptr();
  params.eps = eps;
  params.rows = x.size(0);
  params.size = x.size(1);
  params.rounding = norm_rounding(precise, offset);
  params.type = type_of(x);
  for_rows(norm_rows, params, params.rows, params.size);
}

void rms_norm_backward_(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& inverse,
                        const OptionalTensor& residual, const Tensor& dx, bool precise, bool offset) {
  MEGALORA_CHECK(x.dim() == 2, x.sizes());
  check_rows(x, x);
  check_matrix(dy, x.sizes(), x);
  check_dense(dx, x.sizes(), x);
  check_dense(weight, {x.size(1)}, x);
  check_wide(inverse, x.size(0), x);
  if (residual) check_dense(*residual, x.sizes(), x);
  RmsNormBackwardParams params{};
  params.dy = matrix_of(dy);
  params.x = matrix_of(x);
  params.weight = weight.const_data_ptr();
  params.inverse = inverse.const_data_ptr();
  params.residual = data_or_null(residual);
  params.dx = dx.mutable_data_ptr();
  params.rows = x.size(0);
  params.size = x.size(1);
  params.rounding = norm_rounding(precise, offset);
  params.type = type_of(x);
  for_rows(norm_backward_rows, params, params.rows, params.size);
}

}  // namespace megalora::cpu
