// Where the partial results of pieces lie: what the attention kernels write and the merge reads.
//
// The rows of a request fall into slices (see DecodeParams::slices), those of a slice into slabs of
// 16, the rows of a warp in a wgmma accumulator. A slab of a slot has
// - its sums: for each of 8 lines two rows, r and r + 8, and of each the maximum m that its scores,
//   in base 2, have been compared with, and the sum of the weights 2^(score - m). The largest score
//   may be some more than m: as long as they stay small, weights above 1 are as good. (-inf, 0) if
//   the row attended to nothing in the piece;
// - its values, weighted but not divided by that sum, as the lanes of a warp hold them: for each
//   tile of 8 columns a float4 of each lane, which is columns 2 * (lane % 4) and the next one of
//   rows lane / 4 and lane / 4 + 8. A warp so writes and reads 512 bytes side by side. They are
//   unwritten in pieces without blocks.
// Rows of the last slab that do not exist hold anything.
#pragma once

#include "common/schedule.h"
#include "params.h"

namespace flashmla::partial {

constexpr int kSlabRows = 16;
constexpr int kLines = kSlabRows / 2;
constexpr int kTileColumns = 8;
constexpr int kLanes = 32;

// Floats of a slab.
constexpr int kSums = 2 * kSlabRows;
FLASHMLA_HOST_DEVICE constexpr int values(int head_dim_v) { return kSlabRows * head_dim_v; }

FLASHMLA_HOST_DEVICE int rows_of_slice(const DecodeParams& p) {
  return p.seq_q * p.heads_q / p.slices;
}

FLASHMLA_HOST_DEVICE int slabs_of_slice(int rows) { return schedule::ceil_div(rows, kSlabRows); }

}  // namespace flashmla::partial
