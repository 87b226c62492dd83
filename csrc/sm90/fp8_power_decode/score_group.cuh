// The warpgroups of decode over V3.2 caches with simple scales that have queries, scores and
// weights.
#pragma once

#include "sm90/fp8_power_decode/warpgroup.cuh"

namespace flashmla::sm90::fp8_power_decode {

template <typename P>
class ScoreGroup : Warpgroup<P> {
  using Base = Warpgroup<P>;
  using T = typename P::T;
  using K = typename P::K;
  using Base::barrier_of_group;
  using Base::first_row;
  using Base::group;
  using Base::kp_;
  using Base::lane_;
  using Base::max_index_;
  using Base::maximum;
  using Base::number_;
  using Base::p_address;
  using Base::ratio;
  using Base::row;
  using Base::smem_;
  using Base::thread;
  using Base::warp_;
  using Base::warpgroup_;
  using typename Base::Rows;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    Base::for_each_piece([&](auto& piece) {
      if (piece.first_block >= piece.end_block) return;
      begin_piece(piece);
      const int first = number_;
      const int end = first + piece.end_block - piece.first_block;
      const int to_block = piece.first_block - first;
      // Each takes the blocks of its parity, and follows the other one's.
#pragma unroll 1
      for (number_ += (number_ + group()) % 2; number_ < end; number_ += 2) {
        attend(number_ + to_block, /*follows=*/number_ > first);
      }
      if (number_ == end) follow_max(end - 1);
      number_ = end;
      finish_piece();
    });
  }

 private:
  __device__ __forceinline__ bool any_of_group(bool x) const {
    return ptx::named_barrier_or(kBarrierMathGroup + warpgroup_, 128, x);
  }
  __device__ __forceinline__ void barrier_of_groups() const {
    ptx::named_barrier_sync(kBarrierMathGroup + P::kThreads / 128, P::kScoreGroups * 128);
  }

  // The token of a block whose scores are this thread's, h = 0 or 1.
  __device__ __forceinline__ int token(int h) const {
    return warp_ * 16 + h * 8 + token_of_row(lane_ / 4);
  }
  __device__ __forceinline__ uint32_t own_token() const {
    return Base::tokens_of(number_) + token(0) * P::kStride;
  }

  // Not kept: registers are scarce.
  __device__ __forceinline__ float scale_log2() const {
    constexpr float kLog2e = 1.4426950408889634f;
    return kp_.p.softmax_scale * kLog2e;
  }

  // --- blocks -----------------------------------------------------------------------------------

  // Of this thread's two tokens.
  __device__ __forceinline__ void load_scales(TokenScales<P> (&scales)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scales[h] = ptx::ld_shared_16(own_token() + h * 8 * P::kStride + K::kScalesOffset);
    }
  }

  // Block `number_` of the part, block `block` of the request.
  __device__ __forceinline__ void attend(int block, bool follows) {
    Base::forget_addresses();
    wait_for_block(smem_, number_);
    {
      TokenScales<P> scales[2];
      load_scales(scales);
      leave_scales(scales);
    }
    float s[kAccumulators];
    scores(s);
    check_promise(s);
    mask(block, s);
    ptx::mbarrier_arrive(&smem_.empty[number_ % P::kStages]);
    if (follows) follow_max(number_ - 1);
    softmax(s);
  }

  // NaN for scales that are not simple. They are loaded again, since registers are scarce.
  __device__ __forceinline__ void check_promise(float (&s)[kAccumulators]) const {
    TokenScales<P> scales[2];
    load_scales(scales);
    if (are_not_simple<P>(scales)) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) s[i] = NAN;
      wgmma::hold(s);
    }
  }

  // Writes the scales as the values need them.
  __device__ __forceinline__ void leave_scales(const TokenScales<P> (&scales)[2]) const {
    // By the four lanes that have the same tokens.
    static_assert(P::kGroups == 4);
    const int group = lane_ % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      smem_.scales[number_ % P::kStages][place_of_scale(group, lane_ / 4, 2 * warp_ + h)] =
          __float2half_rn(scale_of(scales[h], group));
    }
  }

  // S = K Q^T.
  __device__ __forceinline__ void scores(float (&s)[kAccumulators]) {
    const uint32_t chunks = own_token() + lane_ % 4 * 8;
    const uint32_t q = ptx::opaque(ptx::smem_address(smem_.q[0]));
    Operand a[kOperands];
    rope_scores<P>(chunks, q + P::kCodeTiles * kSubTileBytes, lane_, a, s);
    constexpr int kHalvesOfGroup = 2 * P::kTilesOfGroup;
    RawKeys raw = load_raw_keys<P>(chunks);
    Factor<true> factor[2];
#pragma unroll
    for (int half = 0; half < 2 * P::kCodeTiles; ++half) {
      const RawKeys now = raw;
      if (half + 1 < 2 * P::kCodeTiles) raw = load_raw_keys<P>(chunks + (half + 1) * 32);
      // The first two are of the RoPE columns.
      Operand& operand = a[half % kOperands];
      wait_for(operand);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Not kept: registers are scarce.
        if (half % kHalvesOfGroup == 0) {
          const uint32_t scales = own_token() + h * 8 * P::kStride + K::kScalesOffset;
          factor[h].set(__uint_as_float(ptx::ld_shared_4(scales + 4 * (half / kHalvesOfGroup))));
        }
        factor[h].convert(now.token[h].x, operand[0][h], operand[0][h + 2]);
        factor[h].convert(now.token[h].y, operand[1][h], operand[1][h + 2]);
      }
      issue_scores<__half>(operand, q + half / 2 * kSubTileBytes + half % 2 * 64, s, true);
    }
    wait_for_all(a);
    wgmma::hold(s);
  }

  // --- softmax ----------------------------------------------------------------------------------

  // Scores are still times the factors of the queries.
  __device__ __forceinline__ void mask(int block, float (&s)[kAccumulators]) const {
    const uint2 marks = smem_.marks[number_ % P::kStages];
    if (!(scale_log2() > 0.f)) [[unlikely]] {
      // The largest score must become the largest exponent.
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) s[i] *= scale_log2();
      wgmma::hold(s);
    }
    mask_scores<P>(
        block, marks, smem_.visible, warp_, [&](int h) { return token(h); },
        [&](int i) { return row(i); }, s);
  }

  // Weights are at most 2^kSlack before the maximum is moved: as exact as up to 1, and the output
  // need hardly ever be rescaled.
  static constexpr float kSlack = 8.f;

  // Turns s into P, stores it, rounded, and sums up.
  __device__ __forceinline__ void softmax(float (&s)[kAccumulators]) {
    bool exceeds = false;
    {
      const Rows max = load_rows(maximum(max_index_), lane_);
      const Rows multiplier = load_rows(smem_.q_factor, lane_);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const int first = i / 2 * 4 + i % 2;
        const float most = fmaxf(s[first], s[first + 2]) * multiplier.of_row[i];
        exceeds |= most > max.of_row[i] + kSlack;
      }
    }
    const bool moves = any_of_group(exceeds);
    if (moves) [[unlikely]]
      move_max(s);
    {
      const Rows max = load_rows(maximum(max_index_), lane_);
      const Rows multiplier = load_rows(smem_.q_factor, lane_);
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) {
        const int r = row_of(i);
        s[i] = ptx::exp2_approx(fmaf(s[i], multiplier.of_row[r], -finite_max(max.of_row[r])));
      }
    }
    const int buffer = number_ % P::kWeightBuffers;
    ptx::mbarrier_wait(&smem_.p_empty[buffer], number_ / P::kWeightBuffers & 1 ^ 1);
    if (thread() == 0) smem_.max_moved[buffer] = moves;
    store_p<__half>(p_address(number_), warp_, lane_, s);
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&smem_.p_full[buffer]);
    add_sums(s);
  }

  // Moves the maximum of the rows that exceed it by too much.
  __device__ __forceinline__ void move_max(const float (&s)[kAccumulators]) {
    const Rows multiplier = load_rows(smem_.q_factor, lane_);
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int first = i / 2 * 4 + i % 2;
      float x = fmaxf(s[first], s[first + 2]) * multiplier.of_row[i];
#pragma unroll
      for (int distance = 4; distance <= 16; distance *= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, distance));
      }
      if (lane_ < 4) smem_.warp_max[warp_][row(i)] = x;
    }
    barrier_of_group();
    if (thread() < kRows) {
      float x = smem_.warp_max[0][thread()];
#pragma unroll
      for (int warp = 1; warp < 4; ++warp) x = fmaxf(x, smem_.warp_max[warp][thread()]);
      const float old = maximum(max_index_)[thread()];
      maximum(max_index_ + 1)[thread()] = x > old + kSlack ? x : old;
    }
    barrier_of_group();
    ++max_index_;
    rescale_sums();
  }

  // Waits for P of a block of the other warpgroup, and takes over its maximum.
  __device__ __forceinline__ void follow_max(int number) {
    const int buffer = number % P::kWeightBuffers;
    ptx::mbarrier_wait(&smem_.p_full[buffer], number / P::kWeightBuffers & 1);
    if (smem_.max_moved[buffer]) [[unlikely]] {
      ++max_index_;
      rescale_sums();
    }
  }

  // As the maximum moves to the present one.
  __device__ __forceinline__ void rescale_sums() {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 2 * lane_ + e;
      sum_[e] *= ratio(maximum(max_index_ - 1)[row], maximum(max_index_)[row]);
    }
  }

  // Adds up the weights of the warp's tokens: lane l gets those of rows 2 * l and 2 * l + 1, in 14
  // shuffles instead of 16 registers.
  __device__ __forceinline__ void add_sums(const float (&s)[kAccumulators]) {
    float sums[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int first = i / 2 * 4 + i % 2;
      sums[i] = s[first] + s[first + 2];
    }
#pragma unroll
    for (int step = 0; step < 3; ++step) {
      const int rows = kThreadRows >> (step + 1), distance = 16 >> step;
      const bool upper = lane_ & distance;
#pragma unroll
      for (int i = 0; i < kThreadRows / 2; ++i) {
        if (i >= rows) break;
        const float give = upper ? sums[i] : sums[i + rows];
        const float keep = upper ? sums[i + rows] : sums[i];
        sums[i] = keep + __shfl_xor_sync(0xffffffff, give, distance);
      }
    }
    sum_[0] += sums[0];
    sum_[1] += sums[1];
  }

  // --- piece ------------------------------------------------------------------------------------

  __device__ __forceinline__ void begin_piece(const schedule::Piece& piece) {
    sum_[0] = sum_[1] = 0.f;
    ++max_index_;
    barrier_of_groups();  // The queries of the last piece have been read.
    // By whose P the value warpgroups first hear of the piece.
    if (group() == number_ % 2 && thread() < kRows) maximum(max_index_)[thread()] = -INFINITY;
    if constexpr (!P::kSparse) {
      if (group() == 0 && thread() < kRows) {
        smem_.visible[thread()] = visible_tokens(kp_, piece, first_row() + thread());
      }
    }
    prepare_queries(piece);
  }

  __device__ __forceinline__ void prepare_queries(const schedule::Piece& piece) {
    constexpr int kRowsAtOnce = 2;
    constexpr int kChunks = SimpleRow<P>::kChunks;
    const int64_t first_of_tile =
        (static_cast<int64_t>(piece.request) * kp_.p.slices + smem_.place.slice) * kp_.rows +
        first_row();
#pragma unroll 1
    for (int first = (group() * 4 + warp_) * kRowsAtOnce; first < kRows;
         first += P::kScoreGroups * 4 * kRowsAtOnce) {
      uint4 x[kRowsAtOnce][3];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const auto* source = reinterpret_cast<const uint4*>(static_cast<const T*>(kp_.p.q)) +
                             (first_of_tile + first + i) * kChunks;
        const bool exists = first_row() + first + i < kp_.rows;
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          const int chunk = 32 * k + lane_;
          x[i][k] = exists && chunk < kChunks ? source[chunk] : uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int row = first + i;
        const uint32_t tile_row = ptx::smem_address(smem_.q[0]) + row * kRowBytes;
        const SimpleRow<P> simple(x[i], lane_);
        if (lane_ == 0) smem_.q_factor[row] = multiplier(simple.undo);
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          const int chunk = 32 * k + lane_;
          if (chunk >= kChunks) break;
          store_chunk(simple.chunk(x[i][k], chunk), tile_row + chunk / 8 * kSubTileBytes, row,
                      chunk % 8);
        }
      }
    }
    ptx::fence_proxy_async();
    barrier_of_groups();
  }

  // From scores times the factor of a row to base-2 exponents. Not 0, as -inf times 0 were NaN.
  __device__ __forceinline__ float multiplier(float undo) const {
    const float x = scale_log2() > 0.f ? undo * scale_log2() : undo;
    return x == 0.f ? 0x1p-126f : x;
  }

  __device__ __forceinline__ void finish_piece() {
    ptx::mbarrier_wait(&smem_.sums_empty, Base::piece_parity() ^ 1);
#pragma unroll
    for (int e = 0; e < 2; ++e) smem_.sums[group()][warp_][2 * lane_ + e] = sum_[e];
    ptx::mbarrier_arrive(&smem_.sums_full);
  }

  float sum_[2];  // of the weights of this warp's tokens, of rows 2 * lane and 2 * lane + 1
};

}  // namespace flashmla::sm90::fp8_power_decode
