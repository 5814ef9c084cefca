// The cut of qkv into heads with the rotation of q and k, both ways, on the CPU.
#include <algorithm>

#include "cpu/checks.h"
#include "cpu/kernels.h"

namespace megalora::cpu {
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
MEGALORA_INLINE void split(const SplitRopeParams& a, int64_t begin, int64_t end) {
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

MEGALORA_MULTIVERSION void split_rope_rows(const SplitRopeParams& a, int64_t begin, int64_t end) {
  dispatch(a.type, [&](auto zero) MEGALORA_INLINE_LAMBDA { split<decltype(zero)>(a, begin, end); });
}

void split_rope(bool backward, const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& q,
                const Tensor& k, const Tensor& v) {
  MEGALORA_CHECK(q.dim() == 3 && k.dim() == 3, q.sizes(), " and ", k.sizes());
  const int64_t tokens = q.size(0), heads = q.size(1), kv_heads = k.size(1), dim = q.size(2);
  MEGALORA_CHECK(dim % 2 == 0, "head_dim ", dim);
  check_rows(q, qkv);
  check_matrix(k, {tokens, kv_heads, dim}, qkv);
  check_matrix(v, {tokens, kv_heads, dim}, qkv);
  check_dense(qkv, {tokens, (heads + 2 * kv_heads) * dim}, qkv);
  check_dense(cos, {tokens, dim / 2}, qkv);
  check_dense(sin, {tokens, dim / 2}, qkv);
  SplitRopeParams params{};
  params.qkv = data_of(qkv);
  params.q = heads_of(q);
  params.k = heads_of(k);
  params.v = heads_of(v);
  params.cos = cos.const_data_ptr();
  params.sin = sin.const_data_ptr();
  params.tokens = tokens;
  params.head_dim = dim;
  params.backward = backward;
  params.type = type_of(qkv);
  for_rows(split_rope_rows, params, tokens, qkv.size(1));
}

}  // namespace

void split_rope_(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& q, const Tensor& k,
                 const Tensor& v) {
  split_rope(false, qkv, cos, sin, q, k, v);
}

void split_rope_backward_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                          const Tensor& qkv) {
  split_rope(true, qkv, cos, sin, q, k, v);
}

}  // namespace megalora::cpu
