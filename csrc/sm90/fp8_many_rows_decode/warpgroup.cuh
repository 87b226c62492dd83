// What the warpgroups of decode over V3.2 caches for more than 32 rows have in common.
#pragma once

#include <cfloat>

#include "sm90/decode/fp8_operands.cuh"
#include "sm90/fp8_many_rows_decode/storage.cuh"

namespace flashmla::sm90::fp8_many_rows_decode {

// Of the 64 rows of a tile a thread has to do with two of every eight, 8 * j + 2 * (lane % 4) + e
// at 2 * j + e.
constexpr int kThreadRows = kRows / 4;
constexpr int kAccumulators = kRows / 2;

// A maximum that is finite, so that differences are numbers, and below all scores.
constexpr float kNoMaximum = -FLT_MAX;

template <typename P>
class Warpgroup {
 public:
  __device__ __forceinline__ Warpgroup(const KernelParams<P>& kp, SharedStorage<P>& smem)
      : kp_(kp), smem_(smem) {
    lane_ = ptx::lane_id();
    warp_ = ptx::uniform(threadIdx.x % 128 / 32);
    warpgroup_ = ptx::uniform(threadIdx.x / 128);
  }

 protected:
  // Of its kind: 0 or 1.
  __device__ __forceinline__ int group() const { return warpgroup_ % 2; }
  // In the warpgroup.
  __device__ __forceinline__ int thread() const { return warp_ * 32 + lane_; }
  __device__ __forceinline__ void barrier_of_group() const {
    ptx::named_barrier_sync(kBarrierMathGroup + warpgroup_, 128);
  }

  // Calls body(piece) for each piece of the part.
  template <typename Body>
  __device__ __forceinline__ void for_each_piece(const Body& body) const {
    smem_.pieces[warpgroup_].for_each(
        kp_, smem_.place.part, thread(), [&] { barrier_of_group(); }, body);
  }

  // Of the barriers that are used once in each piece with blocks.
  __device__ __forceinline__ uint32_t piece_parity() const {
    return smem_.pieces[warpgroup_].pieces & 1 ^ 1;
  }

  // What is worked out from the lane would be kept, and registers are scarce.
  __device__ __forceinline__ void forget_addresses() { lane_ = ptx::lane_id(); }

  __device__ __forceinline__ int first_row() const { return smem_.place.row_tile * kRows; }
  // This thread's row i of the tile.
  __device__ __forceinline__ int row(int i) const { return i / 2 * 8 + lane_ % 4 * 2 + i % 2; }
  __device__ __forceinline__ uint32_t tokens_of(int number) const {
    return ptx::smem_address(smem_.tokens[0]) + number % P::kStages * P::kBlockBytes;
  }
  // Whose scores are a block's.
  __device__ __forceinline__ static int owner(int number) { return number % P::kScoreGroups; }
  // P of a block.
  __device__ __forceinline__ uint32_t p_address(int number) const {
    return ptx::smem_address(smem_.p[0]) + owner(number) * P::kWeightBytes;
  }
  // Of the rows that stand for eight tokens in an accumulator, which token `row` is: so that lanes
  // that load side by side find theirs in different banks.
  __device__ __forceinline__ static int token_of(int row) {
    return P::kFp8 ? row : token_of_row(row);
  }

  using Rows = RowsOfThread<kRows>;

  // Maxima are numbered, over all pieces of the part.
  __device__ __forceinline__ float (&maximum(int index) const)[kRows] {
    return smem_.maxima[index % P::kMaxima];
  }
  // What turns weights below one maximum into weights below a later one.
  __device__ __forceinline__ static float ratio(float old_max, float new_max) {
    return old_max == new_max ? 1.f : ptx::exp2_approx(old_max - new_max);
  }

  const KernelParams<P>& kp_;
  SharedStorage<P>& smem_;
  int lane_;
  int warp_;
  int warpgroup_;
  int max_index_ = 0;
  int number_ = 0;  // of the next block, in the part
};

}  // namespace flashmla::sm90::fp8_many_rows_decode
