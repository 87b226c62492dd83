// The math warpgroups of the decode kernels for sm_90a: scores, softmax and values of 64-row tiles.
//
// docs/kernels/dense_decode.md draws the schedule. In short: warpgroup 0 owns the left half of the
// output columns and computes the scores of even blocks (always in buffer 0), warpgroup 1 owns the
// right half and the scores of odd blocks (buffer 1), half a block later. Each multiplies both P
// tiles with its half of the values, in block order, so the running maximum only ever moves
// forward. A P tile is stored over the 64 RoPE columns of its own key block, which nothing reads
// once the scores are done.
#pragma once

#include "common/partial_scale.cuh"
#include "common/quad.cuh"
#include "sm90/decode/cta.cuh"

namespace flashmla::sm90::decode {

// What one thread keeps of its two rows (r and r + 8) of the accumulator layout.
struct RowState {
  float max[2];  // base-2 scaled, -inf while nothing was attended
  float sum[2];  // of this thread's columns of this warpgroup's blocks
};

template <typename P, int kGroup>
class MathGroup {
  using T = typename P::T;
  using S = typename P::S;

 public:
  __device__ MathGroup(const KernelParams<P>& kp, SharedStorage<P>& smem) : kp_(kp), smem_(smem) {
    thread_ = threadIdx.x % 128;
    lane_ = thread_ % 32;
    row_ = thread_ / 32 * 16 + lane_ / 4;
  }

  __device__ __forceinline__ void run() {
    constexpr float kLog2e = 1.4426950408889634f;
    scale_log2_ = kp_.p.softmax_scale * kLog2e;
    PieceWalk<P> walk(kp_.p, smem_.place.part);
    schedule::Piece piece;
    while (walk.next(kp_.p, piece)) {
      if (piece.first_block >= piece.end_block) {
        store_empty(kp_, smem_.place, piece, kGroup, thread_);
        continue;
      }
      begin_piece(piece);
      if constexpr (kGroup == 0) {
        even_owner_piece(piece);
      } else {
        odd_owner_piece(piece);
      }
      finish_piece(piece);
    }
  }

 private:
  // --- blocks -----------------------------------------------------------------------------------

  // Warpgroup 0: scores of the even blocks, then P_even V and P_odd V.
  __device__ __forceinline__ void even_owner_piece(const schedule::Piece& piece) {
#pragma unroll 1
    for (int block = piece.first_block; block < piece.end_block; block += 2) {
      bool odd_in_flight = false;
      if (block != piece.first_block) {
        issue_odd_values(piece, block - 1);
        // The next scores go behind that product if their keys are there. If not, its keys are
        // released first: these are what the copies then have room for.
        odd_in_flight = keys_are_there<0>();
        if (!odd_in_flight) {
          wgmma::wait<0>();
          release_values<1>();
        }
      }
      float s[32];
      uint32_t p[4][4];
      float factor[2];
      issue_scores<0>(s);
      if (odd_in_flight) {
        wgmma::wait<2>();
        release_values<1>();
      }
      finish_scores<0>(s, block + 2 >= piece.end_block && frees_queries<P>(piece));
      wgmma::hold(out_);
      mask(piece, block, s);
      move_max<0>(s, factor);
      exponentials(s, p);
      store_p<0>(p);
      rescale_output(factor);
      zero_values_past_end<0>(piece, block);
      values_from_registers<0>(p);
      finish_values<0>();
      parity_[0] ^= 1;
    }
    if ((piece.end_block - piece.first_block) % 2 == 0) {
      issue_odd_values(piece, piece.end_block - 1);
      finish_values<1>();
    }
  }

  __device__ __forceinline__ void issue_odd_values(const schedule::Piece& piece, int block) {
    float factor[2];
    ptx::mbarrier_wait(&smem_.p_full[1], parity_[1]);
    follow_max<1>(factor);
    rescale_output(factor);
    wait_values<1>();
    zero_values_past_end<1>(piece, block);
    values_from_shared<1>();
    parity_[1] ^= 1;
  }

  // Warpgroup 1: scores of the odd blocks, then P_even V, under which the odd softmax hides, and
  // P_odd V.
  __device__ __forceinline__ void odd_owner_piece(const schedule::Piece& piece) {
#pragma unroll 1
    for (int block = piece.first_block; block < piece.end_block; block += 2) {
      const bool has_odd = block + 1 < piece.end_block;
      const bool last_of_queries = block + 2 >= piece.end_block && frees_queries<P>(piece);
      float s[32];
      uint32_t p[4][4];
      float factor[2];
      if (has_odd) {
        issue_scores<1>(s);
        finish_scores<1>(s, last_of_queries);
        mask(piece, block + 1, s);
      } else if (last_of_queries) {
        release_queries();
      }
      ptx::mbarrier_wait(&smem_.p_full[0], parity_[0]);
      follow_max<0>(factor);
      rescale_output(factor);
      wait_values<0>();
      zero_values_past_end<0>(piece, block);
      values_from_shared<0>();
      if (has_odd) {
        move_max<1>(s, factor);
        exponentials(s, p);
        store_p<1>(p);
      }
      finish_values<0>();
      parity_[0] ^= 1;
      if (has_odd) {
        rescale_output(factor);
        zero_values_past_end<1>(piece, block + 1);
        values_from_registers<1>(p);
        finish_values<1>();
        parity_[1] ^= 1;
      }
    }
  }

  // --- scores ---------------------------------------------------------------------------------

  // Whether all copies of the block in kBuffer have landed, for all threads of a warp alike.
  template <int kBuffer>
  __device__ __forceinline__ bool keys_are_there() const {
    bool there = true;
#pragma unroll
    for (int copy = 0; copy < S::kCopies; ++copy) {
      there &= ptx::mbarrier_test(&smem_.kv_full[kBuffer][copy], parity_[kBuffer]);
    }
    return __all_sync(0xffffffff, there);
  }

  // S = Q K^T of the block in kBuffer, sub-tile by sub-tile as the copies land. The odd block's
  // begins when the even block's is half done: side by side both would end late, and the tensor
  // cores would have nothing to do during both softmaxes.
  template <int kBuffer>
  __device__ __forceinline__ void issue_scores(float (&s)[32]) {
    if constexpr (kBuffer == 1) ptx::mbarrier_wait(&smem_.scores_half_done, parity_[0]);
    const uint32_t q = ptx::smem_address(smem_.q);
    const uint32_t keys = ptx::smem_address(smem_.kv[kBuffer]);
    const int first = kBuffer == 0 ? 0 : first_half(kp_, kBuffer);
#pragma unroll
    for (int i = 0; i < S::kSubTiles; ++i) {
      const bool is_rope = i >= S::kValueTiles;
      const int half = (i / S::kHalfTiles) ^ first;  // of the values
      const int tile_in_half = i % S::kHalfTiles;
      const int tile = is_rope ? i : half * S::kHalfTiles + tile_in_half;
      if (tile_in_half == 0) {
        ptx::mbarrier_wait(&smem_.kv_full[kBuffer][is_rope ? S::kRopeCopy : half],
                           parity_[kBuffer]);
      }
      const uint64_t a = wgmma::k_major(q + tile * kSubTileBytes, kGroupBytes);
      const uint64_t b =
          is_rope ? wgmma::k_major(keys + S::kOffsetOfP, kGroupBytes)
                  : wgmma::k_major(keys + half * S::kHalfBytes + tile_in_half * kGroupBytes,
                                   S::kHalfTiles * kGroupBytes);
      wgmma::fence();
#pragma unroll
      for (int step = 0; step < kSubTileColumns / 16; ++step) {
        const uint64_t offset = wgmma::distance(step * 32);
        wgmma::m64n64k16_ss(T{}, s, a + offset, b + offset, i + step > 0);
      }
      if (kBuffer == 0 && i == S::kHalfTiles - 1) wgmma::commit();
    }
    wgmma::commit();
    // Read by the lane that later releases the buffer.
    marks_ = lane_ == 0 ? smem_.marks[kBuffer] : uint2{0, 0};
  }

  template <int kBuffer>
  __device__ __forceinline__ void finish_scores(float (&s)[32], bool last_of_queries) {
    marks_.x = __shfl_sync(0xffffffff, marks_.x, 0);
    if constexpr (P::kSparse) marks_.y = __shfl_sync(0xffffffff, marks_.y, 0);
    if constexpr (kBuffer == 0) {
      wgmma::wait<1>();
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(&smem_.scores_half_done);
    }
    wgmma::wait<0>();
    wgmma::hold(s);
    if (!P::kSparse && marks_.x != 0) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] = NAN;
      wgmma::hold(s);  // a branch: selecting each would delay all other blocks
    }
    // The scores of all four warps have read the RoPE sub-tile that P is about to replace.
    if constexpr (S::kHasRope) ptx::named_barrier_sync(kBarrierMathGroup + kGroup, 128);
    if (last_of_queries) release_queries();
  }

  __device__ __forceinline__ void release_queries() {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(&smem_.q_empty);
  }

  // --- softmax --------------------------------------------------------------------------------

  // Scores of tokens that a row does not attend to become -inf. `hold` keeps rare cases branches.
  __device__ __forceinline__ void mask(const schedule::Piece& piece, int block, float (&s)[32]) {
    if (!(scale_log2_ > 0.f)) [[unlikely]] {
      // The largest score must become the largest exponent.
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] *= scale_log2_;
      wgmma::hold(s);
    }
    if constexpr (P::kSparse) {
      if ((marks_.x & marks_.y) == 0xffffffff) [[likely]]
        return;
      const int first = lane_ % 4 * 2;
      const uint32_t exist[2] = {marks_.x >> first, marks_.y >> first};
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (!(exist[i / 16] >> (i / 4 % 4 * 8 + i % 2) & 1)) s[i] = -INFINITY;
      }
      wgmma::hold(s);
    } else if ((block + 1) * kTokens > unmasked_tokens_) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int token = block * kTokens + i / 4 * 8 + lane_ % 4 * 2 + i % 2;
        if (token >= visible_tokens_[i / 2 % 2]) s[i] = -INFINITY;
      }
      wgmma::hold(s);
    }
  }

  __device__ __forceinline__ float multiplier() const {
    return scale_log2_ > 0.f ? scale_log2_ : 1.f;
  }

  // Moves the running maximum on if need be and publishes it. `factor` is what the output must be
  // multiplied with.
  template <int kBuffer>
  __device__ __forceinline__ void move_max(const float (&s)[32], float (&factor)[2]) {
    // P may exceed 1 by so much, in float32 and after rounding alike, before the maximum is moved:
    // as exact, and the output need hardly ever be rescaled.
    constexpr float kSlack = 8.f;
    float block_max[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        m[k] = fmaxf(fmaxf(s[8 * k + 2 * h], s[8 * k + 2 * h + 1]),
                     fmaxf(s[8 * k + 2 * h + 4], s[8 * k + 2 * h + 5]));
      }
      block_max[h] = fmaxf(fmaxf(m[0], m[1]), fmaxf(m[2], m[3])) * multiplier();
      factor[h] = 1.f;
    }
    // Whole rows need be looked at only if one of a thread's columns moves the maximum.
    if (__any_sync(0xffffffff, block_max[0] > state_.max[0] + kSlack ||
                                   block_max[1] > state_.max[1] + kSlack)) [[unlikely]] {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int distance = 1; distance <= 2; distance *= 2) {
          block_max[h] = fmaxf(block_max[h], __shfl_xor_sync(0xffffffff, block_max[h], distance));
        }
        if (block_max[h] > state_.max[h] + kSlack) factor[h] = set_max(h, block_max[h]);
      }
    }
    if (lane_ % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) smem_.row_max[kBuffer][row_ + 8 * h] = state_.max[h];
    }
  }

  // Turns s into P, sums up, and rounds P.
  __device__ __forceinline__ void exponentials(float (&s)[32], uint32_t (&p)[4][4]) {
    const float scale = multiplier();
    const float offset[2] = {finite_max(state_.max[0]), finite_max(state_.max[1])};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int h = i / 2 % 2;
      s[i] = ptx::exp2_approx(fmaf(s[i], scale, -offset[h]));
      state_.sum[h] += s[i];
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        p[k][r] = ptx::pack<T>(s[8 * k + 2 * r], s[8 * k + 2 * r + 1]);
      }
    }
  }

  // Makes `new_max` the running maximum, rescales the sum, returns the factor for the output.
  __device__ __forceinline__ float set_max(int h, float new_max) {
    if (new_max == state_.max[h]) return 1.f;
    const float factor = ptx::exp2_approx(state_.max[h] - finite_max(new_max));
    state_.max[h] = new_max;
    state_.sum[h] *= factor;
    return factor;
  }

  // Takes over the maximum that the other warpgroup published.
  template <int kBuffer>
  __device__ __forceinline__ void follow_max(float (&factor)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) factor[h] = set_max(h, smem_.row_max[kBuffer][row_ + 8 * h]);
  }

  // Exact to skip when all factors of a warp are 1, which is the common case once a maximum is
  // established.
  __device__ __forceinline__ void rescale_output(const float (&factor)[2]) {
    if (!__any_sync(0xffffffff, factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
    for (int i = 0; i < S::kAccumulators; ++i) out_[i] *= factor[i / 2 % 2];
  }

  // --- P and values ---------------------------------------------------------------------------

  template <int kBuffer>
  __device__ __forceinline__ void store_p(const uint32_t (&p)[4][4]) {
    const uint32_t base = ptx::smem_address(smem_.kv[kBuffer]) + S::kOffsetOfP;
    const int row = thread_ / 32 * 16 + lane_ % 16;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int chunk = 2 * k + lane_ / 16;
      ptx::stmatrix_x4(base + row * 128 + ((chunk ^ (row & 7)) << 4), p[k][0], p[k][1], p[k][2],
                       p[k][3]);
    }
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&smem_.p_full[kBuffer]);
  }

  // P is 0 past the end, but 0 x NaN is NaN: what lies there must not reach the product.
  template <int kBuffer>
  __device__ __forceinline__ void zero_values_past_end(const schedule::Piece& piece, int block) {
    if constexpr (P::kLoading != Loading::kCopied) return;  // zeroed by those who gather
    const int valid = piece.length - block * kTokens;
    if (valid >= kTokens) return;
    const uint32_t base = ptx::smem_address(smem_.kv[kBuffer]) + kGroup * S::kHalfBytes;
    constexpr int kChunks = S::kHalfTiles * 8;  // of 16 bytes, of a token
#pragma unroll 1
    for (int i = thread_; i < (kTokens - valid) * kChunks; i += 128) {
      const int token = valid + i / kChunks;
      const int chunk = i % kChunks;
      ptx::st_shared_zero_16(base +
                             (token / kGroupTokens * S::kHalfTiles + chunk / 8) * kGroupBytes +
                             token % kGroupTokens * kRowBytes + chunk % 8 * 16);
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kBarrierMathGroup + kGroup, 128);
  }

  // The scores were computed by the other warpgroup, which waited for all copies. This one waits
  // for its half itself, to see what has been copied.
  template <int kBuffer>
  __device__ __forceinline__ void wait_values() {
    ptx::mbarrier_wait(&smem_.kv_full[kBuffer][kGroup], parity_[kBuffer]);
  }

  // 16 tokens of this warpgroup's half of the values.
  template <int kBuffer>
  __device__ __forceinline__ uint64_t values_descriptor() const {
    return wgmma::mn_major(ptx::smem_address(smem_.kv[kBuffer]) + kGroup * S::kHalfBytes,
                           kGroupBytes, S::kHalfTiles * kGroupBytes);
  }
  static constexpr uint64_t kValuesStep =
      wgmma::distance(16 / kGroupTokens * S::kHalfTiles * kGroupBytes);

  template <int kBuffer>
  __device__ __forceinline__ void values_from_registers(const uint32_t (&p)[4][4]) {
    const uint64_t v = values_descriptor<kBuffer>();
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma::values_rs(T{}, out_, p[k], v + k * kValuesStep);
    wgmma::commit();
  }

  template <int kBuffer>
  __device__ __forceinline__ void values_from_shared() {
    const uint64_t p =
        wgmma::k_major(ptx::smem_address(smem_.kv[kBuffer]) + S::kOffsetOfP, kGroupBytes);
    const uint64_t v = values_descriptor<kBuffer>();
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma::values_ss(T{}, out_, p + wgmma::distance(k * 32), v + k * kValuesStep);
    }
    wgmma::commit();
  }

  template <int kBuffer>
  __device__ __forceinline__ void finish_values() {
    wgmma::wait<0>();
    wgmma::hold(out_);
    release_values<kBuffer>();
  }

  template <int kBuffer>
  __device__ __forceinline__ void release_values() {
    __syncwarp();
    if (lane_ == 0) {
      ptx::mbarrier_arrive(&smem_.kv_empty[kBuffer][kGroup]);
      if constexpr (P::kPaired) {
        const uint32_t own = ptx::smem_address(&smem_.kv_empty[kBuffer][kGroup]);
        ptx::mbarrier_arrive_cluster(ptx::map_to_cta(own, ptx::cluster_cta_rank() ^ 1));
      }
    }
  }

  // --- piece ----------------------------------------------------------------------------------

  __device__ __forceinline__ void begin_piece(const schedule::Piece& piece) {
#pragma unroll
    for (int i = 0; i < S::kAccumulators; ++i) out_[i] = 0.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state_.max[h] = -INFINITY;
      state_.sum[h] = 0.f;
    }
    if constexpr (!P::kSparse) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        visible_tokens_[h] =
            visible_tokens(kp_, piece, smem_.place.row_tile * kRows + row_ + 8 * h);
      }
      unmasked_tokens_ = visible_tokens(kp_, piece, smem_.place.row_tile * kRows);
    }
    if (needs_queries<P>(piece)) {
      ptx::mbarrier_wait(&smem_.q_full, piece_parities_ >> 1);
      piece_parities_ ^= 2;
    }
  }

  __device__ __forceinline__ void finish_piece(const schedule::Piece& piece) {
    // The two warpgroups end with the same maximum; their sums are of different blocks.
    float (&sums)[kMathGroups][kRows] = smem_.row_sum[piece_parities_ & 1];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state_.sum[h] += __shfl_xor_sync(0xffffffff, state_.sum[h], 1);
      state_.sum[h] += __shfl_xor_sync(0xffffffff, state_.sum[h], 2);
      if (lane_ % 4 == 0) sums[kGroup][row_ + 8 * h] = state_.sum[h];
    }
    ptx::mbarrier_arrive(&smem_.sums_full);
    ptx::mbarrier_wait(&smem_.sums_full, piece_parities_ & 1);
    piece_parities_ ^= 1;
    // Warps without a row have nothing to store.
    if (smem_.place.row_tile * kRows + thread_ / 32 * 16 >= kp_.rows) return;
    // Both warpgroups add in the same order, so both get the same bits.
    const float row_sums[2] = {sums[0][row_] + sums[1][row_],
                               sums[0][row_ + 8] + sums[1][row_ + 8]};
    if (piece.slot >= 0) {
      store_partial(piece, row_sums);
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) store_final(piece, h, row_sums[h]);
    }
  }

  // A thread's accumulators are pairs of columns. Exchanged among the four lanes of a row they
  // become 16 bytes side by side, a quarter of the requests. All lanes take part, also those whose
  // row does not exist.
  __device__ __forceinline__ void store_final(const schedule::Piece& piece, int h, float sum) {
    const int row = smem_.place.row_tile * kRows + row_ + 8 * h;
    const bool valid = row < kp_.rows;
    const RowIndex index = row_index(kp_, smem_.place.slice, valid ? row : 0);
    const auto [lse, factor] = final_row(kp_.p, piece.request, index.head, state_.max[h], sum);
    const int q = lane_ % 4;
    T* out = static_cast<T*>(kp_.p.out) + out_row(kp_, piece.request, index) * S::kDimV +
             kGroup * S::kHalfColumns + q * 8;
#pragma unroll
    for (int g = 0; g < S::kHalfColumns / 32; ++g) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * (4 * g + j) + 2 * h;
        x[j] = ptx::pack<T>(out_[i] * factor, out_[i + 1] * factor);
      }
      transpose_quad(x);
      if (valid) *reinterpret_cast<uint4*>(out + g * 32) = uint4{x[0], x[1], x[2], x[3]};
    }
    if (kGroup == 0 && q == 0 && valid) kp_.p.lse[lse_index(kp_, piece.request, index)] = lse;
  }

  // As the registers hold it, which takes few instructions: this code runs once and comes from a
  // cold instruction cache. Rounded: see common/partial_results.h.
  __device__ __forceinline__ void store_partial(const schedule::Piece& piece,
                                                const float (&sums)[2]) {
    constexpr int kGroups = P::kScaleGroups / 2;  // of this half
    constexpr int kPairs = S::kHalfColumns / kGroups / partial::kTileColumns / 2;
    const int64_t first =
        (partial_slab(kp_, smem_.place, piece, thread_ / 32) * 2 + kGroup) * kGroups;
    float4* all_sums =
        reinterpret_cast<float4*>(kp_.p.partial_sums) + first * partial::kLanes + lane_;
    uint4* values =
        reinterpret_cast<uint4*>(kp_.p.partial_out) + first * (kPairs * partial::kLanes) + lane_;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const float* out = &out_[group * kPairs * 8];
      float factor[2];
      float4 scaled;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float magnitude = 0.f;
#pragma unroll
        for (int i = 0; i < kPairs * 8; i += 4) {
          magnitude += fabsf(out[i + 2 * h]) + fabsf(out[i + 2 * h + 1]);
        }
        const partial::Scale scale = partial::scale_of(magnitude, sums[h]);
        factor[h] = scale.factor;
        (h == 0 ? scaled.x : scaled.z) = state_.max[h] + scale.exponent;
        (h == 0 ? scaled.y : scaled.w) = sums[h] * scale.factor;
      }
      all_sums[group * partial::kLanes] = scaled;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* columns = &out[8 * pair + 2 * i];
          x[i] = ptx::pack<__half>(columns[0] * factor[i % 2], columns[1] * factor[i % 2]);
        }
        values[(group * kPairs + pair) * partial::kLanes] = {x[0], x[1], x[2], x[3]};
      }
    }
  }

  const KernelParams<P>& kp_;
  SharedStorage<P>& smem_;
  int thread_;  // in the warpgroup
  int lane_;
  int row_;  // of the tile: this thread's first row

  uint2 marks_;
  float out_[S::kAccumulators];
  RowState state_;
  float scale_log2_;
  int visible_tokens_[2];
  int unmasked_tokens_;  // no row of the tile is masked before this token
  uint32_t parity_[kBuffers] = {0, 0};
  uint32_t piece_parities_ = 0;  // bit 0 of the sums, bit 1 of the queries: registers are scarce
};

}  // namespace flashmla::sm90::decode
