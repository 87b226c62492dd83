// Merges the pieces of requests that the schedule cut: out = sum_i w_i out_i with
// w_i = 2^(lse_i - lse), lse = log2 sum_i 2^lse_i, in ascending order of the pieces.
//
// A CTA takes kWarps rows of one request, a warp each. It reads from the schedule itself which
// parts hold the request, so there is no second array that could disagree with the first.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/ptx.cuh"
#include "common/schedule.cuh"
#include "launch.h"

namespace flashmla {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kDimV = 512;
constexpr int kVectors = kDimV / 4 / 32;  // float4 per lane

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

// The request that `part` begins and leaves unfinished, if any: count is 0 otherwise. Every split
// request has exactly one such part; the other pieces are the first ones of the parts after it.
__device__ Slots find_slots(const DenseDecodeParams& p, int part, int* request) {
  const schedule::Row row = schedule::load_row(p.schedule, part);
  *request = row.end_request;
  if (row.end_unit == 0 ||
      !schedule::precedes_or_equals(row.begin_request, row.begin_unit, row.end_request, 0)) {
    return {0, 0, 0, 0};
  }
  // Exactly one later part runs past the request.
  __shared__ int last_part;
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

__device__ Slots invariant_slots(const DenseDecodeParams& p, int request) {
  const int length = p.cache_seqlens[request];
  if (length > static_cast<int64_t>(p.table_width) * p.page_size) return {1, 0, 0, 0};
  const int blocks = schedule::blocks_of(length);
  const int splits = schedule::ceil_div(blocks, schedule::invariant_split_blocks(blocks));
  const int64_t first = static_cast<int64_t>(request) * p.slots_per_request;
  return {splits, first, first, 1};
}

// Grid: (parts, or requests if batch_invariant) x groups of kWarps rows, flattened on x.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const DenseDecodeParams p, int rows, int row_groups) {
  // All results are NaN already, and stay so.
  if (*p.schedule_is_broken) return;
  const int row_group = blockIdx.x % row_groups;
  const int group = p.heads_q / p.heads_kv;
  int request = blockIdx.x / row_groups;
  const Slots slots = p.batch_invariant ? invariant_slots(p, request)
                                        : find_slots(p, /*part=*/blockIdx.x / row_groups, &request);
  if (slots.count < 2) return;

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int flat_row = row_group * kWarps + warp;  // over KV heads x rows
  if (flat_row >= p.heads_kv * rows) return;
  const int kv_head = flat_row / rows;
  const int row = flat_row % rows;
  const auto slot_row = [&](int piece) {
    return (slots[piece] * p.heads_kv + kv_head) * rows + row;
  };

  float max = -INFINITY;
  for (int i = lane; i < slots.count; i += 32) max = fmaxf(max, p.partial_lse[slot_row(i)]);
  for (int step = 16; step > 0; step /= 2) {
    max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, step));
  }
  const float offset = max == -INFINITY ? 0.f : max;
  float sum = 0.f;
  for (int i = lane; i < slots.count; i += 32) sum += exp2f(p.partial_lse[slot_row(i)] - offset);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);

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

  float4 out[kVectors] = {};
  for (int i = 0; i < slots.count; ++i) {
    const int64_t source = slot_row(i);
    const float piece_lse = p.partial_lse[source];
    // An empty piece left its output unwritten.
    if (piece_lse == -INFINITY) continue;
    const float weight = exp2f(piece_lse - offset);
    const float4* piece = reinterpret_cast<const float4*>(p.partial_out + source * kDimV);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float4 x = piece[v * 32 + lane];
      out[v].x += weight * x.x;
      out[v].y += weight * x.y;
      out[v].z += weight * x.z;
      out[v].w += weight * x.w;
    }
  }
  const int64_t out_row = (static_cast<int64_t>(request) * p.seq_q + token) * p.heads_q + head;
  uint2* target = reinterpret_cast<uint2*>(static_cast<T*>(p.out) + out_row * kDimV);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    target[v * 32 + lane] = uint2{ptx::pack<T>(out[v].x * factor, out[v].y * factor),
                                  ptx::pack<T>(out[v].z * factor, out[v].w * factor)};
  }
  if (lane == 0) {
    p.lse[(static_cast<int64_t>(request) * p.heads_q + head) * p.seq_q + token] = lse;
  }
}

template <typename T>
Status launch(const DenseDecodeParams& p, cudaStream_t stream) {
  const int rows = p.seq_q * p.heads_q / p.heads_kv;
  const int row_groups = schedule::ceil_div(rows * p.heads_kv, kWarps);
  const int64_t ctas = static_cast<int64_t>(p.batch_invariant ? p.batch : p.num_parts) * row_groups;
  if (ctas > INT32_MAX) return {cudaErrorInvalidConfiguration, "grid of the merge kernel"};
  combine_kernel<T><<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(p, rows, row_groups);
  FLASHMLA_RETURN_IF_ERROR(cudaGetLastError());
  return {};
}

}  // namespace

Status launch_combine(const DenseDecodeParams& params, cudaStream_t stream) {
  if (params.head_dim_v != kDimV) return {cudaErrorNotSupported, "head_dim_v of the merge kernel"};
  // One part takes every request whole.
  if (params.num_parts == 1 && !params.batch_invariant) return {};
  return params.dtype == DataType::kFloat16 ? launch<__half>(params, stream)
                                            : launch<__nv_bfloat16>(params, stream);
}

}  // namespace flashmla
