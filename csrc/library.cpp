// The library `megalora._C`: schemas of the ops, and what Python asks of the build. Kernels are in a file a topic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <string>
#include <vector>

#include "common.h"

#if __has_include("megalora_sources.h")  // where setup.py builds it: a digest of csrc/, see megalora/ops/sources.py
#include "megalora_sources.h"
#else
#define MEGALORA_SOURCES ""
#endif

namespace {

// The clone of the MEGALORA_MULTIVERSION functions that this CPU runs.
std::string instruction_set() {
#if defined(MEGALORA_HAS_CLONES)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "default";
}

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(MEGALORA_CUDA)
  info["devices"] = std::vector<std::string>{"cpu", "cuda"};
#else
  info["devices"] = std::vector<std::string>{"cpu"};
#endif
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["instruction_set"] = instruction_set();
  info["sources"] = MEGALORA_SOURCES;
  return info;
}

}  // namespace

TORCH_LIBRARY(megalora, m) {
  m.def("dropout(Tensor x, Tensor token_index, int seed, int site, int step, int feature_offset, float p, "
        "Tensor? live_step=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("dropout_add_(Tensor(a!) out, Tensor g, Tensor token_index, int seed, int site, int step, int feature_offset, "
        "float p, Tensor? live_step=None) -> ()",
        {at::Tag::pt2_compliant_tag});
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info, "devices, torch, compiler, openmp, instruction_set and sources of this build.");
}
