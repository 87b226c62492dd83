// Shared memory and barriers of decode with FP8 products.
#pragma once

#include "sm90/decode/cta.cuh"
#include "sm90/fp8_matmul_decode/config.h"

namespace flashmla::sm90::decode {

template <bool kSparse>
struct SharedStorage<fp8_matmul_decode::Problem<kSparse>> {
  using P = fp8_matmul_decode::Problem<kSparse>;

  // Latent columns of the queries, scaled by a power of two for each row, and RoPE columns.
  alignas(1024) uint8_t q[fp8_matmul_decode::kGroups][fp8_matmul_decode::kCodeTileBytes];
  alignas(1024) uint8_t q_rope[kSubTileBytes];
  // Keys as they lie in the cache, and transposed: the values.
  alignas(
      1024) uint8_t codes[kBuffers][fp8_matmul_decode::kGroups][fp8_matmul_decode::kCodeTileBytes];
  alignas(1024) uint8_t rope[kBuffers][kSubTileBytes];
  alignas(1024)
      uint8_t values[kBuffers][fp8_matmul_decode::kValueTiles][fp8_matmul_decode::kValueTileBytes];

  // P of the blocks of a pair, for even and for odd pairs, as threads have it.
  uint4 p[2][kBuffers][4][128];

  // Scales of the tokens as they are in the cache, and by groups for scores and for values: these
  // divided by `reference`, a power of two that is larger than all of a pair's.
  uint4 raw_scales[kBuffers][kTokens];
  float scales[kBuffers][fp8_matmul_decode::kGroups][kTokens];
  __half relative_scales[kBuffers][fp8_matmul_decode::kGroups][kTokens];
  float reference[fp8_matmul_decode::kGroups];
  uint4 warp_max[kBuffers][P::kLoadWarps];

  GatheredBlock blocks[kAnnouncedBlocks];
  alignas(8) uint8_t stream[sizeof(BlockStream<P>)];

  SharedWalk<P> pieces[kMathGroups];

  float q_factor[kRows];  // undoes the scaling of a row of queries; NaN if it is not finite
  float row_max[2][kMathGroups][kRows];  // for even and for odd pairs
  float max_before[kMathGroups][kRows];  // the pair, if it moves in this one
  float row_sum[2][kMathGroups][kRows];
  Place place;
  uint2 marks[kBuffers];

  uint64_t keys_full[kBuffers];   // codes, RoPE columns, scales, mark
  uint64_t keys_empty[kBuffers];  // the scores are done
  uint64_t p_full;                // P of a pair, and its row_max
  uint64_t values_full;           // transposed codes of a pair, and relative scales
  uint64_t values_empty;
  uint64_t sums_full;
  uint64_t block_announced[kAnnouncedBlocks];

  __device__ __forceinline__ void init_barriers() {
    ptx::mbarrier_init(&sums_full, kMathThreads);
    for (uint64_t& barrier : block_announced) ptx::mbarrier_init(&barrier, 1);
    ptx::mbarrier_init(&p_full, kMathThreads);
    ptx::mbarrier_init(&values_full, P::kLoadThreads);
    ptx::mbarrier_init(&values_empty, kMathThreads);
    for (int i = 0; i < kBuffers; ++i) {
      ptx::mbarrier_init(&keys_full[i], P::kLoadThreads);
      ptx::mbarrier_init(&keys_empty[i], 128);
      marks[i] = {0, 0};
    }
  }
};

}  // namespace flashmla::sm90::decode
