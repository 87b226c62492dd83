// Shapes and budgets of the dense decode kernel for sm_90a.
#pragma once

#include <cstdint>

#include "common/schedule.h"

namespace flashmla::sm90::dense_decode {

constexpr int kRows = 64;                          // rows of a tile: query tokens x heads
constexpr int kTokens = schedule::kBlockTokens;    // tokens of a block
constexpr int kDim = 576;                          // columns of queries and keys
constexpr int kDimV = 512;                         // columns of values and results
constexpr int kSubTileColumns = 64;                // columns of a 128-byte-swizzled sub-tile
constexpr int kSubTiles = kDim / kSubTileColumns;  // 9; the last one is no value column
constexpr int kSubTilesHalf = kDimV / kSubTileColumns / 2;  // value sub-tiles of one warpgroup
constexpr int kSubTileBytes = kRows * kSubTileColumns * 2;
constexpr int kLastSubTile = kSubTiles - 1;
constexpr int kBuffers = 2;
// Sub-tiles that one copy-engine instruction brings, and one barrier announces. Issuing a copy
// costs the issuing lane 140 clocks and more, so small ones make it the bottleneck; with large ones
// the first scores start later.
constexpr int kSubTilesPerCopy = 4;
constexpr int kCopiesHalf = kSubTilesHalf / kSubTilesPerCopy;
constexpr int kCopies = 2 * kCopiesHalf + 1;  // the last one brings the RoPE sub-tile
constexpr int kLastCopy = kCopies - 1;
static_assert(kSubTilesHalf % kSubTilesPerCopy == 0);

static_assert(kRows == kTokens, "query and key sub-tiles, and P, share one size");
static_assert(kSubTiles * kSubTileColumns == kDim);
static_assert(2 * kSubTilesHalf + 1 == kSubTiles,
              "P takes the place of the one key sub-tile that holds no values");

constexpr int kMathGroups = 2;
constexpr int kMathThreads = kMathGroups * 128;
constexpr int kThreads = kMathThreads + 128;  // the third warpgroup loads
constexpr int kKeyLoaderWarps = kBuffers;     // of its four warps, one for each key buffer;
constexpr int kQueryLoaderWarps = 2;          // the others load queries
static_assert(kKeyLoaderWarps + kQueryLoaderWarps == 4);

// 2 x 128 x 224 + 128 x 56 registers of 65,536.
constexpr int kMathRegisters = 224;
constexpr int kLoadRegisters = 56;
static_assert(kMathThreads * kMathRegisters + 128 * kLoadRegisters <= 65536);

// A copy-engine box is at most one block; smaller pages take several boxes a sub-tile. Rows come
// in swizzle groups of 8.
constexpr int kMinPageSize = 8;

FLASHMLA_HOST_DEVICE constexpr bool page_size_supported(int page_size) {
  return page_size % kTokens == 0 || (page_size >= kMinPageSize && kTokens % page_size == 0);
}

FLASHMLA_HOST_DEVICE constexpr int box_tokens(int page_size) {
  return page_size < kTokens ? page_size : kTokens;
}

}  // namespace flashmla::sm90::dense_decode
