// Operands of products on AMX tiles: float32 numbers cut into three parts in bfloat16, x = p0 + p1 + p2 but for 2^-27
// of x, in the order in which tiles are loaded. For tiles.h; needs the CPU to have AMX and AVX-512.
//
// A panel is 32 rows of the left operand (or columns of the right one) over `depth` of the inner dimension, with zeros
// beyond the edges. A step is 32 of the inner dimension of a panel: three parts, each two tiles of 16 rows of 64 bytes.
// In the right operand a row of a tile has pairs of the inner dimension, of 16 columns.
#pragma once

// Of what GCC 12's header has, once it is inlined here.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdint>

namespace megalora::cpu {

#define MEGALORA_TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define MEGALORA_TILES_INLINE inline __attribute__((always_inline)) MEGALORA_TILES

constexpr int64_t kEdge = 32;  // rows of a panel, and depth of a step
constexpr int64_t kTileRow = 64, kTileBytes = 16 * kTileRow, kPartBytes = 2 * kTileBytes;
constexpr int kPieces = 3;  // parts of a number
constexpr int64_t kStepBytes = kPieces * kPartBytes;

constexpr int64_t steps_of(int64_t depth) { return (depth + kEdge - 1) / kEdge; }

// The lanes of a vector that `left` numbers fill.
MEGALORA_TILES_INLINE __mmask16 lanes_of(int64_t left) {
  return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1U << left) - 1);
}

// 32 numbers, `low` first, as bfloat16.
MEGALORA_TILES_INLINE __m512i rounded(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// The first or last 16 of 32 bfloat16 as floats.
template <int Half>
MEGALORA_TILES_INLINE __m512 widened(__m512i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, Half)), 16));
}

MEGALORA_TILES_INLINE void cut(__m512 low, __m512 high, __m512i parts[kPieces]) {
  for (int i = 0; i < kPieces; ++i) {
    parts[i] = rounded(low, high);
    low = _mm512_sub_ps(low, widened<0>(parts[i]));
    high = _mm512_sub_ps(high, widened<1>(parts[i]));
  }
}

// The parts of 32 neighbours in a row, of which `left` are there.
MEGALORA_TILES_INLINE void cut_row(const float* x, int64_t left, __m512i parts[kPieces]) {
  cut(_mm512_maskz_loadu_ps(lanes_of(left), x), _mm512_maskz_loadu_ps(lanes_of(left - 16), x + 16), parts);
}

// How many parts a step needs, by the bits of the second and third: weights that were bfloat16 have one.
MEGALORA_TILES_INLINE uint8_t parts_in_use(__m512i second, __m512i third) {
  return _mm512_test_epi32_mask(third, third) != 0 ? 3 : _mm512_test_epi32_mask(second, second) != 0 ? 2 : 1;
}

// 16 x 16 words, turned.
MEGALORA_TILES_INLINE void turn(__m512i rows[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    rows[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// The three functions below pack one step, of which `depth` of the inner dimension are there. They ask for the memory
// of the steps that come next, as the caller has them: no prefetcher of the CPU follows so many rows.

// A step of the left operand: rows of `from`, of which `rows` are there. Returns the parts that it needs.
MEGALORA_TILES inline uint8_t pack_left(const float* from, int64_t stride, int64_t rows, int64_t depth, char* to) {
  __m512i second = _mm512_setzero_si512(), third = second;
  for (int64_t row = 0; row < kEdge; ++row) {
    __m512i parts[kPieces] = {};
    if (row < rows) {
      const float* x = from + row * stride;
      _mm_prefetch(x + 2 * kEdge, _MM_HINT_T0);
      _mm_prefetch(x + 2 * kEdge + 16, _MM_HINT_T0);
      cut_row(x, depth, parts);
    }
    second = _mm512_or_si512(second, parts[1]);
    third = _mm512_or_si512(third, parts[2]);
    for (int i = 0; i < kPieces; ++i) _mm512_store_si512(to + i * kPartBytes + row * kTileRow, parts[i]);
  }
  return parts_in_use(second, third);
}

// A step of the right operand from [columns, depth], rows of `from`: turned.
MEGALORA_TILES inline void pack_right_turned(const float* from, int64_t stride, int64_t columns, int64_t depth,
                                             char* to) {
  for (int64_t half = 0; half < 2; ++half) {
    __m512i words[kPieces][16] = {};
    for (int64_t row = 0; row < 16 && 16 * half + row < columns; ++row) {
      const float* x = from + (16 * half + row) * stride;
      _mm_prefetch(x + 2 * kEdge, _MM_HINT_T0);
      _mm_prefetch(x + 2 * kEdge + 16, _MM_HINT_T0);
      __m512i parts[kPieces];
      cut_row(x, depth, parts);
      for (int i = 0; i < kPieces; ++i) words[i][row] = parts[i];
    }
    for (int i = 0; i < kPieces; ++i) {
      turn(words[i]);
      char* tile = to + i * kPartBytes + half * kTileBytes;
      for (int row = 0; row < 16; ++row) _mm512_store_si512(tile + row * kTileRow, words[i][row]);
    }
  }
}

// A step of the right operand from [depth, columns], rows of `from`, two and two. Returns the parts that it needs.
MEGALORA_TILES inline uint8_t pack_right(const float* from, int64_t stride, int64_t columns, int64_t depth, char* to) {
  alignas(64) static constexpr uint16_t kInPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i in_pairs = _mm512_load_si512(kInPairs), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
  __m512i seen[kPieces] = {};
  for (int64_t pair = 0; pair < 16; ++pair) {
    for (int64_t half = 0; half < 2; ++half) {
      const __mmask16 lanes = lanes_of(columns - 16 * half);
      const float* x = from + 2 * pair * stride + 16 * half;
      _mm_prefetch(x + kEdge * stride, _MM_HINT_T0);
      _mm_prefetch(x + (kEdge + 1) * stride, _MM_HINT_T0);
      __m512 even = _mm512_maskz_loadu_ps(2 * pair < depth ? lanes : 0, x);
      __m512 odd = _mm512_maskz_loadu_ps(2 * pair + 1 < depth ? lanes : 0, x + stride);
      char* place = to + half * kTileBytes + pair * kTileRow;
      for (int i = 0; i < kPieces; ++i) {
        const __m512i words = _mm512_permutexvar_epi16(in_pairs, rounded(even, odd));
        _mm512_store_si512(place + i * kPartBytes, words);
        seen[i] = _mm512_or_si512(seen[i], words);
        even = _mm512_sub_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)));
        odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(words, upper)));
      }
    }
  }
  return parts_in_use(seen[1], seen[2]);
}

}  // namespace megalora::cpu
