// The activations of MLPs, in float32: what Gate (params.h) names.
#pragma once

#include <type_traits>

#include "params.h"

namespace megalora {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// Of one number g: value() = act(g), backward(d) = d act'(g).
template <Gate>
struct Activated;

template <>
struct Activated<Gate::silu> {
  float g, s;
  __device__ __forceinline__ explicit Activated(float g) : g(g), s(sigmoid(g)) {}
  __device__ __forceinline__ float value() const { return g * s; }
  __device__ __forceinline__ float backward(float d) const { return d * s * (1.f + g * (1.f - s)); }
};

// g (1 + tanh(u)) / 2 = g sigmoid(2 u) with u = sqrt(2 / pi) (g + 0.044715 g^3).
template <>
struct Activated<Gate::gelu_tanh> {
  static constexpr float linear = 1.5957691216057308f, cubic = linear * 0.044715f;  // of 2 u
  float g, s;
  __device__ __forceinline__ explicit Activated(float g) : g(g), s(sigmoid(g * (linear + cubic * g * g))) {}
  __device__ __forceinline__ float value() const { return g * s; }
  __device__ __forceinline__ float backward(float d) const {
    return d * s * (1.f + g * (1.f - s) * (linear + 3.f * cubic * g * g));
  }
};

// g Phi(g), Phi and its density those of the normal distribution.
template <>
struct Activated<Gate::gelu> {
  float g, s;
  __device__ __forceinline__ explicit Activated(float g) : g(g), s(0.5f * (1.f + erff(g * 0.7071067811865476f))) {}
  __device__ __forceinline__ float value() const { return g * s; }
  __device__ __forceinline__ float backward(float d) const {
    return d * (s + g * 0.3989422804014327f * __expf(-0.5f * g * g));
  }
};

// Calls `body` with `gate`, one of those above, as a std::integral_constant.
template <typename Body>
auto dispatch_gate(Gate gate, Body body) {
  if (gate == Gate::gelu_tanh) return body(std::integral_constant<Gate, Gate::gelu_tanh>{});
  if (gate == Gate::gelu) return body(std::integral_constant<Gate, Gate::gelu>{});
  return body(std::integral_constant<Gate, Gate::silu>{});
}

// What x is: act(gate) * up, act(up), or (Gate::none) read.
template <Gate act_, bool gated_>
struct Origin {
  static constexpr Gate act = act_;
  static constexpr bool gated = gated_, made = act != Gate::none;
};
using Read = Origin<Gate::none, false>;

// Calls `body` with the Origin of what is made.
template <typename Body>
auto dispatch_origin(Gate gate, bool gated, Body body) {
  return dispatch_gate(gate, [&](auto act) {
    constexpr Gate of = decltype(act)::value;
    return gated ? body(Origin<of, true>{}) : body(Origin<of, false>{});
  });
}

}  // namespace megalora
