// The attention of one new token of each of a few sequences over a cache, on the CPU: a sequence reads what it has,
// whatever the others have.
//
// Legend: B sequences, H query and K key/value heads, D head_dim, S slots of the cache, C tokens that one holds.
#include <ATen/OpMathType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/checks.h"
#include "cpu/multiversion.h"
#include "inline.h"

namespace megalora::cpu {
namespace {

constexpr int64_t kProductsPerTask = 16384;

template <typename scalar_t>
MEGALORA_INLINE scalar_t* at_head(const Heads& heads, int64_t sequence, int64_t head) {
  return static_cast<scalar_t*>(heads.data) + sequence * heads.token_stride + head * heads.head_stride;
}

template <typename scalar_t, typename opmath_t>
MEGALORA_INLINE void attend_one(const DecodeAttentionParams& a, int64_t task, opmath_t* scratch) {
  const int64_t sequence = task / a.kv_heads, kv_head = task % a.kv_heads, dim = a.head_dim;
  const int64_t position = a.positions[sequence];
  const int64_t offset = (a.slots[sequence] * a.kv_heads + kv_head) * a.capacity * dim;
  scalar_t* keys = static_cast<scalar_t*>(a.keys) + offset;
  scalar_t* values = static_cast<scalar_t*>(a.values) + offset;
  std::memcpy(keys + position * dim, at_head<scalar_t>(a.k, sequence, kv_head), dim * sizeof(scalar_t));
  std::memcpy(values + position * dim, at_head<scalar_t>(a.v, sequence, kv_head), dim * sizeof(scalar_t));

  const int64_t first = a.window > 0 ? std::max<int64_t>(0, position + 1 - a.window) : 0;
  const int64_t count = position + 1 - first;
  opmath_t *q = scratch, *row = q + dim, *sum = row + dim, *weights = sum + dim;
  const opmath_t scale = 1 / std::sqrt(static_cast<opmath_t>(dim));
  for (int64_t g = 0; g < a.group; ++g) {
    const scalar_t* query = at_head<scalar_t>(a.q, sequence, kv_head * a.group + g);
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
    scalar_t* out = at_head<scalar_t>(a.out, sequence, kv_head * a.group + g);
    for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<scalar_t>(sum[d] / total);
  }
}

template <typename scalar_t>
MEGALORA_INLINE void attend_between(const DecodeAttentionParams& a, void* scratch, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    attend_one<scalar_t>(a, task, static_cast<at::opmath_type<scalar_t>*>(scratch));
  }
}

MEGALORA_MULTIVERSION void attend(const DecodeAttentionParams& a, void* scratch, int64_t begin, int64_t end) {
  switch (a.type) {
    case Type::float32: return attend_between<float>(a, scratch, begin, end);
    case Type::float64: return attend_between<double>(a, scratch, begin, end);
    case Type::bfloat16: return attend_between<at::BFloat16>(a, scratch, begin, end);
    case Type::float16: return attend_between<at::Half>(a, scratch, begin, end);
  }
}

// Of all sequences: the longest that one attends to, and their sum.
struct Lengths {
  int64_t longest = 0, all = 0;
};
Lengths checked_lengths(const DecodeAttentionParams& params, int64_t slots) {
  Lengths lengths;
  for (int64_t b = 0; b < params.sequences; ++b) {
    const int64_t slot = params.slots[b], position = params.positions[b];
    MEGALORA_CHECK(slot >= 0 && slot < slots, "slot ", slot);
    MEGALORA_CHECK(position >= 0 && position < params.capacity, "position ", position, " of ", params.capacity);
    const int64_t count = params.window > 0 ? std::min(params.window, position + 1) : position + 1;
    lengths.longest = std::max(lengths.longest, count);
    lengths.all += count;
  }
  return lengths;
}

}  // namespace

void decode_attention_(const Tensor& q_BHD, const Tensor& k_BKD, const Tensor& v_BKD, const Tensor& keys_SKCD,
                       const Tensor& values_SKCD, const Tensor& slots_B, const Tensor& positions_B, int64_t window,
                       const Tensor& out_BHD, const OptionalTensor& cos, const OptionalTensor& sin,
                       const OptionalTensor&) {
  MEGALORA_CHECK(!cos && !sin, "q and k are rotated by split_rope_ on a CPU");
  const int64_t sequences = q_BHD.size(0), dim = q_BHD.size(2), kv_heads = k_BKD.size(1);
  const auto dtype = q_BHD.scalar_type();
  for (const Tensor* x : {&q_BHD, &k_BKD, &v_BKD, &out_BHD}) {
    MEGALORA_CHECK(x->dim() == 3 && x->size(0) == sequences && x->size(2) == dim, x->sizes());
    MEGALORA_CHECK(x->stride(2) == 1 && x->scalar_type() == dtype, x->strides(), " of ", x->scalar_type());
  }
  MEGALORA_CHECK(v_BKD.size(1) == kv_heads && q_BHD.size(1) % kv_heads == 0, q_BHD.sizes(), " and ", v_BKD.sizes());
  for (const Tensor* x : {&keys_SKCD, &values_SKCD}) {
    MEGALORA_CHECK(x->dim() == 4 && x->size(1) == kv_heads && x->size(3) == dim, x->sizes());
    MEGALORA_CHECK(x->is_contiguous() && x->scalar_type() == dtype, x->strides(), " of ", x->scalar_type());
  }
  const Tensor slots = slots_B.contiguous(), positions = positions_B.contiguous();
  for (const Tensor* x : {&slots, &positions}) {
    MEGALORA_CHECK(x->scalar_type() == at::kLong && x->numel() == sequences, x->sizes(), " of ", x->scalar_type());
  }
  DecodeAttentionParams params{};
  params.q = heads_of(q_BHD);
  params.k = heads_of(k_BKD);
  params.v = heads_of(v_BKD);
  params.out = heads_of(out_BHD);
  params.keys = keys_SKCD.mutable_data_ptr();
  params.values = values_SKCD.mutable_data_ptr();
  params.slots = slots.const_data_ptr<int64_t>();
  params.positions = positions.const_data_ptr<int64_t>();
  params.sequences = sequences;
  params.kv_heads = kv_heads;
  params.group = q_BHD.size(1) / kv_heads;
  params.capacity = keys_SKCD.size(2);
  params.head_dim = dim;
  params.window = window;
  params.type = type_of(q_BHD);
  const Lengths lengths = checked_lengths(params, keys_SKCD.size(0));
  if (sequences == 0) return;
  // Products of a task, on average.
  const int64_t each = std::max<int64_t>(1, lengths.all / sequences * params.group * dim);
  at::parallel_for(0, sequences * kv_heads, std::max<int64_t>(1, kProductsPerTask / each),
                   [&](int64_t begin, int64_t end) {
                     std::vector<double> scratch(3 * dim + lengths.longest);
                     attend(params, scratch.data(), begin, end);
                   });
}

}  // namespace megalora::cpu
