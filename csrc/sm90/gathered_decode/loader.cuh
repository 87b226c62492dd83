// The loading warpgroups of the gathering decode kernels. Eight lanes fetch a token, see
// token_finder.cuh, each 8 columns of every sub-tile, so they write a row of a sub-tile without
// bank conflicts.
//
// FP8 values go through a stage in shared memory. While tokens are converted and stored, later ones
// are on their way into the places that become free. (Through registers instead of a stage nothing
// would overlap: the compiler waits for all loads under way at once.) Slots are loaded one block
// ahead.
#pragma once

#include "sm90/gathered_decode/token_finder.cuh"

namespace flashmla::sm90::gathered_decode {

// What the loaders have in common.
template <typename P, CacheFormat kFormat>
class Loader : protected TokenFinder<P, kFormat> {
  using Base = TokenFinder<P, kFormat>;
  using S = typename P::S;

 public:
  __device__ __forceinline__ Loader(const KernelParams<P>& kp, const CUtensorMap& queries,
                                    SharedStorage<P>& smem)
      : Base(kp, smem), queries_(queries) {}

 protected:
  using Base::first_token_;
  using Base::kLaneTokens;
  using Base::kp_;
  using Base::lane_;
  using Base::smem_;
  using Base::warp_;
  using typename Base::Tokens;

  // --- queries --------------------------------------------------------------------------------

  // Copies the row tile of the piece once nobody reads the one before, unless that would mean to
  // wait.
  __device__ __forceinline__ void copy_queries(int request, bool must) {
    if (!queries_are_due_) return;
    if (warp_ == 0) {
      const bool free = __all_sync(kAllLanes, ptx::mbarrier_test(&smem_.q_empty, q_parity()));
      if (!free && !must) return;
      if (!free) ptx::mbarrier_wait(&smem_.q_empty, q_parity());
      if (lane_ == 0) {
        ptx::mbarrier_arrive_expect_tx(&smem_.q_full, sizeof(smem_.q));
        const int entry = P::kSparse ? request * kp_.p.slices + smem_.place.slice : request;
        ptx::tma_load_4d(smem_.q, &queries_, &smem_.q_full, ptx::evict_first_policy(), 0,
                         smem_.place.row_tile * kRows, 0, entry);
      }
      empty_parity_ ^= kQueries;
    }
    queries_are_due_ = false;
  }

  // --- shared memory ----------------------------------------------------------------------------

  // Where this lane's 8 columns of sub-tile `tile` of its token `i` go. `base` is the place of its
  // token 0 in the first of `tiles` sub-tiles that lie together.
  __device__ __forceinline__ static uint32_t place_of(uint32_t base, int tiles, int tile, int i) {
    // Token 4 * i + q of the warp: row 4 * (i % 2) + q of a group, and the chunks of a row are
    // swizzled with its number.
    return (i % 2 == 0 ? base : (base ^ 4 << 4) + 4 * kRowBytes) +
           (i / 2 * tiles + tile) * kGroupBytes;
  }

  // The place of this lane's token 0 in the first sub-tile at `tiles_begin`, of `tiles`.
  __device__ __forceinline__ uint32_t lane_base(uint32_t tiles_begin, int tiles) const {
    const int row = lane_ / 8;
    return tiles_begin + first_token_ * tiles * kRowBytes + row * kRowBytes +
           ((lane_ % 8 ^ row) << 4);
  }

  __device__ __forceinline__ uint32_t half_base(int buffer, int half) const {
    return lane_base(
        ptx::smem_address(smem_.kv[0]) + buffer * S::kBufferBytes + half * S::kHalfBytes,
        S::kHalfTiles);
  }

  __device__ __forceinline__ void wait_empty(int buffer, int half) {
    ptx::mbarrier_wait(&smem_.kv_empty[buffer][half], empty_parity_ >> buffer & 1);
  }

  // What this thread has written, and copied if it has waited for that, may be read.
  __device__ __forceinline__ void arrive_full(int buffer, int copy) {
    ptx::mbarrier_arrive(&smem_.kv_full[buffer][copy]);
  }

  // --- RoPE columns -----------------------------------------------------------------------------

  // Which half of a block the RoPE columns are fetched with, if they are fetched by themselves.
  static constexpr int rope_half(int buffer) {
    return S::kHasRope ? reader_of_p(buffer) : kFormat == CacheFormat::kFp8V4 ? 1 : -1;
  }

  __device__ __forceinline__ void copy_rope(const Tokens& tokens, int buffer, int offset) {
    constexpr int kTiles = S::kHasRope ? 1 : S::kHalfTiles;
    const uint32_t base =
        S::kHasRope
            ? lane_base(ptx::smem_address(smem_.kv[0]) + buffer * S::kBufferBytes + S::kOffsetOfP,
                        kTiles)
            : half_base(buffer, 1);
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      ptx::cp_async_16(place_of(base, kTiles, kTiles - 1, i),
                       tokens.token[i] + (offset + lane_ % 8 * 16), true);
    }
  }

  __device__ __forceinline__ static int first_half_of(int buffer) { return buffer; }

  const CUtensorMap& queries_;
  bool queries_are_due_ = false;
  // A bit for each buffer, and one for the queries. A fresh barrier lets the first wait pass.
  static constexpr uint32_t kQueries = 1 << kBuffers;
  __device__ __forceinline__ uint32_t q_parity() const { return empty_parity_ >> kBuffers; }
  uint32_t empty_parity_ = 2 * kQueries - 1;
};

// FP8 values, through a stage in shared memory that is private to a warp.
template <typename P, CacheFormat kFormat>
class ConvertingLoader : Loader<P, kFormat> {
  using Base = Loader<P, kFormat>;
  using S = typename P::S;
  using F = Format<kFormat>;
  // Tokens that a lane converts: if paired, those of one half of a warp's.
  static constexpr int kLaneTokens = Base::kLaneTokens / P::kClusterCtas;
  using typename Base::Tokens;

 public:
  __device__ __forceinline__ ConvertingLoader(const KernelParams<P>& kp, const CUtensorMap& queries,
                                              SharedStorage<P>& smem)
      : Base(kp, queries, smem) {
    // Odd tokens have sub-tiles 0 and 1, and 2 and 3, exchanged in the stage, so that eight bytes
    // of one sub-tile for each lane are in different banks.
    const int token = this->lane_ / 8;
    values_ = ptx::smem_address(smem.stage_values[0]) +
              this->warp_ * (P::kStages * kStageTokens * kStageValueBytes) +
              token * kStageValueBytes + (token & 1) * kSubTileColumns;
    if constexpr (P::kPaired) {
      rank_ = ptx::cluster_cta_rank();
      const uint32_t own = ptx::smem_address(&smem);
      to_peer_ = ptx::map_to_cta(own, rank_ ^ 1) - own;
    }
    scales_ = ptx::smem_address(smem.stage_scales[0]) +
              this->warp_ * (P::kStages * kStageTokens * kStageScaleBytes) +
              token * kStageScaleBytes;
  }

  __device__ __forceinline__ void run() {
    Base::begin_announcing();
    Tokens tokens;
    typename Base::Entries entries;
    uint32_t mark;
    int buffer = 0;
    {
      const GatheredBlock block = Base::wait_block(0);
      if (!(block.flags & kBlockExists)) return;
      Base::load_entries(block, entries);
      mark = Base::find(block, entries, tokens) | bad(block);
    }
#pragma unroll
    for (int i = 0; i < P::kStages; ++i) fetch(tokens, i, Base::first_half_of(buffer));

    this->queries_are_due_ = true;
    bool more = true;
    for (int number = 0; more; ++number) {
      Base::announce(number + 2);
      {
        const GatheredBlock next = Base::wait_block(number + 1);
        more = next.flags & kBlockExists;
        Base::load_entries(next, entries);
      }
      const int next_buffer = more ? Base::block(number + 1).buffer : 0;
      uint32_t next_mark = 0;
#pragma unroll 1
      for (int step = 0; step < 2; ++step) {
        const int half = Base::first_half_of(buffer) ^ step;
        Base::copy_queries(Base::block(number).request, /*must=*/step == 1);
        Base::wait_empty(buffer, half);
        if (step == 0) Base::set_mark(buffer, mark);
        const bool has_rope = half == Base::rope_half(buffer);
        const int next_half = step == 0 ? half ^ 1 : Base::first_half_of(next_buffer);
        const auto fetch_rope = [&] {
          if (has_rope) Base::copy_rope(tokens, buffer, F::kRopeOffset);
          ptx::cp_async_commit();  // also if there is nothing in it: groups are counted
        };
        convert(buffer, half, tokens, next_half, fetch_rope, [&] {
          if (step == 0) return;
          if (more) {
            const GatheredBlock next = Base::block(number + 1);
            next_mark = Base::find(next, entries, tokens) | bad(next);
          } else {
            tokens.set_zeros();
          }
        });
        ptx::cp_async_wait<P::kStages>();  // for the RoPE columns
        ptx::fence_proxy_async();
        if (P::kPaired && this->warp_ == 0 && this->lane_ == 0) {
          // What comes from the other CTA.
          const int tiles = half == 0 ? S::kHalfTiles : F::kRightTiles;
          ptx::mbarrier_arrive_expect_tx(&this->smem_.kv_full[buffer][half],
                                         tiles * kSubTileBytes / 2);
        } else {
          Base::arrive_full(buffer, half);
        }
        if (S::kHasRope && has_rope) Base::arrive_full(buffer, S::kRopeCopy);
      }
      this->empty_parity_ ^= 1 << buffer;
      buffer = next_buffer;
      mark = next_mark;
      if (more && Base::block(number + 1).flags & kBlockNeedsQueries) this->queries_are_due_ = true;
    }
    ptx::cp_async_wait<0>();
  }

 private:
  __device__ __forceinline__ static uint32_t bad(const GatheredBlock& block) {
    return !P::kSparse && block.flags & kBlockIsBad;
  }

  // Fetches a half of the values of this lane's token i into a stage: 16 bytes of sub-tiles 0 and
  // 1, and of 2 and 3.
  __device__ __forceinline__ void fetch(const Tokens& tokens, int i, int half) const {
    const int chunk = this->lane_ % 8 * 16;
    const int stage = i % P::kStages;
    const uint8_t* token = tokens.token[i];
    int to_scales = tokens.to_scales[i];
    if (P::kPaired && rank_ == 1) {
      token = tokens.token[Base::kLaneTokens / 2 + i];
      to_scales = tokens.to_scales[Base::kLaneTokens / 2 + i];
    }
    const uint8_t* source = token + (half * S::kHalfColumns + chunk);
    const uint32_t target = (values_ ^ chunk) + stage * (kStageTokens * kStageValueBytes);
    ptx::cp_async_16(target, source, true);
    ptx::cp_async_16(target + 128, source + 128, true);
    if (chunk == 0) {
      ptx::cp_async_small<F::kHalfScaleBytes>(scales_ + stage * (kStageTokens * kStageScaleBytes),
                                              F::scales(token, to_scales, half));
    }
    ptx::cp_async_commit();
  }

  // Converts and stores a half of the values of this lane's tokens, and fetches what comes kStages
  // tokens later into the places that become free. `fetch_rope` follows the last values of this
  // half; `advance` makes `tokens` those of the next one.
  template <typename FetchRope, typename Advance>
  __device__ __forceinline__ void convert(int buffer, int half, Tokens& tokens, int next_half,
                                          const FetchRope& fetch_rope, const Advance& advance) {
    uint32_t base = Base::half_base(buffer, half);
    if constexpr (P::kPaired) base += rank_ * (kGroupBytes * S::kHalfTiles);
    const uint32_t barrier =
        ptx::smem_address(&this->smem_.kv_full[0][0]) + (buffer * S::kCopies + half) * 8 + to_peer_;
    if (P::kStages == kLaneTokens) fetch_rope();
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      // Groups of copies that are newer than token i: those of the kStages - 1 tokens after it, and
      // of the RoPE columns once they are fetched.
      if (i < kLaneTokens - P::kStages) {
        ptx::cp_async_wait<P::kStages - 1>();
      } else {
        ptx::cp_async_wait<P::kStages>();
      }
      __syncwarp();
      const int stage = i % P::kStages;
      const uint32_t address = values_ + this->lane_ % 8 * 8;
      uint2 codes[S::kHalfTiles];
#pragma unroll
      for (int tile = 0; tile < S::kHalfTiles; ++tile) {
        codes[tile] = ptx::ld_shared_8((address ^ (tile & 1) * kSubTileColumns) + tile / 2 * 128 +
                                       stage * (kStageTokens * kStageValueBytes));
      }
      typename F::HalfScales half_scales;
      half_scales.read(scales_ + stage * (kStageTokens * kStageScaleBytes));
      const int later = i + P::kStages;
      if (later == kLaneTokens) advance();
      __syncwarp();  // now all lanes have read the stage
      if (later < kLaneTokens) {
        fetch(tokens, later, half);
        if (later == kLaneTokens - 1) fetch_rope();
      } else {
        fetch(tokens, later - kLaneTokens, next_half);
      }
      float scales[4];
      half_scales.of_tiles(scales);
#pragma unroll
      for (int tile = 0; tile < S::kHalfTiles; ++tile) {
        if (tile >= F::kRightTiles && half == 1) break;
        const uint2 low = dequantize(codes[tile].x, scales[tile]);
        const uint2 high = dequantize(codes[tile].y, scales[tile]);
        const uint32_t place = Base::place_of(base, S::kHalfTiles, tile, i);
        ptx::st_shared_16(place, low.x, low.y, high.x, high.y);
        if constexpr (P::kPaired) {
          ptx::st_async_16(place + to_peer_, barrier, low.x, low.y, high.x, high.y);
        }
      }
    }
  }

  uint32_t rank_ = 0;  // of this CTA in a pair
  uint32_t to_peer_ = 0;
  uint32_t values_;  // the places of this lane's token in the first stage of the warp
  uint32_t scales_;
};

// 16-bit elements, straight to shared memory.
template <typename P>
class CopyingLoader : Loader<P, CacheFormat::kPlain> {
  using Base = Loader<P, CacheFormat::kPlain>;
  using S = typename P::S;
  using typename Base::Tokens;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    Base::begin_announcing();
    typename Base::Entries entries;
    bool more;
    {
      const GatheredBlock block = Base::wait_block(0);
      more = block.flags & kBlockExists;
      Base::load_entries(block, entries);
    }
    int pending =
        -1;  // copies under way: 4 * buffer + 2 * half + whether RoPE columns are with them
    const auto hand_out = [&] {
      ptx::fence_proxy_async();
      Base::arrive_full(pending >> 2, pending >> 1 & 1);
      if (S::kHasRope && pending & 1) Base::arrive_full(pending >> 2, S::kRopeCopy);
      pending = -1;
    };
    for (int number = 0; more; ++number) {
      Tokens tokens;
      const uint32_t mark = Base::find(Base::block(number), entries, tokens);
      const int buffer = Base::block(number).buffer;
      const int request = Base::block(number).request;
      if (Base::block(number).flags & kBlockNeedsQueries) this->queries_are_due_ = true;
      Base::announce(number + 2);
      const GatheredBlock next = Base::wait_block(number + 1);
      more = next.flags & kBlockExists;
      Base::load_entries(next, entries);
#pragma unroll 1
      for (int step = 0; step < 2; ++step) {
        const int half = Base::first_half_of(buffer) ^ step;
        const bool free =
            __all_sync(kAllLanes, ptx::mbarrier_test(&this->smem_.kv_empty[buffer][half],
                                                     this->empty_parity_ >> buffer & 1));
        // Before it waits for others this warp hands out all that they may be waiting for.
        if ((!free || this->queries_are_due_) && pending >= 0) {
          ptx::cp_async_wait<0>();
          hand_out();
        }
        Base::copy_queries(request, /*must=*/step == 1);
        if (!free) Base::wait_empty(buffer, half);
        if (step == 0) Base::set_mark(buffer, mark);
        const uint32_t base = Base::half_base(buffer, half);
#pragma unroll
        for (int i = 0; i < Base::kLaneTokens; ++i) {
          const uint8_t* source =
              tokens.token[i] + (half * S::kHalfColumns * 2 + this->lane_ % 8 * 16);
#pragma unroll
          for (int tile = 0; tile < S::kHalfTiles; ++tile) {
            ptx::cp_async_16(Base::place_of(base, S::kHalfTiles, tile, i),
                             source + tile * kRowBytes, true);
          }
        }
        const bool has_rope = half == Base::rope_half(buffer);
        if (has_rope) Base::copy_rope(tokens, buffer, S::kDimV * 2);
        ptx::cp_async_commit();
        if (pending >= 0) {
          ptx::cp_async_wait<1>();
          hand_out();
        }
        pending = 4 * buffer + 2 * half + has_rope;
      }
      this->empty_parity_ ^= 1 << buffer;
    }
    if (pending >= 0) {
      ptx::cp_async_wait<0>();
      hand_out();
    }
  }
};

}  // namespace flashmla::sm90::gathered_decode
