// What the ops on the CPU share: checks of tensors, their data and type, the cut of rows over threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "check.h"
#include "ops.h"
#include "params.h"

namespace megalora::cpu {

constexpr int64_t kElementsPerTask = 16384;  // below this (about 10 us of work) another thread does not pay

template <typename Params>
void for_rows(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t rows, int64_t row_size) {
  if (rows == 0 || row_size == 0) return;
  at::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerTask / row_size),
                   [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return Type::float64;
    case at::kFloat: return Type::float32;
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    default: MEGALORA_CHECK(false, "no CPU kernel for dtype ", x.scalar_type());
  }
}

// The type of the arithmetic.
inline at::ScalarType wide_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline void* data_of(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }
inline void* data_or_null(const OptionalTensor& x) { return x ? data_of(*x) : nullptr; }
inline Matrix matrix_of(const Tensor& x) { return {data_of(x), x.stride(0)}; }
inline Heads heads_of(const Tensor& x) { return {data_of(x), x.size(1), x.stride(0), x.stride(1)}; }

inline void check_rows(const Tensor& x, const Tensor& like) {
  MEGALORA_CHECK(x.device() == like.device(), x.device(), " and ", like.device());
  MEGALORA_CHECK(x.scalar_type() == like.scalar_type(), x.scalar_type(), " and ", like.scalar_type());
  MEGALORA_CHECK(x.numel() == 0 || x.size(-1) < 2 || x.stride(-1) == 1, "strides ", x.strides());
}

inline void check_matrix(const Tensor& x, at::IntArrayRef sizes, const Tensor& like) {
  MEGALORA_CHECK(x.sizes() == sizes, x.sizes(), " for ", sizes);
  check_rows(x, like);
}

// Rows without gaps.
inline void check_dense(const Tensor& x, at::IntArrayRef sizes, const Tensor& like) {
  check_matrix(x, sizes, like);
  MEGALORA_CHECK(x.is_contiguous(), "strides ", x.strides());
}

// What goes with rows, one number or a few for each, in the type of the arithmetic.
inline void check_wide(const Tensor& x, int64_t numel, const Tensor& like) {
  MEGALORA_CHECK(x.scalar_type() == wide_type(like), x.scalar_type());
  MEGALORA_CHECK(x.is_contiguous() && x.numel() == numel, x.sizes(), ", strides ", x.strides());
}

}  // namespace megalora::cpu
