// The warpgroups of decode over V3.2 caches for more than 32 rows that have the values, and load.
#pragma once

#include "sm90/fp8_many_rows_decode/warpgroup.cuh"
#include "sm90/gathered_decode/fp8_loader.cuh"

namespace flashmla::sm90::fp8_many_rows_decode {

template <typename P>
class ValueGroup : Warpgroup<P> {
  using Base = Warpgroup<P>;
  using T = typename P::T;
  using Base::first_row;
  using Base::group;
  using Base::kp_;
  using Base::lane_;
  using Base::max_index_;
  using Base::maximum;
  using Base::number_;
  using Base::p_address;
  using Base::row;
  using Base::smem_;
  using Base::thread;
  using Base::warp_;
  using typename Base::Rows;
  static constexpr int kTiles = P::S::kHalfTiles;  // of 64 columns, of a warpgroup

 public:
  __device__ __forceinline__ ValueGroup(const KernelParams<P>& kp, SharedStorage<P>& smem,
                                        int warpgroup)
      : Base(kp, smem), loader_(kp, smem, warpgroup * 128, warpgroup % 2) {}

  __device__ __forceinline__ void run() {
    loader_.load_until(P::kStages);
    Base::for_each_piece([&](auto& piece) {
      if (piece.first_block >= piece.end_block) {
        store_empty(kp_, smem_.place, piece, group(), thread());
        return;
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) out_[tile][i] = 0.f;
      }
      ++max_index_;
#pragma unroll 1
      while (number_ < static_cast<int>(ptx::uniform(smem_.pieces[Base::warpgroup_].end_number))) {
        add_block();
        ++number_;
        loader_.load_if_next(number_ + P::kStages - 1);
      }
      finish_piece(piece);
    });
  }

 private:
  // --- blocks -----------------------------------------------------------------------------------

  __device__ __forceinline__ void add_block() {
    Base::forget_addresses();
    const int stage = number_ % P::kStages;
    // To see what has been copied.
    ptx::mbarrier_wait(&smem_.full[stage], number_ / P::kStages & 1);
    ptx::mbarrier_wait(&smem_.p_full[Base::owner(number_)], number_ / P::kScoreGroups & 1);
    if (smem_.max_moved_of_p[Base::owner(number_)]) [[unlikely]] {
      ++max_index_;
      rescale_output();
    }
    if constexpr (P::kFp8) {
      values_of_codes();
    } else {
      values();
    }
    ptx::mbarrier_arrive(&smem_.p_empty[Base::owner(number_)]);
    ptx::mbarrier_arrive(&smem_.empty[stage]);
  }

  // From the maximum before the present one.
  __device__ __forceinline__ void rescale_output() {
    const Rows max = load_rows(maximum(max_index_), lane_);
    const Rows old = load_rows(maximum(max_index_ - 1), lane_);
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const float factor = Base::ratio(old.of_row[i], max.of_row[i]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int h = 0; h < 2; ++h) out_[tile][i / 2 * 4 + 2 * h + i % 2] *= factor;
      }
    }
  }

  // O^T += V^T P^T of this warpgroup's half, by tiles of 64 columns, of which each warp has 16 side
  // by side: the even ones are its first 8 rows of an accumulator, the odd ones the others. A tile
  // is taken in two halves of 32 tokens.
  __device__ __forceinline__ void values() {
    const uint32_t columns = own_columns();
    const uint64_t p = wgmma::k_major(ptx::opaque(p_address(number_)), kGroupBytes);
    const uint32_t scales = ptx::smem_address(smem_.scales[0]) +
                            number_ % P::kStages * static_cast<int>(sizeof(smem_.scales[0])) +
                            (group() * (kTiles / P::kTilesOfGroup) * 32 + lane_ % 4 * 8) *
                                static_cast<int>(sizeof(__half2));
    Operand a[kOperands];
#pragma unroll
    for (int part = 0; part < 2 * kTiles; ++part) {
      const int tile = part / 2, half = part % 2;
      uint32_t raw[4];
      ptx::ldmatrix_x4_trans(columns + tile * 64 + half * 32 * P::kStride, raw);
      __half2 scale[4];
      load_value_scales(
          scales + (tile / P::kTilesOfGroup * 32 + 4 * half) * static_cast<int>(sizeof(__half2)),
          scale);
      Operand& operand = a[part % kOperands];
      if (part >= kOperands) wait_for(operand);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        convert_columns(raw[m], scale[m], operand[m / 2][m % 2 * 2], operand[m / 2][m % 2 * 2 + 1]);
      }
      wgmma::fence();
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        wgmma::narrow_rs(__half{}, out_[tile], operand[step],
                         p + wgmma::distance(64 * half + 32 * step), true);
      }
      wgmma::commit();
    }
    wait_for_all(a);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) wgmma::hold(out_[tile]);
  }

  // What this lane loads of the first tile and tokens, for an `ldmatrix`.
  __device__ __forceinline__ uint32_t own_columns() const {
    return Base::tokens_of(number_) + (lane_ / 8 * 8 + Base::token_of(lane_ % 8)) * P::kStride +
           (group() * kTiles * 4 + warp_) * 16;
  }

  // The same of codes as they are. The sum of a block is added to that of the others here, since
  // the tensor cores keep few bits of it; for half of the rows at a time.
  __device__ __forceinline__ void values_of_codes() {
    const uint32_t columns = own_columns();
    // Of this half's groups of columns.
    const int first_group = group() * (kTiles / P::kTilesOfGroup);
    const uint32_t p = ptx::uniform(p_address(number_)) + first_group * P::kWeightTileBytes;
    const float* references = &smem_.reference[Base::owner(number_)][first_group];
    uint32_t raw[2][4];
    const auto load = [&](int tile) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        ptx::ldmatrix_x4_trans(columns + tile * 64 + step * 32 * P::kStride, raw[step]);
      }
    };
    load(0);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      Operand a;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        // Of two columns and four tokens, by columns; tokens as in P.
        const uint32_t (&x)[4] = raw[step];
        set(a[step], __byte_perm(x[0], x[1], 0x6240), __byte_perm(x[0], x[1], 0x7351),
            __byte_perm(x[2], x[3], 0x6240), __byte_perm(x[2], x[3], 0x7351));
      }
      const int group_of_half = tile / P::kTilesOfGroup;
      const float reference = references[group_of_half];
#pragma unroll
      for (int rows = 0; rows < 2; ++rows) {
        const uint64_t b = wgmma::k_major_64b(p + group_of_half * P::kWeightTileBytes +
                                              rows * P::kWeightTileBytes / 2);
        float t[kAccumulators / 2];
        wgmma::fence();
        wgmma::narrow_rs(wgmma::E4m3{}, t, a[0], b, false);
        wgmma::narrow_rs(wgmma::E4m3{}, t, a[1], b + wgmma::distance(32), true);
        wgmma::commit();
        if (rows == 0 && tile + 1 < kTiles) load(tile + 1);
        wgmma::wait<0>();
        wgmma::hold(t);
        hold(a);
#pragma unroll
        for (int i = 0; i < kAccumulators / 2; ++i) {
          float& sum = out_[tile][rows * kAccumulators / 2 + i];
          sum = fmaf(t[i], reference, sum);
        }
      }
    }
  }

  // --- piece ------------------------------------------------------------------------------------

  __device__ __forceinline__ void finish_piece(const schedule::Piece& piece) {
    ptx::mbarrier_wait(&smem_.sums_full, Base::piece_parity());
    if (piece.slot >= 0) {
      store_partial(piece);
    } else {
      store_final(piece);
    }
    ptx::mbarrier_arrive(&smem_.sums_empty);
  }

  // The same bits whichever of two warpgroups had the first block.
  __device__ __forceinline__ float row_sum(int row) const {
    const auto sum = [&](int group) {
      return smem_.sums[group][0][row] + smem_.sums[group][1][row];
    };
    return sum(0) + sum(1);
  }

  __device__ __forceinline__ void store_final(const schedule::Piece& piece) const {
    // Opaque: what follows from it would be worked out in advance, and there is no register for it.
    int columns = warp_ * 8 + lane_ / 4;
    asm volatile("" : "+r"(columns));
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      if (first_row() + row(r) >= kp_.rows) continue;
      const RowIndex index = row_index(kp_, smem_.place.slice, first_row() + row(r));
      const auto [lse, factor] =
          final_row(kp_.p, piece.request, index.head, maximum(max_index_)[row(r)], row_sum(row(r)));
      uint32_t* out = static_cast<uint32_t*>(kp_.p.out) + out_row(kp_, piece.request, index) * 256 +
                      group() * 128 + columns;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float* x = &out_[tile][r / 2 * 4 + r % 2];
        out[32 * tile] = ptx::pack<T>(x[0] * factor, x[2] * factor);
      }
      if (group() == 0 && thread() < 4) kp_.p.lse[lse_index(kp_, piece.request, index)] = lse;
    }
  }

  // A thread's two columns of two rows, 8 apart, are what a lane has in the order of the workspace.
  __device__ __forceinline__ void store_partial(const schedule::Piece& piece) const {
#pragma unroll
    for (int slab_of_tile = 0; slab_of_tile < kSlabsPerTile; ++slab_of_tile) {
      if (first_row() + slab_of_tile * partial::kSlabRows >= kp_.rows) break;
      const int64_t slab = partial_slab(kp_, smem_.place, piece, slab_of_tile);
      // Of its 16 columns in a tile of 64 a warp has two tiles of the workspace.
      float4* values =
          reinterpret_cast<float4*>(kp_.p.partial_out) + slab * (partial::values(512) / 4) +
          (group() * kTiles * 8 + warp_ * 2 + lane_ / 16) * partial::kLanes + lane_ / 4 % 4;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int line = lane_ % 4 * 2 + e;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const float* x = &out_[tile][8 * slab_of_tile + e];
          values[8 * tile * partial::kLanes + 4 * line] = {x[0], x[2], x[4], x[6]};
        }
        if (group() == 0 && thread() < 4) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = slab_of_tile * partial::kSlabRows + 8 * h + line;
            const float sum = row_sum(row);
            const float max = sum == 0.f ? -INFINITY : maximum(max_index_)[row];
            store_partial_sums(kp_, slab, line, h, {max, sum});
          }
        }
      }
    }
  }

  gathered_decode::Fp8Loader<P, 2> loader_;
  float out_[kTiles][kAccumulators];
};

}  // namespace flashmla::sm90::fp8_many_rows_decode
