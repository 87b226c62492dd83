// Plans the tile schedule: see common/schedule.h for the format and reference/scheduler.py for the
// same plan in jnp; both give the same integers.
//
// One CTA. The prefix sum of the requests' weights goes through a sequence of CTA-wide scans; the
// start of part p is the request whose weights hold p * payload, found by whichever thread owns
// that request. So the parts are walked over one after the other only as far as they begin in one
// request: a batch of one with 132 parts takes 10 us, 128 requests take 4 to 5.
#include "common/schedule.h"
#include "launch.h"

namespace flashmla {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ int blocks_of_request(const ScheduleParams& p, int request) {
  const auto clipped = [](const int32_t* lengths, int i, int value, int bound) {
    const int length = lengths != nullptr ? lengths[i] : value;
    return bound >= 0 ? min(length, bound) : length;
  };
  const int length = clipped(p.lengths, request, p.default_length, p.max_length);
  const int extra = clipped(p.extra_lengths, request, p.extra_default_length, p.extra_max_length);
  const int cap = max((1 << 30) / max(p.batch, 1) - schedule::kOverheadBlocks, 1);
  const int64_t blocks =
      static_cast<int64_t>(schedule::blocks_of(length)) + schedule::blocks_of(extra);
  return static_cast<int>(blocks < cap ? blocks : cap);
}

struct Start {
  int request;
  int unit;
};

// Where the part starts whose share begins `x` into the weights of `request`.
__device__ __forceinline__ Start start_in_request(const ScheduleParams& p, int request, int x,
                                                  int blocks) {
  const int y = x - schedule::kOverheadBlocks;
  if (y <= 0) return {request, 0};
  int unit = y;
  int units = blocks;
  if (p.batch_invariant) {
    const int split = schedule::invariant_split_blocks(blocks);
    unit = y / split;
    units = schedule::ceil_div(blocks, split);
    if (unit <= 0) return {request, 0};
  }
  if (unit >= units) return {request + 1, 0};
  return {request, unit};
}

// Sum over the CTA and exclusive prefix of this thread. `scratch` holds kWarps + 1 integers.
__device__ __forceinline__ int exclusive_scan(int value, int* scratch, int* total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffff, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  __syncthreads();  // the scratch of the last call has been read
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const int sum = scratch[lane];
    int prefix = sum;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffff, prefix, step);
      if (lane >= step) prefix += other;
    }
    scratch[lane] = prefix - sum;
    if (lane == 31) scratch[kWarps] = prefix;
  }
  __syncthreads();
  *total = scratch[kWarps];
  return scratch[warp] + inclusive - value;
}
static_assert(kWarps == 32, "the second level of the scan is one warp");

// While planning, columns 4 and 5 of a row hold the part's alternative: the request it would begin
// with if no request is cut, and the cost of all requests before that one.
constexpr int kWholeRequest = 4;
constexpr int kCostBefore = 5;

__device__ __forceinline__ int32_t* row_of(const ScheduleParams& p, int part) {
  return p.schedule + int64_t{8} * part;
}

__device__ __forceinline__ void store_begin(const ScheduleParams& p, int part, Start start,
                                            int whole_request, int cost_before) {
  int32_t* row = row_of(p, part);
  row[0] = start.request;
  row[1] = start.unit;
  row[kWholeRequest] = whole_request;
  row[kCostBefore] = cost_before;
}

__global__ void __launch_bounds__(kThreads) schedule_kernel(const ScheduleParams p) {
  __shared__ int scratch[kWarps + 1];

  // Total weight, hence the share of a part.
  int sum = 0;
  for (int request = threadIdx.x; request < p.batch; request += kThreads) {
    sum += blocks_of_request(p, request) + schedule::kOverheadBlocks;
  }
  int total;
  exclusive_scan(sum, scratch, &total);
  const int even = total / p.num_parts + (total % p.num_parts != 0 ? 1 : 0);
  const int payload = max(even, schedule::kMinShareBlocks);

  // Begins of the parts: the first, those for which no work is left, and below those in between.
  const int used_parts = min(p.num_parts, schedule::ceil_div(total, payload));
  for (int part = max(used_parts, 1) + threadIdx.x; part < p.num_parts; part += kThreads) {
    store_begin(p, part, {p.batch, 0}, p.batch, total);
  }
  if (threadIdx.x == 0) {
    store_begin(p, 0, {0, 0}, 0, 0);
    p.num_splits[0] = 0;
  }

  int weight_base = 0;  // of the requests of earlier rounds
  int split_base = 0;
  for (int base = 0; base < p.batch; base += kThreads) {
    const int request = base + threadIdx.x;
    const bool valid = request < p.batch;
    const int blocks = valid ? blocks_of_request(p, request) : 0;
    const int weight = valid ? blocks + schedule::kOverheadBlocks : 0;
    int round_weight;
    const int begin = weight_base + exclusive_scan(weight, scratch, &round_weight);

    // Parts 1.. whose share begins in this request.
    int splits = valid ? 1 : 0;
    if (valid) {
      int part = max((begin + payload - 1) / payload, 1);
      for (; part < used_parts && static_cast<int64_t>(part) * payload < begin + weight; ++part) {
        const Start start = start_in_request(p, request, part * payload - begin, blocks);
        store_begin(p, part, start, request, begin);
        if (start.unit > 0) ++splits;
      }
      if (p.batch_invariant) {
        splits = max(schedule::ceil_div(blocks, schedule::invariant_split_blocks(blocks)), 1);
      }
    }
    int round_splits;
    const int split_begin = split_base + exclusive_scan(splits, scratch, &round_splits);
    if (valid) p.num_splits[request + 1] = split_begin + splits;
    weight_base += round_weight;
    split_base += round_splits;
  }
  __syncthreads();

  // Cut no request if that leaves no part with much more than its share.
  bool too_much = p.batch_invariant;
  for (int part = threadIdx.x; part < p.num_parts; part += kThreads) {
    const int end = part + 1 < p.num_parts ? row_of(p, part + 1)[kCostBefore] : total;
    too_much |= end - row_of(p, part)[kCostBefore] > payload + schedule::kWholeRequestSlack;
  }
  const bool cut_requests = __syncthreads_or(too_much);
  if (!cut_requests) {
    for (int request = threadIdx.x; request < p.batch; request += kThreads) {
      p.num_splits[request + 1] = request + 1;
    }
    for (int part = threadIdx.x; part < p.num_parts; part += kThreads) {
      int32_t* row = row_of(p, part);
      row[0] = row[kWholeRequest];
      row[1] = 0;
    }
    __syncthreads();
  }

  // A part ends where the next one begins.
  for (int part = threadIdx.x; part < p.num_parts; part += kThreads) {
    int32_t* row = row_of(p, part);
    const bool last = part + 1 == p.num_parts;
    row[2] = last ? p.batch : row[8];
    row[3] = last ? 0 : row[8 + 1];
    reinterpret_cast<int4*>(row)[1] = {
        p.batch, p.row_tiles, schedule::expected_stamp(p.batch_invariant, p.sparse), p.num_parts};
  }
}

}  // namespace

Status launch_schedule(const ScheduleParams& params, cudaStream_t stream) {
  if (params.num_parts < 1) return {cudaErrorInvalidValue, "num_parts >= 1"};
  schedule_kernel<<<1, kThreads, 0, stream>>>(params);
  FLASHMLA_RETURN_IF_ERROR(cudaGetLastError());
  return {};
}

}  // namespace flashmla
