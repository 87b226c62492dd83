// Shared memory and barriers of decode over V3.2 caches with simple scales.
#pragma once

#include "sm90/decode/cta.cuh"
#include "sm90/fp8_power_decode/config.h"

namespace flashmla::sm90::decode {

template <bool kSparse>
struct SharedStorage<fp8_power_decode::Problem<kSparse>> {
  using P = fp8_power_decode::Problem<kSparse>;

  // Queries times a power of two for each row: latent columns as fp16, RoPE columns as bfloat16, in
  // the order in which lanes have those of the keys. Rows of 64 columns, swizzled.
  alignas(1024) uint8_t q[P::kCodeTiles + 1][kSubTileBytes];
  // P, a token a column.
  alignas(1024) uint8_t p[P::kWeightBuffers][kSubTileBytes];
  // Blocks as they lie in the cache.
  alignas(128) uint8_t tokens[P::kStages][P::kBlockBytes];
  // The scales as the values need them.
  alignas(16) __half scales[P::kStages][P::kGroups * kTokens];

  GatheredBlock blocks[kAnnouncedBlocks];
  static_assert(kAnnouncedBlocks > 3 + P::kStages);
  alignas(8) uint8_t stream[sizeof(BlockStream<P>)];
  SharedWalk<P> pieces[P::kThreads / 128];

  alignas(16) float q_factor[kRows];  // undoes that of q; NaN if a row is not finite
  // The running maximum (base-2 scaled scores), -inf while nothing was attended: the present one
  // and those before it, which values may still be weighted with.
  alignas(16) float maxima[P::kMaxima][kRows];
  float warp_max[4][kRows];
  float sums[P::kScoreGroups][4][kRows];  // of the weights that each warp has had
  int visible[kRows];                     // dense: tokens that a row attends to
  bool max_moved[P::kWeightBuffers];      // with the block that P is of
  Place place;
  uint2 marks[P::kStages];

  uint64_t full[P::kStages];
  uint64_t empty[P::kStages];
  uint64_t p_full[P::kWeightBuffers];
  uint64_t p_empty[P::kWeightBuffers];
  uint64_t sums_full, sums_empty;
  uint64_t block_announced[kAnnouncedBlocks];

  __device__ __forceinline__ void init_barriers() {
    for (uint64_t& barrier : block_announced) ptx::mbarrier_init(&barrier, 1);
    for (int i = 0; i < P::kStages; ++i) {
      ptx::mbarrier_init(&full[i], P::kLoadWarps);
      ptx::mbarrier_init(&empty[i], 128 + 256);
      marks[i] = {0, 0};
    }
    for (int i = 0; i < P::kWeightBuffers; ++i) {
      ptx::mbarrier_init(&p_full[i], 128);
      ptx::mbarrier_init(&p_empty[i], 256);
    }
    ptx::mbarrier_init(&sums_full, 256);
    ptx::mbarrier_init(&sums_empty, 256);
  }
};

}  // namespace flashmla::sm90::decode
