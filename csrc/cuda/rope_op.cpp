// The cut of qkv into heads with the rotation of q and k, both ways, on CUDA.
#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {
namespace {

void split_rope(bool backward, const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& q,
                const Tensor& k, const Tensor& v) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  const int64_t heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(2);
  MEGALORA_CHECK(qkv.is_contiguous() && qkv.size(1) == (heads + 2 * kv_heads) * head_dim, qkv.sizes(), q.sizes(),
                 k.sizes());
  MEGALORA_CHECK(head_dim % (2 * kOctet) == 0 && cos.is_contiguous() && sin.is_contiguous(), "head_dim ", head_dim);
  for (const Tensor* side : {&qkv, &cos, &sin, &q, &k, &v}) check_rows(*side, qkv);
  SplitRopeParams params{};
  params.qkv = data_of(qkv);
  params.q = heads_of(q);
  params.k = heads_of(k);
  params.v = heads_of(v);
  params.cos = cos.const_data_ptr();
  params.sin = sin.const_data_ptr();
  params.tokens = qkv.size(0);
  params.head_dim = head_dim;
  params.backward = backward;
  params.type = type_of(qkv);
  if (qkv.numel() == 0) return;
  launch_split_rope(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
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

}  // namespace megalora::cuda
