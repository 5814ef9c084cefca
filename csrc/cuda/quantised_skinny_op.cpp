// Linears of a few rows on quantised weights, on CUDA.
#include <ATen/ops/empty.h>

#include "cuda/beside_checks.h"
#include "cuda/checks.h"
#include "cuda/launch.h"

namespace megalora::cuda {
namespace {

constexpr int64_t kBlock = 64, kNestedNumbers = 256;  // of NF4

// Checks x [M, I + C], branch [O, C], bias [O] and sets what both formats take of them; y [M, `outputs`] is new.
template <typename Params>
Tensor begin(Params& params, const Tensor& x, int64_t most_rows, int64_t in_features, const Tensor& branch,
             const Tensor& bias, int64_t outputs) {
  check_matrix(x, x);
  MEGALORA_CHECK(x.size(0) <= most_rows, x.sizes());
  MEGALORA_CHECK(branch.dim() == 2 && branch.size(1) % kOctet == 0, branch.sizes());
  MEGALORA_CHECK(x.size(1) == in_features + branch.size(1), x.sizes(), " for ", in_features, " and ", branch.sizes());
  if (branch.size(1) > 0) check_rows(branch, x);  // without adapters there is none, and its rows have no length
  if (bias.defined()) {
    MEGALORA_CHECK(bias.numel() == branch.size(0) && bias.scalar_type() == x.scalar_type(), bias.sizes());
    params.bias = bias.const_data_ptr();
  }
  Tensor y = at::empty({x.size(0), outputs}, x.options());
  params.x = matrix_of(x);
  params.branch = matrix_of(branch);
  params.y = y.mutable_data_ptr();
  params.rows = x.size(0);
  params.in_features = in_features;
  params.out_features = branch.size(0);
  params.room = branch.size(1);
  params.type = type_of(x);
  return y;
}

Tensor contiguous_or_none(const OptionalTensor& bias) { return bias ? bias->contiguous() : Tensor(); }

Tensor fp8_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& branch,
                  const OptionalTensor& bias, bool kept, const BesideArguments& given) {
  const bool bytes = codes.scalar_type() == at::kFloat8_e4m3fn || codes.scalar_type() == at::kByte;
  MEGALORA_CHECK(codes.dim() == 2 && bytes && codes.size(1) % 16 == 0, codes.sizes(), " of ", codes.scalar_type());
  MEGALORA_CHECK(branch.size(0) == codes.size(0), branch.sizes(), " for ", codes.sizes());
  check_rows(codes, codes);
  check_floats(scale, codes.size(0), x);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = contiguous_or_none(bias);
  Fp8SkinnyParams params{};
  params.beside = beside_of(given, x, codes.size(1), codes.size(0));
  Tensor y = begin(params, x, kMostSkinnyRows, codes.size(1), branch, dense, outputs_left(given, codes.size(0)));
  if (y.numel() == 0) return y;
  params.codes = matrix_of(codes);
  params.scale = scale.const_data_ptr<float>();
  params.kept = kept;
  launch_fp8_skinny(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace

Tensor fp8_skinny_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& branch,
                         const OptionalTensor& bias, bool kept) {
  return fp8_linear(x, codes, scale, branch, bias, kept, {{}, {}, {}, 0, false, false, "none"});
}

Tensor fp8_step_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& branch,
                       const OptionalTensor& bias, bool kept, const OptionalTensor& delta, const OptionalTensor& sum,
                       const OptionalTensor& norm, double eps, bool precise, bool offset, std::string_view gate) {
  return fp8_linear(x, codes, scale, branch, bias, kept, {delta, sum, norm, eps, precise, offset, gate});
}

Tensor nf4_skinny_linear(const Tensor& x, at::TensorList codes, at::TensorList absmax, at::TensorList scale,
                         at::TensorList numbers, at::TensorList offset, at::IntArrayRef nested_block,
                         at::IntArrayRef first, at::IntArrayRef width, const Tensor& branch,
                         const OptionalTensor& bias) {
  const size_t count = codes.size();
  MEGALORA_CHECK(0 < count && count <= static_cast<size_t>(kMostNf4Parts), count, " parts");
  MEGALORA_CHECK(absmax.size() == count && first.size() == count && width.size() == count, "a list lacks a part");
  MEGALORA_CHECK(scale.size() == count && numbers.size() == count && offset.size() == count, "a list lacks a part");
  MEGALORA_CHECK(nested_block.size() == count, "a list lacks a part");
  const int64_t in_features = x.size(1) - branch.size(1), blocks = in_features / kBlock;
  MEGALORA_CHECK(in_features > 0 && in_features % kBlock == 0, x.sizes(), " and ", branch.sizes());
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = contiguous_or_none(bias);
  Nf4SkinnyParams params{};
  Tensor y = begin(params, x, kMostNf4Rows, in_features, branch, dense, branch.size(0));
  for (size_t i = 0; i < count; ++i) {
    MEGALORA_CHECK(codes[i].scalar_type() == at::kByte && codes[i].dim() == 2 && codes[i].is_contiguous(), "codes");
    MEGALORA_CHECK(codes[i].size(1) == in_features / 2, codes[i].sizes(), " for ", x.sizes());
    check_rows(codes[i], codes[i]);
    const int64_t outputs = codes[i].size(0);
    MEGALORA_CHECK(absmax[i].is_contiguous() && absmax[i].numel() == outputs * blocks, absmax[i].sizes());
    MEGALORA_CHECK(absmax[i].scalar_type() == at::kByte, absmax[i].scalar_type());
    Nf4Part& part = params.parts[params.count++];
    part.codes = codes[i].const_data_ptr<uint8_t>();
    part.absmax = absmax[i].const_data_ptr<uint8_t>();
    part.outputs = outputs;
    part.first_output = i == 0 ? 0 : params.parts[i - 1].first_output + params.parts[i - 1].outputs;
    part.first = first[i];
    part.width = width[i];
    const int64_t last = first[i] + (outputs - 1) * width[i] + blocks - 1;
    MEGALORA_CHECK(nested_block[i] > 0 && (nested_block[i] & (nested_block[i] - 1)) == 0, nested_block);
    MEGALORA_CHECK(last < INT32_MAX && last / nested_block[i] < scale[i].numel(), scale[i].sizes(), " for ", last);
    check_floats(scale[i], scale[i].numel(), x);
    check_floats(numbers[i], kNestedNumbers, x);
    check_floats(offset[i], 1, x);
    part.scale = scale[i].const_data_ptr<float>();
    part.numbers = numbers[i].const_data_ptr<float>();
    part.offset = offset[i].const_data_ptr<float>();
    while (int64_t{1} << part.nested_shift < nested_block[i]) ++part.nested_shift;
  }
  const Nf4Part& end = params.parts[params.count - 1];
  MEGALORA_CHECK(end.first_output + end.outputs == branch.size(0), branch.sizes(), " for ", end.first_output);
  if (y.numel() == 0) return y;
  launch_nf4_skinny(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace megalora::cuda
