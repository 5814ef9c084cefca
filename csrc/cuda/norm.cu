// RMSNorm and LayerNorm, alone or of the sum with what is added to the residual stream before them.
#include "cuda/decode_step.h"
#include "cuda/norm_rows.h"

namespace megalora {
namespace {

struct NormArguments {
  NormParams params;
  Draw draw;
  float eps, addend_eps, scale;  // in the type of the arithmetic
};

// norm(delta) of a row, in the place of delta.
template <typename T, typename Shape, NormKind kind>
__device__ __forceinline__ void norm_addend(Vector<T> (&delta)[Shape::held], const NormArguments& arguments,
                                            const RowPlace<T, Shape>& at, float* scratch) {
  constexpr int each = Vector<T>::size;
  const NormParams& params = arguments.params;
  const NormWeight<T, kind> weight(params.addend.norm);
  float squares = 0;
#pragma unroll
  for (int h = 0; h < Shape::held; ++h) {
    if (at.element(h) >= params.size) continue;
    delta[h] = load(static_cast<const T*>(params.addend.delta) + at.row * params.size + at.element(h));
#pragma unroll
    for (int j = 0; j < each; ++j) squares += to_float(delta[h].at[j]) * to_float(delta[h].at[j]);
  }
  const float mean = row_sum<Shape::threads>(squares, scratch) / static_cast<float>(params.size);
  const float r = rsqrtf(mean + arguments.addend_eps);
  if (at.lane == 0) static_cast<float*>(params.addend.inverse)[at.row] = r;
#pragma unroll
  for (int h = 0; h < Shape::held; ++h) {
    if (at.element(h) >= params.size) continue;
    const auto w = weight.read(at.element(h));
#pragma unroll
    for (int j = 0; j < each; ++j) delta[h].at[j] = weight.product(w.at[j], to_float(delta[h].at[j]) * r);
  }
}

// kind: of the norm; before: of the addend's own.
template <typename T, typename Shape, NormKind kind, NormKind before>
__global__ void __launch_bounds__(Shape::block) norm_kernel(const __grid_constant__ NormArguments arguments) {
  let_next_start();
  await_previous();
  constexpr int each = Vector<T>::size, held = Shape::held;
  __shared__ float scratch[32];
  const NormParams& params = arguments.params;
  const int64_t size = params.size;
  const RowPlace<T, Shape> at;
  if (at.row >= params.rows) return;  // whole warps only: a block of one row never gets here
  const bool adds = params.addend.delta != nullptr;
  Vector<T> kept[held], delta[held];
#pragma unroll
  for (int h = 0; h < held; ++h) {  // all loads before the first store, which they may not pass
    const int64_t element = at.element(h);
    if (element >= size) continue;
    kept[h] = load(static_cast<const T*>(params.x.data) + at.row * params.x.stride + element);
    if (before == NormKind::none && adds) {
      delta[h] = load(static_cast<const T*>(params.addend.delta) + at.row * size + element);
    }
  }
  if constexpr (before != NormKind::none) norm_addend<T, Shape, before>(delta, arguments, at, scratch);
  const AddendFactors<T> factors(arguments.draw, arguments.scale, at.row);
  float total = 0;  // of squares, or of LayerNorm of the row
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t element = at.element(h);
    if (element >= size) continue;
    if (adds) {
      factors.forward(delta[h], element);
#pragma unroll
      for (int j = 0; j < each; ++j) kept[h].at[j] = from_float<T>(to_float(kept[h].at[j]) + to_float(delta[h].at[j]));
      store(static_cast<T*>(params.sum) + at.row * size + element, kept[h]);
    }
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const float x = to_float(kept[h].at[j]);
      total += kind == NormKind::layer ? x : x * x;
    }
  }
  float mean = row_sum<Shape::threads>(total, scratch) / static_cast<float>(size), variance = mean;
  if constexpr (kind == NormKind::layer) {
    total = 0;
#pragma unroll
    for (int h = 0; h < held; ++h) {
      if (at.element(h) >= size) continue;
#pragma unroll
      for (int j = 0; j < each; ++j) total += (to_float(kept[h].at[j]) - mean) * (to_float(kept[h].at[j]) - mean);
    }
    variance = row_sum<Shape::threads>(total, scratch) / static_cast<float>(size);
  }
  const float r = rsqrtf(variance + arguments.eps);
  if (at.lane == 0) {
    static_cast<float*>(params.statistics)[at.row] = r;
    if (kind == NormKind::layer) static_cast<float*>(params.statistics)[params.rows + at.row] = mean;
  }
  const NormWeight<T, kind> weight(params.norm);
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t element = at.element(h);
    if (element >= size) continue;
    const auto w = weight.read(element);
    Vector<T> out, b;
    if constexpr (kind == NormKind::layer) {
      if (weight.bias != nullptr) b = load(weight.bias + element);
    }
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const float x = to_float(kept[h].at[j]);
      if constexpr (kind == NormKind::layer) {
        const float y = (x - mean) * r * weight.of(w.at[j]);
        out.at[j] = from_float<T>(weight.bias == nullptr ? y : y + to_float(b.at[j]));
      } else {
        out.at[j] = weight.product(w.at[j], x * r);
      }
    }
    store(static_cast<T*>(params.y.data) + at.row * params.y.stride + element, out);
  }
}

}  // namespace

void launch_norm(const NormParams& params, cudaStream_t stream) {
  const NormArguments arguments{params, make_draw(params.addend.mask), static_cast<float>(params.norm.eps),
                                static_cast<float>(params.addend.norm.eps), static_cast<float>(params.addend.scale)};
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    with_row_shape<T>(params.size, [&](auto shape) {
      using Shape = decltype(shape);
      with_kinds<T>(params.norm.kind, params.addend.norm.kind, [&](auto kind, auto before) {
        launch_following(norm_kernel<T, Shape, decltype(kind)::value, decltype(before)::value>,
                         dim3(blocks_for(params.rows, Shape::block / Shape::threads)), Shape::block, params.rows,
                         stream, arguments);
      });
    });
  });
}

}  // namespace megalora
