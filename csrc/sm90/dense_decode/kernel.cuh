// Dense decode for sm_90a: attention of 64-row tiles (query tokens x heads of one KV head) over a
// paged latent cache of 16-bit elements, which the copy engine brings as it is.
#pragma once

#include "sm90/decode/math_group.cuh"

namespace flashmla::sm90::dense_decode {

using namespace decode;

constexpr int kKeyLoaderWarps = kBuffers;  // of the four loading warps, one for each key buffer;
constexpr int kQueryLoaderWarps = 2;       // the others load queries

// A copy-engine box is at most one block; smaller pages take several.
constexpr int kMinPageSize = kGroupTokens;

FLASHMLA_HOST_DEVICE constexpr bool page_size_supported(int page_size) {
  return page_size % kTokens == 0 || (page_size >= kMinPageSize && kTokens % page_size == 0);
}

FLASHMLA_HOST_DEVICE constexpr int box_tokens(int page_size) {
  return page_size < kTokens ? page_size : kTokens;
}

// Boxes of half of the values and of the RoPE sub-tile of the keys; and of a row tile of queries,
// only where a request's rows lie side by side (one KV head).
struct TensorMaps {
  CUtensorMap keys_half;
  CUtensorMap keys_rope;
  CUtensorMap queries;
};

// ---------------------------------------------------------------------------------------------
// Loading warps
// ---------------------------------------------------------------------------------------------

// Keys: each buffer has a warp of its own, so that waiting for one does not hold up the other. The
// lanes look up pages; a lane feeds the copy engine for each page of the block.
template <typename P>
__device__ __forceinline__ void load_keys(const KernelParams<P>& kp, const TensorMaps& maps,
                                          SharedStorage<P>& smem, int buffer, int lane) {
  using S = typename P::S;
  const int box = box_tokens(kp.p.page_size);
  const int boxes = kTokens / box;
  const int blocks_of_page = kp.p.page_size / box;  // 1 for small pages
  const int groups_of_page = kp.p.page_size / kGroupTokens;
  const int first_tile = smem.place.slice * S::kSubTiles;
  const int first = first_half(kp, buffer);
  const uint64_t policy = ptx::evict_first_policy();
  uint8_t* keys = smem.kv[buffer];
  uint64_t* full = smem.kv_full[buffer];
  uint64_t* empty = smem.kv_empty[buffer];
  uint32_t parity = 1;  // a fresh barrier lets the first wait pass
  bool marked_bad = false;

  PieceWalk<P> walk(kp.p, smem.place.part);
  schedule::Piece piece;
  while (walk.next(kp.p, piece)) {
    const int32_t* table =
        kp.p.block_table + static_cast<int64_t>(piece.request) * kp.p.table_width;
    for (int block = piece.first_block + buffer; block < piece.end_block; block += kBuffers) {
      // Entries past the length may hold anything and are not looked at.
      const int valid = min(piece.length - block * kTokens, kTokens);
      const int used_boxes = (valid + box - 1) / box;
      const int table_entry = block / blocks_of_page;
      int group = (block - table_entry * blocks_of_page) * kTokenGroups;  // in the page
      bool bad = piece.poison;
      if (lane < used_boxes && !piece.poison) {
        const int page = table[table_entry * boxes + lane];
        bad = page < 0 || page >= kp.p.num_pages;
        group += page * groups_of_page;
      }
      const bool block_is_bad = __any_sync(0xffffffff, bad);
      if (block_is_bad != marked_bad) {
        // The warpgroup that reads the mark has released its half of the block before.
        ptx::mbarrier_wait(&empty[buffer], parity);
        if (lane == 0) smem.marks[buffer].x = block_is_bad;
        marked_bad = block_is_bad;
      }
      if (block_is_bad) {
        // Nothing is copied. The mark is written before lane 0, too, arrives.
        for (int half = 0; half < 2; ++half) ptx::mbarrier_wait(&empty[half], parity);
        __syncwarp();
        if (lane < S::kCopies) ptx::mbarrier_arrive(&full[lane]);
        parity ^= 1;
        continue;
      }
      // What can be done before the buffer is empty: the barriers are free once the block before
      // has landed, and nothing of this one lands before the copies below.
      if (lane < S::kCopies) {
        const int tiles = lane == S::kRopeCopy ? 1 : S::kHalfTiles;
        ptx::mbarrier_wait(&full[lane], parity);
        ptx::mbarrier_arrive_expect_tx(&full[lane], used_boxes * box * tiles * kSubTileColumns * 2);
      }
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        const int half = first ^ i;
        ptx::mbarrier_wait(&empty[half], parity);
        if (lane >= used_boxes) continue;
        ptx::tma_load_4d(keys + half * S::kHalfBytes + lane * box * S::kHalfTiles * kRowBytes,
                         &maps.keys_half, &full[half], policy, 0, 0,
                         first_tile + half * S::kHalfTiles, group);
        if (S::kHasRope && half == reader_of_p(buffer)) {
          ptx::tma_load_4d(keys + S::kOffsetOfP + lane * box * kRowBytes, &maps.keys_rope,
                           &full[S::kRopeCopy], policy, 0, 0, first_tile + S::kValueTiles, group);
        }
      }
      parity ^= 1;
    }
  }
}

// Queries of one KV head: a row tile is one box, and rows past the last are filled with zeros.
template <typename P>
__device__ __forceinline__ void copy_queries(const KernelParams<P>& kp, const TensorMaps& maps,
                                             SharedStorage<P>& smem, int lane) {
  const uint64_t policy = ptx::evict_first_policy();
  uint32_t empty_parity = 1;
  PieceWalk<P> walk(kp.p, smem.place.part);
  schedule::Piece piece;
  while (walk.next(kp.p, piece)) {
    if (piece.first_block >= piece.end_block || !needs_queries<P>(piece)) continue;
    ptx::mbarrier_wait(&smem.q_empty, empty_parity);
    empty_parity ^= 1;
    if (lane == 0) {
      ptx::mbarrier_arrive_expect_tx(&smem.q_full, sizeof(smem.q));
      ptx::tma_load_4d(smem.q, &maps.queries, &smem.q_full, policy, 0, smem.place.row_tile * kRows,
                       0, piece.request);
    }
  }
}

// Queries of several KV heads: gathered row by row, since those of one are strided over query
// tokens.
template <typename P>
__device__ __forceinline__ void gather_queries(const KernelParams<P>& kp, SharedStorage<P>& smem,
                                               int thread) {
  using T = typename P::T;
  using S = typename P::S;
  constexpr int kChunks = S::kDim / 8;  // of 16 bytes in a row
  constexpr int kLoaders = kQueryLoaderWarps * 32;
  const uint32_t q_base = ptx::smem_address(smem.q);
  const T* q = static_cast<const T*>(kp.p.q);
  uint32_t empty_parity = 1;

  PieceWalk<P> walk(kp.p, smem.place.part);
  schedule::Piece piece;
  while (walk.next(kp.p, piece)) {
    if (piece.first_block >= piece.end_block || !needs_queries<P>(piece)) continue;
    ptx::mbarrier_wait(&smem.q_empty, empty_parity);
    empty_parity ^= 1;
#pragma unroll 4
    for (int i = thread; i < kRows * kChunks; i += kLoaders) {
      const int row_in_tile = i / kChunks;
      const int chunk = i - row_in_tile * kChunks;
      const int row = smem.place.row_tile * kRows + row_in_tile;
      const bool valid = row < kp.rows;
      const RowIndex index = row_index(kp, smem.place.slice, valid ? row : 0);
      const T* source = q + out_row(kp, piece.request, index) * S::kDim + chunk * 8;
      const uint32_t target = q_base + (chunk / 8) * kSubTileBytes + row_in_tile * 128 +
                              (((chunk & 7) ^ (row_in_tile & 7)) << 4);
      ptx::cp_async_16(target, source, valid);
    }
    ptx::cp_async_wait_all();
    ptx::fence_proxy_async();
    __syncwarp();
    if ((thread & 31) == 0) ptx::mbarrier_arrive(&smem.q_full);
  }
}

// ---------------------------------------------------------------------------------------------
// Kernel
// ---------------------------------------------------------------------------------------------

template <typename P>
__global__ void __launch_bounds__(P::kThreads, 1)
    dense_decode_kernel(const __grid_constant__ KernelParams<P> kp,
                        const __grid_constant__ TensorMaps maps) {
  auto& smem = shared_storage<P>(ptx::dynamic_smem());
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&maps.keys_half);
    ptx::prefetch_tensor_map(&maps.keys_rope);
  }
  if (!begin_cta<P>(kp, smem, kp.must_gather_queries ? kQueryLoaderWarps : 1, 1)) return;

  if (warpgroup == kMathGroups) {
    static_assert(kKeyLoaderWarps + kQueryLoaderWarps == P::kLoadWarps);
    ptx::setmaxnreg_dec<P::kLoadRegisters>();
    const int thread = threadIdx.x % 128;
    const int warp = __shfl_sync(0xffffffff, thread / 32, 0);
    if (warp < kKeyLoaderWarps) {
      load_keys<P>(kp, maps, smem, /*buffer=*/warp, lane);
    } else if (kp.must_gather_queries) {
      gather_queries<P>(kp, smem, thread - kKeyLoaderWarps * 32);
    } else if (warp == kKeyLoaderWarps) {
      copy_queries<P>(kp, maps, smem, lane);
    }
  } else if (warpgroup == 0) {
    ptx::setmaxnreg_inc<P::kMathRegisters>();
    MathGroup<P, 0>(kp, smem).run();
  } else {
    ptx::setmaxnreg_inc<P::kMathRegisters>();
    MathGroup<P, 1>(kp, smem).run();
  }
}

}  // namespace flashmla::sm90::dense_decode
