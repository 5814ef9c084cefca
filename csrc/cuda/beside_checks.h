// The arguments of linears of a few rows that say what they do beside their product (BesideParams).
#pragma once

#include "cuda/checks.h"

namespace megalora::cuda {

struct BesideArguments {
  const OptionalTensor &delta, &sum, &norm;
  double eps;
  bool precise, offset;
  std::string_view gate;
};

// Checks them for x [M, I], whose first `in_features` are normed, and `outputs` outputs.
inline BesideParams beside_of(const BesideArguments& given, const Tensor& x, int64_t in_features, int64_t outputs) {
  BesideParams beside{};
  MEGALORA_CHECK(given.delta.has_value() == given.sum.has_value(), "delta and sum go together");
  MEGALORA_CHECK(given.norm || !given.delta, "what is added is normed");
  for (const OptionalTensor* one : {&given.delta, &given.sum}) {
    if (!*one) continue;
    MEGALORA_CHECK((*one)->is_contiguous() && (*one)->sizes() == x.sizes(), (*one)->sizes(), " for ", x.sizes());
    check_rows(**one, x);
  }
  beside.delta = data_or_null(given.delta);
  beside.sum = data_or_null(given.sum);
  if (given.norm) {
    MEGALORA_CHECK(x.size(1) == in_features, x.sizes(), " is normed, with a branch behind");
    MEGALORA_CHECK(given.norm->dim() == 1 && given.norm->size(0) == in_features, given.norm->sizes());
    MEGALORA_CHECK(in_features <= kLargestNormedRow && x.numel() <= kMostNormed, x.sizes());
    check_rows(*given.norm, x);
    beside.norm = given.norm->const_data_ptr();
  }
  beside.eps = static_cast<float>(given.eps);
  beside.rounding = {given.precise, given.offset};
  beside.gate = given.gate == "none" ? Gate::none : gate_of(given.gate);
  MEGALORA_CHECK(beside.gate == Gate::none || outputs % 2 == 0, outputs, " outputs with gates");
  return beside;
}

inline int64_t outputs_left(const BesideArguments& given, int64_t outputs) {
  return given.gate == "none" ? outputs : outputs / 2;
}

}  // namespace megalora::cuda
