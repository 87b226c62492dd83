// Shapes and budgets of decode with FP8 products.
#pragma once

#include "sm90/decode/config.h"

namespace flashmla::sm90::fp8_matmul_decode {

using namespace decode;

// The V3.2 format: 512 latent columns in groups that share a scale, 64 RoPE columns.
constexpr int kGroups = 4;
constexpr int kGroupColumns = 128;
// A sub-tile of codes is 64 rows of 128 bytes: one group.
constexpr int kCodeTileBytes = 64 * kGroupColumns;
// One of transposed values is 64 columns of 64 tokens.
constexpr int kValueTiles = 8;
constexpr int kValueTileBytes = 64 * kTokens;

// An attention problem as the kernels see it.
template <bool kSparse_>
struct Problem {
  using T = __nv_bfloat16;
  using S = Shape<576, 512>;
  static constexpr bool kSparse = kSparse_;
  static constexpr bool kPaired = false;
  static constexpr int kClusterCtas = 1;
  using Params = std::conditional_t<kSparse, SparseDecodeParams, DenseDecodeParams>;

  static constexpr int kLoadThreads = 128;
  static constexpr int kLoadWarps = kLoadThreads / 32;
  static constexpr int kThreads = kMathThreads + kLoadThreads;
  static constexpr int kMathRegisters = 224;
  static constexpr int kLoadRegisters = 3 * 168 - 2 * kMathRegisters;
};

}  // namespace flashmla::sm90::fp8_matmul_decode
