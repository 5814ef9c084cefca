// Ops that draw a mask: in a schema its arguments are seven, in C++ one struct, or none without a token_index.
// masked<&op> is `op` with them apart.
#pragma once

#include <utility>

#include "ops.h"

namespace megalora {
namespace detail {

template <typename... Types>
struct List {};

// `Before` and `Rest` are op's parameters before and from here on; once the mask's is found, `Rest` are those after it.
template <auto op, typename Result, typename Before, typename Rest>
struct Masked;

template <auto op, typename Result, typename... Before, typename Next, typename... Rest>
struct Masked<op, Result, List<Before...>, List<Next, Rest...>>
    : Masked<op, Result, List<Before..., Next>, List<Rest...>> {};

template <auto op, typename Result, typename... Before, typename... After>
struct Masked<op, Result, List<Before...>, List<const MaskArguments&, After...>> {
  static Result call(Before... before, const Tensor& token_index, int64_t seed, int64_t site, int64_t step,
                     int64_t feature_offset, double p, const OptionalTensor& live_step, After... after) {
    return op(std::forward<Before>(before)...,
              MaskArguments{token_index, seed, site, step, feature_offset, p, live_step},
              std::forward<After>(after)...);
  }
};

template <auto op, typename Result, typename... Before, typename... After>
struct Masked<op, Result, List<Before...>, List<const OptionalMask&, After...>> {
  static Result call(Before... before, const OptionalTensor& token_index, int64_t seed, int64_t site, int64_t step,
                     int64_t feature_offset, double p, const OptionalTensor& live_step, After... after) {
    OptionalMask mask;
    if (token_index) mask = MaskArguments{*token_index, seed, site, step, feature_offset, p, live_step};
    return op(std::forward<Before>(before)..., mask, std::forward<After>(after)...);
  }
};

template <auto op, typename Result, typename... Parameters>
constexpr auto take_apart(Result (*)(Parameters...)) {
  return &Masked<op, Result, List<>, List<Parameters...>>::call;
}

}  // namespace detail

template <auto op>
constexpr auto masked = detail::take_apart<op>(op);

}  // namespace megalora
