// The loading warpgroup of decode over FP8 caches: copies tokens as they are.
#pragma once

#include "sm90/gathered_decode/token_finder.cuh"
#include "sm90/fp8_decode/storage.cuh"

namespace flashmla::sm90::fp8_decode {

using gathered_decode::TokenFinder;

template <typename P>
class Loader : TokenFinder<P, CacheFormat::kFp8V32> {
  using Base = TokenFinder<P, CacheFormat::kFp8V32>;
  using Base::first_token_;
  using Base::kLaneTokens;
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
      copy(stage, tokens);
      Base::set_mark(stage, mark);
      ptx::cp_async_arrive(&smem_.full[stage]);
      if (lane_ == 0) ptx::mbarrier_arrive(&smem_.full[stage]);
      if (++stage == P::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }

 private:
  __device__ __forceinline__ void copy(int stage, const Tokens& tokens) {
    const uint32_t first = ptx::smem_address(smem_.tokens[stage]) +
                           (first_token_ + lane_ / 8) * Token::kTokenBytes;
    const int chunk = lane_ % 8 * 16;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const uint32_t target = first + 4 * i * Token::kTokenBytes;
      const uint8_t* token = tokens.token[i];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        ptx::cp_async_16(target + group * 128 + chunk, token + group * 128 + chunk, true);
      }
      ptx::cp_async_16(target + Token::kRopeOffset + chunk, token + Token::kRopeOffset + chunk,
                       true);
      if (lane_ % 8 == i) {
        ptx::cp_async_16(target + Token::kScalesOffset, token + Token::kScalesOffset, true);
      }
    }
  }
};

}  // namespace flashmla::sm90::fp8_decode
