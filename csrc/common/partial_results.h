// Where the partial results of pieces lie: what the attention kernels write and the merge reads.
//
// The rows of a request fall into slices (see DecodeParams::slices), those of a slice into slabs of
// 16, the rows of a warp in a wgmma accumulator. Lane 4 * r + c of such a warp has columns 2 * c
// and the next one of rows r and r + 8 in each tile of 8 columns. A slab of a slot has of each row
// and
// - the maximum m that its scores, in base 2, have been compared with, and the sum of the weights
//   2^(score - m). The largest score may be some more than m: as long as they stay small, weights
//   above 1 are as good. (-inf, 0) if the row attended to nothing in the piece;
// - the values with these weights, not divided by that sum. They are unwritten in pieces without
//   blocks.
// There are two forms, by the kernel that writes them (leaves_float_pieces in launch.h):
// - Float: for each line r of 8 maximum and sum of row r, and of row r + 8; for each tile a float4
//   of each lane, first of row r.
// - Rounded to float16, in half of the bytes: for each two tiles 8 numbers of each lane, first of
//   the first tile. They are multiplied with 2^-e, e being such that they fit, which a lane finds
//   for each of its rows and each group of columns by itself. So there are m + e and sum * 2^-e for
//   each group and lane: whoever takes these for maximum and sum need not know of e. Groups are the
//   left and the right half of the columns; of FP8 caches, where scales may make one of 64 columns
//   much smaller than the next, these.
// Rows of the last slab that do not exist hold anything.
#pragma once

#include "common/schedule.h"
#include "params.h"

namespace flashmla::partial {

constexpr int kSlabRows = 16;
constexpr int kLines = kSlabRows / 2;
constexpr int kTileColumns = 8;
constexpr int kLanes = 32;

// Groups of columns with a scale of their own, of 512 columns if FP8.
constexpr int kPlainScaleGroups = 2;
constexpr int kFp8ScaleGroups = 8;
FLASHMLA_HOST_DEVICE constexpr int scale_groups(CacheFormat format) {
  return format == CacheFormat::kPlain ? kPlainScaleGroups : kFp8ScaleGroups;
}
// Floats of a slab for maxima and sums; the float form needs the first of them only.
FLASHMLA_HOST_DEVICE constexpr int sums(CacheFormat format) {
  return scale_groups(format) * kLanes * 4;
}
FLASHMLA_HOST_DEVICE constexpr int values(int head_dim_v) { return kSlabRows * head_dim_v; }
// Floats that there is room for in place of these.
FLASHMLA_HOST_DEVICE constexpr int floats(int head_dim_v, CacheFormat format) {
  return values(head_dim_v) / (format == CacheFormat::kPlain ? 2 : 1);
}

FLASHMLA_HOST_DEVICE int rows_of_slice(const DecodeParams& p) {
  return p.seq_q * p.heads_q / p.slices;
}

FLASHMLA_HOST_DEVICE int slabs_of_slice(int rows) { return schedule::ceil_div(rows, kSlabRows); }

}  // namespace flashmla::partial
