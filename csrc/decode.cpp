// One new token of each of a few sequences, on the CPU: linears that read every weight once, attention over a cache.
//
// Legend: M rows, I in_features, O out_features; B sequences, H query and K key/value heads, D head_dim, S slots of the
// cache, C tokens that one holds.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"
#include "inline.h"

namespace megalora {
namespace {

// ---- skinny_linear: bound by reading the weight, so what counts is that all threads stream it at once ----

constexpr int64_t kMostRows = 4;     // more are left to GEMMs: those read the weight once too
constexpr int kTogether = 4;         // outputs under way at a time: enough sums to hide the latency of an addition
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

struct Linear {
  const void *x, *weight, *bias;
  void* y;
  int64_t in_features, out_features, x_stride, weight_stride;
};

template <int M, int R, typename scalar_t>
MEGALORA_INLINE void outputs(const Linear& job, int64_t first) {
  const auto* x = static_cast<const scalar_t*>(job.x);
  const auto* weight = static_cast<const scalar_t*>(job.weight) + first * job.weight_stride;
  v16 sums[R][M] = {};
  int64_t i = 0;
  for (; i + 16 <= job.in_features; i += 16) {
    v16 rows[M];
    for (int m = 0; m < M; ++m) load(rows[m], x + m * job.x_stride + i);
    for (int r = 0; r < R; ++r) {
      v16 weights;
      load(weights, weight + r * job.weight_stride + i);
      for (int m = 0; m < M; ++m) sums[r][m] += weights * rows[m];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      float total = sum(sums[r][m]);
      for (int64_t j = i; j < job.in_features; ++j) {
        total += static_cast<float>(weight[r * job.weight_stride + j]) * static_cast<float>(x[m * job.x_stride + j]);
      }
      if (job.bias != nullptr) total += static_cast<float>(static_cast<const scalar_t*>(job.bias)[first + r]);
      static_cast<scalar_t*>(job.y)[m * job.out_features + first + r] = static_cast<scalar_t>(total);
    }
  }
}

template <int M, typename scalar_t>
MEGALORA_INLINE void outputs_between(const Linear& job, int64_t begin, int64_t end) {
  int64_t o = begin;
  for (; o + kTogether <= end; o += kTogether) outputs<M, kTogether, scalar_t>(job, o);
  for (; o < end; ++o) outputs<M, 1, scalar_t>(job, o);
}

template <typename scalar_t>
MEGALORA_INLINE void some_rows(const Linear& job, int64_t rows, int64_t begin, int64_t end) {
  switch (rows) {
    case 1: return outputs_between<1, scalar_t>(job, begin, end);
    case 2: return outputs_between<2, scalar_t>(job, begin, end);
    case 3: return outputs_between<3, scalar_t>(job, begin, end);
    default: return outputs_between<4, scalar_t>(job, begin, end);
  }
}

MEGALORA_MULTIVERSION void linear_float(const Linear& job, int64_t rows, int64_t begin, int64_t end) {
  some_rows<float>(job, rows, begin, end);
}

MEGALORA_MULTIVERSION void linear_bfloat16(const Linear& job, int64_t rows, int64_t begin, int64_t end) {
  some_rows<at::BFloat16>(job, rows, begin, end);
}

at::Tensor skinny_linear(const at::Tensor& x_MI, const at::Tensor& weight_OI, const std::optional<at::Tensor>& bias_O) {
  MEGALORA_CHECK(x_MI.dim() == 2 && weight_OI.dim() == 2, x_MI.sizes(), " and ", weight_OI.sizes());
  MEGALORA_CHECK(x_MI.size(0) <= kMostRows, x_MI.sizes());
  MEGALORA_CHECK(x_MI.size(1) == weight_OI.size(1), x_MI.sizes(), " and ", weight_OI.sizes());
  MEGALORA_CHECK(x_MI.stride(1) == 1 && weight_OI.stride(1) == 1, x_MI.strides(), " and ", weight_OI.strides());
  MEGALORA_CHECK(x_MI.scalar_type() == weight_OI.scalar_type(), x_MI.scalar_type(), " and ", weight_OI.scalar_type());
  const bool is_float = x_MI.scalar_type() == at::kFloat;
  MEGALORA_CHECK(is_float || x_MI.scalar_type() == at::kBFloat16, x_MI.scalar_type());
  at::Tensor bias;
  if (bias_O.has_value()) {
    bias = bias_O->contiguous();
    MEGALORA_CHECK(bias.dim() == 1 && bias.size(0) == weight_OI.size(0), bias.sizes());
    MEGALORA_CHECK(bias.scalar_type() == x_MI.scalar_type(), bias.scalar_type());
  }
  const int64_t rows = x_MI.size(0), out_features = weight_OI.size(0);
  at::Tensor y = at::empty({rows, out_features}, x_MI.options());
  if (y.numel() == 0) return y;
  const Linear job{x_MI.const_data_ptr(), weight_OI.const_data_ptr(), bias.defined() ? bias.const_data_ptr() : nullptr,
                   y.mutable_data_ptr(),  x_MI.size(1),               out_features,
                   x_MI.stride(0),        weight_OI.stride(0)};
  const int64_t grain = std::max<int64_t>(kTogether, kWeightsPerTask / std::max<int64_t>(1, x_MI.size(1)));
  at::parallel_for(0, out_features, grain, [&](int64_t begin, int64_t end) {
    (is_float ? linear_float : linear_bfloat16)(job, rows, begin, end);
  });
  return y;
}

at::Tensor skinny_linear_meta(const at::Tensor& x_MI, const at::Tensor& weight_OI, const std::optional<at::Tensor>&) {
  return at::empty_symint({x_MI.sym_size(0), weight_OI.sym_size(0)}, x_MI.options());
}

// ---- decode_attention_: a sequence reads what it has, whatever the others have ----

constexpr int64_t kProductsPerTask = 16384;

struct Heads {  // [B, heads, D], D adjacent
  void* data;
  int64_t sequence, head;
};

struct Attention {
  Heads q, k, v, out;
  void *keys, *values;  // [S, K, C, D], contiguous
  const int64_t *slots, *positions;
  int64_t kv_heads, group, capacity, dim, window;
};

template <typename scalar_t>
MEGALORA_INLINE scalar_t* at_head(const Heads& heads, int64_t sequence, int64_t head) {
  return static_cast<scalar_t*>(heads.data) + sequence * heads.sequence + head * heads.head;
}

template <typename scalar_t, typename opmath_t>
MEGALORA_INLINE void attend_one(const Attention& job, int64_t task, opmath_t* scratch) {
  const int64_t sequence = task / job.kv_heads, kv_head = task % job.kv_heads, dim = job.dim;
  const int64_t position = job.positions[sequence];
  const int64_t offset = (job.slots[sequence] * job.kv_heads + kv_head) * job.capacity * dim;
  scalar_t* keys = static_cast<scalar_t*>(job.keys) + offset;
  scalar_t* values = static_cast<scalar_t*>(job.values) + offset;
  std::memcpy(keys + position * dim, at_head<scalar_t>(job.k, sequence, kv_head), dim * sizeof(scalar_t));
  std::memcpy(values + position * dim, at_head<scalar_t>(job.v, sequence, kv_head), dim * sizeof(scalar_t));

  const int64_t first = job.window > 0 ? std::max<int64_t>(0, position + 1 - job.window) : 0;
  const int64_t count = position + 1 - first;
  opmath_t *q = scratch, *row = q + dim, *sum = row + dim, *weights = sum + dim;
  const opmath_t scale = 1 / std::sqrt(static_cast<opmath_t>(dim));
  for (int64_t g = 0; g < job.group; ++g) {
    const scalar_t* query = at_head<scalar_t>(job.q, sequence, kv_head * job.group + g);
    for (int64_t d = 0; d < dim; ++d) q[d] = static_cast<opmath_t>(query[d]) * scale;
    opmath_t largest = -INFINITY;
    for (int64_t j = 0; j < count; ++j) {
      const scalar_t* key = keys + (first + j) * dim;
      opmath_t product = 0;
#pragma omp simd reduction(+ : product)
      for (int64_t d = 0; d < dim; ++d) product += q[d] * static_cast<opmath_t>(key[d]);
      weights[j] = product;
      largest = std::max(largest, product);
    }
    opmath_t total = 0;
    for (int64_t j = 0; j < count; ++j) total += weights[j] = std::exp(weights[j] - largest);
    for (int64_t d = 0; d < dim; ++d) sum[d] = 0;
    for (int64_t j = 0; j < count; ++j) {
      const scalar_t* value = values + (first + j) * dim;
      const opmath_t weight = weights[j];
      for (int64_t d = 0; d < dim; ++d) sum[d] += weight * static_cast<opmath_t>(value[d]);
    }
    scalar_t* out = at_head<scalar_t>(job.out, sequence, kv_head * job.group + g);
    for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<scalar_t>(sum[d] / total);
  }
}

template <typename scalar_t>
MEGALORA_INLINE void attend_between(const Attention& job, void* scratch, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    attend_one<scalar_t>(job, task, static_cast<at::opmath_type<scalar_t>*>(scratch));
  }
}

MEGALORA_MULTIVERSION void attend(const Attention& job, at::ScalarType dtype, void* scratch, int64_t begin,
                                  int64_t end) {
  switch (dtype) {
    case at::kFloat: return attend_between<float>(job, scratch, begin, end);
    case at::kDouble: return attend_between<double>(job, scratch, begin, end);
    case at::kBFloat16: return attend_between<at::BFloat16>(job, scratch, begin, end);
    case at::kHalf: return attend_between<at::Half>(job, scratch, begin, end);
    default: MEGALORA_CHECK(false, "attention of dtype ", dtype);
  }
}

Heads heads_of(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

void decode_attention_(const at::Tensor& q_BHD, const at::Tensor& k_BKD, const at::Tensor& v_BKD, at::Tensor& keys_SKCD,
                       at::Tensor& values_SKCD, const at::Tensor& slots_B, const at::Tensor& positions_B,
                       int64_t window, at::Tensor& out_BHD) {
  const int64_t sequences = q_BHD.size(0), dim = q_BHD.size(2), kv_heads = k_BKD.size(1);
  const auto dtype = q_BHD.scalar_type();
  for (const at::Tensor* x : {&q_BHD, &k_BKD, &v_BKD, static_cast<const at::Tensor*>(&out_BHD)}) {
    MEGALORA_CHECK(x->dim() == 3 && x->size(0) == sequences && x->size(2) == dim, x->sizes());
    MEGALORA_CHECK(x->stride(2) == 1 && x->scalar_type() == dtype, x->strides(), " of ", x->scalar_type());
  }
  MEGALORA_CHECK(v_BKD.size(1) == kv_heads && q_BHD.size(1) % kv_heads == 0, q_BHD.sizes(), " and ", v_BKD.sizes());
  for (const at::Tensor* x : {&keys_SKCD, &values_SKCD}) {
    MEGALORA_CHECK(x->dim() == 4 && x->size(1) == kv_heads && x->size(3) == dim, x->sizes());
    MEGALORA_CHECK(x->is_contiguous() && x->scalar_type() == dtype, x->strides(), " of ", x->scalar_type());
  }
  const at::Tensor slots = slots_B.contiguous(), positions = positions_B.contiguous();
  for (const at::Tensor* x : {&slots, &positions}) {
    MEGALORA_CHECK(x->scalar_type() == at::kLong && x->numel() == sequences, x->sizes(), " of ", x->scalar_type());
  }
  const int64_t capacity = keys_SKCD.size(2);
  const int64_t *slot = slots.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  int64_t longest = 0, all = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    MEGALORA_CHECK(slot[b] >= 0 && slot[b] < keys_SKCD.size(0), "slot ", slot[b]);
    MEGALORA_CHECK(position[b] >= 0 && position[b] < capacity, "position ", position[b], " of ", capacity);
    const int64_t count = window > 0 ? std::min(window, position[b] + 1) : position[b] + 1;
    longest = std::max(longest, count);
    all += count;
  }
  if (sequences == 0) return;
  const Attention job{heads_of(q_BHD),
                      heads_of(k_BKD),
                      heads_of(v_BKD),
                      heads_of(out_BHD),
                      keys_SKCD.mutable_data_ptr(),
                      values_SKCD.mutable_data_ptr(),
                      slot,
                      position,
                      kv_heads,
                      q_BHD.size(1) / kv_heads,
                      capacity,
                      dim,
                      window};
  const int64_t each = std::max<int64_t>(1, all / sequences * job.group * dim);  // products of a task, on average
  at::parallel_for(0, sequences * kv_heads, std::max<int64_t>(1, kProductsPerTask / each),
                   [&](int64_t begin, int64_t end) {
                     std::vector<double> scratch(3 * dim + longest);
                     attend(job, dtype, scratch.data(), begin, end);
                   });
}

void decode_attention_meta_(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::Tensor&, at::Tensor&,
                            const at::Tensor&, const at::Tensor&, int64_t, at::Tensor&) {}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalora, m) {
  // x [M, I], weight [O, I], bias [O] -> [M, O]; M at most 4; float32 or bfloat16, summed in float32.
  m.def("skinny_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", {at::Tag::pt2_compliant_tag});
  // q, out [B, H, D], k, v [B, K, D], keys, values [S, K, C, D], slots, positions [B] int64; window 0: none.
  m.def("decode_attention_(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor slots, "
        "Tensor positions, int window, Tensor(c!) out) -> ()",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(megalora, CPU, m) {
  m.impl("skinny_linear", &skinny_linear);
  m.impl("decode_attention_", &decode_attention_);
}

TORCH_LIBRARY_IMPL(megalora, Meta, m) {
  m.impl("skinny_linear", &skinny_linear_meta);
  m.impl("decode_attention_", &decode_attention_meta_);
}

}  // namespace megalora
