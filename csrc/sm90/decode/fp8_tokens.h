// Tokens of FP8 caches as the kernels have them in shared memory that convert them in registers.
#pragma once

#include "common/fp8_formats.h"
#include "params.h"
#include "sm90/decode/config.h"

namespace flashmla::sm90::decode {

template <CacheFormat kFormat_>
struct Fp8Tokens {
  static constexpr bool kKeepsQueries = false;  // they are prepared anew for each piece
  static constexpr int kScaleGroups = partial::kFp8ScaleGroups;
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
};

}  // namespace flashmla::sm90::decode
