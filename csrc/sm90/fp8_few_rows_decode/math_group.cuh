// The math warpgroups of decode over FP8 caches.
//
// Scores and values are computed transposed: tokens, or columns of the values, are the 64 rows of a
// product, and the rows of the problem its 16 or 32 columns. So the keys are the operand that comes
// from registers, and FP8 codes need not be written anywhere once they are converted.
//
// The warpgroups share nothing but the queries while a piece lasts: they take blocks in turn, and
// each has a maximum, sums and results of its own, which are added up at its end.
#pragma once

#include "sm90/decode/fp8_operands.cuh"
#include "sm90/fp8_few_rows_decode/storage.cuh"

namespace flashmla::sm90::fp8_few_rows_decode {

template <typename P>
class MathGroup {
  using T = typename P::T;
  using K = typename P::K;
  static constexpr int kCodeTiles = P::kCodeTiles;
  static constexpr int kValueTiles = P::S::kValueTiles;
  static constexpr int kHalfTiles = P::S::kHalfTiles;
  static constexpr int kGroups = P::kGroups;
  static constexpr int kTileRows = P::kTileRows;
  // Of the rows of a tile, those that a thread has to do with: two of every eight, 8 * j + 2 *
  // (lane % 4) + e at 2 * j + e.
  static constexpr int kThreadRows = kTileRows / 4;
  static constexpr int kAccumulators = kTileRows / 2;

 public:
  // All run the same code, or it would not fit into the instruction cache.
  __device__ MathGroup(const KernelParams<P>& kp, SharedStorage<P>& smem, int group)
      : kp_(kp), smem_(smem), group_(group) {
    thread_ = threadIdx.x % 128;
    lane_ = thread_ % 32;
    warp_ = __shfl_sync(0xffffffff, thread_ / 32, 0);
  }

  __device__ __forceinline__ void run() {
    const auto barrier = [&] { barrier_of_group(); };
    smem_.pieces[group_].for_each(kp_, smem_.place.part, thread_, barrier, [&](auto& piece) {
      if (piece.first_block >= piece.end_block) {
        if (group_ < 2) store_empty(kp_, smem_.place, piece, group_, thread_);
        return;
      }
      begin_piece(piece);
      to_number_ -= piece.first_block;
#pragma unroll 1
      for (int block = piece.first_block + group_; block < piece.end_block;
           block += P::kMathGroups) {
        attend(block);
      }
      to_number_ += piece.end_block;
      finish_piece(piece);
    });
  }

 private:
  __device__ __forceinline__ void barrier_of_group() const {
    ptx::named_barrier_sync(kBarrierMathGroup + group_, 128);
  }
  __device__ __forceinline__ void barrier_of_groups() const {
    ptx::named_barrier_sync(kBarrierMathGroups, P::kMathThreads);
  }

  // Not kept: registers are scarce.
  __device__ __forceinline__ float scale_log2() const {
    constexpr float kLog2e = 1.4426950408889634f;
    return kp_.p.softmax_scale * kLog2e;
  }

  // This thread's row i of the tile.
  __device__ __forceinline__ int row(int i) const { return i / 2 * 8 + lane_ % 4 * 2 + i % 2; }
  // The token of a block whose scores are this thread's, h = 0 or 1.
  __device__ __forceinline__ int token(int h) const {
    return warp_ * 16 + h * 8 + token_of_row(lane_ / 4);
  }

  // --- blocks -----------------------------------------------------------------------------------

  __device__ __forceinline__ void attend(int block) {
    const int number = to_number_ + block;
    const int stage = number % P::kStages;
    const uint32_t tokens = ptx::smem_address(smem_.tokens[0]) + stage * P::kBlockBytes;
    wait_for_block(smem_, number);
    TokenScales<P> scales[2];
    load_scales(tokens, stage, scales);
    float s[kAccumulators];
    // Here all warps are done with the last P, too.
    const bool simple = are_simple(scales);
    if (simple) {
      scores<true>(tokens, scales, s);
    } else {
      scores<false>(tokens, scales, s);
    }
    mask(block, smem_.marks[stage], s);
    softmax(s, simple);
    if (simple) {
      values<true>(tokens, stage);
    } else {
      values<false>(tokens, stage);
    }
  }

  // --- scores -----------------------------------------------------------------------------------

  __device__ __forceinline__ uint32_t own_token(uint32_t tokens) const {
    return tokens + token(0) * P::kStride;
  }

  // Of this thread's two tokens.
  __device__ __forceinline__ void load_scales(uint32_t tokens, int stage,
                                              TokenScales<P> (&scales)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (P::kHasScalesApart) {
        scales[h] = load_scales_apart(smem_, stage, warp_, token(h));
      } else {
        scales[h] = ptx::ld_shared_16(own_token(tokens) + h * 8 * P::kStride + K::kScalesOffset);
      }
    }
  }

  // Whether all scales of a block are powers of two, or 0, and such that fp16 has all values.
  __device__ __forceinline__ bool are_simple(const TokenScales<P> (&scales)[2]) const {
    return !ptx::named_barrier_or(kBarrierMathGroup + group_, 128, are_not_simple<P>(scales));
  }

  // S = K Q^T. Leaves the scales for the values.
  template <bool kSimple>
  __device__ __forceinline__ void scores(uint32_t tokens, const TokenScales<P> (&scales)[2],
                                         float (&s)[kAccumulators]) {
    const uint32_t chunks = own_token(tokens) + lane_ % 4 * 8;
    const uint32_t q = ptx::smem_address(kSimple ? smem_.simple_q[0] : smem_.q[0]);
    Operand a[kOperands];
    rope_scores<P>(chunks, q + kCodeTiles * SharedStorage<P>::kTileBytes, lane_, a, s);
    Factor<kSimple> factors[2][kGroups];
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
      factors[i / kGroups][i % kGroups].set(scale_of(scales[i / kGroups], i % kGroups));
    }
    leave_scales<kSimple>(scales);
    RawKeys raw = load_raw_keys<P>(chunks);
#pragma unroll
    for (int half = 0; half < 2 * kCodeTiles; ++half) {
      const RawKeys now = raw;
      if (half + 1 < 2 * kCodeTiles) raw = load_raw_keys<P>(chunks + (half + 1) * 32);
      // The first two are of the RoPE columns.
      Operand& operand = a[(half + 2) % kOperands];
      if (half + 2 >= kOperands) wait_for(operand);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto& factor = factors[h][half / 2 / P::kTilesOfGroup];
        factor.convert(now.token[h].x, operand[0][h], operand[0][h + 2]);
        factor.convert(now.token[h].y, operand[1][h], operand[1][h + 2]);
      }
      issue_scores<Element<kSimple>>(
          operand, q + half / 2 * SharedStorage<P>::kTileBytes + half % 2 * 64, s, true);
    }
    wait_for_all(a);
    wgmma::hold(s);
    if constexpr (kSimple) {
      const Rows factors = load_rows(smem_.q_factor, lane_);
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) s[i] *= factors.of_row[row_of(i)];
    }
  }

  // Writes the scales as the values need them.
  template <bool kSimple>
  __device__ __forceinline__ void leave_scales(const TokenScales<P> (&scales)[2]) const {
    const int row = lane_ / 4;
    // The four lanes that have the same tokens take turns.
#pragma unroll
    for (int turn = 0; turn < kGroups; turn += 4) {
      const int group = turn + lane_ % 4;
      if (kGroups % 4 != 0 && group >= kGroups) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float scale = scale_of(scales[h], group);
        const int place = place_of_scale(group, row, 2 * warp_ + h);
        if constexpr (kSimple) {
          reinterpret_cast<__half*>(smem_.scales[group_])[place] = __float2half_rn(scale);
        } else {
          smem_.scales[group_][place] = scale;
        }
      }
    }
  }

  // --- softmax ----------------------------------------------------------------------------------

  __device__ __forceinline__ void mask(int block, uint2 marks, float (&s)[kAccumulators]) const {
    if (!(scale_log2() > 0.f)) [[unlikely]] {
      // The largest score must become the largest exponent.
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) s[i] *= scale_log2();
      wgmma::hold(s);
    }
    mask_scores<P>(
        block, marks, smem_.visible[group_], warp_, [&](int h) { return token(h); },
        [&](int i) { return row(i); }, s);
  }

  using Rows = RowsOfThread<kTileRows>;

  // Weights are at most 2^kSlack before the maximum is moved: as exact as up to 1, and the output
  // need hardly ever be rescaled.
  static constexpr float kSlack = 8.f;

  // Turns s into P, sums up, and stores P, rounded.
  __device__ __forceinline__ void softmax(float (&s)[kAccumulators], bool simple) {
    const float multiplier = scale_log2() > 0.f ? scale_log2() : 1.f;
    Rows max = load_rows(smem_.maxima[group_], lane_);
    bool exceeds = false;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int first = i / 2 * 4 + i % 2;
      exceeds |= fmaxf(s[first], s[first + 2]) * multiplier > max.of_row[i] + kSlack;
    }
    if (ptx::named_barrier_or(kBarrierMathGroup + group_, 128, exceeds)) [[unlikely]] {
      move_max(s, multiplier, max);
    }
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) {
      const int r = row_of(i);
      s[i] = ptx::exp2_approx(fmaf(s[i], multiplier, -finite_max(max.of_row[r])));
      sum_[r] += s[i];
    }
    if (simple) {
      store_p<__half>(p_address(0), warp_, lane_, s);
      if constexpr (P::kRopeIsValue) store_p<T>(p_address(1), warp_, lane_, s);
    } else {
      store_p<T>(p_address(0), warp_, lane_, s);
    }
    ptx::fence_proxy_async();
    barrier_of_group();
  }

  __device__ __forceinline__ uint32_t p_address(int i) const {
    return ptx::smem_address(smem_.p[0][i]) + group_ * static_cast<int>(sizeof(smem_.p[0]));
  }

  // Moves the maximum of the rows that exceed it by too much.
  __device__ __forceinline__ void move_max(const float (&s)[kAccumulators], float multiplier,
                                           Rows& max) {
    float (&warp_max)[4][kTileRows] = smem_.warp_max[group_];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int first = i / 2 * 4 + i % 2;
      float x = fmaxf(s[first], s[first + 2]) * multiplier;
#pragma unroll
      for (int distance = 4; distance <= 16; distance *= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, distance));
      }
      if (lane_ < 4) warp_max[warp_][row(i)] = x;
    }
    barrier_of_group();
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      float x = warp_max[0][row(i)];
#pragma unroll
      for (int warp = 1; warp < 4; ++warp) x = fmaxf(x, warp_max[warp][row(i)]);
      if (!(x > max.of_row[i] + kSlack)) continue;
      const float factor = ptx::exp2_approx(max.of_row[i] - x);
      max.of_row[i] = x;
      // The others have read the old one before the barrier, and read this one after the next.
      if (warp_ == 0 && lane_ < 4) smem_.maxima[group_][row(i)] = x;
      sum_[i] *= factor;
#pragma unroll
      for (int tile = 0; tile < kValueTiles; ++tile) {
#pragma unroll
        for (int h = 0; h < 2; ++h) out_[tile][i / 2 * 4 + 2 * h + i % 2] *= factor;
      }
    }
  }

  // --- values -----------------------------------------------------------------------------------

  // O^T += V^T P^T, by tiles of 64 columns, of which each warp has 16 side by side: the even ones
  // are its first 8 rows of an accumulator, the odd ones the others. A tile is taken in two halves
  // of 32 tokens.
  template <bool kSimple>
  __device__ __forceinline__ void values(uint32_t tokens, int stage) {
    const uint32_t columns =
        tokens + (lane_ / 8 * 8 + token_of_row(lane_ % 8)) * P::kStride + warp_ * 16;
    const uint64_t p = wgmma::k_major(p_address(0), kGroupBytes);
    using Scales = std::conditional_t<kSimple, __half2, float2>;  // of two tokens
    const uint32_t scales = ptx::smem_address(smem_.scales[0]) +
                            group_ * static_cast<int>(sizeof(smem_.scales[0])) +
                            lane_ % 4 * 8 * static_cast<int>(sizeof(Scales));
    uint32_t raw[4];
    Operand a[kOperands];
    ptx::ldmatrix_x4_trans(columns, raw);
#pragma unroll
    for (int part = 0; part < 2 * kCodeTiles; ++part) {
      const int tile = part / 2, half = part % 2;
      const uint32_t now[4] = {raw[0], raw[1], raw[2], raw[3]};
      Scales scale[4];
      load_value_scales(scales + (tile / P::kTilesOfGroup * 32 + 4 * half) * sizeof(Scales), scale);
      Operand& operand = a[part % kOperands];
      if (part >= kOperands) wait_for(operand);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        convert_columns(now[m], scale[m], operand[m / 2][m % 2 * 2], operand[m / 2][m % 2 * 2 + 1]);
      }
      if (const int next = part + 1; next < 2 * kCodeTiles) {
        ptx::ldmatrix_x4_trans(columns + next / 2 * 64 + next % 2 * 32 * P::kStride, raw);
      } else if (!P::kRopeIsValue) {
        release(stage);
      }
      wgmma::fence();
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        wgmma::narrow_rs(Element<kSimple>{}, out_[tile], operand[step],
                         p + wgmma::distance(64 * half + 32 * step), true);
      }
      wgmma::commit();
    }
    if constexpr (P::kRopeIsValue) rope_values(tokens, stage, p_address(kSimple ? 1 : 0), a);
    wait_for_all(a);
#pragma unroll
    for (int tile = 0; tile < kValueTiles; ++tile) wgmma::hold(out_[tile]);
  }

  // The RoPE columns, as they are: unlike above the first 8 rows of an accumulator are a warp's
  // first 8 columns. `p_address`: P of their type.
  __device__ __forceinline__ void rope_values(uint32_t tokens, int stage, uint32_t p_address,
                                              Operand (&a)[kOperands]) {
    const uint32_t columns = tokens + (lane_ / 16 * 8 + token_of_row(lane_ % 8)) * P::kStride +
                             K::kRopeOffset + warp_ * 32 + lane_ / 8 % 2 * 16;
    const uint64_t p = wgmma::k_major(p_address, kGroupBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Operand& operand = a[(2 * kCodeTiles + half) % kOperands];
      wait_for(operand);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        ptx::ldmatrix_x4_trans(columns + (32 * half + 16 * step) * P::kStride, operand[step]);
      }
      if (half == 1) release(stage);
      wgmma::fence();
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        wgmma::narrow_rs(T{}, out_[kCodeTiles], operand[step],
                         p + wgmma::distance(64 * half + 32 * step), true);
      }
      wgmma::commit();
    }
  }

  // All threads arrive: a lane for its warp would do, but racecheck sees only that the one who
  // arrives has read what it has.
  __device__ __forceinline__ void release(int stage) { ptx::mbarrier_arrive(&smem_.empty[stage]); }

  // --- piece ------------------------------------------------------------------------------------

  __device__ __forceinline__ void begin_piece(const schedule::Piece& piece) {
    prepare_queries(piece);
#pragma unroll
    for (int tile = 0; tile < kValueTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) out_[tile][i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) sum_[i] = 0.f;
    // Not before: others may have looked at what the last piece has had. The group meets before
    // this is read.
    if (thread_ < kTileRows) {
      smem_.maxima[group_][thread_] = -INFINITY;
      if constexpr (!P::kSparse) {
        smem_.visible[group_][thread_] = visible_tokens(kp_, piece, thread_);
      }
    }
  }

  // Writes the queries. Nobody reads those of the last piece any more: the warpgroups have met at
  // its end.
  __device__ __forceinline__ void prepare_queries(const schedule::Piece& piece) {
    constexpr int kRowsAtOnce = 2;
    constexpr int kChunks = ScaledRow<P>::kChunks;
    const int64_t first_row =
        (static_cast<int64_t>(piece.request) * kp_.p.slices + smem_.place.slice) * kp_.rows;
#pragma unroll 1
    for (int first = (group_ * 4 + warp_) * kRowsAtOnce; first < kTileRows;
         first += P::kMathGroups * 4 * kRowsAtOnce) {
      uint4 x[kRowsAtOnce][3];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const auto* source = reinterpret_cast<const uint4*>(static_cast<const T*>(kp_.p.q)) +
                             (first_row + first + i) * kChunks;
        const bool exists = first + i < kp_.rows;
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
        const uint32_t simple_row = ptx::smem_address(smem_.simple_q[0]) + row * kRowBytes;
        const ScaledRow<P> simple(x[i], lane_);
        if (lane_ == 0) smem_.q_factor[row] = simple.undo;
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          const int chunk = 32 * k + lane_;
          if (chunk >= kChunks) break;
          const uint32_t tile = chunk / 8 * SharedStorage<P>::kTileBytes;
          store_chunk(x[i][k], tile_row + tile, row, chunk % 8);
          store_chunk(simple.chunk(x[i][k], chunk), simple_row + tile, row, chunk % 8);
        }
      }
    }
    ptx::fence_proxy_async();
    barrier_of_groups();
  }

  // The first two warpgroups add up what all have, each half of the columns, and store it.
  __device__ __forceinline__ void finish_piece(const schedule::Piece& piece) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int distance = 4; distance <= 16; distance *= 2) {
        sum_[i] += __shfl_xor_sync(0xffffffff, sum_[i], distance);
      }
      if (lane_ < 4) smem_.sums[group_][warp_][row(i)] = sum_[i];
    }
    if constexpr (P::kRopeIsValue) interleave(out_[kCodeTiles], lane_);
    barrier_of_groups();  // The queries, whose place is taken now, have been read.
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      // What a warpgroup stores is to lie in the first half of the registers, what it leaves for
      // another one in the second: one code for both halves.
      if (half == 0 ? group_ > 0 : group_ > 1) swap_halves();
      if (group_ != half) leave_half(group_ < half ? group_ : group_ - 1);
      ptx::mbarrier_arrive(&smem_.left);
      if (group_ == half) {
        ptx::mbarrier_wait(&smem_.left, half);
        add_halves();
        ptx::mbarrier_arrive(&smem_.taken);
      }
      // The other half, or other queries, come to the same place.
      ptx::mbarrier_wait(&smem_.taken, half);
    }
    if (group_ >= 2) return;
    if (piece.slot >= 0) {
      store_partial(piece);
    } else {
      store_final(piece);
    }
  }

  // Maximum and sum of weights of a row, over all warpgroups. Not kept: registers are scarce.
  __device__ __forceinline__ float row_max(int row) const {
    float max = smem_.maxima[0][row];
#pragma unroll
    for (int g = 1; g < P::kMathGroups; ++g) max = fmaxf(max, smem_.maxima[g][row]);
    return max;
  }
  __device__ __forceinline__ float row_sum(int row, float max) const {
    float total = 0.f;
#pragma unroll
    for (int g = 0; g < P::kMathGroups; ++g) {
      float sum = smem_.sums[g][0][row];
#pragma unroll
      for (int warp = 1; warp < 4; ++warp) sum += smem_.sums[g][warp][row];
      total += sum * weight(g, row, max);
    }
    return total;
  }
  // What the results of warpgroup g count.
  __device__ __forceinline__ float weight(int g, int row, float max) const {
    return ptx::exp2_approx(smem_.maxima[g][row] - finite_max(max));
  }

  __device__ __forceinline__ void swap_halves() {
#pragma unroll
    for (int tile = 0; tile < kHalfTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) {
        const float x = out_[tile][i];
        out_[tile][i] = out_[kHalfTiles + tile][i];
        out_[kHalfTiles + tile][i] = x;
      }
    }
  }

  // Where the results of the other warpgroups are left: in place of the queries.
  using Exchange = float4[P::kMathGroups - 1][kHalfTiles][kTileRows / 8][128];
  static_assert(sizeof(Exchange) <=
                sizeof(SharedStorage<P>::q) + sizeof(SharedStorage<P>::simple_q));
  __device__ __forceinline__ Exchange& exchange() const {
    return reinterpret_cast<Exchange&>(smem_.q);
  }

  __device__ __forceinline__ void leave_half(int place) const {
#pragma unroll
    for (int tile = 0; tile < kHalfTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < kTileRows / 8; ++j) {
        const float* x = &out_[kHalfTiles + tile][4 * j];
        exchange()[place][tile][j][thread_] = {x[0], x[1], x[2], x[3]};
      }
    }
  }

  // Adds what the others have left, in a fixed order.
  __device__ __forceinline__ void add_halves() {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const float max = row_max(row(r));
      const float factor = weight(group_, row(r), max);
#pragma unroll
      for (int tile = 0; tile < kHalfTiles; ++tile) {
#pragma unroll
        for (int h = 0; h < 2; ++h) out_[tile][r / 2 * 4 + 2 * h + r % 2] *= factor;
      }
    }
#pragma unroll
    for (int place = 0; place < P::kMathGroups - 1; ++place) {
      const int group = place < group_ ? place : place + 1;
#pragma unroll
      for (int j = 0; j < kTileRows / 8; ++j) {
        float factors[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          factors[e] = weight(group, row(2 * j + e), row_max(row(2 * j + e)));
        }
#pragma unroll
        for (int tile = 0; tile < kHalfTiles; ++tile) {
          const float4 x = exchange()[place][tile][j][thread_];
          float* out = &out_[tile][4 * j];
          out[0] = fmaf(x.x, factors[0], out[0]);
          out[1] = fmaf(x.y, factors[1], out[1]);
          out[2] = fmaf(x.z, factors[0], out[2]);
          out[3] = fmaf(x.w, factors[1], out[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void store_final(const schedule::Piece& piece) const {
    // Opaque: what follows from it would be worked out in advance, and there is no register for it.
    int columns = warp_ * 8 + lane_ / 4;
    asm volatile("" : "+r"(columns));
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      if (row(r) >= kp_.rows) continue;
      const RowIndex index = row_index(kp_, smem_.place.slice, row(r));
      const float max = row_max(row(r));
      const auto [lse, factor] =
          final_row(kp_.p, piece.request, index.head, max, row_sum(row(r), max));
      uint32_t* out = static_cast<uint32_t*>(kp_.p.out) + out_row(kp_, piece.request, index) * 256 +
                      group_ * 128 + columns;
#pragma unroll
      for (int tile = 0; tile < kHalfTiles; ++tile) {
        const float* x = &out_[tile][r / 2 * 4 + r % 2];
        out[32 * tile] = ptx::pack<T>(x[0] * factor, x[2] * factor);
      }
      if (group_ == 0 && thread_ < 4) kp_.p.lse[lse_index(kp_, piece.request, index)] = lse;
    }
  }

  // A thread's two columns of two rows, 8 apart, are what a lane has in the order of the workspace.
  __device__ __forceinline__ void store_partial(const schedule::Piece& piece) const {
#pragma unroll
    for (int slab_of_tile = 0; slab_of_tile < kTileRows / partial::kSlabRows; ++slab_of_tile) {
      if (slab_of_tile * partial::kSlabRows >= kp_.rows) break;
      const int64_t slab = partial_slab(kp_, smem_.place, piece, slab_of_tile);
      // Of its 16 columns in a tile of 64 a warp has two tiles of the workspace.
      float4* values =
          reinterpret_cast<float4*>(kp_.p.partial_out) + slab * (partial::values(512) / 4) +
          (group_ * kHalfTiles * 8 + warp_ * 2 + lane_ / 16) * partial::kLanes + lane_ / 4 % 4;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int line = lane_ % 4 * 2 + e;
#pragma unroll
        for (int tile = 0; tile < kHalfTiles; ++tile) {
          const float* x = &out_[tile][8 * slab_of_tile + e];
          values[8 * tile * partial::kLanes + 4 * line] = {x[0], x[2], x[4], x[6]};
        }
        if (group_ == 0 && thread_ < 4) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = slab_of_tile * partial::kSlabRows + 8 * h + line;
            const float max = row_max(row);
            store_partial_sums(kp_, slab, line, h, {max, row_sum(row, max)});
          }
        }
      }
    }
  }

  static constexpr int kBarrierMathGroups = kBarrierMathGroup + P::kMathGroups;

  const KernelParams<P>& kp_;
  SharedStorage<P>& smem_;
  int group_;
  int thread_;  // in the warpgroup
  int lane_;
  int warp_;

  float out_[kValueTiles][kAccumulators];
  float sum_[kThreadRows];  // of this thread's tokens of this warpgroup's blocks
  int to_number_ = 0;       // from a block of the piece to its number in the part
};

}  // namespace flashmla::sm90::fp8_few_rows_decode
