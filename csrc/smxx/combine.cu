// Merges the pieces of requests that the schedule cut. Of each piece i and row there are m_i, which
// is near the maximum of the scores, the sum s_i of the weights 2^(score - m_i), and the values
// with these weights. With m the largest of m_i all of them are added with the factors 2^(m_i - m),
// in a fixed order; out is the sum of values over that of weights.
//
// A CTA takes some columns of 16 rows of a request: a slab of common/partial_results.h, whose lanes
// it reads as the attention kernel wrote them. It reads from the schedule itself which parts hold
// the request, so there is no second array that could disagree with the first.
//
// The kernel is launched while the attention kernel still runs, finds its work, and waits. The
// schedule and the lengths may be read before: they come from kernels that the attention kernel has
// waited for before it let this one start. Every CTA waits, also one with nothing to merge: a
// kernel after this one waits for this one only.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dependent_launch.cuh"
#include "common/final_row.cuh"
#include "common/most_blocks.h"
#include "common/partial_results.h"
#include "common/ptx.cuh"
#include "common/quad.cuh"
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
  const int blocks = p.sparse ? schedule::ChoiceLengths(p).read(request, piece)
                              : schedule::SequenceLengths(p).read(request, piece);
  const int splits = schedule::ceil_div(blocks, schedule::invariant_split_blocks(blocks));
  const int64_t first = static_cast<int64_t>(request) * p.slots_per_request;
  return {splits, first, first, 1};
}

// Pieces of a batch-invariant request are added in runs of so many, then the runs one by one. So
// the result is the same whether a warp adds all runs or each warp has one of them, and the merge
// can be shared as fits the batch.
constexpr int kInvariantRun = 4;

// How the work of a merge is shared: so many warps share the pieces of a slab, a run of pieces
// each, for so many tiles of 8 columns.
template <int kDimV, int kWarpsPerSlab, int kTiles, bool kInvariant, bool kRounded>
struct Sharing {
  static constexpr int kTilesOfCta = kWarps / kWarpsPerSlab * kTiles;
  static constexpr int kColumnGroups = kDimV / partial::kTileColumns / kTilesOfCta;
  static_assert(kColumnGroups * kTilesOfCta * partial::kTileColumns == kDimV);
  static_assert(!kInvariant || kWarpsPerSlab == 1 ||
                kWarpsPerSlab * kInvariantRun >= schedule::kMaxInvariantSplits);
  // Pieces that are loaded and added at once, and warps whose sums are.
  static constexpr int kAtOnce = kInvariant                 ? kInvariantRun
                                 : kTiles == 1 || !kRounded ? 8 / kTiles
                                 : kTiles < 8               ? 4
                                                            : 2;
  static constexpr int kWarpsAtOnce = kInvariant ? 1 : 8 / kTiles;
};

// Of each of a lane's two rows (r and r + 8) the maximum, the sum of the weights, and the values of
// some tiles, as they lie in the workspace: in float, or rounded.
template <int kTiles, bool kRounded>
struct Stored;

template <int kTiles>
struct Stored<kTiles, false> {
  // Maximum and sum of row r, of row r + 8; of no piece until it is loaded.
  float4 sums = {-INFINITY, 0.f, -INFINITY, 0.f};
  float4 floats[kTiles];  // two columns of row r, of row r + 8

  template <int kDimV>
  __device__ __forceinline__ void load(const DecodeParams& p, int64_t slab, int first_tile,
                                       int lane) {
    sums = __ldcs(reinterpret_cast<const float4*>(p.partial_sums) +
                  slab * (partial::sums(p.format) / 4) + lane / 4);
    const float4* x = reinterpret_cast<const float4*>(p.partial_out) +
                      slab * (partial::values(kDimV) / 4) + first_tile * partial::kLanes + lane;
#pragma unroll
    for (int v = 0; v < kTiles; ++v) floats[v] = __ldcs(x + v * partial::kLanes);
  }
  __device__ __forceinline__ float4 values(int v) const { return floats[v]; }
};

template <int kTiles>
struct Stored<kTiles, true> {
  float4 sums = {-INFINITY, 0.f, -INFINITY, 0.f};  // of this group of columns
  uint2 pairs[kTiles];

  template <int kDimV>
  __device__ __forceinline__ void load(const DecodeParams& p, int64_t slab, int first_tile,
                                       int lane) {
    const int groups = partial::scale_groups(p.format);
    const int group = first_tile * groups / (kDimV / partial::kTileColumns);
    static_assert(kDimV / partial::kFp8ScaleGroups % (kTiles * partial::kTileColumns) == 0 ||
                  kDimV != 512);
    sums = __ldcs(reinterpret_cast<const float4*>(p.partial_sums) +
                  (slab * groups + group) * partial::kLanes + lane);
    const uint4* x = reinterpret_cast<const uint4*>(p.partial_out) +
                     slab * (partial::values(kDimV) / 8) + first_tile / 2 * partial::kLanes + lane;
    if constexpr (kTiles == 1) {
      pairs[0] = __ldcs(reinterpret_cast<const uint2*>(x) + first_tile % 2);
    } else {
#pragma unroll
      for (int v = 0; v < kTiles; v += 2) {
        const uint4 two_tiles = __ldcs(x + v / 2 * partial::kLanes);
        pairs[v] = {two_tiles.x, two_tiles.y};
        pairs[v + 1] = {two_tiles.z, two_tiles.w};
      }
    }
  }
  __device__ __forceinline__ float4 values(int v) const {
    const float2 top = ptx::unpack<__half>(pairs[v].x);
    const float2 bottom = ptx::unpack<__half>(pairs[v].y);
    return {top.x, top.y, bottom.x, bottom.y};
  }
};

// The same of several pieces.
template <int kTiles>
struct Total {
  float4 sums = {-INFINITY, 0.f, -INFINITY, 0.f};
  float4 weighted[kTiles] = {};

  __device__ __forceinline__ float4 values(int v) const { return weighted[v]; }
};

// What weights of the maximum `max` are multiplied with if it gives way to `largest`: 0 where there
// are none, also if there are none at all.
__device__ __forceinline__ float weight_of(float max, float largest) {
  return exp2f(max - (largest == -INFINITY ? 0.f : largest));
}

// Adds the pieces to `total`, in their order. Multiply-adds are explicit, so that all kernels that
// this becomes a part of round alike.
template <typename Piece, int kTiles, int kCount>
__device__ __forceinline__ void add(const Piece (&pieces)[kCount], Total<kTiles>& total) {
  float top = total.sums.x;
  float bottom = total.sums.z;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    top = fmaxf(top, pieces[i].sums.x);
    bottom = fmaxf(bottom, pieces[i].sums.z);
  }
  const float old_top = weight_of(total.sums.x, top);
  const float old_bottom = weight_of(total.sums.z, bottom);
  total.sums = {top, total.sums.y * old_top, bottom, total.sums.w * old_bottom};
#pragma unroll
  for (int v = 0; v < kTiles; ++v) {
    float4& out = total.weighted[v];
    out = {out.x * old_top, out.y * old_top, out.z * old_bottom, out.w * old_bottom};
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Piece& piece = pieces[i];
    const float top_weight = weight_of(piece.sums.x, top);
    const float bottom_weight = weight_of(piece.sums.z, bottom);
    total.sums.y = fmaf(top_weight, piece.sums.y, total.sums.y);
    total.sums.w = fmaf(bottom_weight, piece.sums.w, total.sums.w);
    // Values of nothing may be unwritten. Others count even if their weight is 0 now: an infinite
    // one makes NaN, as it does where the request is not cut.
#pragma unroll
    for (int v = 0; v < kTiles; ++v) {
      const float4 x = piece.values(v);
      float4& out = total.weighted[v];
      if (piece.sums.x != -INFINITY) {
        out.x = fmaf(top_weight, x.x, out.x);
        out.y = fmaf(top_weight, x.y, out.y);
      }
      if (piece.sums.z != -INFINITY) {
        out.z = fmaf(bottom_weight, x.z, out.z);
        out.w = fmaf(bottom_weight, x.w, out.w);
      }
    }
  }
}

// Adds those that load(i) gives for `begin` to `end` - 1, kAtOnce of them on their way at once.
template <typename Piece, int kAtOnce, int kTiles, typename Load>
__device__ __forceinline__ void add_all(int begin, int end, const Load& load,
                                        Total<kTiles>& total) {
#pragma unroll 1
  for (int first = begin; first < end; first += kAtOnce) {
    Piece pieces[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < end) load(first + i, pieces[i]);
    }
    add(pieces, total);
  }
}

// Grid: (requests or parts) x slabs of a request x groups of columns, flattened on x.
template <typename T, int kDimV, int kWarpsPerSlab, int kTiles, bool kInvariant, bool kRounded>
__global__ void __launch_bounds__(kThreads, 2)  // left alone the compiler spills for more CTAs
    combine_kernel(const DecodeParams p, int rows, int slabs) {
  using S = Sharing<kDimV, kWarpsPerSlab, kTiles, kInvariant, kRounded>;
  ptx::grid_dependency_launch();
  const int column_group = blockIdx.x % S::kColumnGroups;
  const int flat_slab = blockIdx.x / S::kColumnGroups;
  const int slabs_of_request = slabs * p.slices;
  const int slab = flat_slab % slabs_of_request;  // over slices x slabs
  int request = flat_slab / slabs_of_request;
  const Slots slots = kInvariant            ? invariant_slots(p, request)
                      : merge_by_request(p) ? find_slots_of_request(p, request)
                                            : find_slots_of_part(p, request, &request);
  ptx::grid_dependency_wait();
  if (slots.count < 2) return;
  const bool broken = *p.schedule_is_broken;

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int chunk = warp % kWarpsPerSlab;
  const int first_tile = column_group * S::kTilesOfCta + warp / kWarpsPerSlab * kTiles;
  using Piece = Stored<kTiles, kRounded>;
  const auto load = [&](int piece, Piece& x) {
    x.template load<kDimV>(p, slots[piece] * slabs_of_request + slab, first_tile, lane);
  };
  const int per_warp = kInvariant ? kInvariantRun : schedule::ceil_div(slots.count, kWarpsPerSlab);
  const int begin = chunk * per_warp;
  Total<kTiles> total;
  add_all<Piece, S::kAtOnce>(begin, min(begin + per_warp, slots.count), load, total);
  if constexpr (kInvariant && kWarpsPerSlab == 1) {
#pragma unroll 1
    for (int first = kInvariantRun; first < slots.count; first += kInvariantRun) {
      Total<kTiles> run[1];
      add_all<Piece, S::kAtOnce>(first, min(first + kInvariantRun, slots.count), load, run[0]);
      add(run, total);
    }
  }

  if constexpr (kWarpsPerSlab > 1) {
    __shared__ float4 sums_of_warps[kWarps][32];
    __shared__ float4 values_of_warps[kWarps][kTiles][32];
    if (chunk > 0) {
      sums_of_warps[warp][lane] = total.sums;
#pragma unroll
      for (int v = 0; v < kTiles; ++v) values_of_warps[warp][v][lane] = total.weighted[v];
    }
    __syncthreads();
    if (chunk > 0) return;
    const auto load_of_warp = [&](int other, Total<kTiles>& x) {
      x.sums = sums_of_warps[warp + other][lane];
#pragma unroll
      for (int v = 0; v < kTiles; ++v) x.weighted[v] = values_of_warps[warp + other][v][lane];
    };
    add_all<Total<kTiles>, S::kWarpsAtOnce>(1, kWarpsPerSlab, load_of_warp, total);
  }
  // A broken schedule: all results are NaN already, and stay so.
  if (broken) return;

  const int group = p.heads_q / p.heads_kv;
  const int slice = slab / slabs;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = slab % slabs * partial::kSlabRows + lane / 4 + 8 * h;
    const bool valid = row < rows;
    const int token = p.sparse ? slice : row / group;
    const int head = p.sparse ? row : slice * group + row % group;
    const float max = h == 0 ? total.sums.x : total.sums.z;
    const float sum = h == 0 ? total.sums.y : total.sums.w;
    const auto [lse, factor] = final_row(p, request, valid ? head : 0, max, sum);
    const int64_t out_row = (static_cast<int64_t>(request) * p.seq_q + token) * p.heads_q + head;
    uint32_t* out = static_cast<uint32_t*>(p.out) + out_row * (kDimV / 2) +
                    first_tile * (partial::kTileColumns / 2);
    uint32_t pairs[kTiles];
#pragma unroll
    for (int v = 0; v < kTiles; ++v) {
      const float4& x = total.weighted[v];
      pairs[v] = h == 0 ? ptx::pack<T>(x.x * factor, x.y * factor)
                        : ptx::pack<T>(x.z * factor, x.w * factor);
    }
    if constexpr (kTiles % 4 == 0) {
#pragma unroll
      for (int v = 0; v < kTiles; v += 4) {
        uint32_t x[4] = {pairs[v], pairs[v + 1], pairs[v + 2], pairs[v + 3]};
        transpose_quad(x);
        if (valid) reinterpret_cast<uint4*>(out)[v + lane % 4] = {x[0], x[1], x[2], x[3]};
      }
    } else if (valid) {
#pragma unroll
      for (int v = 0; v < kTiles; ++v) out[v * (partial::kTileColumns / 2) + lane % 4] = pairs[v];
    }
    if (valid && first_tile == 0 && lane % 4 == 0) {
      p.lse[(static_cast<int64_t>(request) * p.heads_q + head) * p.seq_q + token] = lse;
    }
  }
}

int64_t groups_of_ctas(const DecodeParams& p) {
  return merge_by_request(p) ? p.batch : p.num_parts;
}

template <typename T, int kDimV, int kWarpsPerSlab, int kTiles, bool kRounded,
          bool kInvariant = false>
Status launch_kernel(const DecodeParams& p, cudaStream_t stream) {
  const int rows = partial::rows_of_slice(p);
  const int slabs = partial::slabs_of_slice(rows);
  using S = Sharing<kDimV, kWarpsPerSlab, kTiles, kInvariant, kRounded>;
  const int64_t ctas = groups_of_ctas(p) * slabs * p.slices * S::kColumnGroups;
  return launch_dependent(&combine_kernel<T, kDimV, kWarpsPerSlab, kTiles, kInvariant, kRounded>,
                          "grid of the merge kernel", ctas, kThreads, 0, stream, p, rows, slabs);
}

// CTAs that can start at once, while the attention kernel runs if it leaves half of the
// multiprocessors free, when it ends otherwise. More would start one after the other, which costs
// 2 us and more. What the host knows of the lengths is the most that they can be; GPUs with other
// numbers of multiprocessors than 132 get a less fitting number.
int64_t most_ctas(const DecodeParams& p) {
  constexpr int kMultiprocessors = 132;
  constexpr int kCtasOfMultiprocessor = 2;
  const int row_tiles =
      p.slices * schedule::ceil_div(partial::rows_of_slice(p), schedule::kRowTileRows);
  const int64_t blocks = std::min<int64_t>(most_blocks(p), INT32_MAX);
  const int least = schedule::least_even_piece(static_cast<int>(blocks), row_tiles);
  const int64_t pieces = p.batch_invariant ? p.num_slots : blocks / least;
  const int64_t parts = std::min<int64_t>(pieces, p.num_parts);
  const bool half_is_free = parts * row_tiles <= kMultiprocessors / 2;
  return kMultiprocessors * kCtasOfMultiprocessor / (half_is_free ? 2 : 1);
}

template <typename T, int kDimV, bool kRounded>
Status launch(const DecodeParams& p, cudaStream_t stream) {
  // As many CTAs for a slab as that leaves. Many of them share the pieces, few the columns.
  const int64_t slabs =
      groups_of_ctas(p) * p.slices * partial::slabs_of_slice(partial::rows_of_slice(p));
  constexpr int kTiles = kDimV / partial::kTileColumns;
  const int64_t ctas = most_ctas(p) / std::max<int64_t>(slabs, 1);
  if (p.batch_invariant) {
    if (ctas >= kTiles / 4) return launch_kernel<T, kDimV, 4, 2, kRounded, true>(p, stream);
    if (ctas >= kTiles / 8) return launch_kernel<T, kDimV, 4, 4, kRounded, true>(p, stream);
    return launch_kernel<T, kDimV, 1, kRounded ? 4 : 2, kRounded, true>(p, stream);
  }
  if (ctas >= kTiles) return launch_kernel<T, kDimV, 8, 1, kRounded>(p, stream);
  if (ctas >= kTiles / 2) return launch_kernel<T, kDimV, 8, 2, kRounded>(p, stream);
  if (ctas >= kTiles / 4) return launch_kernel<T, kDimV, 8, 4, kRounded>(p, stream);
  if (ctas >= kTiles / 8) return launch_kernel<T, kDimV, 4, 4, kRounded>(p, stream);
  if (ctas >= kTiles / 16) return launch_kernel<T, kDimV, 2, 4, kRounded>(p, stream);
  if constexpr (kDimV == 512) {
    if (ctas < kTiles / 32) return launch_kernel<T, kDimV, 1, 8, kRounded>(p, stream);
  }
  return launch_kernel<T, kDimV, 1, 4, kRounded>(p, stream);
}

template <typename T>
Status launch(const DecodeParams& p, cudaStream_t stream) {
  if (p.head_dim_v == 512) return launch<T, 512, true>(p, stream);
  if (p.head_dim_v == 256) return launch<T, 256, true>(p, stream);
  return {cudaErrorNotSupported, "head_dim_v of the merge kernel"};
}

}  // namespace

Status launch_combine(const DecodeParams& params, cudaStream_t stream) {
  // One part takes every request whole.
  if (params.num_parts == 1 && !params.batch_invariant) return {};
  if (leaves_float_pieces(params)) return launch<__nv_bfloat16, 512, false>(params, stream);
  return params.dtype == DataType::kFloat16 ? launch<__half>(params, stream)
                                            : launch<__nv_bfloat16>(params, stream);
}

}  // namespace flashmla
