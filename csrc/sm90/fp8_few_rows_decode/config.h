// Shapes and budgets of decode over FP8 caches for few rows: docs/kernels/fp8_few_rows.md.
#pragma once

#include "sm90/decode/fp8_tokens.h"

namespace flashmla::sm90::fp8_few_rows_decode {

using namespace decode;

// An attention problem as the kernels see it, with up to kTileRows rows: 16 or 32.
template <CacheFormat kFormat_, bool kSparse_, int kTileRows_>
struct Problem : Fp8Tokens<kFormat_> {
  using T = __nv_bfloat16;
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
  static constexpr int kLoadRegisters = Problem::kHasScalesApart ? 40 : 32;
  static constexpr int kMathRegisters =
      (kLaunchRegisters * (kMathGroups + 1) - kLoadRegisters) / kMathGroups / 8 * 8;

  // Blocks in shared memory at once: as many as there is room for.
  static constexpr int kStages = kTileRows == 16 ? 4 : 3;
};

}  // namespace flashmla::sm90::fp8_few_rows_decode
