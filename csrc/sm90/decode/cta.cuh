// What the decode kernels for sm_90a share besides the mathematics: shared memory, barriers, the
// place of a row in the results, and the beginning of a CTA.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <new>

#include "common/fast_divide.h"
#include "common/final_row.cuh"
#include "common/partial_results.h"
#include "common/ptx.cuh"
#include "common/schedule.cuh"
#include "common/wgmma.cuh"
#include "sm90/decode/config.h"

namespace flashmla::sm90::decode {

// ---------------------------------------------------------------------------------------------
// Parameters and rows
// ---------------------------------------------------------------------------------------------

template <typename P>
struct KernelParams {
  typename P::Params p;
  int rows;                  // of one request and slice
  int row_tiles;             // of 64 rows, of one request and slice
  int group;                 // h_q / h_kv: query heads of a KV head
  bool must_gather_queries;  // rows of a row tile do not lie side by side

  // Of the caches that tokens are gathered from.
  FastDivide page_size[kMaxRuns];
  uint32_t slots[kMaxRuns];       // at most 2^31
  uint32_t page_bytes[kMaxRuns];  // if tokens do not follow each other over page boundaries
};

constexpr int kSlabsPerTile = kRows / partial::kSlabRows;

// What a CTA works on.
struct Place {
  int part;
  int slice;
  int row_tile;
};

struct RowIndex {
  int token;  // query token
  int head;   // query head, over all KV heads
};

template <typename P>
__device__ __forceinline__ RowIndex row_index(const KernelParams<P>& kp, int slice, int row) {
  if constexpr (P::kSparse) return {slice, row};
  const int token = row / kp.group;
  return {token, slice * kp.group + row - token * kp.group};
}

template <typename P>
__device__ __forceinline__ int64_t out_row(const KernelParams<P>& kp, int request, RowIndex i) {
  return (static_cast<int64_t>(request) * kp.p.seq_q + i.token) * kp.p.heads_q + i.head;
}

template <typename P>
__device__ __forceinline__ int64_t lse_index(const KernelParams<P>& kp, int request, RowIndex i) {
  return (static_cast<int64_t>(request) * kp.p.heads_q + i.head) * kp.p.seq_q + i.token;
}

template <typename P>
using PieceWalk = schedule::PieceWalk<
    std::conditional_t<P::kSparse, schedule::ChoiceLengths, schedule::SequenceLengths>>;

// Where a math warpgroup is in its part of the schedule, in shared memory, for kernels that have no
// registers for it.
template <typename P>
struct SharedWalk {
  // Calls body(piece) for each piece of the part, by all threads of the warpgroup, whose barrier is
  // `barrier`.
  template <typename Barrier, typename Body>
  __device__ __forceinline__ void for_each(const KernelParams<P>& kp, int part, int thread,
                                           const Barrier& barrier, const Body& body) {
    if (thread == 0) {
      new (walk) PieceWalk<P>(kp.p, part);
      pieces = 0;
      end_number = 0;
    }
    while (true) {
      if (thread == 0) {
        more = reinterpret_cast<PieceWalk<P>*>(walk)->next(kp.p, piece);
        if (more && piece.first_block < piece.end_block) {
          ++pieces;
          end_number += piece.end_block - piece.first_block;
        }
      }
      barrier();
      if (!more) break;
      body(piece);
      barrier();
    }
  }

  alignas(8) uint8_t walk[sizeof(PieceWalk<P>)];
  schedule::Piece piece;
  bool more;
  int pieces;      // with blocks, up to this one
  int end_number;  // of the blocks of these
};

// While nothing was attended the maximum is -inf, and -inf - -inf must not make a NaN.
__device__ __forceinline__ float finite_max(float max) { return max == -INFINITY ? 0.f : max; }

// Tokens that a row of the request and slice attends to. Never decreases along the rows. All rows
// see the block that stands for a length that makes no sense.
template <typename P>
__device__ __forceinline__ int visible_tokens(const KernelParams<P>& kp,
                                              const schedule::Piece& piece, int row) {
  if (!kp.p.causal || piece.poison) return piece.length;
  const int token = min(row / kp.group, kp.p.seq_q - 1);
  return piece.length - (kp.p.seq_q - 1 - token);
}

// Whether queries are to be loaded for the piece, and given up after it.
template <typename P>
__device__ __forceinline__ bool needs_queries(const schedule::Piece& piece) {
  return !P::kKeepsQueries || piece.needs_queries;
}
template <typename P>
__device__ __forceinline__ bool frees_queries(const schedule::Piece& piece) {
  return !P::kKeepsQueries || piece.frees_queries;
}

// Which slab of the workspace is for rows 16 * warp and up of the row tile. See
// common/partial_results.h.
template <typename P>
__device__ __forceinline__ int64_t partial_slab(const KernelParams<P>& kp, const Place& place,
                                                const schedule::Piece& piece, int warp) {
  const int64_t slice = static_cast<int64_t>(piece.slot) * kp.p.slices + place.slice;
  return slice * partial::slabs_of_slice(kp.rows) + place.row_tile * kSlabsPerTile + warp;
}

// The maximum and the sum of one of the two rows of a line of a slab, of float partial results.
template <typename P>
__device__ __forceinline__ void store_partial_sums(const KernelParams<P>& kp, int64_t slab,
                                                   int line, int h, const float2& max_and_sum) {
  float2* sums = reinterpret_cast<float2*>(kp.p.partial_sums);
  sums[slab * (P::kScaleGroups * partial::kLanes * 2) + line * 2 + h] = max_and_sum;
}

// A piece without blocks, by warpgroup `group`, which owns that half of the columns: zeros and +inf
// for a whole request, weight 0 for a part of one.
template <typename P>
__device__ __forceinline__ void store_empty(const KernelParams<P>& kp, const Place& place,
                                            const schedule::Piece& piece, int group, int thread) {
  using T = typename P::T;
  using S = typename P::S;
  const int first_row = place.row_tile * kRows;
  if (piece.slot >= 0) {
    const int warp = thread / 32;
    if (first_row + warp * partial::kSlabRows >= kp.rows) return;
    // Right for both forms: that for lines takes the first of what is for the lanes of a group.
    constexpr int kGroupsOfHalf = P::kScaleGroups / 2;
    const int64_t half = partial_slab(kp, place, piece, warp) * 2 + group;
    float4* sums = reinterpret_cast<float4*>(kp.p.partial_sums) +
                   half * (kGroupsOfHalf * partial::kLanes) + thread % 32;
#pragma unroll
    for (int g = 0; g < kGroupsOfHalf; ++g) {
      sums[g * partial::kLanes] = {-INFINITY, 0.f, -INFINITY, 0.f};
    }
    return;
  }
  for (int i = thread; i < kRows; i += 128) {
    const int row = first_row + i;
    if (group != 0 || row >= kp.rows) break;
    kp.p.lse[lse_index(kp, piece.request, row_index(kp, place.slice, row))] = INFINITY;
  }
  constexpr int kChunks = S::kHalfColumns / 8;
  for (int i = thread; i < kRows * kChunks; i += 128) {
    const int row = first_row + i / kChunks;
    if (row >= kp.rows) break;
    T* out = static_cast<T*>(kp.p.out) +
             out_row(kp, piece.request, row_index(kp, place.slice, row)) * S::kDimV +
             group * S::kHalfColumns + i % kChunks * 8;
    *reinterpret_cast<uint4*>(out) = uint4{0, 0, 0, 0};
  }
}

// A block, as those see it who gather its tokens.
struct alignas(16) GatheredBlock {
  const int32_t* entries;  // sparse: the slots of its tokens; dense: the request's row of the table
  int count;               // of its tokens that are to be gathered
  int position;            // dense: its first token in the request
  int request;
  int source;
  int buffer;
  int flags;
};
static_assert(sizeof(GatheredBlock) == 32);
constexpr int kBlockExists = 1;
constexpr int kBlockNeedsQueries = 2;  // others than the block before it
constexpr int kBlockIsBad = 4;

// The blocks of a part of the schedule, one after the other.
template <typename P>
class BlockStream {
 public:
  __device__ __forceinline__ BlockStream(const KernelParams<P>& kp, int part) : walk_(kp.p, part) {
    piece_.first_block = piece_.end_block = 0;
    block_ = 0;
  }

  __device__ __forceinline__ void next(const KernelParams<P>& kp, int slice,
                                       GatheredBlock& result) {
    ++block_;
    while (block_ >= piece_.end_block) {
      if (!walk_.next(kp.p, piece_)) {
        // Nor is there a later one: the walk may have left a piece there that is not this part's.
        piece_.end_block = 0;
        result.flags = 0;
        return;
      }
      block_ = piece_.first_block;
    }
    int block = block_;
    int length = piece_.length;
    result.source = 0;
    if constexpr (P::kSparse) {
      const int blocks = schedule::blocks_of(length);
      if (block >= blocks) {
        block -= blocks;
        length = piece_.extra_length;
        result.source = 1;
      }
      const SparseSource& source = kp.p.sources[result.source];
      const int64_t row = static_cast<int64_t>(piece_.request) * kp.p.slices + slice;
      result.entries = source.indices + row * source.topk + block * kTokens;
    } else {
      result.entries = kp.p.block_table + static_cast<int64_t>(piece_.request) * kp.p.table_width;
    }
    result.position = block * kTokens;
    result.count = piece_.poison ? 0 : min(length - block * kTokens, kTokens);
    result.request = piece_.request;
    result.buffer = (block_ - piece_.first_block) % kBuffers;
    const bool begins_queries = block_ == piece_.first_block && needs_queries<P>(piece_);
    result.flags = kBlockExists | (begins_queries ? kBlockNeedsQueries : 0) |
                   (piece_.poison ? kBlockIsBad : 0);
  }

 private:
  PieceWalk<P> walk_;
  schedule::Piece piece_;
  int block_;
};

// Blocks are announced two ahead of the one that the announcing warp gathers. Another warp may be
// two blocks behind it, no more, since it could not have been given the buffer else.
constexpr int kAnnouncedBlocks = 8;
static_assert(kAnnouncedBlocks > 2 + 2);

// ---------------------------------------------------------------------------------------------
// Shared memory and barriers
// ---------------------------------------------------------------------------------------------

constexpr int kWarpArrivals = 4;  // one lane of each warp of a warpgroup

template <typename P>
struct SharedStorage {
  using S = typename P::S;

  alignas(1024) uint8_t q[S::kSubTiles][kSubTileBytes];
  alignas(1024) uint8_t kv[kBuffers][S::kBufferBytes];
  // FP8 tokens on their way, of each gathering warp.
  static constexpr int kStages = P::kStages > 0 ? P::kLoadWarps * P::kStages : 1;
  alignas(128) uint8_t stage_values[kStages][kStageTokens * kStageValueBytes];
  uint8_t stage_scales[kStages][kStageTokens * kStageScaleBytes];
  // What there is to gather.
  static constexpr bool kGathers = P::kLoading != Loading::kCopied;
  GatheredBlock blocks[kGathers ? kAnnouncedBlocks : 1];
  alignas(8) uint8_t stream[kGathers ? sizeof(BlockStream<P>) : 1];

  // Running maximum (base-2 scaled scores) after block 2i (0) and 2i + 1 (1) of a piece.
  float row_max[2][kRows];
  // Row sums of each warpgroup's own blocks, double-buffered over pieces.
  float row_sum[2][kMathGroups][kRows];
  Place place;  // here, since registers are scarce
  // What loading warps say of the block in the buffer. If sparse, a bit for each token that exists;
  // else x is not 0 if it cannot be loaded, since its page is no page of the cache.
  uint2 marks[kBuffers];

  uint64_t q_full;
  uint64_t q_empty;
  uint64_t kv_full[kBuffers][S::kCopies];
  uint64_t kv_empty[kBuffers][2];  // [.][h]: the value half of warpgroup h
  uint64_t p_full[kBuffers];       // P of the block in the buffer, and its row_max
  uint64_t scores_half_done;       // of the even block: the odd block's may begin
  uint64_t sums_full;              // row_sum of the piece
  uint64_t block_announced[kAnnouncedBlocks];

  // `query_arrivals`, `key_arrivals`: of the loading threads, for a row tile of queries, and for a
  // part of a block that has a barrier of its own.
  __device__ __forceinline__ void init_barriers(int query_arrivals, int key_arrivals) {
    ptx::mbarrier_init(&q_full, query_arrivals);
    ptx::mbarrier_init(&q_empty, kMathGroups * kWarpArrivals);
    ptx::mbarrier_init(&sums_full, kMathThreads);
    ptx::mbarrier_init(&scores_half_done, kWarpArrivals);
    for (uint64_t& barrier : block_announced) ptx::mbarrier_init(&barrier, 1);
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      for (int copy = 0; copy < S::kCopies; ++copy) {
        ptx::mbarrier_init(&kv_full[buffer][copy], key_arrivals);
      }
      ptx::mbarrier_init(&p_full[buffer], 128);
      marks[buffer] = {0, 0};
      for (int half = 0; half < 2; ++half) {
        ptx::mbarrier_init(&kv_empty[buffer][half], P::kClusterCtas * kWarpArrivals);
      }
    }
  }
};

template <typename P>
constexpr int kSharedBytes = sizeof(SharedStorage<P>);

// Named barrier of a math warpgroup: + its index.
constexpr int kBarrierMathGroup = 1;

// Which half of the values, hence which warpgroup, releases the RoPE sub-tile of a buffer: the one
// that reads P from there, which is not the one that wrote it.
__device__ __forceinline__ constexpr int reader_of_p(int buffer) { return 1 - buffer; }

// Which half of the values of a buffer is loaded first and first used by the scores: the one that
// is released first, by the warpgroup that has P in registers. If the copy engine loads for a
// single row tile it is the left one of both buffers: memory is what counts then, and serves halves
// better in one order.
template <typename P>
__device__ __forceinline__ int first_half(const KernelParams<P>& kp, int buffer) {
  return P::kLoading != Loading::kCopied || kp.row_tiles > 1 ? buffer : 0;
}

// ---------------------------------------------------------------------------------------------
// Beginning of a CTA
// ---------------------------------------------------------------------------------------------

// Shared memory of the CTA. Sub-tiles start at multiples of 1,024, as the 128-byte swizzle wants.
template <typename P>
__device__ __forceinline__ SharedStorage<P>& shared_storage(uint8_t* bytes) {
  static_assert(kSharedBytes<P> <= kSharedBytesMax);
  // Kept in a register: known to the compiler, it would be worked out anew, from a slow special
  // register, for each access (5% of the time in all).
  const uint32_t base = ptx::opaque(ptx::smem_address(bytes));
  return *reinterpret_cast<SharedStorage<P>*>(ptx::smem_pointer(base));
}

// NaN to all results of this row tile and slice: the schedule is not one for this call.
template <typename P>
__device__ __noinline__ void fill_nan(const KernelParams<P>& kp, const Place& place) {
  constexpr int kPairs = P::S::kDimV / 2;
  const int first_row = place.row_tile * kRows;
  const int count = min(kRows, kp.rows - first_row);
  const uint32_t nan_pair = ptx::pack<typename P::T>(NAN, NAN);
  for (int request = place.part; request < kp.p.batch; request += kp.p.num_parts) {
    for (int i = threadIdx.x; i < count * kPairs; i += P::kThreads) {
      const RowIndex index = row_index(kp, place.slice, first_row + i / kPairs);
      reinterpret_cast<uint32_t*>(kp.p.out)[out_row(kp, request, index) * kPairs + i % kPairs] =
          nan_pair;
    }
    for (int i = threadIdx.x; i < count; i += P::kThreads) {
      kp.p.lse[lse_index(kp, request, row_index(kp, place.slice, first_row + i))] = NAN;
    }
  }
}

// Finds the CTA's place, makes its barriers, waits for earlier kernels and proves the schedule.
// Grid: num_parts x slices x row_tiles, flattened on x with the row tile fastest, so that tiles
// that read the same keys run side by side. False if nothing is left to do.
// `arrivals`: of SharedStorage::init_barriers.
template <typename P, typename... Arrivals>
__device__ __forceinline__ bool begin_cta(const KernelParams<P>& kp, SharedStorage<P>& smem,
                                          Arrivals... arrivals) {
  if (threadIdx.x == 0) {
    const int tile = static_cast<int>(blockIdx.x) / kp.row_tiles;
    smem.place = {tile / kp.p.slices, tile % kp.p.slices,
                  static_cast<int>(blockIdx.x) % kp.row_tiles};
    smem.init_barriers(arrivals...);
    ptx::fence_barrier_init();
  }
  if constexpr (P::kPaired) ptx::cluster_sync();
  // From here on what earlier kernels wrote may be read, and the merge may be launched: it waits.
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();

  const schedule::Expected expected{kp.p.batch, kp.row_tiles * kp.p.slices, kp.p.num_parts,
                                    schedule::expected_stamp(kp.p.batch_invariant, P::kSparse)};
  // After this barrier all threads see the place and the other barriers, too.
  const bool broken =
      __syncthreads_or(schedule::any_row_broken(kp.p.schedule, expected, threadIdx.x, P::kThreads));
  if (blockIdx.x == 0 && threadIdx.x == 0) *kp.p.schedule_is_broken = broken;
  if (broken) fill_nan<P>(kp, smem.place);
  return !broken;
}

// All of a CTA whose math warpgroups run the same code, and whose last warpgroup loads.
template <typename P, typename Loader, typename MathGroup>
__device__ __forceinline__ void run_cta(const KernelParams<P>& kp) {
  auto& smem = shared_storage<P>(ptx::dynamic_smem());
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);

  if (!begin_cta<P>(kp, smem)) return;

  if (warpgroup == (P::kThreads - P::kLoadThreads) / 128) {
    ptx::setmaxnreg_dec<P::kLoadRegisters>();
    Loader(kp, smem).run();
  } else {
    ptx::setmaxnreg_inc<P::kMathRegisters>();
    MathGroup(kp, smem, warpgroup).run();
  }
}

}  // namespace flashmla::sm90::decode
