// The cut of qkv into heads with the rotation of q and k, both ways, on the CPU.
#include <algorithm>

#include "cpu_kernels.h"

namespace megalora {
namespace {

// out = (a cos - b sin, b cos + a sin) of the halves (a, b) of in; `sign` -1 turns back.
template <typename scalar_t>
MEGALORA_INLINE void rotate(scalar_t* __restrict out, const scalar_t* __restrict in, const scalar_t* __restrict cos,
                            const scalar_t* __restrict sin, int64_t half, wide_t<scalar_t> sign) {
  using wide = wide_t<scalar_t>;
  for (int64_t i = 0; i < half; ++i) {
    const wide a = static_cast<wide>(in[i]), b = static_cast<wide>(in[half + i]);
    const wide c = static_cast<wide>(cos[i]), s = static_cast<wide>(sin[i]) * sign;
    out[i] = static_cast<scalar_t>(a * c - b * s);
    out[half + i] = static_cast<scalar_t>(b * c + a * s);
  }
}

template <typename scalar_t>
MEGALORA_INLINE void split(const SplitRope& a, int64_t begin, int64_t end) {
  const int64_t dim = a.head_dim, half = dim / 2;
  const wide_t<scalar_t> sign = a.backward ? -1 : 1;
  const int64_t width = (a.q.count + a.k.count + a.v.count) * dim;
  for (int64_t token = begin; token < end; ++token) {
    auto* whole = static_cast<scalar_t*>(a.qkv) + token * width;
    const auto* cos = static_cast<const scalar_t*>(a.cos) + token * half;
    const auto* sin = static_cast<const scalar_t*>(a.sin) + token * half;
    for (const Heads* heads : {&a.q, &a.k, &a.v}) {
      auto* part = static_cast<scalar_t*>(heads->data) + token * heads->token_stride;
      for (int64_t head = 0; head < heads->count; ++head, whole += dim, part += heads->head_stride) {
        const scalar_t* from = a.backward ? part : whole;
        scalar_t* to = a.backward ? whole : part;
        if (heads == &a.v) {
          std::copy_n(from, dim, to);
        } else {
          rotate(to, from, cos, sin, half, sign);
        }
      }
    }
  }
}

}  // namespace

MEGALORA_MULTIVERSION void split_rope_rows(const SplitRope& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&](auto zero) MEGALORA_INLINE_LAMBDA { split<decltype(zero)>(a, begin, end); });
}

}  // namespace megalora
