// The skinny products of a LoRA branch on the CPU. Each draws its mask into a buffer that stays in the cache, applies it
// to a tile of tokens there, and multiplies from there: x is read once, and nothing that is as large is written.
//
// The order of every sum is fixed by the sizes alone: lanes of a vector, chunks of the features, segments of the tokens.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_kernels.h"
#include "outer.h"

namespace megalora {
namespace {

constexpr int64_t kTileTokens = 16;

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
MEGALORA_INLINE void down(const LoraDown& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  const int64_t features = a.in.features, rank = a.in.rank, A_stride = padded(features);
  const auto* A = static_cast<const wide*>(a.in.A);
  const auto scale = static_cast<wide>(a.in.mask.scale);
  Tile<wide> tile;
  std::vector<wide> sums(kTileTokens * rank);
  for (int64_t first = begin; first < end; first += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, end - first);
    std::fill(sums.begin(), sums.end(), wide{0});
    for (int64_t feature = 0; feature < features; feature += kLoraChunk) {
      const int64_t n = std::min(kLoraChunk, features - feature);
      for (int64_t t = 0; t < tokens; ++t) {
        const auto* x = static_cast<const scalar_t*>(a.x) + (first + t) * a.x_stride + feature;
        dropped<scalar_t>(tile.at[t], x, a.in.token[first + t], feature, n, a.in.mask);
      }
      int64_t t = 0;
      for (; t + 2 <= tokens; t += 2) dots<2>(tile, t, A + feature, A_stride, padded(n), sums.data() + t * rank, rank);
      for (; t < tokens; ++t) dots<1>(tile, t, A + feature, A_stride, padded(n), sums.data() + t * rank, rank);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      auto* z = static_cast<scalar_t*>(a.z) + (first + t) * a.z_stride;
      for (int64_t r = 0; r < rank; ++r) z[r] = static_cast<scalar_t>(sums[t * rank + r] * scale);
      for (int64_t r = rank; r < a.z_columns; ++r) z[r] = static_cast<scalar_t>(0.f);
    }
  }
}

// ---- the gradients

// The rows [first, first + tokens) of dz [T, R], wide.
template <typename scalar_t>
MEGALORA_INLINE void widen(wide_t<scalar_t>* out, const void* dz, int64_t dz_stride, int64_t first, int64_t tokens,
                           int64_t rank) {
  for (int64_t t = 0; t < tokens; ++t) {
    const auto* row = static_cast<const scalar_t*>(dz) + (first + t) * dz_stride;
    for (int64_t r = 0; r < rank; ++r) out[t * rank + r] = static_cast<wide_t<scalar_t>>(row[r]);
  }
}

template <typename scalar_t>
MEGALORA_INLINE void input_grad(const LoraInputGrad& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  const int64_t features = a.in.features, rank = a.in.rank, A_stride = padded(features);
  const auto* A = static_cast<const wide*>(a.in.A);
  const auto scale = static_cast<wide>(a.in.mask.scale);
  const auto threshold = static_cast<uint16_t>(a.in.mask.threshold);
  Tile<wide> tile;
  std::vector<wide> dz(kTileTokens * rank);
  alignas(64) uint32_t words[words_for(kLoraChunk)] = {};
  for (int64_t first = begin; first < end; first += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, end - first);
    widen<scalar_t>(dz.data(), a.dz, a.dz_stride, first, tokens, rank);
    for (int64_t feature = 0; feature < features; feature += kLoraChunk) {
      const int64_t n = std::min(kLoraChunk, features - feature);
      outer(tile.at[0], kLoraChunk, tokens, {dz.data(), 1, rank}, A + feature, A_stride, rank, padded(n), false);
      for (int64_t t = 0; t < tokens; ++t) {
        auto* dx = static_cast<scalar_t*>(a.dx) + (first + t) * a.dx_stride + feature;
        const wide* g = tile.at[t];
        const lane_t* lanes = reinterpret_cast<const lane_t*>(words);  // all are kept where threshold is 0
        if (threshold != 0) lanes = draw_lanes(words, a.in.token[first + t], feature, n, a.in.mask);
        for (int64_t i = 0; i < n; ++i) {
          const auto sum = static_cast<scalar_t>(static_cast<wide>(dx[i]) + g[i] * scale);
          dx[i] = lanes[i] >= threshold ? sum : dx[i];
        }
      }
    }
  }
}

template <typename scalar_t>
MEGALORA_INLINE void weight_grad(const LoraWeightGrad& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  const int64_t features = a.in.features, rank = a.in.rank, stride = padded(features);
  const int64_t chunks = (features + kLoraChunk - 1) / kLoraChunk;
  Tile<wide> tile;
  std::vector<wide> dz(kTileTokens * rank);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t segment = task / chunks, feature = task % chunks * kLoraChunk;
    const int64_t n = std::min(kLoraChunk, features - feature);
    const int64_t from = segment * a.segment, to = std::min(from + a.segment, a.tokens);
    wide* out = static_cast<wide*>(a.parts) + segment * rank * stride + feature;
    for (int64_t first = from; first < to; first += kTileTokens) {
      const int64_t tokens = std::min(kTileTokens, to - first);
      widen<scalar_t>(dz.data(), a.dz, a.dz_stride, first, tokens, rank);
      for (int64_t t = 0; t < tokens; ++t) {
        const auto* x = static_cast<const scalar_t*>(a.x) + (first + t) * a.x_stride + feature;
        const int64_t token = a.in.mask.threshold == 0 ? 0 : a.in.token[first + t];
        dropped<scalar_t>(tile.at[t], x, token, feature, n, a.in.mask);
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

}  // namespace

MEGALORA_MULTIVERSION void lora_down_rows(const LoraDown& a, int64_t begin, int64_t end) {
  dispatch(a.in.dtype, [&](auto zero) MEGALORA_INLINE_LAMBDA { down<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void lora_input_grad_rows(const LoraInputGrad& a, int64_t begin, int64_t end) {
  dispatch(a.in.dtype, [&](auto zero) MEGALORA_INLINE_LAMBDA { input_grad<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void lora_weight_grad_tasks(const LoraWeightGrad& a, int64_t begin, int64_t end) {
  dispatch(a.in.dtype, [&](auto zero) MEGALORA_INLINE_LAMBDA { weight_grad<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void sum_parts_rows(const SumParts& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&](auto zero) MEGALORA_INLINE_LAMBDA { sum_parts<wide_t<decltype(zero)>>(a, begin, end); });
}

}  // namespace megalora
