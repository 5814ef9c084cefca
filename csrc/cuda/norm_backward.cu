// The backward pass of norm.cu.
#include "cuda/norm_rows.h"

namespace megalora {
namespace {

struct NormBackwardArguments {
  NormBackwardParams params;
  Draw draw;
  float scale;
};

// ddelta of a row, where `grad` is what norm(delta) gets; delta is read again.
template <typename T, typename Shape, NormKind kind>
__device__ __forceinline__ void norm_addend_backward(Vector<T> (&grad)[Shape::held], const NormBackwardParams& params,
                                                     const RowPlace<T, Shape>& at, float* scratch) {
  constexpr int each = Vector<T>::size;
  const NormWeight<T, kind> weight(params.addend.norm);
  const float r = static_cast<const float*>(params.addend.inverse)[at.row];
  Vector<T> delta[Shape::held];
  float dot = 0;
#pragma unroll
  for (int h = 0; h < Shape::held; ++h) {
    if (at.element(h) >= params.size) continue;
    delta[h] = load(static_cast<const T*>(params.addend.delta) + at.row * params.size + at.element(h));
    const auto w = weight.read(at.element(h));
#pragma unroll
    for (int j = 0; j < each; ++j) {
      dot += to_float(grad[h].at[j]) * weight.of(w.at[j]) * to_float(delta[h].at[j]) * r;
    }
  }
  const float mean = row_sum<Shape::threads>(dot, scratch) / static_cast<float>(params.size);
#pragma unroll
  for (int h = 0; h < Shape::held; ++h) {
    if (at.element(h) >= params.size) continue;
    repack(grad[h]), repack(delta[h]);
    const auto w = weight.read(at.element(h));
    Vector<T> out;
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const float dn = to_float(grad[h].at[j]) * weight.of(w.at[j]);
      out.at[j] = from_float<T>(r * (dn - to_float(delta[h].at[j]) * r * mean));
    }
    store(static_cast<T*>(params.ddelta) + at.row * params.size + at.element(h), out);
  }
}

template <typename T, typename Shape, NormKind kind, NormKind before>
__global__ void __launch_bounds__(Shape::block, Shape::blocks_per_sm)
    norm_backward_kernel(const __grid_constant__ NormBackwardArguments arguments) {
  constexpr int each = Vector<T>::size, held = Shape::held;
  constexpr bool centred = kind == NormKind::layer;
  __shared__ float2 scratch[32];
  const NormBackwardParams& params = arguments.params;
  const NormWeight<T, kind> weight(params.norm);
  const auto* residual = static_cast<const T*>(params.residual);
  const int64_t size = params.size;
  const RowPlace<T, Shape> at;
  if (at.row >= params.rows) return;
  const auto* statistics = static_cast<const float*>(params.statistics);
  const float r = statistics[at.row], mean = centred ? statistics[params.rows + at.row] : 0.f;
  constexpr bool early = held <= 4;  // read the residual before the sums meet; else registers do not suffice
  Vector<T> xs[held], ds[held], residuals[early ? held : 1];
  float2 sums = {0, 0};  // of dn times what is normed, and of dn, with dn = dy w
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t element = at.element(h);
    if (element >= size) continue;
    xs[h] = load(static_cast<const T*>(params.x.data) + at.row * params.x.stride + element);
    ds[h] = load(static_cast<const T*>(params.dy.data) + at.row * params.dy.stride + element);
    if (early && residual != nullptr) residuals[h] = load(residual + at.row * size + element);
    const auto w = weight.read(element);
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const float dn = to_float(ds[h].at[j]) * weight.of(w.at[j]);
      sums.x += dn * (to_float(xs[h].at[j]) - mean) * r;
      if (centred) sums.y += dn;
    }
  }
  if constexpr (centred) {
    sums = row_sum<Shape::threads>(sums, scratch);
  } else {
    sums.x = row_sum<Shape::threads>(sums.x, reinterpret_cast<float*>(scratch));
  }
  const float along = sums.x / static_cast<float>(size), level = sums.y / static_cast<float>(size);
  const AddendFactors<T> factors(arguments.draw, arguments.scale, at.row);
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t element = at.element(h);
    if (element >= size) continue;
    repack(xs[h]), repack(ds[h]);
    const auto w = weight.read(element);
    Vector<T> more, out;
    if constexpr (early) {
      more = residuals[h];
    } else {
      if (residual != nullptr) more = load(residual + at.row * size + element);
    }
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const float dn = to_float(ds[h].at[j]) * weight.of(w.at[j]);
      float d = r * ((centred ? dn - level : dn) - (to_float(xs[h].at[j]) - mean) * r * along);
      if (residual != nullptr) d += to_float(more.at[j]);
      out.at[j] = from_float<T>(d);
    }
    store(static_cast<T*>(params.dx) + at.row * size + element, out);
    if (params.ddelta == nullptr) continue;
    factors.backward(out, element);
    if constexpr (before == NormKind::none) {
      store(static_cast<T*>(params.ddelta) + at.row * size + element, out);
    } else {
      ds[h] = out;
    }
  }
  if constexpr (before != NormKind::none) {
    if (params.ddelta == nullptr) return;
    norm_addend_backward<T, Shape, before>(ds, params, at, reinterpret_cast<float*>(scratch));
  }
}

}  // namespace

void launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream) {
  const NormBackwardArguments arguments{params, make_draw(params.addend.mask), static_cast<float>(params.addend.scale)};
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    with_row_shape<T>(params.size, [&](auto shape) {
      using Shape = decltype(shape);
      with_kinds<T>(params.norm.kind, params.addend.norm.kind, [&](auto kind, auto before) {
        norm_backward_kernel<T, Shape, decltype(kind)::value, decltype(before)::value>
            <<<blocks_for(params.rows, Shape::block / Shape::threads), Shape::block, 0, stream>>>(arguments);
      });
    });
  });
}

}  // namespace megalora
