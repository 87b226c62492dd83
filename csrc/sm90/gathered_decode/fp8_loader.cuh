// Loading of the kernels that convert FP8 codes in registers: copies tokens as they are.
#pragma once

#include <climits>

#include "sm90/decode/fp8_tokens.h"
#include "sm90/gathered_decode/token_finder.cuh"

namespace flashmla::sm90::gathered_decode {

// Finds and copies the blocks of a part, one of kStep: so many warpgroups load. A lane for each
// token.
template <typename P, int kStep = 1>
class Fp8Loader : TokenFinder<P, P::kFormat, true> {
  using Base = TokenFinder<P, P::kFormat, true>;
  using K = typename P::K;
  using Base::first_token_;
  using Base::kWarpTokens;
  using Base::lane_;
  using Base::smem_;
  using Base::warp_;

 public:
  // The warpgroup that begins with thread `first_thread`; it takes block `first` and on.
  __device__ __forceinline__ Fp8Loader(const KernelParams<P>& kp, SharedStorage<P>& smem,
                                       int first_thread = P::kThreads - P::kLoadThreads,
                                       int first = 0)
      : Base(kp, smem, first_thread), number_(first) {
    if (first == 0) Base::begin_announcing(kStep + 1);
    const GatheredBlock block = Base::wait_block(first);
    Base::load_entries(block, entries_);
    if (!(block.flags & kBlockExists)) number_ = kNone;
  }

  // Loads all.
  __device__ __forceinline__ void run() {
    while (number_ != kNone) load();
  }

  // Loads blocks up to number `end` - 1, of those that there are.
  __device__ __forceinline__ void load_until(int end) {
    while (number_ < end) load();
  }

  // Loads block `number`, if there is one and it is the next.
  __device__ __forceinline__ void load_if_next(int number) {
    if (number_ == number) load();
  }

 private:
  __device__ __forceinline__ void load() {
    const GatheredBlock block = Base::block(number_);
    typename Base::Tokens tokens;
    uint32_t mark = Base::find(block, entries_, tokens);
    if (!P::kSparse && block.flags & kBlockIsBad) mark |= 1;
    Base::announce(number_ + kStep + 1);
    const GatheredBlock next = Base::wait_block(number_ + kStep);
    Base::load_entries(next, entries_);

    const int stage = number_ % P::kStages;
    // A fresh barrier lets the first wait pass.
    ptx::mbarrier_wait(&smem_.empty[stage], number_ / P::kStages & 1 ^ 1);
    Base::set_mark(stage, mark);
    if constexpr (P::kHasScalesApart) {
      const uint32_t odd = Base::bits_of_tokens(tokens.to_scales[0] & 8, 0);
      if (lane_ == 0) reinterpret_cast<uint16_t*>(&smem_.odd_scales[stage])[warp_] = odd;
    }
    if (lane_ == 0) {
      ptx::mbarrier_arrive_expect_tx(&smem_.full[stage],
                                     kWarpTokens * (K::kTokenBytes + P::kScaleBytes));
    }
    __syncwarp();
    copy(stage, tokens);
    number_ = next.flags & kBlockExists ? number_ + kStep : kNone;
  }

  // A copy for each token, or if dense, for all that lie side by side.
  __device__ __forceinline__ void copy(int stage, const typename Base::Tokens& tokens) {
    if (lane_ >= kWarpTokens || tokens.count[0] == 0) return;
    // Made anew: registers are scarce.
    const uint64_t policy = ptx::evict_first_policy();
    uint64_t* full = &smem_.full[stage];
    const int token = first_token_ + lane_;
    static_assert(P::kSparse || P::kStride == K::kTokenBytes);
    ptx::bulk_load(ptx::smem_address(smem_.tokens[stage]) + token * P::kStride, tokens.token[0],
                   tokens.count[0] * K::kTokenBytes, full, policy);
    // The copy engine wants multiples of 16, as tokens are, and scales begin at multiples of 8.
    // What it takes too much is in the page: an odd page has at least 8 bytes of padding.
    if constexpr (P::kHasScalesApart) {
      ptx::bulk_load(ptx::smem_address(&smem_.token_scales[stage][token]),
                     tokens.token[0] + (tokens.to_scales[0] & ~8), P::kScaleBytes, full, policy);
    }
  }

  static constexpr int kNone = INT_MAX;

  typename Base::Entries entries_;
  int number_;  // of the next block, or kNone
};

}  // namespace flashmla::sm90::gathered_decode
