// Plans the tile schedule: see common/schedule.h for the format and reference/scheduler.py for the
// same plan in jnp; both give the same integers.
//
// The weights of the requests are summed up once; then each part finds by binary search the request
// whose weights hold its position, part * payload. So the time does not depend on how the parts are
// spread over the requests. Parts of even pieces are found in the same way, by the numbers of
// pieces. Two forms, chosen by shapes only:
//
// - Up to 1024 requests and parts, where even pieces may be planned: one CTA with a thread for each
//   request and each part, all in registers and shared memory. This is latency, so scans take one
//   barrier and divisions are kept few.
// - Else a cluster of CTAs, and requests grouped into at most 1024 segments. Only the sums over
//   these are kept, all of them by each CTA; the segments that parts begin in are read a second
//   time, as is all of a batch-invariant batch.
#include <algorithm>

#include "common/dependent_launch.cuh"
#include "common/ptx.cuh"
#include "common/schedule.h"
#include "launch.h"

namespace flashmla {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
static_assert(kMaxWarps == 32, "the second level of a scan is one warp");
static_assert(schedule::kMaxEvenParts == kMaxThreads, "even pieces are planned by the small form");
constexpr unsigned kAllLanes = 0xffffffff;

// ---------------------------------------------------------------------------------------------
// Arithmetic
// ---------------------------------------------------------------------------------------------

FLASHMLA_HOST_DEVICE unsigned divide_up(unsigned a, unsigned b) { return (a + b - 1) / b; }

// Number of pieces less one of a batch-invariant request: ceil(blocks / split) - 1. All requests
// come through here, so it is done without a division by a variable.
FLASHMLA_HOST_DEVICE int invariant_cuts(int blocks) {
  using namespace schedule;
  const int split = invariant_split_blocks(blocks);
  if (split == kMinInvariantBlocks) {
    return blocks > 0 ? (blocks - 1) / kMinInvariantBlocks : 0;
  }
  // kMaxInvariantSplits pieces hold the request; less those that it leaves empty.
  int cuts = kMaxInvariantSplits - 1;
  for (int spare = kMaxInvariantSplits * split - blocks; spare >= split; spare -= split) --cuts;
  return cuts;
}

struct Start {
  int request;
  int unit;
};

// Where the part starts whose share begins `x` into the weights of `request`.
FLASHMLA_HOST_DEVICE Start start_in_request(bool batch_invariant, int request, int x, int blocks) {
  int unit = x - schedule::kOverheadBlocks;
  int units = blocks;
  if (unit <= 0) return {request, 0};
  if (batch_invariant) {
    const unsigned split = schedule::invariant_split_blocks(blocks);
    unit = static_cast<unsigned>(unit) / split;
    units = static_cast<int>(divide_up(blocks, split));
    if (unit <= 0) return {request, 0};
  }
  if (unit >= units) return {request + 1, 0};
  return {request, unit};
}

// The even share of a part, in blocks. `total` is below 2^30.
FLASHMLA_HOST_DEVICE int payload_of(int total, int num_parts) {
  const int even = static_cast<int>(divide_up(total, num_parts));
  return even > schedule::kMinShareBlocks ? even : schedule::kMinShareBlocks;
}

// ---------------------------------------------------------------------------------------------
// Weights of requests
// ---------------------------------------------------------------------------------------------

// What a request weighs: its blocks, at most `most_blocks` of them, and the overhead.
// Every request of a large batch passes through here, so the instructions are counted.
class Weights {
 public:
  __device__ __forceinline__ Weights(const ScheduleParams& p, int most_blocks)
      : p_(p),
        bound_(p.max_length >= 0 ? p.max_length : INT32_MAX),
        extra_bound_(p.extra_max_length >= 0 ? p.extra_max_length : INT32_MAX),
        least_(schedule::kOverheadBlocks),
        most_(most_blocks + schedule::kOverheadBlocks) {
    if (p.lengths == nullptr) least_ += blocks_of(p.default_length, bound_);
    if (p.extra_lengths == nullptr) least_ += blocks_of(p.extra_default_length, extra_bound_);
  }

  // Those of the requests first, first + 32, ..; 0 for one past the batch. The loads of all rows
  // are issued before the first is waited for.
  template <int kRows>
  __device__ __forceinline__ void load(int first, int (&weights)[kRows]) const {
    const bool full = first + 32 * (kRows - 1) < p_.batch;
#pragma unroll
    for (int row = 0; row < kRows; ++row) weights[row] = least_;
    if (p_.lengths != nullptr) add_blocks(p_.lengths, bound_, first, full, weights);
    if (p_.extra_lengths != nullptr) {
      add_blocks(p_.extra_lengths, extra_bound_, first, full, weights);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) weights[row] = min(weights[row], most_);
    if (full) return;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (first + 32 * row >= p_.batch) weights[row] = 0;
    }
  }

  __device__ __forceinline__ int load(int request) const {
    int weights[1];
    load(request, weights);
    return weights[0];
  }

 private:
  // schedule::blocks_of in fewer instructions; at most 2^25.
  __device__ __forceinline__ static int blocks_of(int length, int bound) {
    constexpr unsigned kTokens = schedule::kBlockTokens;
    return (static_cast<unsigned>(max(min(length, bound), 0)) + (kTokens - 1)) / kTokens;
  }

  template <int kRows>
  __device__ __forceinline__ void add_blocks(const int32_t* lengths, int bound, int first,
                                             bool full, int (&weights)[kRows]) const {
    int loaded[kRows];
    if (full) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) loaded[row] = lengths[first + 32 * row];
    } else {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int request = first + 32 * row;
        loaded[row] = request < p_.batch ? lengths[request] : 0;
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) weights[row] += blocks_of(loaded[row], bound);
  }

  const ScheduleParams& p_;
  int bound_;
  int extra_bound_;
  int least_;  // the overhead and what does not depend on the request
  int most_;
};

// ---------------------------------------------------------------------------------------------
// Scans and search
// ---------------------------------------------------------------------------------------------

__device__ __forceinline__ int warp_inclusive_scan(int value, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

struct Scan {
  int before;  // sum of the values of earlier threads
  int total;   // sum over the CTA
};

// One barrier: `sums` holds kMaxWarps integers that no other scan of the kernel uses, and every
// warp sums them up for itself.
__device__ __forceinline__ Scan cta_scan(int value, int* sums) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int inclusive = warp_inclusive_scan(value, lane);
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  const int sum = lane < blockDim.x / 32 ? sums[lane] : 0;
  const int prefix = warp_inclusive_scan(sum, lane);
  return {__shfl_sync(kAllLanes, prefix - sum, warp) + inclusive - value,
          __shfl_sync(kAllLanes, prefix, 31)};
}

// Index of the last of `count` >= 1 ascending integers that is <= position; the first one is.
// For several positions at once, since a search is a chain of loads.
template <int kPositions>
__device__ __forceinline__ void find_last(const int* starts, int count,
                                          const int (&positions)[kPositions],
                                          int (&found)[kPositions]) {
#pragma unroll
  for (int i = 0; i < kPositions; ++i) found[i] = 0;
  const int top = count > 1 ? 1 << schedule::floor_log2(count - 1) : 0;
#pragma unroll 1
  for (int step = top; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kPositions; ++i) {
      const int next = found[i] + step;
      if (next < count && starts[next] <= positions[i]) found[i] = next;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Few requests and parts
// ---------------------------------------------------------------------------------------------

// Thread i plans request i and part i.
__global__ void __launch_bounds__(kMaxThreads)
    small_schedule_kernel(const ScheduleParams p, int most_blocks) {
  __shared__ int weight_sums[kMaxWarps];
  __shared__ int cut_sums[kMaxWarps];
  __shared__ int piece_sums[kMaxWarps];
  __shared__ int even_pieces[schedule::kEvenSizes][kMaxWarps];
  __shared__ unsigned cut_parts[kMaxWarps];  // a bit for each part that begins within a request
  __shared__ int starts[kMaxThreads + 1];    // weights of the requests before; then the total
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  const Weights weights(p, most_blocks);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();

  const int weight = weights.load(thread);
  const auto [start, total] = cta_scan(weight, weight_sums);
  starts[thread] = start;
  if (thread + 1 == blockDim.x) starts[blockDim.x] = total;
  const int payload = payload_of(total, p.num_parts);
  // For num_splits: the last part that begins before the end of this request, and the pieces of
  // the requests before if those do not depend on the parts.
  const bool is_request = thread < p.batch;
  const int last_part = is_request ? static_cast<unsigned>(start + weight - 1) / payload : 0;
  int cuts = 0;
  if (p.batch_invariant) {
    const int own = is_request ? invariant_cuts(weight - schedule::kOverheadBlocks) : 0;
    cuts = cta_scan(own, cut_sums).before + own;
  }
  // The sizes that even pieces may have, and how many pieces they make.
  const bool may_be_even = !p.batch_invariant && p.batch <= p.num_parts;
  const int blocks = is_request ? weight - schedule::kOverheadBlocks : 0;
  const int all_blocks = total - p.batch * schedule::kOverheadBlocks;
  int least_even = 0;
  int first_even = 0;
  if (may_be_even) {
    least_even = schedule::least_even_piece(all_blocks, p.row_tiles);
    first_even = max(static_cast<int>(divide_up(all_blocks, p.num_parts)), least_even);
#pragma unroll
    for (int i = 0; i < schedule::kEvenSizes; ++i) {
      // More than all parts are as good as any number, and their sum cannot overflow.
      const int pieces = min(static_cast<int>(divide_up(blocks, first_even + i)), p.num_parts + 1);
      const int sum = __reduce_add_sync(kAllLanes, pieces);
      if (lane == 0) even_pieces[i][warp] = sum;
    }
  }
  __syncthreads();

  // This part and the next one, which begins where this one ends; spare threads repeat the last.
  // The position after the last part's is past all weights, as those of parts without work are.
  // None is above total + num_parts, or 2 * num_parts.
  const int part = min(thread, p.num_parts - 1);
  const int positions[2] = {part * payload, (part + 1) * payload};
  int requests[2];
  find_last(starts, p.batch, positions, requests);
  Start begins[2];
  int costs[2];  // of the requests before the one that the position is in
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (positions[i] >= total) {
      requests[i] = p.batch;
      begins[i] = {p.batch, 0};
      costs[i] = total;
    } else {
      costs[i] = starts[requests[i]];
      const int units = starts[requests[i] + 1] - costs[i] - schedule::kOverheadBlocks;
      begins[i] = start_in_request(p.batch_invariant, requests[i], positions[i] - costs[i], units);
    }
  }

  // Cut no request if that leaves no part with much more than its share.
  const int slack = schedule::whole_request_slack(all_blocks, p.num_parts, p.row_tiles);
  const bool too_much = p.batch_invariant || costs[1] - costs[0] > payload + slack;
  const unsigned cut_mask = __ballot_sync(kAllLanes, begins[0].unit > 0);
  if (lane == 0) cut_parts[warp] = cut_mask;
  const bool cut_requests = __syncthreads_or(too_much);
  // Else into even pieces, one for each part, if some size is small enough and makes few enough.
  int even = 0;
  if (may_be_even && cut_requests) {
    const int most_even = max(payload + schedule::kEvenSlack, least_even);
#pragma unroll
    for (int i = schedule::kEvenSizes - 1; i >= 0; --i) {
      const int pieces = lane < blockDim.x / 32 ? even_pieces[i][lane] : 0;
      const bool fits = __reduce_add_sync(kAllLanes, pieces) <= p.num_parts;
      if (fits && first_even + i <= most_even) even = first_even + i;
    }
  }
  if (!cut_requests) {
    begins[0] = {requests[0], 0};
    begins[1] = {requests[1], 0};
  } else if (even > 0) {
    // Pieces in the low half, and the cuts between those of a request in the high half: neither sum
    // passes kMaxThreads.
    const int pieces = static_cast<int>(divide_up(blocks, even));
    const int value = pieces + (max(pieces - 1, 0) << 16);
    const Scan scan = cta_scan(value, piece_sums);
    const int num_pieces = scan.total & 0xffff;
    cuts = (scan.before + value) >> 16;
    starts[thread] = scan.before & 0xffff;
    __syncthreads();
    const int pieces_before[2] = {part, part + 1};
    find_last(starts, p.batch, pieces_before, requests);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int piece = pieces_before[i];
      begins[i] = piece < num_pieces ? Start{requests[i], (piece - starts[requests[i]]) * even}
                                     : Start{p.batch, 0};
    }
    // Empty requests go to the part before, and the first ones have none.
    if (part == 0) begins[0] = {0, 0};
  } else if (!p.batch_invariant) {
    // Those that cut this request or an earlier one are the cutting ones among the parts up to
    // last_part.
    const unsigned mask = lane < blockDim.x / 32 ? cut_parts[lane] : 0;
    const int before = warp_inclusive_scan(__popc(mask), lane) - __popc(mask);
    const int word = last_part / 32;
    const unsigned up_to = (2u << last_part % 32) - 1;
    cuts =
        __shfl_sync(kAllLanes, before, word) + __popc(__shfl_sync(kAllLanes, mask, word) & up_to);
  }
  if (thread == 0) p.num_splits[0] = 0;
  if (is_request) p.num_splits[thread + 1] = thread + 1 + cuts;
  if (thread < p.num_parts) {
    int4* row = reinterpret_cast<int4*>(p.schedule) + 2 * thread;
    row[0] = {begins[0].request, begins[0].unit, begins[1].request, begins[1].unit};
    row[1] = {p.batch, p.row_tiles, schedule::expected_stamp(p.batch_invariant, p.sparse),
              p.num_parts};
  }
}

// ---------------------------------------------------------------------------------------------
// Many requests or parts
// ---------------------------------------------------------------------------------------------

constexpr int kTileRows = 4;
constexpr int kTile = 32 * kTileRows;  // requests that a warp takes together
constexpr int kTilesAtOnce = 4;        // loads in flight while summing up: 16 a thread
constexpr int kMaxSegments = kMaxThreads;
constexpr int kClusterCtas = 8;  // the most that all GPUs with clusters take

// While planning, a row holds besides begin and end of the part those it would have if no request
// is cut: (request, cost of all requests before that one) in columns 4 and 5, and 6 and 7.
__device__ __forceinline__ void store_begin(const ScheduleParams& p, int part, Start start,
                                            int whole_request, int cost_before) {
  int2* row = reinterpret_cast<int2*>(p.schedule) + int64_t{4} * part;
  if (part < p.num_parts) {
    row[0] = {start.request, start.unit};
    row[2] = {whole_request, cost_before};
  }
  if (part > 0) {  // the one before ends here
    row[-3] = {start.request, start.unit};
    row[-1] = {whole_request, cost_before};
  }
}

// What a warp keeps of the tile of requests it looks for parts in.
struct TileScratch {
  int starts[kTile + 1];
  int cuts[kTile];
};

// Plans the parts that begin in the requests first .. end - 1, whose weights begin at `start`.
// Unless batch_invariant, writes the cuts of these requests, summed up, to num_splits[1 + request]
// and returns their sum.
__device__ __forceinline__ int plan_segment(const ScheduleParams& p, const Weights& weights,
                                            int payload, int first, int end, int start,
                                            TileScratch& scratch) {
  const int lane = threadIdx.x % 32;
  int cuts_before = 0;
  for (int tile = first; tile < end; tile += kTile) {
    int tile_weights[kTileRows];
    weights.load(tile + lane, tile_weights);
    __syncwarp();  // the scratch of the tile before has been read
    int tile_end = start;
#pragma unroll
    for (int row = 0; row < kTileRows; ++row) {
      const int inclusive = warp_inclusive_scan(tile_weights[row], lane);
      scratch.starts[32 * row + lane] = tile_end + inclusive - tile_weights[row];
      scratch.cuts[32 * row + lane] = 0;
      tile_end += __shfl_sync(kAllLanes, inclusive, 31);
    }
    if (lane == 0) scratch.starts[kTile] = tile_end;
    __syncwarp();
    const int part_end = divide_up(tile_end, payload);
    for (int part = divide_up(start, payload) + lane; part < part_end; part += 32) {
      const int positions[1] = {part * payload};
      int found[1];
      find_last(scratch.starts, kTile, positions, found);
      const int cost = scratch.starts[found[0]];
      const int blocks = scratch.starts[found[0] + 1] - cost - schedule::kOverheadBlocks;
      const Start begin =
          start_in_request(p.batch_invariant, tile + found[0], positions[0] - cost, blocks);
      store_begin(p, part, begin, tile + found[0], cost);
      if (begin.unit > 0) atomicAdd(&scratch.cuts[found[0]], 1);
    }
    if (!p.batch_invariant) {
      __syncwarp();
#pragma unroll
      for (int row = 0; row < kTileRows; ++row) {
        const int request = tile + 32 * row + lane;
        const int inclusive = warp_inclusive_scan(scratch.cuts[32 * row + lane], lane);
        if (request < end) p.num_splits[request + 1] = cuts_before + inclusive;
        cuts_before += __shfl_sync(kAllLanes, inclusive, 31);
      }
    }
    start = tile_end;
  }
  return cuts_before;
}

// Writes num_splits of the requests first .. end - 1, before which there are `cuts_before` cuts.
// With `has_cuts` their own have been written there.
__device__ __forceinline__ void write_splits(const ScheduleParams& p, const Weights& weights,
                                             int first, int end, int cuts_before, bool has_cuts) {
  const int lane = threadIdx.x % 32;
  for (int tile = first; tile < end; tile += kTile) {
    int cuts[kTileRows] = {};
    if (p.batch_invariant) {
      weights.load(tile + lane, cuts);
      int base = 0;
#pragma unroll
      for (int row = 0; row < kTileRows; ++row) {
        const int own = invariant_cuts(cuts[row] - schedule::kOverheadBlocks);
        cuts[row] = base + warp_inclusive_scan(own, lane);
        base = __shfl_sync(kAllLanes, cuts[row], 31);
      }
    } else if (has_cuts) {
#pragma unroll
      for (int row = 0; row < kTileRows; ++row) {
        const int request = tile + 32 * row + lane;
        if (request < end) cuts[row] = p.num_splits[request + 1];
      }
    }
#pragma unroll
    for (int row = 0; row < kTileRows; ++row) {
      const int request = tile + 32 * row + lane;
      if (request < end) p.num_splits[request + 1] = request + 1 + cuts_before + cuts[row];
    }
    if (p.batch_invariant) cuts_before += __shfl_sync(kAllLanes, cuts[kTileRows - 1], 31);
  }
}

// A segment is 2^log_segment_tiles tiles, and there are at most kMaxSegments. Segments and parts
// are dealt out to the CTAs of the cluster, which is all of the grid.
__global__ void __launch_bounds__(kMaxThreads)
    large_schedule_kernel(const ScheduleParams p, int most_blocks, int log_segment_tiles) {
  // For each segment its weight and its cuts, then the sums of those before it.
  __shared__ int starts[kMaxSegments + 1];
  __shared__ int cuts[kMaxSegments + 1];
  __shared__ int weight_sums[kMaxWarps];
  __shared__ int cut_sums[kMaxWarps];
  __shared__ int busy[kMaxSegments];  // this CTA's segments that parts begin in, in any order
  __shared__ int num_busy;
  __shared__ int num_too_much;  // CTAs that have a part with too much work if no request is cut
  __shared__ TileScratch scratch[kMaxWarps];
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int num_ctas = ptx::cluster_ctas();
  const int cta = ptx::cluster_cta_rank();
  // Of all threads and warps of the cluster, neighbours are in different CTAs.
  const int all_threads = num_ctas * kMaxThreads;
  const int all_warps = num_ctas * kMaxWarps;
  const int cluster_thread = num_ctas * thread + cta;
  const int cluster_warp = num_ctas * warp + cta;
  const Weights weights(p, most_blocks);
  const int num_tiles = schedule::ceil_div(p.batch, kTile);
  const int num_segments = schedule::ceil_div(num_tiles, 1 << log_segment_tiles);
  const auto begin_of_segment = [&](int segment) { return segment * (kTile << log_segment_tiles); };
  const auto end_of_segment = [&](int segment) {
    return segment + 1 < num_segments ? begin_of_segment(segment + 1) : p.batch;
  };
  // Adds to a number of all CTAs; a warp as one.
  const auto add_everywhere = [&](int& number, int value) {
    if (lane < num_ctas) ptx::cluster_add(&number, lane, value);
  };
  starts[thread] = 0;
  cuts[thread] = 0;
  if (thread == 0) num_busy = num_too_much = 0;
  ptx::cluster_sync();
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();

  // Sums over segments.
  for (int tile = kTilesAtOnce * cluster_warp; tile < num_tiles; tile += kTilesAtOnce * all_warps) {
    int values[kTilesAtOnce * kTileRows];
    weights.load(tile * kTile + lane, values);
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      int weight = 0;
      int invariant = 0;
#pragma unroll
      for (int row = 0; row < kTileRows; ++row) {
        const int value = values[kTileRows * i + row];
        weight += value;
        if (p.batch_invariant) invariant += invariant_cuts(value - schedule::kOverheadBlocks);
      }
      if (tile + i >= num_tiles) break;
      const int segment = (tile + i) >> log_segment_tiles;
      add_everywhere(starts[segment], __reduce_add_sync(kAllLanes, weight));
      if (p.batch_invariant) {
        add_everywhere(cuts[segment], __reduce_add_sync(kAllLanes, invariant));
      }
    }
  }
  ptx::cluster_sync();
  const int weight = starts[thread];
  const auto [start, total] = cta_scan(weight, weight_sums);
  const int payload = payload_of(total, p.num_parts);
  starts[thread] = start;
  if (thread % num_ctas == cta && divide_up(start, payload) < divide_up(start + weight, payload)) {
    busy[atomicAdd(&num_busy, 1)] = thread;
  }
  const auto sum_up_cuts = [&] {
    const Scan scan = cta_scan(cuts[thread], cut_sums);
    cuts[thread] = scan.before;
    if (thread == 0) cuts[kMaxSegments] = scan.total;
  };
  if (p.batch_invariant) sum_up_cuts();
  __syncthreads();

  // Begins of the parts; of those for which no work is left, and the end of the last one, first.
#pragma unroll 1
  for (int part = divide_up(total, payload) + cluster_thread; part <= p.num_parts;
       part += all_threads) {
    store_begin(p, part, {p.batch, 0}, p.batch, total);
  }
  for (int i = warp; i < num_busy; i += kMaxWarps) {
    const int segment = busy[i];
    const int segment_cuts = plan_segment(p, weights, payload, begin_of_segment(segment),
                                          end_of_segment(segment), starts[segment], scratch[warp]);
    if (!p.batch_invariant) add_everywhere(cuts[segment], segment_cuts);
  }
  ptx::cluster_sync();

  // Cut no request if that leaves no part with much more than its share.
  if (!p.batch_invariant) sum_up_cuts();
  const int slack = schedule::whole_request_slack(total - p.batch * schedule::kOverheadBlocks,
                                                  p.num_parts, p.row_tiles);
  bool too_much = p.batch_invariant;
#pragma unroll 1
  for (int part = cluster_thread; part < p.num_parts; part += all_threads) {
    const int4 whole = reinterpret_cast<const int4*>(p.schedule)[int64_t{2} * part + 1];
    too_much |= whole.w - whole.y > payload + slack;
  }
  too_much = __syncthreads_or(too_much);
  if (warp == 0) add_everywhere(num_too_much, too_much);
  ptx::cluster_sync();
  const bool cut_requests = num_too_much > 0;

#pragma unroll 1
  for (int part = cluster_thread; part < p.num_parts; part += all_threads) {
    int4* row = reinterpret_cast<int4*>(p.schedule) + int64_t{2} * part;
    if (!cut_requests) row[0] = {row[1].x, 0, row[1].z, 0};
    row[1] = {p.batch, p.row_tiles, schedule::expected_stamp(p.batch_invariant, p.sparse),
              p.num_parts};
  }
  if (cta == 0 && thread == 0) p.num_splits[0] = 0;
  if (!cut_requests) {
    for (int request = cta * kMaxThreads + thread; request < p.batch; request += all_threads) {
      p.num_splits[request + 1] = request + 1;
    }
    return;
  }
  // A segment's CTA is the one that has planned it.
  for (int segment = cluster_warp; segment < num_segments; segment += all_warps) {
    write_splits(p, weights, begin_of_segment(segment), end_of_segment(segment), cuts[segment],
                 cuts[segment] < cuts[segment + 1]);
  }
}

}  // namespace

Status launch_schedule(const ScheduleParams& params, cudaStream_t stream) {
  if (params.num_parts < 1) return {cudaErrorInvalidValue, "num_parts >= 1"};
  // Keeps the sum of all weights below 2^30.
  const int even_cap = (1 << 30) / std::max(params.batch, 1) - schedule::kOverheadBlocks;
  const int most_blocks = std::max(even_cap, 1);
  const int most = std::max(params.batch, params.num_parts);
  constexpr const char* kGrid = "grid of the scheduler kernel";
  if (most <= kMaxThreads) {
    return launch_dependent(&small_schedule_kernel, kGrid, 1, 32 * schedule::ceil_div(most, 32), 0,
                            stream, params, most_blocks);
  }
  int log_segment_tiles = 0;
  while ((int64_t{kTile} * kMaxSegments << log_segment_tiles) < params.batch) ++log_segment_tiles;
  return launch_dependent_cluster(&large_schedule_kernel, kGrid, kClusterCtas, kMaxThreads, 0,
                                  stream, params, most_blocks, log_segment_tiles);
}

}  // namespace flashmla
