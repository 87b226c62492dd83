// The loading warpgroup of decode over FP8 caches: copies tokens as they are.
#pragma once

#include "sm90/fp8_few_rows_decode/storage.cuh"
#include "sm90/gathered_decode/token_finder.cuh"

namespace flashmla::sm90::fp8_few_rows_decode {

using gathered_decode::TokenFinder;

template <typename P>
class Loader : TokenFinder<P, CacheFormat::kFp8V32> {
  using Base = TokenFinder<P, CacheFormat::kFp8V32>;
  using Base::first_token_;
  using Base::kLaneTokens;
  using Base::kWarpTokens;
  using Base::lane_;
  using Base::smem_;
  using typename Base::Tokens;

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
      if (lane_ == 0) {
        ptx::mbarrier_arrive_expect_tx(&smem_.full[stage], kWarpTokens * Token::kTokenBytes);
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
  // A copy for each token, or if dense, for all that lie side by side.
  __device__ __forceinline__ void copy(int stage, const Tokens& tokens) {
    if (lane_ % 8 != 0) return;
    const uint32_t first =
        ptx::smem_address(smem_.tokens[stage]) + (first_token_ + lane_ / 8) * Token::kTokenBytes;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      int count = 1;
      if constexpr (!P::kSparse) {
        if (tokens.exists[i]) {
          if (!tokens.begins_run[i]) continue;
          count = tokens.side_by_side[i];
        }
      }
      ptx::bulk_load(first + 4 * i * Token::kTokenBytes, tokens.token[i],
                     count * Token::kTokenBytes, &smem_.full[stage], policy_);
    }
  }

  const uint64_t policy_ = ptx::evict_first_policy();
};

}  // namespace flashmla::sm90::fp8_few_rows_decode
