// Causal attention within documents on the CPU, forward and backward, in tiles that stay in the cache: FlashAttention
// (Dao et al. 2022). One thread does a document and a head, so sums have one order.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // fma where the CPU has it: nearly all of the time is in products
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_kernels.h"
#include "exp.h"
#include "outer.h"

namespace megalora {
namespace {

constexpr int64_t kTile = 64;  // queries or keys

// A tile [rows, D] of one head, wide, rows padded with zeros.
template <typename scalar_t>
MEGALORA_INLINE void take(wide_t<scalar_t>* out, const Heads& heads, int64_t head, int64_t token, int64_t rows,
                          int64_t dim, wide_t<scalar_t> factor) {
  using wide = wide_t<scalar_t>;
  for (int64_t i = 0; i < rows; ++i) {
    const auto* row = static_cast<const scalar_t*>(heads.data) + (token + i) * heads.token_stride + head * heads.head_stride;
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

template <typename scalar_t>
MEGALORA_INLINE void forward(const Attention& a, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  constexpr wide nothing = -std::numeric_limits<wide>::infinity();
  const int64_t dim = a.head_dim, width = padded(dim), group = a.q.count / a.k.count;
  const wide scale = 1 / std::sqrt(static_cast<wide>(dim));
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
        outer(out.data(), width, rows, {scores.data(), 1, kTile}, values.data() + key * width, width, count, width, true);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const wide inverse = 1 / total[i];
        for (int64_t d = 0; d < width; ++d) out[i * width + d] *= inverse;
        static_cast<wide*>(a.lse)[head * a.tokens + start + query + i] = largest[i] + std::log(total[i]);
      }
      put<scalar_t>(a.out, head, start + query, rows, dim, out.data());
    }
  }
}

// With p = exp(s - lse), delta = rowsum(dout out): ds = p (dout v^T - delta); dv = p^T dout, dk = ds^T q, dq = ds k.
template <typename scalar_t>
MEGALORA_INLINE void backward(const AttentionBackward& b, int64_t begin, int64_t end) {
  using wide = wide_t<scalar_t>;
  const Attention& a = b.forward;
  const int64_t dim = a.head_dim, width = padded(dim), group = a.q.count / a.k.count, heads = a.q.count;
  const wide scale = 1 / std::sqrt(static_cast<wide>(dim));
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
          for (int64_t j = 0; j < n; ++j) {
            const wide s = p_row[j] < total ? p_row[j] - total : 0;  // rounding may lift it a little above 0
            const wide weight = j >= range.first && j < range.last ? exp_nonpositive(s) : 0;
            p_row[j] = weight;
            ds_row[j] = weight != 0 ? weight * (ds_row[j] - mean) : 0;
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

}  // namespace

MEGALORA_MULTIVERSION void attention_tasks(const Attention& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&](auto zero) MEGALORA_INLINE_LAMBDA { forward<decltype(zero)>(a, begin, end); });
}

MEGALORA_MULTIVERSION void attention_backward_tasks(const AttentionBackward& a, int64_t begin, int64_t end) {
  dispatch(a.forward.dtype, [&](auto zero) MEGALORA_INLINE_LAMBDA { backward<decltype(zero)>(a, begin, end); });
}

}  // namespace megalora
