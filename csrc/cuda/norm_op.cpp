// RMSNorm and LayerNorm on CUDA.
#include "cuda/checks.h"
#include "cuda/norm_params.h"

namespace megalora::cuda {
namespace {

// kind: rms, precise or layer, with "_offset" behind it where the weight is 1 + w; or none.
NormOf norm_of(std::string_view kind, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
               const Tensor& x) {
  NormOf norm{};
  norm.eps = eps;
  if (kind == "none") return norm;
  const std::string_view name = kind.substr(0, kind.find('_')), rest = kind.substr(name.size());
  MEGALORA_CHECK(rest.empty() || rest == "_offset", kind);
  norm.offset = !rest.empty();
  MEGALORA_CHECK(name == "rms" || name == "precise" || name == "layer", kind);
  norm.kind = name == "layer" ? NormKind::layer : name == "rms" ? NormKind::rms : NormKind::precise;
  MEGALORA_CHECK(weight || (norm.kind == NormKind::layer && !norm.offset), kind, " without a weight");
  MEGALORA_CHECK(!bias || norm.kind == NormKind::layer, kind, " with a bias");
  for (const OptionalTensor* each : {&weight, &bias}) {
    if (!*each) continue;
    MEGALORA_CHECK((*each)->dim() == 1 && (*each)->size(0) == x.size(1), (*each)->sizes(), " for ", x.sizes());
    check_rows(**each, x);
  }
  norm.weight = weight ? weight->const_data_ptr() : nullptr;
  norm.bias = bias ? bias->const_data_ptr() : nullptr;
  return norm;
}

// Rows that a block can hold.
void check_x(const Tensor& x) {
  MEGALORA_CHECK(x.dim() == 2, x.sizes());
  MEGALORA_CHECK(x.size(1) % kOctet == 0 && x.size(1) <= kLargestNorm, x.sizes());
  check_rows(x, x);
}

void check_dense(const OptionalTensor& other, const Tensor& x) {
  if (!other) return;
  MEGALORA_CHECK(other->is_contiguous() && other->sizes() == x.sizes(), other->sizes(), " for ", x.sizes());
  check_rows(*other, x);
}

void* statistics_of(const Tensor& statistics, NormKind kind, const Tensor& x) {
  check_floats(statistics, (kind == NormKind::layer ? 2 : 1) * x.size(0), x);
  return data_of(statistics);
}

NormAddend addend_of(const OptionalTensor& delta, const NormOf& own, const OptionalTensor& inverse, double scale,
                     const OptionalMask& mask, const NormOf& norm, const Tensor& x) {
  NormAddend addend{};
  check_dense(delta, x);
  addend.delta = data_or_null(delta);
  addend.norm = own;
  addend.scale = scale;
  MEGALORA_CHECK(own.kind == NormKind::none || (own.kind == norm.kind && own.kind != NormKind::layer && inverse),
                 "both norms are RMSNorms of one kind");
  MEGALORA_CHECK(own.kind == NormKind::none || x.element_size() == 2, "two norms: 16-bit floats, got ", x.dtype());
  if (inverse) {
    check_floats(*inverse, x.size(0), x);
    addend.inverse = data_of(*inverse);
  }
  if (mask) {
    MEGALORA_CHECK(x.element_size() == 2, "with a mask: 16-bit floats, got ", x.dtype());
    addend.mask = octet_mask(*mask, x);
  }
  return addend;
}

}  // namespace

void norm_(const Tensor& x, std::string_view kind, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
           const OptionalTensor& delta, std::string_view own_kind, const OptionalTensor& own_weight, double own_eps,
           double scale, const OptionalMask& mask, const OptionalTensor& own_inverse, const OptionalTensor& sum,
           const Tensor& y, const Tensor& statistics) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_x(x);
  MEGALORA_CHECK(y.sizes() == x.sizes(), x.sizes(), " and ", y.sizes());
  MEGALORA_CHECK(delta.has_value() == sum.has_value(), "delta and sum go together");
  check_rows(y, x);
  check_dense(sum, x);
  NormParams params{};
  params.x = matrix_of(x);
  params.y = matrix_of(y);
  params.norm = norm_of(kind, weight, bias, eps, x);
  MEGALORA_CHECK(params.norm.kind != NormKind::none, kind);
  const NormOf own = norm_of(own_kind, own_weight, {}, own_eps, x);
  params.addend = addend_of(delta, own, own_inverse, scale, mask, params.norm, x);
  params.sum = data_or_null(sum);
  params.statistics = statistics_of(statistics, params.norm.kind, x);
  params.rows = x.size(0);
  params.size = x.size(1);
  params.type = type_of(x);
  if (x.numel() == 0) return;
  launch_norm(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void norm_backward_(const Tensor& dy, const Tensor& x, std::string_view kind, const OptionalTensor& weight,
                    const Tensor& statistics, const OptionalTensor& residual, const OptionalTensor& delta,
                    std::string_view own_kind, const OptionalTensor& own_weight, const OptionalTensor& own_inverse,
                    double scale, const OptionalMask& mask, const Tensor& dx, const OptionalTensor& ddelta) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_x(x);
  MEGALORA_CHECK(dy.sizes() == x.sizes(), x.sizes(), " and ", dy.sizes());
  check_rows(dy, x);
  check_dense(dx, x);
  check_dense(residual, x);
  check_dense(ddelta, x);
  NormBackwardParams params{};
  params.dy = matrix_of(dy);
  params.x = matrix_of(x);
  params.norm = norm_of(kind, weight, {}, 0, x);
  MEGALORA_CHECK(params.norm.kind != NormKind::none, kind);
  const NormOf own = norm_of(own_kind, own_weight, {}, 0, x);
  MEGALORA_CHECK(delta.has_value() == (own.kind != NormKind::none), "delta is read for its own norm alone");
  params.addend = addend_of(delta, own, own_inverse, scale, mask, params.norm, x);
  params.statistics = statistics_of(statistics, params.norm.kind, x);
  params.residual = data_or_null(residual);
  params.dx = dx.mutable_data_ptr();
  params.ddelta = data_or_null(ddelta);
  params.rows = x.size(0);
  params.size = x.size(1);
  params.type = type_of(x);
  if (x.numel() == 0) return;
  launch_norm_backward(params, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megalora::cuda
