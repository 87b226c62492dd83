// The warpgroups of decode over V3.2 caches for more than 32 rows that have queries, scores and
// weights.
#pragma once

#include "sm90/fp8_many_rows_decode/warpgroup.cuh"

namespace flashmla::sm90::fp8_many_rows_decode {

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
  using typename Base::Rows;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    Base::for_each_piece([&](auto& piece) {
      if (piece.first_block >= piece.end_block) return;
      begin_piece(piece);
      // Each takes the blocks of its parity, and follows the other one's.
#pragma unroll 1
      for (number_ += (number_ + group()) % 2; number_ < end_number(); number_ += 2) attend();
      if (number_ == end_number()) follow_max(number_ - 1);
      number_ = end_number();
      finish_piece();
    });
  }

 private:
  __device__ __forceinline__ bool any_of_group(bool x) const {
    return ptx::named_barrier_or(kBarrierMathGroup + Base::warpgroup_, 128, x);
  }
  __device__ __forceinline__ void barrier_of_groups() const {
    ptx::named_barrier_sync(kBarrierMathGroup + P::kThreads / 128, P::kScoreGroups * 128);
  }

  // The token of a block whose scores are this thread's, h = 0 or 1.
  __device__ __forceinline__ int token(int h) const {
    return warp_ * 16 + h * 8 + Base::token_of(lane_ / 4);
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

  __device__ __forceinline__ const SharedWalk<P>& walk() const {
    return smem_.pieces[Base::warpgroup_];
  }

  __device__ __forceinline__ int end_number() const { return ptx::uniform(walk().end_number); }

  // Block `number_` of the part.
  __device__ __forceinline__ void attend() {
    Base::forget_addresses();
    wait_for_block(smem_, number_);
    float s[kAccumulators];
    uint4 most{};  // in FP8: the largest scales
    if constexpr (P::kFp8) {
      most = scores_of_codes(s);
    } else {
      leave_scales();
      scores(s);
      check_promise(s);
    }
    const int block = walk().piece.end_block - (walk().end_number - number_);
    mask(block, s);
    // In FP8 the scales are still to be read.
    if constexpr (!P::kFp8) release();
    if (block > walk().piece.first_block) follow_max(number_ - 1);
    softmax(s, most);
  }

  __device__ __forceinline__ void release() {
    ptx::mbarrier_arrive(&smem_.empty[number_ % P::kStages]);
  }

  // --- scores -----------------------------------------------------------------------------------

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
  __device__ __forceinline__ void leave_scales() const {
    TokenScales<P> scales[2];
    load_scales(scales);
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
    rope_scores<P>(chunks, q + P::kQueryTiles * kSubTileBytes, lane_, a, s);
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

  // The same of codes as they are. The sum is in units of the scale of the group that is added: it
  // is converted from one to the next, as there are no registers for a sum of each. Returns the
  // largest scales, found while products run.
  __device__ __forceinline__ uint4 scores_of_codes(float (&s)[kAccumulators]) {
    uint4 most;
    const uint32_t q = ptx::uniform(ptx::smem_address(smem_.q[0]));
    const float least[2] = {least_unit(0), least_unit(1)};
    Operand a[2];
    load_keys(0, a[0]);
    load_keys(kRowBytes / 2, a[1]);
#pragma unroll
    for (int tile = 0; tile <= P::kGroups; ++tile) {
      // RoPE columns, which have no scale, come last.
      const bool is_rope = tile == P::kGroups;
      const uint64_t b = wgmma::k_major(q + tile * kSubTileBytes, kGroupBytes);
      wgmma::fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint64_t b_of_step = b + wgmma::distance(32 * step);
        if (is_rope) {
          wgmma::narrow_rs(T{}, s, a[step / 2][step % 2], b_of_step, true);
        } else {
          wgmma::narrow_rs(wgmma::E4m3{}, s, a[step / 2][step % 2], b_of_step, tile + step > 0);
        }
        if (step % 2 == 1) wgmma::commit();
      }
      if (tile == 0) most = largest_scales();
      if (is_rope) break;
      const int next = tile + 1 < P::kGroups ? (tile + 1) * kRowBytes : K::kRopeOffset;
      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        factor[h] = unit(h, tile, least[h]);
        // In quarters, whose reciprocals are normal numbers.
        if (tile + 1 < P::kGroups) {
          factor[h] = factor[h] / 4 * ptx::reciprocal_approx(unit(h, tile + 1, least[h]) / 4);
        }
      }
      wgmma::wait<1>();
      hold(a[0]);
      load_keys(next, a[0]);
      wgmma::wait<0>();
      wgmma::hold(s);
      hold(a[1]);
      load_keys(next + kRowBytes / 2, a[1]);
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) s[i] *= factor[i / 2 % 2];
    }
    wait_for_all(a);
    wgmma::hold(s);
    return most;
  }

  // 64 bytes of this warp's tokens, as two steps of a product take them.
  __device__ __forceinline__ void load_keys(int offset, Operand& a) const {
    const uint32_t words = own_token() + lane_ % 4 * 4 + offset;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[step][i] = ptx::ld_shared_4(words + i % 2 * 8 * P::kStride + step * 32 + i / 2 * 16);
      }
    }
  }

  // The scale of a group of this thread's token h, but for one so small beside the token's largest
  // that nothing can be said in units of it.
  __device__ __forceinline__ float unit(int h, int group, float least) const {
    const float scale = finite_scale(h, group);
    return fabsf(scale) < least ? least : scale;
  }
  __device__ __forceinline__ float least_unit(int h) const {
    const uint4 scales = ptx::ld_shared_16(own_token() + h * 8 * P::kStride + K::kScalesOffset);
    float most = 0x1p-84f;
#pragma unroll
    for (int group = 0; group < P::kGroups; ++group) {
      most = fmaxf(most, fabsf(scale_of(scales, group)));
    }
    return most * 0x1p-40f;
  }

  // Of this thread's token h; an infinite one is as good as NaN.
  __device__ __forceinline__ float finite_scale(int h, int group) const {
    const float scale = __uint_as_float(
        ptx::ld_shared_4(own_token() + h * 8 * P::kStride + K::kScalesOffset + 4 * group));
    return fmaf(scale, 0.f, scale);
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

  // Turns s into P, stores it, rounded, and sums up. `most`: in FP8, the largest scales.
  __device__ __forceinline__ void softmax(float (&s)[kAccumulators], const uint4& most) {
    bool exceeds = false;
    {
      const Rows limit = load_rows(limits(max_index_), lane_);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const int first = i / 2 * 4 + i % 2;
        exceeds |= fmaxf(s[first], s[first + 2]) > limit.of_row[i];
      }
    }
    const bool moves = any_of_group(exceeds);
    if (moves) [[unlikely]]
      move_max(s);
    // The other warpgroup need not wait for P.
    if (thread() == 0) smem_.max_moved[group()] = moves;
    ptx::mbarrier_arrive(&smem_.max_known[group()]);
    {
      const Rows max = load_rows(maximum(max_index_), lane_);
      const Rows multiplier = load_rows(smem_.q_factor, lane_);
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) {
        const int r = row_of(i);
        s[i] = ptx::exp2_approx(fmaf(s[i], multiplier.of_row[r], -max.of_row[r]));
      }
    }
    wait_for_place_of_p();
    if (thread() == 0) smem_.max_moved_of_p[group()] = moves;
    if constexpr (P::kFp8) {
      store_scaled_p(s, most);
      release();
    } else {
      store_p<__half>(p_address(number_), warp_, lane_, s);
    }
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&smem_.p_full[group()]);
    add_sums(s);
  }

  // Until P of this warpgroup's last block was used. A fresh barrier lets the first wait pass.
  __device__ __forceinline__ void wait_for_place_of_p() const {
    ptx::mbarrier_wait(&smem_.p_empty[group()], number_ / P::kScoreGroups & 1 ^ 1);
  }

  // Stores P times the scales of the tokens, for each group of columns, as e4m3. `most`: the
  // largest scales.
  __device__ __forceinline__ void store_scaled_p(const float (&s)[kAccumulators],
                                                 const uint4& most) const {
    // Matrix m of a store: rows 8 * m and up of a half. In a row of P the tokens of a warp that are
    // a thread's, h = 0 and 1, lie side by side.
    const uint32_t place = p_address(number_) + lane_ * kTokens + ((warp_ ^ (lane_ / 2 % 4)) << 4);
#pragma unroll
    for (int group = 0; group < P::kGroups; ++group) {
      const uint32_t exponent = exponent_above(word(most, group));
      const float inverse = __uint_as_float(max((254 - exponent) << 23, 0x00400000u));
      float scale[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) scale[h] = finite_scale(h, group) * inverse;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t x[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const float* w = &s[16 * half + 4 * m];
          x[m] = ptx::pack_e4m3(w[0] * scale[0], w[2] * scale[1], w[1] * scale[0], w[3] * scale[1]);
        }
        ptx::stmatrix_x4_trans(place + group * P::kWeightTileBytes + half * P::kWeightTileBytes / 2,
                               x[0], x[1], x[2], x[3]);
      }
    }
    if (thread() < P::kGroups) {
      const uint32_t x = word(most, lane_);
      smem_.reference[group()][lane_] =
          x >= 0x7f800000 ? NAN : __uint_as_float(exponent_above(x) << 23);
    }
  }
  // Of a power of two above a number, as for float32.
  __device__ __forceinline__ static uint32_t exponent_above(uint32_t bits) {
    return min((bits >> 23) + 1, 254u);
  }

  // The largest scales of the block, as magnitudes, of which NaN is the largest.
  __device__ __forceinline__ uint4 largest_scales() const {
    const uint32_t scales = Base::tokens_of(number_) + lane_ * P::kStride + K::kScalesOffset;
    const uint4 x = ptx::ld_shared_16(scales);
    const uint4 y = ptx::ld_shared_16(scales + 32 * P::kStride);
    const auto most = [](uint32_t x, uint32_t y) {
      return __reduce_max_sync(0xffffffff, max(x & 0x7fffffff, y & 0x7fffffff));
    };
    return {most(x.x, y.x), most(x.y, y.y), most(x.z, y.z), most(x.w, y.w)};
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
      set_max(max_index_ + 1, thread(), x > old + P::kSlack ? x - P::kHeadroom : old);
    }
    barrier_of_group();
    ++max_index_;
    rescale_sums();
  }

  __device__ __forceinline__ float (&limits(int index) const)[kRows] {
    return smem_.limits[index % P::kLimits];
  }
  __device__ __forceinline__ void set_max(int index, int row, float max) const {
    maximum(index)[row] = max;
    limits(index)[row] = (max + P::kSlack) / smem_.q_factor[row];
  }

  // Takes over the maximum of a block of the other warpgroup.
  __device__ __forceinline__ void follow_max(int number) {
    ptx::mbarrier_wait(&smem_.max_known[Base::owner(number)], number / P::kScoreGroups & 1);
    if (smem_.max_moved[Base::owner(number)]) [[unlikely]] {
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
    if (group() == number_ % 2 && thread() < kRows) {
      maximum(max_index_)[thread()] = kNoMaximum;
      limits(max_index_)[thread()] = kNoMaximum;
    }
    if constexpr (!P::kSparse) {
      if (group() == 0 && thread() < kRows) {
        smem_.visible[thread()] = visible_tokens(kp_, piece, first_row() + thread());
      }
    }
    prepare_queries(piece);
  }

  __device__ __forceinline__ void prepare_queries(const schedule::Piece& piece) {
    constexpr int kRowsAtOnce = 2;
    using Row = std::conditional_t<P::kFp8, ScaledRow<P, 7, 126, 64>, ScaledRow<P>>;
    constexpr int kChunks = Row::kChunks;
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
        const Row scaled(x[i], lane_);
        if (lane_ == 0) smem_.q_factor[row] = multiplier(scaled.undo);
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          const int chunk = 32 * k + lane_;
          if (chunk >= kChunks) break;
          if constexpr (P::kFp8) {
            store_query(scaled, x[i][k], chunk, row);
          } else {
            store_chunk(scaled.chunk(x[i][k], chunk), tile_row + chunk / 8 * kSubTileBytes, row,
                        chunk % 8);
          }
        }
      }
    }
    ptx::fence_proxy_async();
    barrier_of_groups();
  }

  // Stores 8 columns of a row: codes, or RoPE columns.
  template <typename Row>
  __device__ __forceinline__ void store_query(const Row& scaled, const uint4& x, int chunk,
                                              int row) const {
    const auto place = [&](int tile, int chunk_of_row) {
      return ptx::smem_address(smem_.q[tile]) + row * kRowBytes + ((chunk_of_row ^ (row & 7)) << 4);
    };
    if (chunk < Row::kCodeChunks) {
      const uint2 codes = scaled.codes(x);
      ptx::st_shared_8(place(chunk / 16, chunk / 2 % 8) + chunk % 2 * 8, codes.x, codes.y);
    } else {
      const uint4 y = scaled.chunk(x, chunk);
      ptx::st_shared_16(place(P::kQueryTiles, chunk % 8), y.x, y.y, y.z, y.w);
    }
  }

  // From scores times the factor of a row to base-2 exponents. Not 0, as -inf times 0 were NaN.
  __device__ __forceinline__ float multiplier(float undo) const {
    const float x = scale_log2() > 0.f ? undo * scale_log2() : undo;
    return x == 0.f ? 0x1p-126f : x;
  }

  __device__ __forceinline__ void finish_piece() {
    ptx::mbarrier_wait(&smem_.sums_empty, Base::piece_parity() ^ 1);
    float* sums = &smem_.sums[group()][warp_ % 2][2 * lane_];
    if (warp_ >= 2) {
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[e] = sum_[e];
    }
    barrier_of_group();
    if (warp_ < 2) {
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[e] += sum_[e];
    }
    ptx::mbarrier_arrive(&smem_.sums_full);
  }

  float sum_[2];  // of the weights of this warp's tokens, of rows 2 * lane and 2 * lane + 1
};

}  // namespace flashmla::sm90::fp8_many_rows_decode
