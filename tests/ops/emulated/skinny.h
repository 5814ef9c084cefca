// What the tests of linears of a few rows give to each of them.
#pragma once

#include "cuda/decode_step.h"
#include "params.h"

namespace megalora {

// x + delta before, a norm and a gate (see BesideParams): pointers, null where there is none.
struct Beside {
  void *delta, *norm, *sum;
  float eps;
  bool precise, offset;
  int gate;
};

inline BesideParams beside_of(const Beside& given) {
  return {given.delta, given.norm,
          given.sum,   given.eps,
          {given.precise, given.offset},
          static_cast<Gate>(given.gate)};
}

template <typename Params>
void begin(Params& params, void* x, void* branch, void* bias, void* y, const int64_t (&sizes)[5]) {
  const auto [rows, stride, in_features, out_features, room] = sizes;
  params.x = {x, stride};
  params.branch = {branch, room};
  params.bias = bias;
  params.y = y;
  params.rows = rows;
  params.in_features = in_features;
  params.out_features = out_features;
  params.room = room;
  params.type = Type::bfloat16;
  tensors.clear();
  allow(branch, out_features * room * 2);
}

}  // namespace megalora
