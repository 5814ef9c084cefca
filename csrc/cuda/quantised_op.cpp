// Quantised weights on CUDA.
#include <ATen/ops/zeros.h>

#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {
namespace {

constexpr int64_t kBlock = 64;  // of NF4

bool is_half(const Tensor& x) { return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf; }

// e4m3 codes, or bytes.
bool is_codes(const Tensor& x) { return x.scalar_type() == at::kFloat8_e4m3fn || x.scalar_type() == at::kByte; }

void check_out(const Tensor& out, const Tensor& like) {
  MEGALORA_CHECK(out.dim() == 2 && is_half(out) && out.size(1) % kOctet == 0, out.sizes(), " of ", out.scalar_type());
  MEGALORA_CHECK(out.device() == like.device(), out.device(), " and ", like.device());
  check_rows(out, out);
}

}  // namespace

void fp8_quantise_(const Tensor& x, const OptionalTensor& factor, const Tensor& codes, const Tensor& scale,
                   const OptionalTensor& z, const OptionalTensor& z_factor) {
  check_matrix(x, x);
  MEGALORA_CHECK(x.size(1) <= kLargestFp8Row, x.sizes());
  MEGALORA_CHECK(codes.dim() == 2 && codes.size(0) == x.size(0) && codes.size(1) >= x.size(1), codes.sizes());
  MEGALORA_CHECK(is_codes(codes) && codes.is_contiguous() && codes.size(1) % kOctet == 0, codes.sizes());
  MEGALORA_CHECK(z.has_value() == z_factor.has_value(), "z and its factor go together");
  const int64_t rank = z ? z_factor->numel() : 0, terms = codes.size(1) - x.size(1);
  MEGALORA_CHECK(rank <= kLargestFp8Branch && (z ? 3 * rank <= terms : terms == 0), codes.sizes(), " for rank ", rank);
  if (z) {
    check_matrix(*z, x);
    check_floats(*z_factor, rank, x);
    MEGALORA_CHECK(z->size(0) == x.size(0) && z->size(1) >= rank, z->sizes());
  }
  MEGALORA_CHECK(codes.device() == x.device(), codes.device());
  check_floats(scale, x.size(0), x);
  if (factor) check_floats(*factor, x.size(1), x);
  if (x.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  Fp8QuantiseParams params{};
  params.x = matrix_of(x);
  params.factor = factor ? factor->const_data_ptr<float>() : nullptr;
  params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  params.scale = scale.mutable_data_ptr<float>();
  if (z) {
    params.z = matrix_of(*z);
    params.z_factor = z_factor->const_data_ptr<float>();
  }
  params.rank = rank;
  params.terms = terms;
  params.rows = x.size(0);
  params.columns = x.size(1);
  params.type = type_of(x);
  launch_fp8_quantise(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void fp8_branch_(const Tensor& branch, const Tensor& scale, const Tensor& codes, const Tensor& factor) {
  MEGALORA_CHECK(branch.dim() == 2 && is_half(branch) && branch.stride(1) == 1, branch.sizes());
  const int64_t rows = branch.size(0), rank = branch.size(1);
  MEGALORA_CHECK(codes.dim() == 2 && is_codes(codes) && codes.stride(1) == 1, codes.sizes());
  MEGALORA_CHECK(codes.size(0) == rows && codes.size(1) >= 3 * rank, codes.sizes(), " for ", branch.sizes());
  MEGALORA_CHECK(codes.device() == branch.device(), codes.device());
  check_floats(scale, rows, branch);
  check_floats(factor, rank, branch);
  if (branch.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(branch.device());
  const Tensor largest = at::zeros({rank}, scale.options());
  Fp8BranchParams params{};
  params.branch = matrix_of(branch);
  params.codes = matrix_of(codes);
  params.scale = scale.const_data_ptr<float>();
  params.largest = largest.mutable_data_ptr<float>();
  params.factor = factor.mutable_data_ptr<float>();
  params.rows = rows;
  params.rank = rank;
  params.terms = codes.size(1);
  params.type = type_of(branch);
  launch_fp8_branch(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void fp8_turn_(const Tensor& codes, const Tensor& out) {
  MEGALORA_CHECK(codes.dim() == 2 && out.dim() == 2 && is_codes(codes) && is_codes(out), codes.sizes());
  MEGALORA_CHECK(codes.size(0) == out.size(1) && codes.size(1) == out.size(0), codes.sizes(), " and ", out.sizes());
  MEGALORA_CHECK(codes.size(0) % kTurned == 0 && codes.size(1) % kTurned == 0, codes.sizes());
  check_rows(codes, codes);
  check_rows(out, codes);
  if (codes.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(codes.device());
  launch_turn({matrix_of(codes), matrix_of(out), codes.size(0), codes.size(1)}, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void fp8_decode_(const Tensor& codes, const Tensor& scale, int64_t block, int64_t phase, const Tensor& out) {
  check_out(out, codes);
  MEGALORA_CHECK(is_codes(codes) && codes.sizes() == out.sizes() && codes.stride(1) == 1, codes.sizes());
  MEGALORA_CHECK(codes.stride(0) % kOctet == 0 && reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % kOctet == 0,
                 codes.strides());
  MEGALORA_CHECK(scale.dim() == 2 && block > 0 && phase >= 0, scale.sizes());
  MEGALORA_CHECK(scale.size(1) == 1 || (out.size(1) - 1 + phase) / block < scale.size(1), scale.sizes());
  check_floats(scale, out.size(0) * scale.size(1), out);
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  Fp8DecodeParams params{};
  params.codes = matrix_of(codes);
  params.out = matrix_of(out);
  params.scale = scale.const_data_ptr<float>();
  params.rows = out.size(0);
  params.columns = out.size(1);
  params.blocks = scale.size(1);
  params.block = block;
  params.phase = phase;
  params.type = type_of(out);
  launch_fp8_decode(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void nf4_decode_(const Tensor& codes, const Tensor& absmax, const OptionalTensor& scale, const OptionalTensor& numbers,
                 const OptionalTensor& offset, int64_t nested_block, int64_t first, int64_t width, const Tensor& out) {
  check_out(out, codes);
  MEGALORA_CHECK(out.size(1) % kBlock == 0, out.sizes());
  MEGALORA_CHECK(codes.scalar_type() == at::kByte && codes.is_contiguous() && codes.numel() == out.numel() / 2,
                 codes.sizes());
  MEGALORA_CHECK(absmax.is_contiguous() && absmax.numel() == out.numel() / kBlock, absmax.sizes());
  MEGALORA_CHECK(absmax.scalar_type() == (scale ? at::kByte : at::kFloat), absmax.scalar_type());
  MEGALORA_CHECK(scale.has_value() == numbers.has_value() && scale.has_value() == offset.has_value(), "all or none");
  if (out.numel() == 0) return;
  const int64_t weights = offset ? offset->numel() : 1, weight_rows = out.size(0) / weights;
  if (scale) {
    check_floats(*scale, scale->numel(), out);
    check_floats(*numbers, 256, out);
    check_floats(*offset, weights, out);
    MEGALORA_CHECK(out.size(0) % weights == 0 && scale->numel() % weights == 0, scale->sizes(), " of ", weights);
    const int64_t last = first + (weight_rows - 1) * width + out.size(1) / kBlock - 1;
    MEGALORA_CHECK(nested_block > 0 && last / nested_block < scale->numel() / weights, scale->sizes());
  }
  const c10::cuda::CUDAGuard guard(out.device());
  Nf4DecodeParams params{};
  params.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  params.absmax = absmax.const_data_ptr();
  if (scale) {
    params.scale = scale->const_data_ptr<float>();
    params.numbers = numbers->const_data_ptr<float>();
    params.offset = offset->const_data_ptr<float>();
    params.scales = scale->numel() / weights;
  }
  params.weight_rows = weight_rows;
  params.out = matrix_of(out);
  params.rows = out.size(0);
  params.columns = out.size(1);
  params.first = first;
  params.width = width;
  params.nested_block = nested_block;
  params.type = type_of(out);
  launch_nf4_decode(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void nf4_to_e4m3_(const Tensor& codes, const Tensor& absmax, const OptionalTensor& scale, const OptionalTensor& numbers,
                  const OptionalTensor& offset, int64_t nested_block, int64_t first, int64_t width,
                  const Tensor& row_scale, const OptionalTensor& terms, const Tensor& out, bool turned) {
  MEGALORA_CHECK(codes.dim() == 2 && codes.scalar_type() == at::kByte && codes.is_contiguous(), codes.sizes());
  const int64_t rows = codes.size(0), columns = 2 * codes.size(1), blocks = columns / kBlock;
  MEGALORA_CHECK(rows >= kLeastNf4ToE4m3Rows && columns > 0, codes.sizes());
  MEGALORA_CHECK(columns % kBlock == 0 && codes.numel() < INT32_MAX / 2, codes.sizes());
  MEGALORA_CHECK(reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % kOctet == 0, "codes not on 8 bytes");
  MEGALORA_CHECK(absmax.is_contiguous() && absmax.numel() == rows * blocks, absmax.sizes(), " for ", codes.sizes());
  MEGALORA_CHECK(absmax.scalar_type() == (scale ? at::kByte : at::kFloat), absmax.scalar_type());
  MEGALORA_CHECK(scale.has_value() == numbers.has_value() && scale.has_value() == offset.has_value(), "all or none");
  check_floats(row_scale, rows, codes);
  MEGALORA_CHECK(out.dim() == 2 && is_codes(out), out.sizes(), " of ", out.scalar_type());
  check_rows(out, out);
  MEGALORA_CHECK(out.device() == codes.device(), out.device(), " and ", codes.device());
  Nf4ToE4m3Params params{};
  if (terms) {
    MEGALORA_CHECK(!turned && is_codes(*terms) && terms->dim() == 2 && terms->size(0) == rows, terms->sizes());
    MEGALORA_CHECK(terms->size(1) % kAlignment == 0 && terms->device() == codes.device(), terms->sizes());
    check_rows(*terms, *terms);
    params.terms = matrix_of(*terms);
    params.term_columns = terms->size(1);
  }
  const int64_t height = turned ? columns : rows, across = turned ? rows : columns + params.term_columns;
  MEGALORA_CHECK(out.size(0) == height && out.size(1) == across && across % kAlignment == 0, out.sizes());
  if (scale) {
    check_floats(*scale, scale->numel(), codes);
    check_floats(*numbers, 256, codes);
    check_floats(*offset, 1, codes);
    MEGALORA_CHECK(nested_block > 0 && (nested_block & (nested_block - 1)) == 0, nested_block);
    const int64_t last = first + (rows - 1) * width + blocks - 1;
    MEGALORA_CHECK(last < INT32_MAX && last / nested_block < scale->numel(), scale->sizes(), " for ", last);
    params.scale = scale->const_data_ptr<float>();
    params.numbers = numbers->const_data_ptr<float>();
    params.offset = offset->const_data_ptr<float>();
    while (int64_t{1} << params.nested_shift < nested_block) ++params.nested_shift;
  }
  const c10::cuda::CUDAGuard guard(codes.device());
  params.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  params.absmax = absmax.const_data_ptr();
  params.row_scale = row_scale.const_data_ptr<float>();
  params.out = matrix_of(out);
  params.rows = rows;
  params.columns = columns;
  params.first = first;
  params.width = width;
  params.turned = turned;
  launch_nf4_to_e4m3(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megalora::cuda
