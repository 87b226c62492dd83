// Shapes and budgets of the decode kernels for sm_90a.
#pragma once

#include <cstdint>

#include <type_traits>

#include "common/partial_results.h"
#include "common/schedule.h"
#include "params.h"

namespace flashmla::sm90::decode {

constexpr int kRows = schedule::kRowTileRows;    // rows of a tile: query tokens x heads
constexpr int kTokens = schedule::kBlockTokens;  // tokens of a block
constexpr int kSubTileColumns = 64;              // columns of a 128-byte-swizzled sub-tile
constexpr int kRowBytes = kSubTileColumns * 2;   // of a sub-tile
constexpr int kSubTileBytes = kRows * kRowBytes;
// Rows come in swizzle groups of 8.
constexpr int kGroupTokens = 8;
constexpr int kGroupBytes = kGroupTokens * kRowBytes;
constexpr int kTokenGroups = kTokens / kGroupTokens;
static_assert(kRows == kTokens, "query and key sub-tiles, and P, share one size");

constexpr int kBuffers = 2;  // of keys
constexpr int kSharedBytesMax = 227 * 1024;

// What follows from the columns of the keys and, their first ones, of the values.
template <int kDim_, int kDimV_>
struct Shape {
  static constexpr int kDim = kDim_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kSubTiles = kDim / kSubTileColumns;
  static constexpr int kValueTiles = kDimV / kSubTileColumns;
  static_assert(kSubTiles * kSubTileColumns == kDim && kValueTiles * kSubTileColumns == kDimV);

  // The sub-tile without values, if the keys have one, holds RoPE columns and later P. Without one
  // P has a sub-tile for itself.
  static constexpr bool kHasRope = kSubTiles > kValueTiles;
  static_assert(kSubTiles - kValueTiles <= 1, "P takes the place of one key sub-tile at most");

  // A math warpgroup owns half of the output columns.
  static constexpr int kHalfTiles = kValueTiles / 2;
  static constexpr int kHalfColumns = kDimV / 2;
  static constexpr int kAccumulators = kHalfColumns / 2;  // registers a thread

  // A key buffer: the two halves of the values, then the sub-tile of RoPE columns and P. In a half
  // the groups of 8 tokens follow each other, each with all its sub-tiles, so that a copy reads
  // memory almost in its order: 1% faster where memory is what counts.
  static constexpr int kHalfBytes = kHalfTiles * kSubTileBytes;
  static constexpr int kOffsetOfP = 2 * kHalfBytes;
  static constexpr int kBufferBytes = kOffsetOfP + kSubTileBytes;

  // One copy-engine instruction brings half of the values, and a third one the RoPE sub-tile; a
  // barrier announces each. Issuing a copy costs the issuing lane 140 clocks and more, so small
  // ones would make it the bottleneck.
  static constexpr int kCopies = kHasRope ? 3 : 2;
  static constexpr int kRopeCopy = 2;
};

constexpr int kMathGroups = 2;
constexpr int kMathThreads = kMathGroups * 128;

// How keys come into shared memory.
enum class Loading {
  kCopied,     // by the copy engine, in pages
  kGathered,   // token by token, by the threads of further warpgroups
  kConverted,  // likewise; values of FP8 become bfloat16 on the way
};

// FP8 tokens on their way: a half of the values, and its scales, of 4 tokens.
constexpr int kStageTokens = 4;
constexpr int kStageValueBytes = 256;
constexpr int kStageScaleBytes = 8;

// An attention problem as the kernels see it.
template <typename T_, typename S_, bool kSparse_, Loading kLoading_, bool kPaired_ = false>
struct Problem {
  using T = T_;  // of queries, results and operands of the matrix products
  using S = S_;
  // Every query token chooses its keys; else rows share the sequence of their request.
  static constexpr bool kSparse = kSparse_;
  static constexpr Loading kLoading = kLoading_;
  // Two row tiles that share their keys are a cluster: each CTA converts half of the tokens, and
  // writes them to the shared memory of both.
  static constexpr bool kPaired = kPaired_;
  static constexpr int kClusterCtas = kPaired ? 2 : 1;
  static_assert(!kPaired || kLoading == Loading::kConverted);
  // The pieces of a request in a part share its queries. Converting takes the registers for that.
  static constexpr bool kKeepsQueries = kLoading != Loading::kConverted;
  // Of partial results.
  static constexpr int kScaleGroups =
      kLoading == Loading::kConverted ? partial::kFp8ScaleGroups : partial::kPlainScaleGroups;
  using Params = std::conditional_t<kSparse, SparseDecodeParams, DenseDecodeParams>;

  static constexpr int kLoadThreads = 128;
  static constexpr int kLoadWarps = kLoadThreads / 32;
  static constexpr int kThreads = kMathThreads + kLoadThreads;

  // Groups of four tokens that each converting warp has on their way: as many as there is room for.
  static constexpr int kStages = kLoading != Loading::kConverted ? 0
                                 : S::kSubTiles > 8 || kPaired   ? 2
                                                                 : 4;

  // Registers a thread of the math and the loading warpgroups. The kernels are launched with 168,
  // the most that 384 threads can have. Gathering takes more of them, masks of sequences too.
  static constexpr int kMathRegisters = S::kDimV != 512                ? 208
                                        : kLoading == Loading::kCopied ? 232
                                        : kSparse                      ? 216
                                                                       : 224;
  static constexpr int kLoadRegisters = 3 * 168 - 2 * kMathRegisters;
};

}  // namespace flashmla::sm90::decode
