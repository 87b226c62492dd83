// Shapes and budgets of decode over FP8 caches for few rows: docs/kernels/fp8_few_rows.md.
#pragma once

#include "common/fp8_formats.h"
#include "params.h"
#include "sm90/decode/config.h"

namespace flashmla::sm90::fp8_few_rows_decode {

using namespace decode;

// An attention problem as the kernels see it, with up to kTileRows rows: 16 or 32.
template <CacheFormat kFormat_, bool kSparse_, int kTileRows_>
struct Problem {
  using T = __nv_bfloat16;
  static constexpr CacheFormat kFormat = kFormat_;
  // A token in the cache, of V4 without its scales, which lie elsewhere in the page.
  static constexpr bool kHasScalesApart = kFormat == CacheFormat::kFp8V4;
  using K = std::conditional_t<kHasScalesApart, fp8_formats::V4, fp8_formats::V32>;
  using S = Shape<K::kLatent + fp8_formats::kRopeBytes / 2, 512>;
  // Codes come in tiles of 64 columns, one or two of which share a scale.
  static constexpr int kCodeTiles = K::kLatent / kSubTileColumns;
  static constexpr int kTilesOfGroup = K::kTile / kSubTileColumns;
  static constexpr int kGroups = kCodeTiles / kTilesOfGroup;
  static constexpr bool kRopeIsValue = kCodeTiles < S::kValueTiles;
  // From token to token in shared memory: an odd number of 16 bytes, so that the same chunk of
  // eight neighbouring tokens is in different banks.
  static constexpr int kStride = (K::kTokenBytes / 16 | 1) * 16;
  static constexpr int kBlockBytes = kTokens * kStride;
  // What is copied beside a token: 8 bytes of scales, with 8 more, since the copy engine takes 16.
  static constexpr int kScaleBytes = kHasScalesApart ? 16 : 0;

  static constexpr bool kSparse = kSparse_;
  static constexpr int kTileRows = kTileRows_;
  using Params = std::conditional_t<kSparse, SparseDecodeParams, DenseDecodeParams>;

  static constexpr int kMathGroups = kTileRows == 16 ? 3 : 2;
  static constexpr int kMathThreads = kMathGroups * 128;
  static constexpr int kLoadThreads = 128;
  static constexpr int kLoadWarps = kLoadThreads / 32;
  static constexpr int kThreads = kMathThreads + kLoadThreads;
  static constexpr bool kPaired = false;
  static constexpr int kClusterCtas = 1;
  // Of a thread. What the loading warpgroup gives up the others get: more than that they would wait
  // for in vain.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kLoadRegisters = kHasScalesApart ? 40 : 32;
  static constexpr int kMathRegisters =
      (kLaunchRegisters * (kMathGroups + 1) - kLoadRegisters) / kMathGroups / 8 * 8;

  // Blocks in shared memory at once: as many as there is room for.
  static constexpr int kStages = kTileRows == 16 ? 4 : 3;
  // Operands in registers at once.
  static constexpr int kOperands = 2;
};

}  // namespace flashmla::sm90::fp8_few_rows_decode
