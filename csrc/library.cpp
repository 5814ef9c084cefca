// The library `megalora._C`: what Python asks of the build. The ops are in ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/multiversion.h"
#include "cpu/tiles.h"
#include "kernel_limits.h"

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

std::map<std::string, int64_t> limits() {
  using namespace megalora;
  return {
      {"alignment", kAlignment},
      {"octet", kOctet},
      {"largest_rank", kLargestRank},
      {"largest_rank_gated_down", kLargestRankGatedDown},
      {"largest_rank_backward", kLargestRankBackward},
      {"largest_rank_gated_backward", kLargestRankGatedBackward},
      {"most_branches", kMostBranches},
      {"shared_memory", kSharedMemory},
      {"largest_norm", kLargestNorm},
      {"largest_fp8_row", kLargestFp8Row},
      {"largest_fp8_branch", kLargestFp8Branch},
      {"turned", kTurned},
      {"least_nf4_to_e4m3_rows", kLeastNf4ToE4m3Rows},
      {"column_scale_rows", kColumnScaleRows},
      {"most_skinny_rows", kMostSkinnyRows},
      {"most_nf4_rows", kMostNf4Rows},
      {"most_nf4_parts", kMostNf4Parts},
      {"largest_normed_row", kLargestNormedRow},
      {"most_normed", kMostNormed},
      {"most_queries_per_head", kMostQueriesPerHead},
      {"small_head_dim", kSmallHeadDim},
      {"large_head_dim", kLargeHeadDim},
  };
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
  info["tiles"] = megalora::cpu::has_tiles();
  info["sources"] = MEGALORA_SOURCES;
  info["limits"] = limits();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info,
        "devices, torch, compiler, openmp, instruction_set, tiles, sources and limits of this build.");
}
