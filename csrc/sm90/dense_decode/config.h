// Shapes and budgets of the dense decode kernel for sm_90a.
#pragma once

#include <cstdint>

#include "common/schedule.h"

namespace flashmla::sm90::dense_decode {

constexpr int kRows = 64;                        // rows of a tile: query tokens x heads
constexpr int kTokens = schedule::kBlockTokens;  // tokens of a block
constexpr int kSubTileColumns = 64;              // columns of a 128-byte-swizzled sub-tile
constexpr int kRowBytes = kSubTileColumns * 2;   // of a sub-tile
constexpr int kSubTileBytes = kRows * kRowBytes;
// Rows come in swizzle groups of 8.
constexpr int kGroupTokens = 8;
constexpr int kGroupBytes = kGroupTokens * kRowBytes;
constexpr int kTokenGroups = kTokens / kGroupTokens;
static_assert(kRows == kTokens, "query and key sub-tiles, and P, share one size");

constexpr int kBuffers = 2;  // of keys
constexpr int kSharedBytesMax = 227 * 1024;

// What follows from the columns of the keys and, their first ones, of the values.
template <int kDim_, int kDimV_>
struct Shape {
  static constexpr int kDim = kDim_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kSubTiles = kDim / kSubTileColumns;
  static constexpr int kValueTiles = kDimV / kSubTileColumns;
  static_assert(kSubTiles * kSubTileColumns == kDim && kValueTiles * kSubTileColumns == kDimV);

  // The sub-tile without values, if the keys have one, holds RoPE columns and later P. Without one
  // P has a sub-tile for itself.
  static constexpr bool kHasRope = kSubTiles > kValueTiles;
  static_assert(kSubTiles - kValueTiles <= 1, "P takes the place of one key sub-tile at most");

  // A math warpgroup owns half of the output columns.
  static constexpr int kHalfTiles = kValueTiles / 2;
  static constexpr int kHalfColumns = kDimV / 2;
  static constexpr int kAccumulators = kHalfColumns / 2;  // registers a thread

  // A key buffer: the two halves of the values, then the sub-tile of RoPE columns and P. In a half
  // the groups of 8 tokens follow each other, each with all its sub-tiles, so that a copy reads
  // memory almost in its order: 1% faster where memory is what counts.
  static constexpr int kHalfBytes = kHalfTiles * kSubTileBytes;
  static constexpr int kOffsetOfP = 2 * kHalfBytes;
  static constexpr int kBufferBytes = kOffsetOfP + kSubTileBytes;

  // One copy-engine instruction brings half of the values, and a third one the RoPE sub-tile; a
  // barrier announces each. Issuing a copy costs the issuing lane 140 clocks and more, so small
  // ones would make it the bottleneck.
  static constexpr int kCopies = kHasRope ? 3 : 2;
  static constexpr int kRopeCopy = 2;

  // Registers a thread of the math and the loading warpgroups. The kernel is launched with 168, the
  // most that 384 threads can have.
  static constexpr int kMathRegisters = kDimV == 512 ? 232 : 208;
  static constexpr int kLoadRegisters = kDimV == 512 ? 40 : 88;
  static_assert(2 * kMathRegisters + kLoadRegisters <= 3 * 168);
};

constexpr int kMathGroups = 2;
constexpr int kMathThreads = kMathGroups * 128;
constexpr int kThreads = kMathThreads + 128;  // the third warpgroup loads
constexpr int kKeyLoaderWarps = kBuffers;     // of its four warps, one for each key buffer;
constexpr int kQueryLoaderWarps = 2;          // the others load queries
static_assert(kKeyLoaderWarps + kQueryLoaderWarps == 4);

// A copy-engine box is at most one block; smaller pages take several.
constexpr int kMinPageSize = kGroupTokens;

FLASHMLA_HOST_DEVICE constexpr bool page_size_supported(int page_size) {
  return page_size % kTokens == 0 || (page_size >= kMinPageSize && kTokens % page_size == 0);
}

FLASHMLA_HOST_DEVICE constexpr int box_tokens(int page_size) {
  return page_size < kTokens ? page_size : kTokens;
}

}  // namespace flashmla::sm90::dense_decode
