// What the kernels take, at most. The library reports these to Python (build_info()["limits"]), and a test compares
// them with megalora/ops/limits.py, which decides in Python what is given to a kernel.
#pragma once

#include <cstdint>

namespace megalora {

// ---- alignment, of CUDA kernels: 16 bytes are read and written at a time

constexpr int64_t kAlignment = 16;  // bytes on which every row starts
constexpr int64_t kOctet = 8;       // sizes of rows are multiples of this many elements

// ---- the LoRA kernels on CUDA. Ranks are those of all branches of an input together, unless said otherwise.

constexpr int64_t kLargestRank = 192;
constexpr int64_t kLargestRankGatedDown = 64;      // where the down-projection makes x = silu(gate) * up itself
constexpr int64_t kLargestRankBackward = 48;       // of dx and dA in one pass
constexpr int64_t kLargestRankGatedBackward = 16;  // of the pass that goes on to gate and up: of each of its factors
constexpr int64_t kMostBranches = 4;               // that read one input
// Bytes that a block may ask for. GPUs of compute capability 9.0 grant 227 KB, those of 8.0 163 KB, and those of 8.6,
// 8.9 and 12.0 99 KB: the kernels are not launched there.
constexpr int64_t kSharedMemory = 163 << 10;

// ---- RMSNorm on CUDA: a row is held in the registers of one block

constexpr int64_t kLargestNorm = 16384;

// ---- quantised weights on CUDA

constexpr int64_t kLargestFp8Row = 65536;  // of a factor that is quantised: a row is held in the registers of one block
constexpr int64_t kLargestFp8Branch = 512;  // columns of z that are quantised behind it, a thread each
constexpr int64_t kTurned = 16;             // codes are turned in squares of so many bytes
constexpr int64_t kLeastNf4ToE4m3Rows = 2;  // rows that NF4 is made e4m3 of, at least
// ---- factors of columns on CUDA

constexpr int64_t kColumnScaleRows = 64;  // that one block goes through, and leaves one sum of

// ---- generation

constexpr int64_t kMostSkinnyRows = 4;  // of linears without tensor cores; a GEMM reads the weight once, too
// Rows that products with NF4 weights decode them for on the fly, on CUDA: above, what is read of x for each code costs
// as much as decoding into memory. With e4m3 weights kMostSkinnyRows: above, products of e4m3 with e4m3 are faster.
constexpr int64_t kMostNf4Rows = 32;
constexpr int64_t kMostNf4Parts = 8;  // of several weights in one of these products
// Of linears that norm what they read, on CUDA: elements of a row, and of all rows, which lie in shared memory.
constexpr int64_t kLargestNormedRow = 8192;
constexpr int64_t kMostNormed = 20480;
// Of attention over the cache on CUDA: query heads of one key/value head, and the two sizes of a head.
constexpr int64_t kMostQueriesPerHead = 8;
constexpr int64_t kSmallHeadDim = 64;
constexpr int64_t kLargeHeadDim = 128;

}  // namespace megalora
