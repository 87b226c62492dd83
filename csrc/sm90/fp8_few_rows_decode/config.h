// Shapes and budgets of decode over V3.2 caches for few rows: docs/kernels/fp8_few_rows.md.
#pragma once

#include "common/fp8_formats.h"
#include "sm90/decode/config.h"

namespace flashmla::sm90::fp8_few_rows_decode {

using namespace decode;

// An attention problem as the kernels see it, with up to kTileRows rows: 16 or 32.
template <bool kSparse_, int kTileRows_>
struct Problem {
  using T = __nv_bfloat16;
  using S = Shape<576, 512>;
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
  static constexpr int kLoadRegisters = 32;
  static constexpr int kMathRegisters =
      (kLaunchRegisters * (kMathGroups + 1) - kLoadRegisters) / kMathGroups / 8 * 8;

  // Blocks in shared memory at once: as many as there is room for.
  static constexpr int kStages = kTileRows == 16 ? 4 : 3;
  // Operands in registers at once.
  static constexpr int kOperands = 2;
};

// A token of the V3.2 format, as it lies in the cache: codes of 512 latent columns in groups that
// share a scale, the scales, 64 RoPE columns. The stride is an odd number of 16 bytes, so that the
// same chunk of eight neighbouring tokens is in different banks.
using Token = fp8_formats::V32;
constexpr int kGroups = 4;
constexpr int kLatentTiles = 8;  // of 64 columns
constexpr int kHalfTiles = kLatentTiles / 2;
constexpr int kBlockBytes = kTokens * Token::kTokenBytes;
static_assert(Token::kTokenBytes / 16 % 2 == 1);

}  // namespace flashmla::sm90::fp8_few_rows_decode
