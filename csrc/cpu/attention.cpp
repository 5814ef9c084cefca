// Causal attention within documents on the CPU, forward and backward, in tiles that stay in the cache: FlashAttention
// (Dao et al. 2022). One thread does a document and a head, so sums have one order.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "cpu/checks.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // fma where the CPU has it: nearly all of the time is in products
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/exp.h"
#include "cpu/kernels.h"
#include "cpu/outer.h"

namespace megalora::cpu {
namespace {

// Causal attention within documents: q, k, v as [T, H, D] and [T, K, D] by their strides. A task is a document and a
// query head; lse [H, T] wide is the logarithm of each row's sum of exponentials. A score q k^T `scale` becomes
// softcap tanh(score / softcap), unless softcap is 0, and then gets slopes[head] (key - query), ALiBi. A head's sink is
// one more score, which gives nothing.
struct AttentionParams {
  Heads q, k, v, out;
  void* lse;
  const int64_t* bounds;  // [documents + 1]
  int64_t documents, tokens, head_dim, window;
  double scale, softcap;
  const void *slopes, *sinks;  // [H] wide, or null
  Type type;
};

// dq by its strides; dk, dv [T, H, D] contiguous and wide: the share of each query head in the gradient of what it
// read.
struct AttentionBackwardParams {
  AttentionParams forward;
  Heads dout, dq;
  void *dk, *dv;
};

constexpr int64_t kTile = 64;  // queries or keys

// A tile [rows, D] of one head, wide, rows padded with zeros.
template <typename scalar_t>
MEGALORA_INLINE void take(wide_t<scalar_t>* out, const Heads& heads, int64_t head, int64_t token, int64_t rows,
                          int64_t dim, wide_t<scalar_t> factor) {
  using wide = wide_t<scalar_t>;
  for (int64_t i = 0; i < rows; ++i) {
    const auto* row =
        static_cast<const scalar_t*>(heads.data) + (token + i) * heads.token_stride + head * heads.head_stride;
    for (int64_t d = 0; d < dim; ++d) out[i * padded(dim) + d] = static_cast<wide>(row[d]) * factor;
    for (int64_t d = dim; d < padded(dim); ++d) out[i * padded(dim) + d] = 0;
  }
}

// Columns that a tile of `rows` keys has in scores: 16, 32 or 64, so that sums over them can go in pairs.
MEGALORA_INLINE int64_t columns_for(int64_t rows) { return rows <= 16 ? 16 : rows <= 32 ? 32 : kTile; }

// The same [D, columns_for(rows)], rows kTile apart: columns behind those of the tile are zeros.
template <typename wide>
MEGALORA_INLINE void transpose(wide* out, const wide* tile, int64_t rows, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t i = 0; i < rows; ++i) out[d * kTile + i] = tile[i * padded(dim) + d];
    for (int64_t i = rows; i < columns_for(rows); ++i) out[d * kTile + i] = 0;
  }
}

template <typename scalar_t>
MEGALORA_INLINE void put(const Heads& heads, int64_t head, int64_t token, int64_t rows, int64_t dim,
                         const wide_t<scalar_t>* tile) {
  for (int64_t i = 0; i < rows; ++i) {
    auto* row = static_cast<scalar_t*>(heads.data) + (token + i) * heads.token_stride + head * heads.head_stride;
    for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<scalar_t>(tile[i * padded(dim) + d]);
  }
}

// The keys that query `query` sees of a tile of keys from `key` on: [first, last).
struct Seen {
  int64_t first, last;
};
MEGALORA_INLINE Seen seen(int64_t query, int64_t key, int64_t keys, int64_t window) {
  return {std::clamp<int64_t>(query - window + 1 - key, 0, keys), std::clamp<int64_t>(query + 1 - key, 0, keys)};
}

// The first tile of keys of which a query from `query` on sees some.
MEGALORA_INLINE int64_t first_tile(int64_t query, int64_t window) {
  return std::max<int64_t>(0, query - window + 1) / kTile * kTile;
}

// s [n] = softcap tanh(s / softcap), and its derivatives by s.
template <typename wide>
MEGALORA_INLINE void cap(wide* s, wide* derivatives, int64_t n, wide softcap) {
  const wide inverse = 1 / softcap;
  for (int64_t j = 0; j < n; ++j) {
    const wide t = tanh_of(s[j] * inverse);
    s[j] = softcap * t;
    derivatives[j] = 1 - t * t;
  }
}

// s [n] += slope (key - query), where the first key stands `behind` tokens before the query.
template <typename wide>
MEGALORA_INLINE void add_alibi(wide* s, int64_t n, wide slope, int64_t behind) {
  for (int64_t j = 0; j < n; ++j) s[j] += slope * static_cast<wide>(static_cast<int32_t>(j - behind));
}

template <typename wide>
MEGALORA_INLINE wide of_head(const void* numbers, int64_t head) {
  return static_cast<const wide*>(numbers)[head];
}

template <typename scalar_t>
MEGALORA_INLINE void forward(const AttentionParams& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  constexpr wide nothing = -std::numeric_limits<wide>::infinity();
  const int64_t dim = a.head_dim, width = padded(dim), group = a.q.count / a.k.count;
  const wide scale = static_cast<wide>(a.scale), softcap = static_cast<wide>(a.softcap);
  std::vector<wide> q(kTile * width), keys(kTile * width), scores(kTile * kTile), out(kTile * width);
  std::vector<wide> columns, values;  // of a whole document
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % a.q.count, start = a.bounds[task / a.q.count];
    const int64_t length = a.bounds[task / a.q.count + 1] - start;
    columns.resize((length + kTile - 1) / kTile * kTile * dim);
    values.resize(length * width);
    take<scalar_t>(values.data(), a.v, head / group, start, length, dim, 1);
    for (int64_t key = 0; key < length; key += kTile) {
      const int64_t count = std::min(kTile, length - key);
      take<scalar_t>(keys.data(), a.k, head / group, start + key, count, dim, 1);
      transpose(columns.data() + key * dim, keys.data(), count, dim);
    }
    for (int64_t query = 0; query < length; query += kTile) {
      const int64_t rows = std::min(kTile, length - query);
      take<scalar_t>(q.data(), a.q, head, start + query, rows, dim, scale);
      std::fill_n(out.begin(), rows * width, wide{0});
      wide largest[kTile], total[kTile] = {};
      std::fill_n(largest, kTile, nothing);
      for (int64_t key = first_tile(query, a.window); key < query + rows; key += kTile) {
        const int64_t count = std::min(kTile, length - key), n = columns_for(count);
        outer(scores.data(), kTile, rows, {q.data(), 1, width}, columns.data() + key * dim, kTile, dim, n, false);
        for (int64_t i = 0; i < rows; ++i) {
          wide* s = scores.data() + i * kTile;
          const Seen range = seen(query + i, key, count, a.window);
          wide lanes[kTile];
          if (softcap != 0) cap(s, lanes, n, softcap);
          if (a.slopes) add_alibi(s, n, of_head<wide>(a.slopes, head), query + i - key);
          for (int64_t j = 0; j < n; ++j) lanes[j] = s[j] = j >= range.first && j < range.last ? s[j] : nothing;
          for (int64_t half = n / 2; half > 0; half /= 2) {
            for (int64_t j = 0; j < half; ++j) lanes[j] = lanes[j] > lanes[j + half] ? lanes[j] : lanes[j + half];
          }
          const wide maximum = lanes[0] > largest[i] ? lanes[0] : largest[i];
          if (maximum == nothing) {  // this query sees none of these keys
            std::fill_n(s, n, wide{0});
            continue;
          }
          for (int64_t j = 0; j < n; ++j) lanes[j] = s[j] = exp_nonpositive(s[j] - maximum);
          const wide fade = exp_nonpositive(largest[i] - maximum);
          total[i] = total[i] * fade + add_halves(lanes, n);
          largest[i] = maximum;
          for (int64_t d = 0; d < width; ++d) out[i * width + d] *= fade;
        }
        outer(out.data(), width, rows, {scores.data(), 1, kTile}, values.data() + key * width, width, count, width,
              true);
      }
      for (int64_t i = 0; i < rows; ++i) {
        if (a.sinks) {
          const wide sink = of_head<wide>(a.sinks, head), maximum = std::max(largest[i], sink);
          const wide fade = exp_nonpositive(largest[i] - maximum);
          total[i] = total[i] * fade + exp_nonpositive(sink - maximum);
          largest[i] = maximum;
          for (int64_t d = 0; d < width; ++d) out[i * width + d] *= fade;
        }
        const wide inverse = 1 / total[i];
        for (int64_t d = 0; d < width; ++d) out[i * width + d] *= inverse;
        static_cast<wide*>(a.lse)[head * a.tokens + start + query + i] = largest[i] + std::log(total[i]);
      }
      put<scalar_t>(a.out, head, start + query, rows, dim, out.data());
    }
  }
}

// With p = exp(s - lse), delta = rowsum(dout out): ds = p (dout v^T - delta), times the derivative of softcap;
// dv = p^T dout, dk = ds^T q, dq = ds k. The sink is in lse.
template <typename scalar_t>
MEGALORA_INLINE void backward(const AttentionBackwardParams& b, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  const AttentionParams& a = b.forward;
  const int64_t dim = a.head_dim, width = padded(dim), group = a.q.count / a.k.count, heads = a.q.count;
  const wide scale = static_cast<wide>(a.scale), softcap = static_cast<wide>(a.softcap);
  std::vector<wide> keys(kTile * width), key_columns(kTile * dim), values(kTile * width), value_columns(kTile * dim);
  std::vector<wide> p(kTile * kTile), ds(kTile * kTile), dk(kTile * width), dv(kTile * width);
  std::vector<wide> q, dout, out(kTile * width), dq, delta;  // of a whole document, but for out
  const auto put_share = [&](void* share, int64_t head, int64_t token, int64_t rows, const std::vector<wide>& tile) {
    put<wide>({share, heads, heads * dim, dim}, head, token, rows, dim, tile.data());
  };
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % heads, start = a.bounds[task / heads], length = a.bounds[task / heads + 1] - start;
    const wide* lse = static_cast<const wide*>(a.lse) + head * a.tokens + start;
    q.resize(length * width);
    dout.resize(length * width);
    delta.resize(length);
    dq.assign(length * width, 0);
    take<scalar_t>(q.data(), a.q, head, start, length, dim, scale);
    take<scalar_t>(dout.data(), b.dout, head, start, length, dim, 1);
    for (int64_t query = 0; query < length; query += kTile) {
      const int64_t rows = std::min(kTile, length - query);
      take<scalar_t>(out.data(), a.out, head, start + query, rows, dim, 1);
      for (int64_t i = 0; i < rows; ++i) {
        wide lanes[16] = {};
        for (int64_t d = 0; d < width; d += 16) {
          for (int64_t j = 0; j < 16; ++j) lanes[j] += dout[(query + i) * width + d + j] * out[i * width + d + j];
        }
        delta[query + i] = add_halves(lanes, 16);
      }
    }
    for (int64_t key = 0; key < length; key += kTile) {
      const int64_t count = std::min(kTile, length - key), n = columns_for(count);
      take<scalar_t>(keys.data(), a.k, head / group, start + key, count, dim, 1);
      transpose(key_columns.data(), keys.data(), count, dim);
      take<scalar_t>(values.data(), a.v, head / group, start + key, count, dim, 1);
      transpose(value_columns.data(), values.data(), count, dim);
      std::fill_n(dk.begin(), count * width, wide{0});
      std::fill_n(dv.begin(), count * width, wide{0});
      for (int64_t query = key; query < length && first_tile(query, a.window) <= key; query += kTile) {
        const int64_t rows = std::min(kTile, length - query);
        const wide *q_tile = q.data() + query * width, *dout_tile = dout.data() + query * width;
        outer(p.data(), kTile, rows, {q_tile, 1, width}, key_columns.data(), kTile, dim, n, false);
        outer(ds.data(), kTile, rows, {dout_tile, 1, width}, value_columns.data(), kTile, dim, n, false);
        for (int64_t i = 0; i < rows; ++i) {
          wide *p_row = p.data() + i * kTile, *ds_row = ds.data() + i * kTile;
          const Seen range = seen(query + i, key, count, a.window);
          const wide total = lse[query + i], mean = delta[query + i];
          wide derivatives[kTile];
          if (softcap != 0) cap(p_row, derivatives, n, softcap);
          if (a.slopes) add_alibi(p_row, n, of_head<wide>(a.slopes, head), query + i - key);
          for (int64_t j = 0; j < n; ++j) {
            const wide s = p_row[j] < total ? p_row[j] - total : 0;  // rounding may lift it a little above 0
            const wide weight = j >= range.first && j < range.last ? exp_nonpositive(s) : 0;
            p_row[j] = weight;
            ds_row[j] = weight != 0 ? weight * (ds_row[j] - mean) : 0;
          }
          if (softcap != 0) {
            for (int64_t j = 0; j < n; ++j) ds_row[j] *= derivatives[j];
          }
        }
        outer(dv.data(), width, count, {p.data(), kTile, 1}, dout_tile, width, rows, width, true);
        outer(dk.data(), width, count, {ds.data(), kTile, 1}, q_tile, width, rows, width, true);
        outer(dq.data() + query * width, width, rows, {ds.data(), 1, kTile}, keys.data(), width, count, width, true);
      }
      put_share(b.dk, head, start + key, count, dk);
      put_share(b.dv, head, start + key, count, dv);
    }
    for (wide& value : dq) value *= scale;
    put<scalar_t>(b.dq, head, start, length, dim, dq.data());
  }
}

MEGALORA_MULTIVERSION void attention_tasks(const AttentionParams& a, int64_t begin, int64_t end) {
  dispatch(a.type, [&](auto zero) MEGALORA_INLINE_LAMBDA { forward<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void attention_backward_tasks(const AttentionBackwardParams& a, int64_t begin, int64_t end) {
  dispatch(a.forward.type, [&](auto zero) MEGALORA_INLINE_LAMBDA { backward<decltype(zero)>(a, begin, end); });
}

// Numbers [H] of the query heads, if given.
const void* checked_numbers(const OptionalTensor& x, const Tensor& q) {
  if (!x) return nullptr;
  check_wide(*x, q.size(1), q);
  return data_of(*x);
}

// Of the documents whose bounds are given.
AttentionParams checked(const Tensor& q, const Tensor& k, const Tensor& v, at::IntArrayRef bounds, int64_t window,
                        double scale, double softcap, const OptionalTensor& slopes, const Tensor& out,
                        const Tensor& lse) {
  MEGALORA_CHECK(q.dim() == 3 && k.dim() == 3, q.sizes(), " and ", k.sizes());
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  MEGALORA_CHECK(k.size(1) > 0 && heads % k.size(1) == 0, heads, " query heads for ", k.size(1), " key heads");
  check_rows(q, q);
  check_matrix(k, {tokens, k.size(1), dim}, q);
  check_matrix(v, k.sizes(), q);
  check_matrix(out, q.sizes(), q);
  check_wide(lse, heads * tokens, q);
  MEGALORA_CHECK(window > 0, "window ", window);
  MEGALORA_CHECK(std::isfinite(scale) && softcap >= 0, "scale ", scale, ", softcap ", softcap);
  MEGALORA_CHECK(!bounds.empty() && bounds.front() == 0 && bounds.back() == tokens, bounds, " for ", tokens, " tokens");
  MEGALORA_CHECK(std::is_sorted(bounds.begin(), bounds.end()), bounds);
  AttentionParams params{};
  params.q = heads_of(q);
  params.k = heads_of(k);
  params.v = heads_of(v);
  params.out = heads_of(out);
  params.lse = lse.mutable_data_ptr();
  params.bounds = bounds.data();
  params.documents = static_cast<int64_t>(bounds.size()) - 1;
  params.tokens = tokens;
  params.head_dim = dim;
  params.window = window;
  params.scale = scale;
  params.softcap = softcap;
  params.slopes = checked_numbers(slopes, q);
  params.type = type_of(q);
  return params;
}

}  // namespace

void attention_(const Tensor& q, const Tensor& k, const Tensor& v, at::IntArrayRef bounds, int64_t window, double scale,
                double softcap, const OptionalTensor& slopes, const OptionalTensor& sinks, const Tensor& out,
                const Tensor& lse) {
  AttentionParams params = checked(q, k, v, bounds, window, scale, softcap, slopes, out, lse);
  params.sinks = checked_numbers(sinks, q);
  at::parallel_for(0, params.documents * q.size(1), 1,
                   [&](int64_t begin, int64_t end) { attention_tasks(params, begin, end); });
}

void attention_backward_(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                         const Tensor& lse, at::IntArrayRef bounds, int64_t window, double scale, double softcap,
                         const OptionalTensor& slopes, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  AttentionBackwardParams params{};
  params.forward = checked(q, k, v, bounds, window, scale, softcap, slopes, out, lse);
  check_matrix(dout, q.sizes(), q);
  check_matrix(dq, q.sizes(), q);
  check_wide(dk, q.numel(), q);
  check_wide(dv, q.numel(), q);
  params.dout = heads_of(dout);
  params.dq = heads_of(dq);
  params.dk = dk.mutable_data_ptr();
  params.dv = dv.mutable_data_ptr();
  at::parallel_for(0, params.forward.documents * q.size(1), 1,
                   [&](int64_t begin, int64_t end) { attention_backward_tasks(params, begin, end); });
}

}  // namespace megalora::cpu
