// Shared memory and barriers of decode over FP8 caches.
#pragma once

#include "sm90/decode/cta.cuh"
#include "sm90/fp8_few_rows_decode/config.h"

namespace flashmla::sm90::decode {

template <CacheFormat kFormat, bool kSparse, int kTileRows>
struct SharedStorage<fp8_few_rows_decode::Problem<kFormat, kSparse, kTileRows>> {
  using P = fp8_few_rows_decode::Problem<kFormat, kSparse, kTileRows>;

  // Rows of 64 columns, swizzled.
  static constexpr int kTileBytes = kTileRows * kRowBytes;
  // Queries: latent columns and RoPE columns, in the order in which lanes have those of the keys.
  alignas(1024) uint8_t q[P::kCodeTiles + 1][kTileBytes];
  // The same times a power of two for each row, latent columns as fp16.
  alignas(1024) uint8_t simple_q[P::kCodeTiles + 1][kTileBytes];
  // Of each warpgroup P of its block, a token a column, in the type of the values: that of the
  // codes, and that of the RoPE columns.
  alignas(1024) uint8_t p[P::kMathGroups][P::kRopeIsValue ? 2 : 1][kTileBytes];
  // Blocks as they lie in the cache.
  alignas(128) uint8_t tokens[P::kStages][P::kBlockBytes];
  // V4: the scales of their tokens, those with a bit in odd_scales in the second half.
  alignas(16) uint4 token_scales[P::kHasScalesApart ? P::kStages : 1][kTokens];
  uint2 odd_scales[P::kStages];

  GatheredBlock blocks[kAnnouncedBlocks];
  static_assert(kAnnouncedBlocks > 2 + P::kStages);
  alignas(8) uint8_t stream[sizeof(BlockStream<P>)];

  SharedWalk<P> pieces[P::kMathGroups];

  // Of each warpgroup the scales of its block as the values need them; simple ones as fp16.
  alignas(16) float scales[P::kMathGroups][P::kGroups * kTokens];
  alignas(16) float q_factor[kTileRows];  // undoes that of simple_q; NaN if a row is not finite
  // Of each warpgroup: the running maximum (base-2 scaled scores), -inf while nothing was attended;
  // that of each warp, if it moves; the sums of the weights that each warp has had.
  float maxima[P::kMathGroups][kTileRows];
  float warp_max[P::kMathGroups][4][kTileRows];
  float sums[P::kMathGroups][4][kTileRows];
  int visible[P::kMathGroups][kTileRows];  // dense: tokens that a row attends to
  Place place;
  uint2 marks[P::kStages];

  uint64_t full[P::kStages];
  uint64_t empty[P::kStages];
  uint64_t left, taken;  // of a half of the results, twice for each piece
  uint64_t block_announced[kAnnouncedBlocks];

  __device__ __forceinline__ void init_barriers() {
    for (uint64_t& barrier : block_announced) ptx::mbarrier_init(&barrier, 1);
    ptx::mbarrier_init(&left, P::kMathThreads);
    ptx::mbarrier_init(&taken, 128);
    for (int i = 0; i < P::kStages; ++i) {
      ptx::mbarrier_init(&full[i], P::kLoadWarps);
      ptx::mbarrier_init(&empty[i], 128);
      marks[i] = {0, 0};
    }
  }
};

}  // namespace flashmla::sm90::decode
