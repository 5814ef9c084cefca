// The ops of decode.cpp in a CUDA build: checks, and the kernels of decode_cuda.cu.
#if defined(MEGALORA_CUDA)
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "common.h"
#include "decode_cuda.h"

namespace megalora {
namespace {

bool is_bfloat16(const at::Tensor& x) {
  MEGALORA_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf, "got ", x.scalar_type());
  return x.scalar_type() == at::kBFloat16;
}

// The last dimension is adjacent, and the others keep to 16 bytes.
void check_octets(const at::Tensor& x, const at::Tensor& like) {
  MEGALORA_CHECK(x.scalar_type() == like.scalar_type(), x.scalar_type(), " beside ", like.scalar_type());
  MEGALORA_CHECK(x.device() == like.device(), x.device(), " beside ", like.device());
  MEGALORA_CHECK(x.size(-1) % 8 == 0 && x.stride(-1) == 1, x.sizes(), " strides ", x.strides());
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    MEGALORA_CHECK(x.size(i) < 2 || x.stride(i) % 8 == 0, x.sizes(), " strides ", x.strides());
  }
  MEGALORA_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, "the data are not 16-byte aligned");
}

at::Tensor skinny_linear(const at::Tensor& x_MI, const at::Tensor& weight_OI, const std::optional<at::Tensor>& bias_O) {
  MEGALORA_CHECK(x_MI.dim() == 2 && weight_OI.dim() == 2, x_MI.sizes(), " and ", weight_OI.sizes());
  MEGALORA_CHECK(x_MI.size(0) <= kMostSkinnyRows, x_MI.sizes());
  MEGALORA_CHECK(x_MI.size(1) == weight_OI.size(1), x_MI.sizes(), " and ", weight_OI.sizes());
  const bool bfloat16 = is_bfloat16(x_MI);
  check_octets(x_MI, x_MI);
  check_octets(weight_OI, x_MI);
  at::Tensor bias;
  if (bias_O.has_value()) {
    bias = bias_O->contiguous();
    MEGALORA_CHECK(bias.numel() == weight_OI.size(0) && bias.scalar_type() == x_MI.scalar_type(), bias.sizes());
  }
  const c10::cuda::CUDAGuard guard(x_MI.device());
  at::Tensor y = at::empty({x_MI.size(0), weight_OI.size(0)}, x_MI.options());
  if (y.numel() == 0) return y;
  C10_CUDA_CHECK(launch_skinny_linear(y.mutable_data_ptr(), x_MI.const_data_ptr(), x_MI.stride(0),
                                      weight_OI.const_data_ptr(), weight_OI.stride(0),
                                      bias.defined() ? bias.const_data_ptr() : nullptr, x_MI.size(0), x_MI.size(1),
                                      weight_OI.size(0), bfloat16, c10::cuda::getCurrentCUDAStream()));
  return y;
}

DecodeHeads heads_of(const at::Tensor& x, const at::Tensor& like) {
  MEGALORA_CHECK(x.dim() == 3 && x.size(0) == like.size(0) && x.size(2) == like.size(2), x.sizes());
  check_octets(x, like);
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

// Slots and positions are not checked: they are on the device. They must be inside the cache.
void decode_attention_(const at::Tensor& q_BHD, const at::Tensor& k_BKD, const at::Tensor& v_BKD, at::Tensor& keys_SKCD,
                       at::Tensor& values_SKCD, const at::Tensor& slots_B, const at::Tensor& positions_B,
                       int64_t window, at::Tensor& out_BHD) {
  const int64_t sequences = q_BHD.size(0), kv_heads = k_BKD.size(1), dim = q_BHD.size(2);
  const bool bfloat16 = is_bfloat16(q_BHD);
  MEGALORA_CHECK(kv_heads > 0 && q_BHD.size(1) % kv_heads == 0, q_BHD.sizes(), " and ", k_BKD.sizes());
  const int64_t group = q_BHD.size(1) / kv_heads, capacity = keys_SKCD.size(2);
  MEGALORA_CHECK((dim == 64 || dim == 128) && group <= kMostQueriesPerHead, q_BHD.sizes(), " and ", k_BKD.sizes());
  MEGALORA_CHECK(v_BKD.size(1) == kv_heads && out_BHD.sizes() == q_BHD.sizes(), v_BKD.sizes(), " ", out_BHD.sizes());
  MEGALORA_CHECK(out_BHD.is_contiguous(), out_BHD.strides());
  for (const at::Tensor* x : {&keys_SKCD, &values_SKCD}) {
    check_octets(*x, q_BHD);
    MEGALORA_CHECK(x->dim() == 4 && x->size(1) == kv_heads && x->size(3) == dim && x->is_contiguous(), x->sizes());
  }
  for (const at::Tensor* x : {&slots_B, &positions_B}) {
    MEGALORA_CHECK(x->scalar_type() == at::kLong && x->numel() == sequences && x->is_contiguous(), x->sizes());
    MEGALORA_CHECK(x->device() == q_BHD.device(), x->device());
  }
  if (sequences == 0) return;
  const c10::cuda::CUDAGuard guard(q_BHD.device());
  const int64_t splits = decode_splits(sequences, kv_heads, capacity);
  const at::Tensor partial =
      at::empty({sequences, kv_heads, splits, group, 2 + dim}, q_BHD.options().dtype(at::kFloat));
  const DecodeAttention job{heads_of(q_BHD, q_BHD),
                            heads_of(k_BKD, q_BHD),
                            heads_of(v_BKD, q_BHD),
                            out_BHD.mutable_data_ptr(),
                            keys_SKCD.mutable_data_ptr(),
                            values_SKCD.mutable_data_ptr(),
                            slots_B.const_data_ptr<int64_t>(),
                            positions_B.const_data_ptr<int64_t>(),
                            partial.mutable_data_ptr<float>(),
                            sequences,
                            kv_heads,
                            group,
                            capacity,
                            dim,
                            window,
                            splits};
  C10_CUDA_CHECK(launch_decode_attention(job, bfloat16, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(megalora, CUDA, m) {
  m.impl("skinny_linear", &skinny_linear);
  m.impl("decode_attention_", &decode_attention_);
}

}  // namespace megalora
#endif
