// Shared memory and barriers of decode over V3.2 caches for more than 32 rows.
#pragma once

#include "sm90/decode/cta.cuh"
#include "sm90/fp8_many_rows_decode/config.h"

namespace flashmla::sm90::decode {

template <bool kSparse, fp8_many_rows_decode::Products kProducts>
struct SharedStorage<fp8_many_rows_decode::Problem<kSparse, kProducts>> {
  using P = fp8_many_rows_decode::Problem<kSparse, kProducts>;

  // Queries times a power of two for each row: latent columns as fp16 or e4m3, RoPE columns as
  // bfloat16, in the order in which lanes have those of the keys. Rows of 128 bytes, swizzled.
  alignas(1024) uint8_t q[P::kQueryTiles + 1][kSubTileBytes];
  // P, a token a column.
  alignas(1024) uint8_t p[P::kScoreGroups][P::kWeightBytes];
  // Blocks as they lie in the cache.
  alignas(128) uint8_t tokens[P::kStages][P::kBlockBytes];
  // The scales as fp16 values need them.
  alignas(16) __half scales[P::kFp8 ? 1 : P::kStages][P::kFp8 ? 1 : P::kGroups * kTokens];
  // In FP8: what P is divided by, a power of two above all scales of the block; NaN if one is.
  float reference[P::kScoreGroups][P::kGroups];

  GatheredBlock blocks[kAnnouncedBlocks];
  static_assert(kAnnouncedBlocks > 3 + P::kStages);
  alignas(8) uint8_t stream[sizeof(BlockStream<P>)];
  SharedWalk<P> pieces[P::kThreads / 128];

  alignas(16) float q_factor[kRows];  // undoes that of q; NaN if a row is not finite
  // The running maximum (base-2 scaled scores), kNoMaximum while nothing was attended: the present
  // one and those before it, which values may still be weighted with.
  alignas(16) float maxima[P::kMaxima][kRows];
  alignas(16) float limits[P::kLimits][kRows];  // of scores before the maximum must be moved
  float warp_max[4][kRows];
  float sums[P::kScoreGroups][2][kRows];  // of the weights that two warps have had
  int visible[kRows];                     // dense: tokens that a row attends to
  // With the last block of each score warpgroup: as the other one is told, and later the values.
  bool max_moved[P::kScoreGroups];
  bool max_moved_of_p[P::kScoreGroups];
  Place place;
  uint2 marks[P::kStages];

  uint64_t full[P::kStages];
  uint64_t empty[P::kStages];
  // Of the last block of each score warpgroup: its maximum, and its P.
  uint64_t max_known[P::kScoreGroups];
  uint64_t p_full[P::kScoreGroups];
  uint64_t p_empty[P::kScoreGroups];
  uint64_t sums_full, sums_empty;
  uint64_t block_announced[kAnnouncedBlocks];

  __device__ __forceinline__ void init_barriers() {
    for (uint64_t& barrier : block_announced) ptx::mbarrier_init(&barrier, 1);
    for (int i = 0; i < P::kStages; ++i) {
      ptx::mbarrier_init(&full[i], P::kLoadWarps);
      ptx::mbarrier_init(&empty[i], 128 + 256);
      marks[i] = {0, 0};
    }
    for (int i = 0; i < P::kScoreGroups; ++i) {
      ptx::mbarrier_init(&max_known[i], 128);
      ptx::mbarrier_init(&p_full[i], 128);
      ptx::mbarrier_init(&p_empty[i], 256);
    }
    ptx::mbarrier_init(&sums_full, 256);
    ptx::mbarrier_init(&sums_empty, 256);
  }
};

}  // namespace flashmla::sm90::decode
