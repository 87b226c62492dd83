// Shapes and budgets of decode over V3.2 caches with simple scales: docs/kernels/fp8_power.md.
#pragma once

#include "sm90/decode/fp8_tokens.h"

namespace flashmla::sm90::fp8_power_decode {

using namespace decode;

// An attention problem as the kernel sees it, with tiles of 64 rows.
template <bool kSparse_>
struct Problem : Fp8Tokens<CacheFormat::kFp8V32> {
  using T = __nv_bfloat16;
  static constexpr bool kSparse = kSparse_;
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
  static constexpr int kValueRegisters = 176;

  // Blocks in shared memory at once: as many as there is room for.
  static constexpr int kStages = 3;
  // Of P: one for each score warpgroup.
  static constexpr int kWeightBuffers = kScoreGroups;
  // Maxima that are kept: more than blocks lie between the first scores and the last values.
  static constexpr int kMaxima = 8;
};

}  // namespace flashmla::sm90::fp8_power_decode
