// The format of the tile schedule, shared by its planner, the attention kernels and the merge.
//
// The work of a batch is the sequence of its requests, each a run of units. A schedule cuts that
// sequence into `num_parts` consecutive parts by *starts* only: part p runs from its begin to the
// begin of part p + 1, and a part that runs past a request takes it to its actual end. So a
// schedule made for other lengths is still a partition of the work, only a less balanced one.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define FLASHMLA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLASHMLA_HOST_DEVICE inline
#endif

namespace flashmla::schedule {

// Tokens of a block: what one step of an attention kernel consumes.
constexpr int kBlockTokens = 64;
// Rows of a row tile, query tokens x heads: what one CTA of an attention kernel works on.
constexpr int kRowTileRows = 64;
// Cost of starting a request within a part, in blocks: load of q, prologue, epilogue.
constexpr int kOverheadBlocks = 2;
// The least share of a part, in blocks: smaller ones cost more to merge than they save.
constexpr int kMinShareBlocks = 2;
// Parts of whole requests only are preferred while the largest costs at most so many blocks more
// than an even share: writing and merging partial results costs about as much, little or more by
// how many there would be.
constexpr int kLeastWholeRequestSlack = 2;
constexpr int kMostWholeRequestSlack = 5;
// Else parts of one piece each are preferred, all of the same size: where requests are few enough,
// and the pieces are at most this many blocks larger than an even share, which counts the
// overheads. A piece's size is chosen among as many as can be between an even share of the blocks
// alone and that.
constexpr int kEvenSlack = 1;
constexpr int kEvenSizes = 1 + kOverheadBlocks + kEvenSlack;
// Their least size, a power of two, makes a piece take about as long as merging all of them: a
// block takes as long as merging so many row tiles.
constexpr int kMergedTilesPerBlock = 32;
// Even pieces are planned for at most so many parts.
constexpr int kMaxEvenParts = 1024;
// Batch-invariant splits: at most this many for one request, and at least this many blocks each.
constexpr int kMaxInvariantSplits = 16;
constexpr int kMinInvariantBlocks = 8;

constexpr int32_t kStamp = 0x4D4C4100;  // format version in the low byte's upper bits
constexpr int32_t kStampBatchInvariant = 1;
constexpr int32_t kStampSparse = 2;

// One row of the schedule. (request, unit) pairs are ordered lexicographically.
struct Row {
  int32_t begin_request;
  int32_t begin_unit;
  int32_t end_request;
  int32_t end_unit;
  int32_t batch;
  int32_t row_tiles;
  int32_t stamp;
  int32_t num_parts;
};
static_assert(sizeof(Row) == 32);

FLASHMLA_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The largest n with 2^n <= x, which is positive.
FLASHMLA_HOST_DEVICE int floor_log2(int x) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz(x);
#else
  return static_cast<int>(std::bit_width(static_cast<unsigned>(x))) - 1;
#endif
}

// Blocks of the smallest even pieces that are worth merging, of `blocks` of all requests: the
// largest power of two whose square is no more than what the pieces have to merge, in blocks' time,
// if they have a block each.
FLASHMLA_HOST_DEVICE int least_even_piece(int blocks, int row_tiles) {
  // Below 2^30. With more blocks pieces are larger in any case.
  const int most_blocks = blocks < 1 << 24 ? blocks : 1 << 24;
  const int merged = most_blocks * (row_tiles < 32 ? row_tiles : 32) / kMergedTilesPerBlock;
  return merged > 0 ? 1 << floor_log2(merged) / 2 : 1;
}

// How much more than an even share the largest part may cost, in blocks, before requests are cut
// into one piece a part, or fewer if they have fewer blocks.
FLASHMLA_HOST_DEVICE int whole_request_slack(int blocks, int num_parts, int row_tiles) {
  // As good as more.
  constexpr int kEnough = (kMostWholeRequestSlack - kLeastWholeRequestSlack) * kMergedTilesPerBlock;
  const int pieces = blocks < num_parts ? blocks : num_parts;
  const int merged =
      (pieces < kEnough ? pieces : kEnough) * (row_tiles < kEnough ? row_tiles : kEnough);
  return kLeastWholeRequestSlack + (merged < kEnough ? merged : kEnough) / kMergedTilesPerBlock;
}

// Number of blocks of a request of `length` tokens; negative lengths count as 0. Written without
// length + 63, which could overflow.
FLASHMLA_HOST_DEVICE int blocks_of(int length) {
  return length <= 0 ? 0 : (length - 1) / kBlockTokens + 1;
}

// Blocks of one batch-invariant split of a request of `blocks` blocks.
FLASHMLA_HOST_DEVICE int invariant_split_blocks(int blocks) {
  const int even = ceil_div(blocks, kMaxInvariantSplits);
  return even > kMinInvariantBlocks ? even : kMinInvariantBlocks;
}

// The most splits a batch-invariant request of up to `capacity` tokens has.
FLASHMLA_HOST_DEVICE int max_invariant_splits(int64_t capacity) {
  const int64_t blocks = (capacity + kBlockTokens - 1) / kBlockTokens;
  const int64_t splits = (blocks + kMinInvariantBlocks - 1) / kMinInvariantBlocks;
  if (splits < 1) return 1;
  return splits < kMaxInvariantSplits ? static_cast<int>(splits) : kMaxInvariantSplits;
}

FLASHMLA_HOST_DEVICE int32_t expected_stamp(bool batch_invariant, bool sparse) {
  return kStamp | (batch_invariant ? kStampBatchInvariant : 0) | (sparse ? kStampSparse : 0);
}

}  // namespace flashmla::schedule
