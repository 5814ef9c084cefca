// The inner loop of the CPU's small products: a few rows of vectors kept in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace megalora::cpu {

// 64 bytes of numbers: one AVX-512 register, two of AVX2.
template <typename wide>
struct Vector {
  typedef wide type __attribute__((vector_size(64)));
  static constexpr int64_t size = 64 / sizeof(wide);
};

template <typename wide>
MEGALORA_INLINE void load(typename Vector<wide>::type& to, const wide* from) {
  std::memcpy(&to, from, sizeof to);
}

// A matrix by its strides.
template <typename wide>
struct Factors {
  const wide* at;
  int64_t k_stride, m_stride;
};

template <int outs, int vectors, typename wide>
MEGALORA_INLINE void outer_block(wide* out, int64_t out_stride, const Factors<wide>& factors, const wide* rows,
                                 int64_t rows_stride, int64_t count, bool accumulate) {
  using vector = typename Vector<wide>::type;
  constexpr int64_t size = Vector<wide>::size;
  vector sums[outs][vectors] = {};
  if (accumulate) {
    for (int m = 0; m < outs; ++m) {
      for (int v = 0; v < vectors; ++v) load<wide>(sums[m][v], out + m * out_stride + v * size);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    vector row[vectors];
    for (int v = 0; v < vectors; ++v) load<wide>(row[v], rows + k * rows_stride + v * size);
    for (int m = 0; m < outs; ++m) {
      const wide factor = factors.at[k * factors.k_stride + m * factors.m_stride];
      for (int v = 0; v < vectors; ++v) sums[m][v] += row[v] * factor;
    }
  }
  for (int m = 0; m < outs; ++m) {
    for (int v = 0; v < vectors; ++v) std::memcpy(out + m * out_stride + v * size, &sums[m][v], sizeof sums[m][v]);
  }
}

template <int outs, typename wide>
MEGALORA_INLINE void outer_rows(wide* out, int64_t out_stride, const Factors<wide>& factors, const wide* rows,
                                int64_t rows_stride, int64_t count, int64_t n, bool accumulate) {
  constexpr int64_t size = Vector<wide>::size;
  int64_t i = 0;
  for (; i + 2 * size <= n; i += 2 * size) {
    outer_block<outs, 2>(out + i, out_stride, factors, rows + i, rows_stride, count, accumulate);
  }
  for (; i < n; i += size) {
    outer_block<outs, 1>(out + i, out_stride, factors, rows + i, rows_stride, count, accumulate);
  }
}

// out [outs, n] (+)= the sum over k of factors[k, m] rows[k, n]; k < count, n a multiple of 16, rows of any stride.
template <typename wide>
MEGALORA_INLINE void outer(wide* out, int64_t out_stride, int64_t outs, Factors<wide> factors, const wide* rows,
                           int64_t rows_stride, int64_t count, int64_t n, bool accumulate) {
  int64_t m = 0;
  for (; m + 4 <= outs; m += 4, factors.at += 4 * factors.m_stride) {
    outer_rows<4>(out + m * out_stride, out_stride, factors, rows, rows_stride, count, n, accumulate);
  }
  for (; m < outs; ++m, factors.at += factors.m_stride) {
    outer_rows<1>(out + m * out_stride, out_stride, factors, rows, rows_stride, count, n, accumulate);
  }
}

}  // namespace megalora::cpu
