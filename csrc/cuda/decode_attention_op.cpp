// The attention of one new token of each of a few sequences over a cache, on CUDA.
#include <ATen/ops/empty.h>

#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {
namespace {

// [B, heads, D]
Heads checked_heads(const Tensor& x, const Tensor& like) {
  MEGALORA_CHECK(x.dim() == 3 && x.size(0) == like.size(0) && x.size(2) == like.size(2), x.sizes());
  check_rows(x, like);
  return heads_of(x);
}

}  // namespace

// What slots and positions hold is not checked: they are on the device. They must be inside the cache.
void decode_attention_(const Tensor& q_BHD, const Tensor& k_BKD, const Tensor& v_BKD, const Tensor& keys_SKCD,
                       const Tensor& values_SKCD, const Tensor& slots_B, const Tensor& positions_B, int64_t window,
                       const Tensor& out_BHD, const OptionalTensor& cos, const OptionalTensor& sin,
                       const OptionalTensor& arrived) {
  const int64_t sequences = q_BHD.size(0), kv_heads = k_BKD.size(1), dim = q_BHD.size(2);
  MEGALORA_CHECK(q_BHD.scalar_type() == at::kBFloat16 || q_BHD.scalar_type() == at::kHalf, q_BHD.scalar_type());
  MEGALORA_CHECK(kv_heads > 0 && q_BHD.size(1) % kv_heads == 0, q_BHD.sizes(), " and ", k_BKD.sizes());
  MEGALORA_CHECK(dim == kSmallHeadDim || dim == kLargeHeadDim, q_BHD.sizes());
  MEGALORA_CHECK(q_BHD.size(1) / kv_heads <= kMostQueriesPerHead, q_BHD.sizes(), " and ", k_BKD.sizes());
  MEGALORA_CHECK(v_BKD.size(1) == kv_heads && out_BHD.sizes() == q_BHD.sizes(), v_BKD.sizes(), " ", out_BHD.sizes());
  MEGALORA_CHECK(out_BHD.is_contiguous(), out_BHD.strides());
  for (const Tensor* x : {&keys_SKCD, &values_SKCD}) {
    check_rows(*x, q_BHD);
    MEGALORA_CHECK(x->dim() == 4 && x->size(1) == kv_heads && x->size(3) == dim && x->is_contiguous(), x->sizes());
  }
  for (const Tensor* x : {&slots_B, &positions_B}) {
    MEGALORA_CHECK(x->scalar_type() == at::kLong && x->numel() == sequences && x->is_contiguous(), x->sizes());
    MEGALORA_CHECK(x->device() == q_BHD.device(), x->device());
  }
  MEGALORA_CHECK(cos.has_value() == sin.has_value(), "cos and sin go together");
  for (const OptionalTensor* x : {&cos, &sin}) {
    if (!*x) continue;
    MEGALORA_CHECK((*x)->sizes() == at::IntArrayRef({sequences, dim / 2}) && (*x)->is_contiguous(), (*x)->sizes());
    check_rows(**x, q_BHD);
  }
  MEGALORA_CHECK(arrived && arrived->scalar_type() == at::kInt && arrived->is_contiguous(), "arrived");
  MEGALORA_CHECK(arrived->numel() >= sequences * kv_heads && arrived->device() == q_BHD.device(), arrived->sizes());
  DecodeAttentionParams params{};
  params.q = checked_heads(q_BHD, q_BHD);
  params.k = checked_heads(k_BKD, q_BHD);
  params.v = checked_heads(v_BKD, q_BHD);
  params.out = checked_heads(out_BHD, q_BHD);
  params.keys = keys_SKCD.mutable_data_ptr();
  params.values = values_SKCD.mutable_data_ptr();
  params.slots = slots_B.const_data_ptr<int64_t>();
  params.positions = positions_B.const_data_ptr<int64_t>();
  params.sequences = sequences;
  params.kv_heads = kv_heads;
  params.group = q_BHD.size(1) / kv_heads;
  params.capacity = keys_SKCD.size(2);
  params.head_dim = dim;
  params.window = window;
  params.type = type_of(q_BHD);
  params.cos = cos ? cos->const_data_ptr() : nullptr;
  params.sin = sin ? sin->const_data_ptr() : nullptr;
  params.arrived = arrived->mutable_data_ptr<int>();
  params.splits = decode_splits(sequences, kv_heads, params.capacity);
  if (sequences == 0) return;
  const c10::cuda::CUDAGuard guard(q_BHD.device());
  const Tensor partial =
      at::empty({sequences, kv_heads, params.splits, params.group, 2 + dim}, q_BHD.options().dtype(at::kFloat));
  params.partial = partial.mutable_data_ptr<float>();
  launch_decode_attention(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megalora::cuda
