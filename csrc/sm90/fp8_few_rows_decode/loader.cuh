// The loading warpgroup of decode over FP8 caches: copies tokens as they are.
#pragma once

#include "sm90/fp8_few_rows_decode/storage.cuh"
#include "sm90/gathered_decode/token_finder.cuh"

namespace flashmla::sm90::fp8_few_rows_decode {

using gathered_decode::TokenFinder;

template <typename P>
class Loader : TokenFinder<P, P::kFormat> {
  using Base = TokenFinder<P, P::kFormat>;
  using K = typename P::K;
  using Base::first_token_;
  using Base::kLaneTokens;
  using Base::kWarpTokens;
  using Base::lane_;
  using Base::smem_;
  using Base::warp_;
  using typename Base::Tokens;
  static constexpr int kTokenBytes = K::kTokenBytes;
  static constexpr int kTokenCopyBytes = kTokenBytes + P::kScaleBytes;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    Base::begin_announcing();
    bool more = Base::wait_block(0).flags & kBlockExists;
    typename Base::Entries entries;
    Base::load_entries(Base::wait_block(0), entries);
    int stage = 0;
    uint32_t parity = 1;  // a fresh barrier lets the first wait pass
    for (int number = 0; more; ++number) {
      Tokens tokens;
      const GatheredBlock block = Base::block(number);
      uint32_t mark = Base::find(block, entries, tokens);
      if (!P::kSparse && block.flags & kBlockIsBad) mark |= 1;
      Base::announce(number + 2);
      const GatheredBlock next = Base::wait_block(number + 1);
      more = next.flags & kBlockExists;
      Base::load_entries(next, entries);

      ptx::mbarrier_wait(&smem_.empty[stage], parity);
      Base::set_mark(stage, mark);
      if constexpr (P::kHasScalesApart) set_odd_scales(stage, tokens);
      if (lane_ == 0) {
        ptx::mbarrier_arrive_expect_tx(&smem_.full[stage], kWarpTokens * kTokenCopyBytes);
      }
      __syncwarp();
      copy(stage, tokens);
      if (++stage == P::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }

 private:
  // The copy engine wants multiples of 16, as tokens are, and scales begin at multiples of 8. What
  // it takes too much is in the page: an odd page has at least 8 bytes of padding.
  __device__ __forceinline__ static bool has_odd_scales(const Tokens& tokens, int i) {
    return tokens.to_scales[i] & 8;
  }
  __device__ __forceinline__ void set_odd_scales(int stage, const Tokens& tokens) {
    uint32_t odd = 0;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      odd |= Base::bits_of_tokens(has_odd_scales(tokens, i), i);
    }
    if (lane_ == 0) reinterpret_cast<uint16_t*>(&smem_.odd_scales[stage])[warp_] = odd;
  }

  // A copy for each token, or if dense, for all that lie side by side. By one of the lanes that
  // have the token: with a lane for each of a warp's 16 tokens long runs of this kernel have failed
  // with "unspecified launch failure", or hung.
  __device__ __forceinline__ void copy(int stage, const Tokens& tokens) {
    if (lane_ % 8 != 0) return;
    uint64_t* full = &smem_.full[stage];
    const int first = first_token_ + lane_ / 8;
    const uint32_t place = ptx::smem_address(smem_.tokens[stage]) + first * P::kStride;
    static_assert(P::kSparse || P::kStride == kTokenBytes);
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      if (tokens.count[i] == 0) continue;
      ptx::bulk_load(place + 4 * i * P::kStride, tokens.token[i], tokens.count[i] * kTokenBytes,
                     full, policy_);
      if constexpr (P::kHasScalesApart) {
        ptx::bulk_load(ptx::smem_address(&smem_.token_scales[stage][first + 4 * i]),
                       tokens.token[i] + (tokens.to_scales[i] & ~8), P::kScaleBytes, full, policy_);
      }
    }
  }

  const uint64_t policy_ = ptx::evict_first_policy();
};

}  // namespace flashmla::sm90::fp8_few_rows_decode
