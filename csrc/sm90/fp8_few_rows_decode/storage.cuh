// Shared memory and barriers of decode over FP8 caches.
#pragma once

#include "sm90/decode/cta.cuh"
#include "sm90/fp8_few_rows_decode/config.h"

namespace flashmla::sm90::decode {

template <bool kSparse, int kTileRows>
struct SharedStorage<fp8_few_rows_decode::Problem<kSparse, kTileRows>> {
  using P = fp8_few_rows_decode::Problem<kSparse, kTileRows>;

  // Rows of 64 columns, swizzled.
  static constexpr int kTileBytes = kTileRows * kRowBytes;
  // Queries: latent columns and RoPE columns, in the order in which lanes have those of the keys.
  alignas(1024) uint8_t q[fp8_few_rows_decode::kLatentTiles + 1][kTileBytes];
  // The same times a power of two for each row, latent columns as fp16.
  alignas(1024) uint8_t simple_q[fp8_few_rows_decode::kLatentTiles + 1][kTileBytes];
  // Of each warpgroup P of its block, a token a column, in the type of the values.
  alignas(1024) uint8_t p[P::kMathGroups][kTileBytes];
  // Blocks as they lie in the cache.
  alignas(128) uint8_t tokens[P::kStages][fp8_few_rows_decode::kBlockBytes];

  GatheredBlock blocks[kAnnouncedBlocks];
  static_assert(kAnnouncedBlocks > 2 + P::kStages);
  alignas(8) uint8_t stream[sizeof(BlockStream<P>)];

  SharedWalk<P> pieces[P::kMathGroups];

  // Of each warpgroup the scales of its block as the values need them; simple ones as fp16.
  alignas(16) float scales[P::kMathGroups][fp8_few_rows_decode::kGroups * kTokens];
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
  uint64_t block_announced[kAnnouncedBlocks];

  __device__ __forceinline__ void init_barriers() {
    for (uint64_t& barrier : block_announced) ptx::mbarrier_init(&barrier, 1);
    for (int i = 0; i < P::kStages; ++i) {
      ptx::mbarrier_init(&full[i], P::kLoadWarps);
      ptx::mbarrier_init(&empty[i], kWarpArrivals);
      marks[i] = {0, 0};
    }
  }
};

}  // namespace flashmla::sm90::decode
