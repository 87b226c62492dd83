// Shared memory and barriers of decode over FP8 caches.
#pragma once

#include "sm90/decode/cta.cuh"
#include "sm90/fp8_decode/config.h"

namespace flashmla::sm90::decode {

template <bool kSparse, int kTileRows>
struct SharedStorage<fp8_decode::Problem<kSparse, kTileRows>> {
  using P = fp8_decode::Problem<kSparse, kTileRows>;

  // Rows of 64 columns, swizzled.
  static constexpr int kTileBytes = kTileRows * kRowBytes;
  // Queries: latent columns and RoPE columns, in the order in which lanes have those of the keys.
  alignas(1024) uint8_t q[fp8_decode::kLatentTiles + 1][kTileBytes];
  // Latent columns as fp16.
  alignas(1024) uint8_t simple_q[fp8_decode::kLatentTiles][kTileBytes];
  // P of an even and of an odd block, a token a column: if simple, fp16 times the scales of each
  // group, else bfloat16.
  alignas(1024) uint8_t p[kMathGroups][fp8_decode::kGroups][kTileBytes];
  // Blocks as they lie in the cache.
  alignas(128) uint8_t tokens[P::kStages][fp8_decode::kBlockBytes];

  GatheredBlock blocks[kAnnouncedBlocks];
  static_assert(kAnnouncedBlocks > 2 + P::kStages);
  alignas(8) uint8_t stream[sizeof(BlockStream<P>)];

  // The running maximum (base-2 scaled scores), a copy for each time that it has moved.
  static constexpr int kMaxima = 4;
  alignas(16) float max[kMaxima][kTileRows];
  float q_factor[kTileRows];  // what simple_q is to be multiplied with; NaN if it is not finite
  uint32_t max_moved[kMathGroups];  // with the even or odd block
  uint32_t p_is_simple[kMathGroups];
  float warp_max[4][kTileRows];
  float sums[kMathGroups][4][kTileRows];  // of the weights that each warp has had
  Place place;
  uint2 marks[P::kStages];

  uint64_t full[P::kStages];
  uint64_t empty[P::kStages];
  uint64_t p_full[kMathGroups];   // P, max, max_moved
  uint64_t p_empty[kMathGroups];  // the other warpgroup's products with P are done
  uint64_t block_announced[kAnnouncedBlocks];

  __device__ __forceinline__ void init_barriers() {
    for (uint64_t& barrier : block_announced) ptx::mbarrier_init(&barrier, 1);
    for (int i = 0; i < P::kStages; ++i) {
      // Each thread's copies, and a lane of each warp for the mark.
      ptx::mbarrier_init(&full[i], P::kLoadThreads + P::kLoadWarps);
      ptx::mbarrier_init(&empty[i], kMathGroups * kWarpArrivals);
      marks[i] = {0, 0};
    }
    for (int i = 0; i < kMathGroups; ++i) {
      ptx::mbarrier_init(&p_full[i], 128);
      ptx::mbarrier_init(&p_empty[i], kWarpArrivals);
    }
  }
};

}  // namespace flashmla::sm90::decode
