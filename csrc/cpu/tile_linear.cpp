// A float32 linear on AMX tiles: each number in three parts of bfloat16, and of the nine products of parts the six that
// float32 can tell. At 16 multiplications of AMX for one of AVX-512 that is more than twice its speed, at its accuracy;
// a weight that was bfloat16 (as most files have it) is one part, and three products do.
//
// Legend: M rows, I in_features, O out_features; blocks and panels as in tile_pack.h.
#include "cpu/tiles.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "cpu/checks.h"

#if defined(MEGALORA_HAS_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/tile_pack.h"
#endif

namespace megalora::cpu {

#if defined(MEGALORA_HAS_TILES)
namespace {

constexpr int64_t kDepth = 1024;              // of a block of the inner dimension, at most: sums of blocks are added up
constexpr int64_t kWeightBytes = 1 << 20;     // of packed weights under way: half of the smallest L2 with tiles
constexpr int64_t kRowBytes = 16 << 20;       // of packed rows of x: malloc gives so much again without fresh pages
constexpr int64_t kMostRows = 1024;           // of x, for which a weight is packed anew
constexpr int64_t kLargestCached = 16 << 20;  // bytes of a result that may stay in caches
constexpr int64_t kSums = kEdge * kEdge;      // of a block of the result: four tiles

constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// GCC's intrinsics do not tell it what memory they read: stores before this are not moved behind it.
MEGALORA_TILES_INLINE void settle(const void* read) { asm volatile("" : : "r"(read) : "memory"); }

MEGALORA_TILES void configure() {
  struct __attribute__((packed)) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = kTileRow;
    config.rows[i] = 16;
  }
  settle(&config);
  _tile_loadconfig(&config);
}

MEGALORA_TILES void release() {
  _tile_release();
  _mm_sfence();  // of what went past the caches
}

// Tiles 0 to 3 are the sums, 4 and 5 a part of the left panel, 6 and 7 one of the right. Macros: their numbers are
// part of the instructions.
#define LOAD_LEFT(part)                                 \
  _tile_loadd(4, left + (part) * kPartBytes, kTileRow); \
  _tile_loadd(5, left + (part) * kPartBytes + kTileBytes, kTileRow)
#define LOAD_RIGHT(part)                                 \
  _tile_loadd(6, right + (part) * kPartBytes, kTileRow); \
  _tile_loadd(7, right + (part) * kPartBytes + kTileBytes, kTileRow)
#define MULTIPLY()         \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)

// Adds one step to the sums, of so many parts on each side: products of parts i and j with i + j <= 2, in the order
// that loads least.
template <int Left, int Right>
MEGALORA_TILES_INLINE void step(const char* left, const char* right) {
  if (Left > 2) {
    LOAD_LEFT(2);
    LOAD_RIGHT(0);
    MULTIPLY();
  }
  if (Left > 1) {
    LOAD_LEFT(1);
    if (Left < 3) {
      LOAD_RIGHT(0);
    }
    MULTIPLY();
    if (Right > 1) {
      LOAD_RIGHT(1);
      MULTIPLY();
    }
  }
  LOAD_LEFT(0);
  if (Right > 1) {
    if (Left < 2) {
      LOAD_RIGHT(1);
    }
    MULTIPLY();
  }
  if (Left < 2 || Right > 1) {
    LOAD_RIGHT(0);
  }
  MULTIPLY();
  if (Right > 2) {
    LOAD_RIGHT(2);
    MULTIPLY();
  }
}

// sums [4 tiles of 16 x 16] of two panels. in_use [steps]: the parts of the weight, which is the left or right one.
template <bool WeightIsLeft>
MEGALORA_TILES void multiply(const char* left, const char* right, const uint8_t* in_use, int64_t steps, float* sums) {
  settle(left);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps; ++i, left += kStepBytes, right += kStepBytes) {
    if (in_use[i] == 3) {
      step<3, 3>(left, right);
    } else if (in_use[i] == 2) {
      WeightIsLeft ? step<2, 3>(left, right) : step<3, 2>(left, right);
    } else {
      WeightIsLeft ? step<1, 3>(left, right) : step<3, 1>(left, right);
    }
  }
  _tile_stored(0, sums, kTileRow);
  _tile_stored(1, sums + 256, kTileRow);
  _tile_stored(2, sums + 512, kTileRow);
  _tile_stored(3, sums + 768, kTileRow);
}
#undef LOAD_LEFT
#undef LOAD_RIGHT
#undef MULTIPLY

MEGALORA_TILES void add(const float* sums, float* to) {
  for (int64_t i = 0; i < kSums; i += 16) {
    _mm512_store_ps(to + i, _mm512_add_ps(_mm512_load_ps(to + i), _mm512_load_ps(sums + i)));
  }
}

// y [rows, columns] = sums + bias; Turned: the rows of the sums are columns of y. past_caches: its rows lie on cache
// lines.
template <bool Turned>
MEGALORA_TILES void write(const float* sums, const float* bias, float* y, int64_t stride, int64_t rows, int64_t columns,
                          bool past_caches) {
  for (int64_t i = 0; i < 2; ++i) {  // of columns of y
    const __mmask16 lanes = lanes_of(columns - 16 * i);
    const __m512 more = bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes, bias + 16 * i);
    for (int64_t j = 0; j < 2; ++j) {  // of rows
      const float* tile = sums + 256 * (Turned ? 2 * i + j : 2 * j + i);
      __m512i words[16];
      for (int64_t row = 0; row < 16; ++row) words[row] = _mm512_load_si512(tile + 16 * row);
      if (Turned) turn(words);
      for (int64_t row = 0; row < 16 && 16 * j + row < rows; ++row) {
        float* to = y + (16 * j + row) * stride + 16 * i;
        const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(words[row]), more);
        if (past_caches && lanes == 0xffff) {
          _mm512_stream_ps(to, sum);
        } else {
          _mm512_mask_storeu_ps(to, lanes, sum);
        }
      }
    }
  }
}

// y [M, O] = x [M, I] weight [O, I]^T + bias; or, turned, weight [I, O] has its rows along O.
struct Product {
  Matrix x, weight, y;
  const float* bias;
  int64_t rows, in_features, out_features;
  bool turned;
  bool past_caches;  // y is larger than caches: writing it must not read it first
};

// How a product is cut. All but `each` depends on its sizes alone, and `each` on nothing that a sum sees.
struct Cut {
  int64_t depth, blocks;  // of the inner dimension: how deep a block is, and how many there are
  int64_t together;       // blocks for which x is packed at once
  int64_t rows, panels;   // of x, packed at once: rows, and panels of them
  int64_t columns, each;  // panels of the weight, and of those how many a task has

  explicit Cut(const Product& a) {
    const int64_t least = up(a.in_features, kDepth);
    depth = up(up(a.in_features, least), kEdge) * kEdge;
    blocks = up(a.in_features, depth);
    rows = std::min(a.rows, kMostRows);
    panels = up(rows, kEdge);
    together = std::clamp<int64_t>(kRowBytes / (panels * panel_bytes()), 1, blocks);
    columns = up(a.out_features, kEdge);
    const int64_t most = std::max<int64_t>(1, kWeightBytes / panel_bytes()), threads = at::get_num_threads();
    each = up(columns, up(columns, most * threads) * threads);
  }
  int64_t panel_bytes() const { return steps_of(depth) * kStepBytes; }
  int64_t tasks() const { return up(columns, each); }
};

char* bytes(const Tensor& buffer) { return static_cast<char*>(buffer.mutable_data_ptr()); }
Tensor buffer(int64_t size) { return at::empty({size}, at::kByte); }

// Rows of x from `first` on, and blocks of the inner dimension [begin, end): what is worked on at once.
struct Stretch {
  int64_t first, rows, begin, end;
};

void pack_rows(const Product& a, const Cut& cut, const Stretch& now, char* packed) {
  const int64_t panels = up(now.rows, kEdge);
  at::parallel_for(0, panels * (now.end - now.begin), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t start = (now.begin + i / panels) * cut.depth, row = i % panels * kEdge, rows = now.rows - row;
      const int64_t end = std::min(start + cut.depth, a.in_features);
      const float* x = static_cast<const float*>(a.x.data) + (now.first + row) * a.x.stride;
      char* place = packed + i * cut.panel_bytes();
      for (int64_t k = start; k < end; k += kEdge, place += kStepBytes) {
        if (a.turned) {
          pack_left(x + k, a.x.stride, rows, end - k, place);
        } else {
          pack_right_turned(x + k, a.x.stride, rows, end - k, place);
        }
      }
    }
  });
}

// The panels [begin, end) of one block of the weight: along its rows, as they lie in memory. in_use [panels, steps].
void pack_weight(const Product& a, const Cut& cut, int64_t begin, int64_t end, int64_t block, char* packed,
                 uint8_t* in_use) {
  const auto* weight = static_cast<const float*>(a.weight.data);
  const int64_t start = block * cut.depth, steps = steps_of(cut.depth), stride = a.weight.stride;
  const int64_t here = steps_of(std::min(cut.depth, a.in_features - start)), panels = end - begin;
  for (int64_t i = 0; i < panels * here; ++i) {
    const int64_t panel = a.turned ? i % panels : i / here, step = a.turned ? i / panels : i % here;
    const int64_t k = start + step * kEdge, o = (begin + panel) * kEdge;
    const int64_t depth = std::min(a.in_features, start + cut.depth) - k, outputs = a.out_features - o;
    char* place = packed + (panel * steps + step) * kStepBytes;
    uint8_t& parts = in_use[panel * steps + step];
    parts = a.turned ? pack_right(weight + k * stride + o, stride, outputs, depth, place)
                     : pack_left(weight + o * stride + k, stride, outputs, depth, place);
  }
}

// One block of the result: what its blocks of the inner dimension add up to in `total`, written after the last one.
void work_out(const Product& a, const Cut& cut, const Stretch& now, int64_t block, int64_t row, int64_t panel,
              const char* x, const char* weight, const uint8_t* in_use, float* total) {
  alignas(64) float sums[kSums];
  float* here = block == 0 ? total : sums;
  const int64_t steps = steps_of(std::min(cut.depth, a.in_features - block * cut.depth));
  a.turned ? multiply<false>(x, weight, in_use, steps, here) : multiply<true>(weight, x, in_use, steps, here);
  if (block > 0) add(sums, total);
  if (block + 1 < cut.blocks) return;
  float* y = static_cast<float*>(a.y.data) + (now.first + row) * a.y.stride + panel * kEdge;
  const float* bias = a.bias == nullptr ? nullptr : a.bias + panel * kEdge;
  const int64_t rows = now.rows - row, columns = a.out_features - panel * kEdge;
  (a.turned ? write<false> : write<true>)(total, bias, y, a.y.stride, rows, columns, a.past_caches);
}

// The panels [begin, end) of the weight. totals: of all blocks of the result, or null where a task's own will do.
void run_task(const Product& a, const Cut& cut, const Stretch& now, int64_t begin, int64_t end, const char* x,
              char* weights, uint8_t* in_use, float* totals) {
  const int64_t panels = up(now.rows, kEdge), steps = steps_of(cut.depth), size = cut.panel_bytes();
  for (int64_t block = now.begin; block < now.end; ++block) {
    pack_weight(a, cut, begin, end, block, weights, in_use);
    const char* rows = x + (block - now.begin) * panels * size;
    for (int64_t m = 0; m < panels; ++m) {
      for (int64_t n = begin; n < end; ++n) {
        float* total = totals + (cut.blocks == 1 ? 0 : (n * cut.panels + m) * kSums);
        work_out(a, cut, now, block, m * kEdge, n, rows + m * size, weights + (n - begin) * size,
                 in_use + (n - begin) * steps, total);
      }
    }
  }
}

void run(const Product& a) {
  const Cut cut(a);
  const Tensor x = buffer(cut.together * cut.panels * cut.panel_bytes());
  const bool all = cut.together < cut.blocks;  // totals wait for the next blocks
  const Tensor totals = buffer(all ? cut.columns * cut.panels * kSums * sizeof(float) : 0);
  for (int64_t first = 0; first < a.rows; first += cut.rows) {
    for (int64_t begin = 0; begin < cut.blocks; begin += cut.together) {
      const int64_t end = std::min(cut.blocks, begin + cut.together);
      const Stretch now{first, std::min(cut.rows, a.rows - first), begin, end};
      pack_rows(a, cut, now, bytes(x));
      at::parallel_for(0, cut.tasks(), 1, [&](int64_t from, int64_t to) {
        configure();
        const Tensor weights = buffer(cut.each * cut.panel_bytes());
        const Tensor own = buffer((all ? 0 : cut.blocks == 1 ? 1 : cut.each * cut.panels) * kSums * sizeof(float));
        std::vector<uint8_t> in_use(cut.each * steps_of(cut.depth));
        for (int64_t task = from; task < to; ++task) {
          const int64_t panel = task * cut.each, last = std::min(cut.columns, panel + cut.each);
          auto* to_add = reinterpret_cast<float*>(bytes(all ? totals : own));
          if (!all && cut.blocks > 1) to_add -= panel * cut.panels * kSums;
          run_task(a, cut, now, panel, last, bytes(x), bytes(weights), in_use.data(), to_add);
        }
        release();
      });
    }
  }
}

bool cpu_has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return false;
  if (!__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512bf16")) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kAmxBf16 = 1U << 22, kAmxTile = 1U << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux 5.16 and later
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool has_tiles() {
  static const bool has = cpu_has_tiles();
  return has;
}

#else

bool has_tiles() { return false; }

#endif

Tensor tile_linear(const Tensor& x_MI, const Tensor& weight_OI, const OptionalTensor& bias_O) {
  MEGALORA_CHECK(has_tiles(), "this CPU or build has no AMX tiles");
  MEGALORA_CHECK(x_MI.dim() == 2 && weight_OI.dim() == 2, x_MI.sizes(), " and ", weight_OI.sizes());
  MEGALORA_CHECK(x_MI.size(1) == weight_OI.size(1), x_MI.sizes(), " and ", weight_OI.sizes());
  MEGALORA_CHECK(x_MI.scalar_type() == at::kFloat && weight_OI.scalar_type() == at::kFloat, x_MI.scalar_type(), " and ",
                 weight_OI.scalar_type());
  const bool turned = weight_OI.stride(1) != 1;
  MEGALORA_CHECK(x_MI.stride(1) == 1 && (!turned || weight_OI.stride(0) == 1), x_MI.strides(), " and ",
                 weight_OI.strides());
  Tensor bias;
  if (bias_O.has_value()) {
    bias = bias_O->contiguous();
    MEGALORA_CHECK(bias.dim() == 1 && bias.size(0) == weight_OI.size(0), bias.sizes());
    MEGALORA_CHECK(bias.scalar_type() == at::kFloat, bias.scalar_type());
  }
  Tensor y = at::empty({x_MI.size(0), weight_OI.size(0)}, x_MI.options());
  if (y.numel() == 0) return y;
  if (x_MI.size(1) == 0) return bias.defined() ? y.copy_(bias) : y.zero_();
#if defined(MEGALORA_HAS_TILES)
  Product product{};
  product.x = matrix_of(x_MI);
  product.weight = turned ? matrix_of(weight_OI.t()) : matrix_of(weight_OI);
  product.y = matrix_of(y);
  product.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  product.rows = x_MI.size(0);
  product.in_features = x_MI.size(1);
  product.out_features = weight_OI.size(0);
  product.turned = turned;
  product.past_caches = y.numel() * static_cast<int64_t>(sizeof(float)) > kLargestCached &&
                        product.out_features % 16 == 0 && reinterpret_cast<uintptr_t>(product.y.data) % 64 == 0;
  run(product);
#endif
  return y;
}

}  // namespace megalora::cpu
