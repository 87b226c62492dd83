// Shapes and budgets of decode over FP8 caches for few rows: docs/kernels/fp8_few_rows.md.
#pragma once

#include "common/fp8_formats.h"
#include "params.h"
#include "sm90/decode/config.h"

namespace flashmla::sm90::fp8_few_rows_decode {

using namespace decode;

// A token in shared memory: kTokenBytes as they lie in the cache, kStride bytes apart, and
// kScaleBytes elsewhere. The stride is an odd number of 16 bytes, so that the same chunk of eight
// neighbouring tokens is in different banks. Codes come in tiles of 64 columns, kTilesOfGroup of
// which share a scale.
template <CacheFormat kFormat>
struct Keys;

// The scales lie between codes and RoPE columns.
template <>
struct Keys<CacheFormat::kFp8V32> : fp8_formats::V32 {
  static constexpr int kDim = 576;
  static constexpr int kTilesOfGroup = 2;
  static constexpr int kStride = kTokenBytes;
  static constexpr int kScaleBytes = 0;
  static constexpr bool kRopeIsValue = false;
};

// The scales lie elsewhere, 8 bytes a token. The copy engine takes 16, those of a neighbour among
// them.
template <>
struct Keys<CacheFormat::kFp8V4> : fp8_formats::V4 {
  static constexpr int kDim = 512;
  static constexpr int kTilesOfGroup = 1;
  static constexpr int kStride = kTokenBytes + 16;
  static constexpr bool kRopeIsValue = true;
  static constexpr int kScaleBytes = 16;
};

constexpr int kTileColumns = 64;
constexpr int kValueTiles = 8;  // of 64 columns
constexpr int kHalfTiles = kValueTiles / 2;

// An attention problem as the kernels see it, with up to kTileRows rows: 16 or 32.
template <CacheFormat kFormat_, bool kSparse_, int kTileRows_>
struct Problem {
  using T = __nv_bfloat16;
  static constexpr CacheFormat kFormat = kFormat_;
  using K = Keys<kFormat>;
  using S = Shape<K::kDim, 512>;
  static constexpr bool kHasScalesApart = kFormat == CacheFormat::kFp8V4;
  static constexpr int kCodeTiles = K::kLatent / kTileColumns;
  static constexpr int kGroups = kCodeTiles / K::kTilesOfGroup;
  static constexpr int kBlockBytes = kTokens * K::kStride;
  static_assert(K::kStride / 16 % 2 == 1);
  static_assert(K::kRopeIsValue == kCodeTiles < kValueTiles);
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
