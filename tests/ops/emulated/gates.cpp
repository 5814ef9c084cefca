// The activations of the CUDA kernels, on a CPU, for tests/ops/test_gates.py.
#include <string_view>

#include "cuda_runtime_api.h"
// What is above stands for CUDA; what is below is the kernels'.
#include "../../../csrc/cuda/gates.h"

using namespace megalora;

extern "C" void run(const char* name, const float* g, const float* d, float* value, float* backward, int64_t count) {
  const std::string_view of(name);
  const Gate gate = of == "silu" ? Gate::silu : of == "gelu" ? Gate::gelu : Gate::gelu_tanh;
  dispatch_gate(gate, [&](auto act) {
    for (int64_t i = 0; i < count; ++i) {
      const Activated<decltype(act)::value> opened(g[i]);
      value[i] = opened.value();
      backward[i] = opened.backward(d[i]);
    }
  });
}
