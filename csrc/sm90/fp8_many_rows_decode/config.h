// Shapes and budgets of decode over V3.2 caches for more than 32 rows:
// docs/kernels/fp8_many_rows.md and docs/kernels/fp8_products.md.
#pragma once

#include "sm90/decode/fp8_tokens.h"

namespace flashmla::sm90::fp8_many_rows_decode {

using namespace decode;

// What is multiplied.
enum class Products {
  kFp16,  // codes times their scales, which must be simple
  kFp8,   // codes as they are, and queries and weights rounded to codes
};

// An attention problem as the kernel sees it, with tiles of 64 rows.
template <bool kSparse_, Products kProducts_>
struct Problem : Fp8Tokens<CacheFormat::kFp8V32> {
  using T = __nv_bfloat16;
  static constexpr bool kSparse = kSparse_;
  static constexpr bool kFp8 = kProducts_ == Products::kFp8;
  using Params = std::conditional_t<kSparse, SparseDecodeParams, DenseDecodeParams>;

  // Warpgroups 0 and 1 have the scores of every second block, 2 and 3 half of the values of all,
  // and find and copy every second block: there are no registers for a fifth one.
  static constexpr int kScoreGroups = 2;
  static constexpr int kThreads = 512;
  static constexpr int kLoadThreads = 128;
  static constexpr int kLoadWarps = kLoadThreads / 32;
  static constexpr bool kPaired = false;
  static constexpr int kClusterCtas = 1;
  // Of a thread. The kernel is launched with 128.
  static constexpr int kScoreRegisters = 80;
  static constexpr int kValueRegisters = 2 * 128 - kScoreRegisters;

  // Latent columns of the queries in a tile of 64 rows, of which the RoPE columns are another one.
  static constexpr int kQueryTileColumns = kFp8 ? kRowBytes : kSubTileColumns;
  static constexpr int kQueryTiles = K::kLatent / kQueryTileColumns;

  // P of a block. In FP8 one for each group of columns, since the scales are in it.
  static constexpr int kWeightTileBytes = kRows * kTokens;
  static constexpr int kWeightBytes = kFp8 ? kGroups * kWeightTileBytes : kSubTileBytes;

  // Blocks in shared memory at once: as many as there is room for.
  static constexpr int kStages = 3;
  // Maxima that are kept: more than blocks lie between the first scores and the last values; and
  // their limits, more than lie between the first and the last scores.
  static constexpr int kMaxima = 8;
  static constexpr int kLimits = 4;

  // Weights, in powers of two: the largest when the maximum is moved, and before it is moved again.
  // Up to 2^8 fp16 is as exact as up to 1; e4m3 has its last bit at 2^-9 and ends at 448.
  static constexpr float kHeadroom = kFp8 ? 4.f : 0.f;
  static constexpr float kSlack = 8.f;
};

}  // namespace flashmla::sm90::fp8_many_rows_decode
