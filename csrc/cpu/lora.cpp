// The skinny products of a LoRA branch on the CPU. Each draws its mask into a buffer that stays in the cache, applies
// it to a tile of tokens there, and multiplies from there: x is read once, and nothing that is as large is written.
//
// The order of every sum is fixed by the sizes alone: lanes of a vector, chunks of the features, segments of the
// tokens.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"
#include "cpu/outer.h"
#include "lora_params.h"

namespace megalora::cpu {
namespace {

constexpr int64_t kTileTokens = 16;
constexpr int64_t kLoraChunk = 512;  // of the features

// parts [segments, R, padded(F)] wide: dz^T dropout(x) of each segment of the tokens, unscaled. A task is a segment and
// a chunk of the features.
struct WeightGradTasks {
  LoraWeightGradParams grad;
  void* parts;
  int64_t segment;  // tokens
};

// out [R, F] wide (or [F, R] if transposed) = factor * the sum of the parts, in their order. Rows are those of the
// parts.
struct SumParts {
  const void* parts;
  void* out;
  int64_t segments, rows, features;
  double factor;
  bool transposed;
  Type type;
};

// A tile of tokens, a chunk of the features each, wide.
template <typename wide>
struct Tile {
  alignas(64) wide at[kTileTokens][kLoraChunk];
};

// out = x where kept, 0 where dropped, not scaled; zeros up to the next whole vector.
template <typename scalar_t>
MEGALORA_INLINE void dropped(wide_t<scalar_t>* out, const scalar_t* x, int64_t token, int64_t feature, int64_t n,
                             const Mask& mask) {
  using wide = wide_t<scalar_t>;
  if (mask.threshold == 0) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<wide>(x[i]);
  } else {
    alignas(64) uint32_t words[words_for(kLoraChunk)];
    const lane_t* lanes = draw_lanes(words, token, feature, n, mask);
    const auto threshold = static_cast<uint16_t>(mask.threshold);
    for (int64_t i = 0; i < n; ++i) out[i] = lanes[i] >= threshold ? static_cast<wide>(x[i]) : 0;
  }
  for (int64_t i = n; i < padded(n); ++i) out[i] = 0;
}

// ---- down

// sums[t][r] += x_t . A_r over a chunk of n features, for `tokens` rows of a tile and `ranks` rows of A.
template <int tokens, int ranks, typename wide>
MEGALORA_INLINE void dot_block(const Tile<wide>& tile, int64_t first_token, const wide* A, int64_t A_stride, int64_t n,
                               wide* sums, int64_t sums_stride) {
  using vector = typename Vector<wide>::type;
  constexpr int64_t size = Vector<wide>::size;
  vector lanes[tokens][ranks] = {};
  for (int64_t i = 0; i < n; i += size) {
    vector x[tokens], a[ranks];
    for (int t = 0; t < tokens; ++t) load<wide>(x[t], tile.at[first_token + t] + i);
    for (int r = 0; r < ranks; ++r) load<wide>(a[r], A + r * A_stride + i);
    for (int t = 0; t < tokens; ++t) {
      for (int r = 0; r < ranks; ++r) lanes[t][r] += x[t] * a[r];
    }
  }
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < ranks; ++r) {
      wide numbers[size];
      std::memcpy(numbers, &lanes[t][r], sizeof numbers);
      sums[t * sums_stride + r] += add_halves(numbers, size);
    }
  }
}

template <int tokens, typename wide>
MEGALORA_INLINE void dots(const Tile<wide>& tile, int64_t token, const wide* A, int64_t A_stride, int64_t n, wide* sums,
                          int64_t rank) {
  int64_t r = 0;
  for (; r + 4 <= rank; r += 4) dot_block<tokens, 4>(tile, token, A + r * A_stride, A_stride, n, sums + r, rank);
  for (; r < rank; ++r) dot_block<tokens, 1>(tile, token, A + r * A_stride, A_stride, n, sums + r, rank);
}

template <typename scalar_t>
MEGALORA_INLINE void down(const LoraDownParams& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  const int64_t features = a.features, rank = a.rank, A_stride = padded(features);
  const auto* A = static_cast<const wide*>(a.A);
  const auto scale = static_cast<wide>(a.mask.scale);
  Tile<wide> tile;
  std::vector<wide> sums(kTileTokens * rank);
  for (int64_t first = begin; first < end; first += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, end - first);
    std::fill(sums.begin(), sums.end(), wide{0});
    for (int64_t feature = 0; feature < features; feature += kLoraChunk) {
      const int64_t n = std::min(kLoraChunk, features - feature);
      for (int64_t t = 0; t < tokens; ++t) {
        const auto* x = static_cast<const scalar_t*>(a.x.data) + (first + t) * a.x.stride + feature;
        dropped<scalar_t>(tile.at[t], x, a.mask.token[first + t], feature, n, a.mask);
      }
      int64_t t = 0;
      for (; t + 2 <= tokens; t += 2) dots<2>(tile, t, A + feature, A_stride, padded(n), sums.data() + t * rank, rank);
      for (; t < tokens; ++t) dots<1>(tile, t, A + feature, A_stride, padded(n), sums.data() + t * rank, rank);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      auto* z = static_cast<scalar_t*>(a.z.data) + (first + t) * a.z.stride;
      for (int64_t r = 0; r < rank; ++r) z[r] = static_cast<scalar_t>(sums[t * rank + r] * scale);
      for (int64_t r = rank; r < a.z_columns; ++r) z[r] = static_cast<scalar_t>(0.f);
    }
  }
}

// ---- the gradients

// The rows [first, first + tokens) of dz [T, R], wide.
template <typename scalar_t>
MEGALORA_INLINE void widen(wide_t<scalar_t>* out, const Matrix& dz, int64_t first, int64_t tokens, int64_t rank) {
  for (int64_t t = 0; t < tokens; ++t) {
    const auto* row = static_cast<const scalar_t*>(dz.data) + (first + t) * dz.stride;
    for (int64_t r = 0; r < rank; ++r) out[t * rank + r] = static_cast<wide_t<scalar_t>>(row[r]);
  }
}

template <typename scalar_t>
MEGALORA_INLINE void input_grad(const LoraInputGradParams& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  const int64_t features = a.features, rank = a.rank, A_stride = padded(features);
  const auto* A = static_cast<const wide*>(a.A);
  const auto scale = static_cast<wide>(a.mask.scale);
  const auto threshold = static_cast<uint16_t>(a.mask.threshold);
  Tile<wide> tile;
  std::vector<wide> dz(kTileTokens * rank);
  alignas(64) uint32_t words[words_for(kLoraChunk)] = {};
  for (int64_t first = begin; first < end; first += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, end - first);
    widen<scalar_t>(dz.data(), a.dz, first, tokens, rank);
    for (int64_t feature = 0; feature < features; feature += kLoraChunk) {
      const int64_t n = std::min(kLoraChunk, features - feature);
      outer(tile.at[0], kLoraChunk, tokens, {dz.data(), 1, rank}, A + feature, A_stride, rank, padded(n), false);
      for (int64_t t = 0; t < tokens; ++t) {
        auto* dx = static_cast<scalar_t*>(a.dx.data) + (first + t) * a.dx.stride + feature;
        wide* g = tile.at[t];
        const lane_t* lanes = reinterpret_cast<const lane_t*>(words);  // all are kept where threshold is 0
        if (threshold != 0) lanes = draw_lanes(words, a.mask.token[first + t], feature, n, a.mask);
        for (int64_t i = 0; i < n; ++i) {
          const wide before = static_cast<wide>(dx[i]), sum = before + g[i] * scale;
          g[i] = lanes[i] >= threshold ? sum : before;
        }
        narrow(dx, g, n);
      }
    }
  }
}

template <typename scalar_t>
MEGALORA_INLINE void weight_grad(const WeightGradTasks& tasks, int64_t begin, int64_t end) {
  const LoraWeightGradParams& a = tasks.grad;
  using wide = wide_t<scalar_t>;
  const int64_t features = a.features, rank = a.rank, stride = padded(features);
  const int64_t chunks = (features + kLoraChunk - 1) / kLoraChunk;
  Tile<wide> tile;
  std::vector<wide> dz(kTileTokens * rank);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t segment = task / chunks, feature = task % chunks * kLoraChunk;
    const int64_t n = std::min(kLoraChunk, features - feature);
    const int64_t from = segment * tasks.segment, to = std::min(from + tasks.segment, a.tokens);
    wide* out = static_cast<wide*>(tasks.parts) + segment * rank * stride + feature;
    for (int64_t first = from; first < to; first += kTileTokens) {
      const int64_t tokens = std::min(kTileTokens, to - first);
      widen<scalar_t>(dz.data(), a.dz, first, tokens, rank);
      for (int64_t t = 0; t < tokens; ++t) {
        const auto* x = static_cast<const scalar_t*>(a.x.data) + (first + t) * a.x.stride + feature;
        const int64_t token = a.mask.threshold == 0 ? 0 : a.mask.token[first + t];
        dropped<scalar_t>(tile.at[t], x, token, feature, n, a.mask);
      }
      outer(out, stride, rank, {dz.data(), rank, 1}, tile.at[0], kLoraChunk, tokens, padded(n), first != from);
    }
  }
}

template <typename wide>
MEGALORA_INLINE void sum_parts(const SumParts& a, int64_t begin, int64_t end) {
  const int64_t stride = padded(a.features);
  const auto factor = static_cast<wide>(a.factor);
  std::vector<wide> total(a.features);
  for (int64_t row = begin; row < end; ++row) {
    std::fill(total.begin(), total.end(), wide{0});
    for (int64_t segment = 0; segment < a.segments; ++segment) {
      const wide* part = static_cast<const wide*>(a.parts) + (segment * a.rows + row) * stride;
      for (int64_t i = 0; i < a.features; ++i) total[i] += part[i];
    }
    auto* out = static_cast<wide*>(a.out) + (a.transposed ? row : row * a.features);
    const int64_t step = a.transposed ? a.rows : 1;
    for (int64_t i = 0; i < a.features; ++i) out[i * step] = total[i] * factor;
  }
}

MEGALORA_MULTIVERSION void down_rows(const LoraDownParams& a, int64_t begin, int64_t end) {
  dispatch(a.type, [&](auto zero) MEGALORA_INLINE_LAMBDA { down<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void input_grad_rows(const LoraInputGradParams& a, int64_t begin, int64_t end) {
  dispatch(a.type, [&](auto zero) MEGALORA_INLINE_LAMBDA { input_grad<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void weight_grad_tasks(const WeightGradTasks& a, int64_t begin, int64_t end) {
  dispatch(a.grad.type, [&](auto zero) MEGALORA_INLINE_LAMBDA { weight_grad<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void sum_parts_rows(const SumParts& a, int64_t begin, int64_t end) {
  dispatch(a.type, [&](auto zero) MEGALORA_INLINE_LAMBDA { sum_parts<wide_t<decltype(zero)>>(a, begin, end); });
}

// ---- ops

// A [R, F] as the kernels read it (LoraParams).
Tensor padded_A(const Tensor& A, const Tensor& x) {
  MEGALORA_CHECK(x.dim() == 2, x.sizes());
  MEGALORA_CHECK(A.dim() == 2 && A.size(1) == x.size(1), A.sizes(), " for ", x.sizes());
  MEGALORA_CHECK(A.scalar_type() == x.scalar_type(), A.scalar_type(), " for ", x.scalar_type());
  Tensor out = at::zeros({A.size(0), padded(A.size(1))}, A.options().dtype(wide_type(A)));
  out.narrow(1, 0, A.size(1)).copy_(A);
  return out;
}

// What every LoRA kernel takes of x [T, F], but A.
void fill(LoraParams& params, const Tensor& x, int64_t rank) {
  check_rows(x, x);
  params.tokens = x.size(0);
  params.features = x.size(1);
  params.rank = rank;
  params.type = type_of(x);
}

constexpr int64_t kSegments = 8;  // into which the tokens of a sum over them are cut, at most
constexpr int64_t kSmallestSegment = 128;

// params.scaling * dz [T, R]^T dropout(x [T, F]), where the mask and its scale are in params already.
Tensor weight_grad_of(LoraWeightGradParams& params, const Tensor& dz, const Tensor& x) {
  fill(params, x, dz.size(1));
  check_matrix(dz, {params.tokens, params.rank}, x);
  params.dz = matrix_of(dz);
  params.x = matrix_of(x);
  const int64_t rank = params.rank, tokens = params.tokens, features = params.features;
  const auto options = x.options().dtype(wide_type(x));
  const int64_t segment = std::max(kSmallestSegment, (tokens + kSegments - 1) / kSegments);
  const int64_t segments = (tokens + segment - 1) / segment;
  const Tensor parts = at::empty({segments, rank, padded(features)}, options);
  const WeightGradTasks tasks{params, parts.mutable_data_ptr(), segment};
  const int64_t chunks = (features + kLoraChunk - 1) / kLoraChunk;
  for_rows(weight_grad_tasks, tasks, segments * chunks, segment * kLoraChunk);
  Tensor out = params.transposed ? at::empty({features, rank}, options) : at::empty({rank, features}, options);
  SumParts sum{};
  sum.parts = parts.const_data_ptr();
  sum.out = out.mutable_data_ptr();
  sum.segments = segments;
  sum.rows = rank;
  sum.features = features;
  sum.factor = params.scaling;
  sum.transposed = params.transposed;
  sum.type = params.type;
  for_rows(sum_parts_rows, sum, rank, features * std::max<int64_t>(1, segments));
  return out;
}

}  // namespace

void lora_down_(const Tensor& z, const Tensor& x, const Tensor& A, const MaskArguments& mask,
                const OptionalTensor& copy) {
  if (copy) copy->copy_(x);
  const Tensor wide_A = padded_A(A, x);
  LoraDownParams params{};
  fill(params, x, A.size(0));
  params.A = wide_A.const_data_ptr();
  params.mask = make_mask(mask, x);
  check_rows(z, x);
  MEGALORA_CHECK(z.dim() == 2 && z.size(0) == x.size(0) && z.size(1) >= params.rank, z.sizes(), " for rank ",
                 params.rank);
  params.x = matrix_of(x);
  params.z = matrix_of(z);
  params.z_columns = z.size(1);
  for_rows(down_rows, params, x.size(0), std::max<int64_t>(1, x.size(1)));
}

void lora_down_input_grad_(const Tensor& in_place, const Tensor& dz, const Tensor& A, const MaskArguments& mask,
                           const OptionalTensor& out) {
  const Tensor dx = out ? out->copy_(in_place) : in_place;
  const Tensor wide_A = padded_A(A, dx);
  LoraInputGradParams params{};
  fill(params, dx, A.size(0));
  params.A = wide_A.const_data_ptr();
  params.mask = make_mask(mask, dx);
  check_matrix(dz, {dx.size(0), A.size(0)}, dx);
  params.dx = matrix_of(dx);
  params.dz = matrix_of(dz);
  for_rows(input_grad_rows, params, dx.size(0), dx.size(1));
}

Tensor lora_down_weight_grad(const Tensor& dz, const Tensor& x, const MaskArguments& mask) {
  MEGALORA_CHECK(x.dim() == 2 && dz.dim() == 2, x.sizes(), " and ", dz.sizes());
  LoraWeightGradParams params{};
  params.mask = make_mask(mask, x);
  params.scaling = params.mask.scale;
  return weight_grad_of(params, dz, x);
}

Tensor lora_up_weight_grad(const Tensor& dy, const Tensor& z, double scaling) {
  MEGALORA_CHECK(dy.dim() == 2 && z.dim() == 2, dy.sizes(), " and ", z.sizes());
  LoraWeightGradParams params{};
  params.scaling = scaling;
  params.transposed = true;
  return weight_grad_of(params, z, dy);
}

}  // namespace megalora::cpu
