// What the ops on CUDA share: checks of tensors, their data, type, device and stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "check.h"
#include "kernel_limits.h"
#include "ops.h"
#include "params.h"

namespace megalora::cuda {

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    case at::kFloat: return Type::float32;
    default: TORCH_CHECK(false, "megalora: dtype ", x.scalar_type(), " has no CUDA kernel: use the torch reference");
  }
}

inline cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// For a tensor that the schema marks as written but a parameter shared with what is read makes const.
inline void* data_of(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }
inline void* data_or_null(const OptionalTensor& x) { return x ? data_of(*x) : nullptr; }
inline Matrix matrix_of(const Tensor& x) { return {data_of(x), x.stride(0)}; }
inline Heads heads_of(const Tensor& x) { return {data_of(x), x.size(1), x.stride(0), x.stride(1)}; }

// Rows of adjacent elements, of the dtype and on the device of `like`, each on kAlignment bytes.
inline void check_rows(const Tensor& x, const Tensor& like) {
  MEGALORA_CHECK(x.scalar_type() == like.scalar_type(), x.scalar_type(), " beside ", like.scalar_type());
  MEGALORA_CHECK(x.device() == like.device(), x.device(), " beside ", like.device());
  MEGALORA_CHECK(x.numel() == 0 || x.stride(-1) == 1, "strides ", x.strides());
  MEGALORA_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment == 0, "the data are not 16-byte aligned");
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    MEGALORA_CHECK(x.size(d) < 2 || x.stride(d) * x.element_size() % kAlignment == 0, "strides ", x.strides());
  }
}

// A matrix of 16-bit floats for the LoRA kernels.
inline void check_matrix(const Tensor& m, const Tensor& like) {
  MEGALORA_CHECK(m.dim() == 2, "got ", m.dim(), " dimensions");
  MEGALORA_CHECK(m.scalar_type() == at::kBFloat16 || m.scalar_type() == at::kHalf, "got ", m.scalar_type());
  MEGALORA_CHECK(m.size(1) % kOctet == 0, "got ", m.sizes());
  MEGALORA_CHECK(m.size(0) < INT32_MAX && m.size(1) < INT32_MAX, "got ", m.sizes());
  MEGALORA_CHECK(m.size(0) < 2 || m.stride(0) >= m.size(1), "strides ", m.strides());
  check_rows(m, like);
}

// Adjacent floats on the device of `like`.
inline void check_floats(const Tensor& x, int64_t count, const Tensor& like) {
  MEGALORA_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous(), "got ", x.scalar_type(), " ", x.strides());
  MEGALORA_CHECK(x.numel() == count && x.device() == like.device(), x.sizes(), " on ", x.device());
}

// A mask whose blocks of eight features are those of x.
inline Mask octet_mask(const MaskArguments& arguments, const Tensor& x) {
  const Mask mask = make_mask(arguments, x);
  MEGALORA_CHECK(mask.feature_offset % kOctet == 0, "feature_offset ", mask.feature_offset);
  return mask;
}

}  // namespace megalora::cuda
