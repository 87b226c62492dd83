// Merges the pieces of requests that the schedule cut: out = sum_i w_i out_i with
// w_i = 2^(lse_i - lse), lse = log2 sum_i 2^lse_i, in ascending order of the pieces.
//
// A CTA takes some rows of one request. It reads from the schedule itself which parts hold the
// request, so there is no second array that could disagree with the first.
//
// The kernel is launched while the attention kernel still runs, finds its work, and waits. The
// schedule and the lengths may be read before: they come from kernels that the attention kernel has
// waited for before it let this one start. Every CTA waits, also one with nothing to merge: a
// kernel after this one waits for this one only.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dependent_launch.cuh"
#include "common/ptx.cuh"
#include "common/schedule.cuh"
#include "launch.h"

namespace flashmla {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

// The slots of a request: count pieces; piece i is in slot first for i = 0, else rest + i * step.
struct Slots {
  int count;  // < 2: the attention kernel wrote the result itself
  int64_t first;
  int64_t rest;
  int step;

  __device__ __forceinline__ int64_t operator[](int i) const {
    return i == 0 ? first : rest + static_cast<int64_t>(i) * step;
  }
};

// Whether a group of CTAs is launched for each request, or for each part: whichever are fewer,
// since a CTA that finds nothing to merge costs its launch.
__host__ __device__ __forceinline__ bool merge_by_request(const DecodeParams& p) {
  return p.batch_invariant || p.batch <= p.num_parts;
}

// The request that `part` begins and leaves unfinished, if any: count is 0 otherwise. Every split
// request has exactly one such part; the other pieces are the first ones of the parts after it.
__device__ Slots find_slots_of_part(const DecodeParams& p, int part, int* request) {
  const schedule::Row row = schedule::load_row(p.schedule, part);
  *request = row.end_request;
  if (row.end_unit == 0 ||
      !schedule::precedes_or_equals(row.begin_request, row.begin_unit, row.end_request, 0)) {
    return {0, 0, 0, 0};
  }
  // Exactly one later part runs past the request.
  __shared__ int last_part;
  if (threadIdx.x == 0) last_part = part;  // if the schedule is broken: see below
  __syncthreads();
  for (int other = part + 1 + threadIdx.x; other < p.num_parts; other += kThreads) {
    const schedule::Row later = schedule::load_row(p.schedule, other);
    if (later.begin_request > row.end_request) break;
    if (later.begin_request == row.end_request && later.end_request > row.end_request) {
      last_part = other;
    }
  }
  __syncthreads();
  return {last_part - part + 1, int64_t{2} * part + 1, int64_t{2} * part, 2};
}

// The pieces of `request`, wherever it begins.
__device__ Slots find_slots_of_request(const DecodeParams& p, int request) {
  __shared__ int first_part;
  __shared__ int last_part;
  // No part may be found if the schedule is broken. The slots are looked at all the same, so they
  // must be some that there are.
  if (threadIdx.x == 0) first_part = last_part = 0;
  __syncthreads();
  for (int part = threadIdx.x; part < p.num_parts; part += kThreads) {
    const schedule::Row row = schedule::load_row(p.schedule, part);
    // Exactly one part holds (request, 0), and exactly one runs past the request.
    const bool begins_by_then =
        schedule::precedes_or_equals(row.begin_request, row.begin_unit, request, 0);
    const bool goes_on =
        row.end_request > request || (row.end_request == request && row.end_unit > 0);
    if (begins_by_then && goes_on) first_part = part;
    if (row.begin_request <= request && row.end_request > request) last_part = part;
  }
  __syncthreads();
  return {last_part - first_part + 1, int64_t{2} * first_part + 1, int64_t{2} * first_part, 2};
}

__device__ Slots invariant_slots(const DecodeParams& p, int request) {
  schedule::Piece piece;
  const int blocks = p.longer_is_nan ? schedule::SequenceLengths(p).read(request, piece)
                                     : schedule::ChoiceLengths(p).read(request, piece);
  const int splits = schedule::ceil_div(blocks, schedule::invariant_split_blocks(blocks));
  const int64_t first = static_cast<int64_t>(request) * p.slots_per_request;
  return {splits, first, first, 1};
}

// How the work of a merge is shared. With few rows of many pieces, several CTAs share a row by
// columns too, so that the values of all pieces are on their way at once. With many rows that costs
// more than it saves, since every CTA has to find its pieces.
template <int kDimV, int kWarpsPerRow, bool kByColumns>
struct Sharing {
  static constexpr int kRowsPerCta = kWarps / kWarpsPerRow;
  static constexpr int kRowVectors = kDimV / 4;
  static constexpr int kColumnGroups = kByColumns ? kRowVectors / 32 : 1;
  static constexpr int kVectors = kRowVectors / 32 / kColumnGroups;  // float4 of a lane
  static constexpr int kBatch = 8 / kVectors;  // pieces whose values are loaded at once
};

// Sum of the pieces [begin, end) of one row, in ascending order and each weighted with
// 2^(its lse - offset). A lane holds columns 4 * (32 * v + lane) + {0..3}.
template <int kVectors, int kBatch>
class WeightedSum {
 public:
  // Starts to load the first pieces: they need not wait for the weights.
  template <typename PieceOf>
  __device__ __forceinline__ WeightedSum(const PieceOf& piece_of, int begin, int end)
      : begin_(begin), end_(end) {
    load(piece_of, begin);
  }

  template <typename PieceOf, typename LseOf>
  __device__ __forceinline__ void run(const PieceOf& piece_of, const LseOf& lse_of, float offset,
                                      float4 (&out)[kVectors]) {
    const int lane = threadIdx.x % 32;
    for (int base = begin_; base < end_; base += 32) {
      const float known = lse_of(base + lane);  // by all lanes, since it may be a shuffle
      const float lse = base + lane < end_ ? known : -INFINITY;
      const float weight = exp2f(lse - offset);
      const int count = min(32, end_ - base);
      for (int first = 0; first < count; first += kBatch) {
        if (base + first > begin_) load(piece_of, base + first);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          // Past the last piece, and an empty piece, which left its output unwritten.
          if (__shfl_sync(0xffffffff, lse, first + i & 31) == -INFINITY || first + i >= count)
            continue;
          const float piece_weight = __shfl_sync(0xffffffff, weight, first + i & 31);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const float4 x = x_[i][v];
            out[v].x += piece_weight * x.x;
            out[v].y += piece_weight * x.y;
            out[v].z += piece_weight * x.z;
            out[v].w += piece_weight * x.w;
          }
        }
      }
    }
  }

 private:
  template <typename PieceOf>
  __device__ __forceinline__ void load(const PieceOf& piece_of, int first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= end_) break;
      const float4* piece = piece_of(first + i);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) x_[i][v] = __ldcs(piece + v * 32 + threadIdx.x % 32);
    }
  }

  int begin_;
  int end_;
  float4 x_[kBatch][kVectors];
};

// Grid: (requests or parts) x groups of rows x groups of columns, flattened on x. The warps of a
// row share its pieces: consecutive runs, added up in ascending order.
template <typename T, int kDimV, int kWarpsPerRow, bool kByColumns>
__global__ void __launch_bounds__(kThreads, 2)  // left alone the compiler spills for more CTAs
    combine_kernel(const DecodeParams p, int rows, int row_groups) {
  using S = Sharing<kDimV, kWarpsPerRow, kByColumns>;
  constexpr int kVectors = S::kVectors;
  ptx::grid_dependency_launch();
  const int column_group = blockIdx.x % S::kColumnGroups;
  const int flat_group = blockIdx.x / S::kColumnGroups;
  const int row_group = flat_group % row_groups;
  const int group = p.heads_q / p.heads_kv;
  int request = flat_group / row_groups;
  const Slots slots = p.batch_invariant     ? invariant_slots(p, request)
                      : merge_by_request(p) ? find_slots_of_request(p, request)
                                            : find_slots_of_part(p, request, &request);
  ptx::grid_dependency_wait();
  if (slots.count < 2) return;
  const bool broken = *p.schedule_is_broken;

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int chunk = warp % kWarpsPerRow;
  const int flat_row = row_group * S::kRowsPerCta + warp / kWarpsPerRow;  // over KV heads x rows
  const bool valid = flat_row < p.heads_kv * rows;
  const int kv_head = valid ? flat_row / rows : 0;
  const int row = valid ? flat_row % rows : 0;
  const auto slot_row = [&](int piece) {
    return (slots[piece] * p.heads_kv + kv_head) * rows + row;
  };
  const int first_vector = column_group * kVectors * 32;
  const auto piece_of = [&](int piece) {
    return reinterpret_cast<const float4*>(p.partial_out) + slot_row(piece) * S::kRowVectors +
           first_vector;
  };
  // Asked for before the values, or it would come after them.
  const float first_lse = lane < slots.count ? p.partial_lse[slot_row(lane)] : -INFINITY;
  const auto lse_of = [&](int piece) {
    if (slots.count <= 32) return __shfl_sync(0xffffffff, first_lse, piece & 31);
    return piece < slots.count ? p.partial_lse[slot_row(piece)] : -INFINITY;
  };

  const int per_chunk = schedule::ceil_div(slots.count, kWarpsPerRow);
  WeightedSum<kVectors, S::kBatch> pieces(piece_of, chunk * per_chunk,
                                          min((chunk + 1) * per_chunk, slots.count));
  float max = first_lse;
  for (int i = lane + 32; i < slots.count; i += 32) max = fmaxf(max, lse_of(i));
  for (int step = 16; step > 0; step /= 2) {
    max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, step));
  }
  const float offset = max == -INFINITY ? 0.f : max;
  float sum = exp2f(first_lse - offset);
  for (int i = lane + 32; i < slots.count; i += 32) sum += exp2f(lse_of(i) - offset);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);

  float4 out[kVectors] = {};
  pieces.run(piece_of, lse_of, offset, out);
  if constexpr (kWarpsPerRow > 1) {
    __shared__ float4 parts[kWarps][kVectors][32];
    if (chunk > 0) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) parts[warp][v][lane] = out[v];
    }
    __syncthreads();
    if (chunk > 0) return;
#pragma unroll
    for (int other = 1; other < kWarpsPerRow; ++other) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float4 x = parts[warp + other][v][lane];
        out[v].x += x.x;
        out[v].y += x.y;
        out[v].z += x.z;
        out[v].w += x.w;
      }
    }
  }
  // A broken schedule: all results are NaN already, and stay so.
  if (!valid || broken) return;

  constexpr float kLn2 = 0.6931471805599453f;
  const bool empty = sum == 0.f;
  const float lse = empty ? INFINITY : (max + log2f(sum)) * kLn2;
  const int token = row / group;
  const int head = kv_head * group + row % group;
  float factor = empty ? 0.f : 1.f / sum;
  if (p.attn_sink != nullptr && !empty) {
    const int64_t base = p.sink_per_request ? static_cast<int64_t>(request) * p.heads_q : 0;
    factor /= 1.f + expf(p.attn_sink[base + head] - lse);
  }
  const int64_t out_row = (static_cast<int64_t>(request) * p.seq_q + token) * p.heads_q + head;
  uint2* target = static_cast<uint2*>(p.out) + out_row * S::kRowVectors + first_vector;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    target[v * 32 + lane] = uint2{ptx::pack<T>(out[v].x * factor, out[v].y * factor),
                                  ptx::pack<T>(out[v].z * factor, out[v].w * factor)};
  }
  if (column_group == 0 && lane == 0) {
    p.lse[(static_cast<int64_t>(request) * p.heads_q + head) * p.seq_q + token] = lse;
  }
}

template <typename T, int kDimV, int kWarpsPerRow, bool kByColumns = false>
Status launch_kernel(const DecodeParams& p, cudaStream_t stream) {
  using S = Sharing<kDimV, kWarpsPerRow, kByColumns>;
  const int rows = p.seq_q * p.heads_q / p.heads_kv;
  const int row_groups = schedule::ceil_div(rows * p.heads_kv, S::kRowsPerCta);
  const int64_t ctas = static_cast<int64_t>(merge_by_request(p) ? p.batch : p.num_parts) *
                       row_groups * S::kColumnGroups;
  return launch_dependent(&combine_kernel<T, kDimV, kWarpsPerRow, kByColumns>,
                          "grid of the merge kernel", ctas, kThreads, 0, stream, p, rows,
                          row_groups);
}

template <typename T, int kDimV>
Status launch(const DecodeParams& p, cudaStream_t stream) {
  // The order of additions, hence the variant, must not depend on the batch here.
  if (p.batch_invariant) return launch_kernel<T, kDimV, 4>(p, stream);
  // So many warps that each has a few pieces, whose values are then all on their way at once.
  const int pieces = p.num_parts / (p.batch > 0 ? p.batch : 1);
  if (pieces >= 12) {
    constexpr int kFewRows = 64;
    const int64_t rows = static_cast<int64_t>(p.batch) * p.seq_q * p.heads_q;
    return rows <= kFewRows ? launch_kernel<T, kDimV, 8, true>(p, stream)
                            : launch_kernel<T, kDimV, 8>(p, stream);
  }
  if (pieces >= 6) return launch_kernel<T, kDimV, 4>(p, stream);
  if (pieces >= 3) return launch_kernel<T, kDimV, 2>(p, stream);
  return launch_kernel<T, kDimV, 1>(p, stream);
}

template <typename T>
Status launch(const DecodeParams& p, cudaStream_t stream) {
  if (p.head_dim_v == 512) return launch<T, 512>(p, stream);
  if (p.head_dim_v == 256) return launch<T, 256>(p, stream);
  return {cudaErrorNotSupported, "head_dim_v of the merge kernel"};
}

}  // namespace

Status launch_combine(const DecodeParams& params, cudaStream_t stream) {
  // One part takes every request whole.
  if (params.num_parts == 1 && !params.batch_invariant) return {};
  return params.dtype == DataType::kFloat16 ? launch<__half>(params, stream)
                                            : launch<__nv_bfloat16>(params, stream);
}

}  // namespace flashmla
