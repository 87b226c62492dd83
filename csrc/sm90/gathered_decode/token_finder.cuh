// Finding what there is to gather: one lane walks over the schedule and announces blocks, and warps
// look up where their tokens are. Each warp has an equal share of the tokens of every block. Who
// copies 16 bytes a lane takes four at once, eight lanes a token, so a lane has to do with few
// tokens, whose addresses it keeps; who copies in bulk may have a lane for each token.
// (Shuffling addresses through the warp instead takes twice the time of the whole kernel: the
// matrix products keep the pipe of shuffles busy.)
#pragma once

#include <new>

#include "sm90/decode/cta.cuh"
#include "sm90/gathered_decode/format.cuh"

namespace flashmla::sm90::gathered_decode {

using namespace decode;

constexpr unsigned kAllLanes = 0xffffffff;

// What all who gather tokens have in common: a warp's share of the blocks' tokens. kLaneEach: a
// lane for each token; lanes 16 and up have the same ones again.
template <typename P, CacheFormat kFormat, bool kLaneEach = false>
class TokenFinder {
  using S = typename P::S;

 public:
  // `first_thread`: of those who gather.
  __device__ __forceinline__ TokenFinder(const KernelParams<P>& kp, SharedStorage<P>& smem,
                                         int first_thread = P::kThreads - P::kLoadThreads)
      : kp_(kp), smem_(smem) {
    // Opaque: it would be worked out anew, from a slow special register, for each use.
    lane_ = ptx::lane_id();
    warp_ = __shfl_sync(kAllLanes, (threadIdx.x - first_thread) / 32, 0);
    first_token_ = warp_ * kWarpTokens;
  }

 protected:
  // Tokens of a block that this warp fetches, and those among them that a lane has to do with.
  static constexpr int kWarpTokens = kTokens / P::kLoadWarps;
  static constexpr int kLaneTokens = kLaneEach ? 1 : kWarpTokens / 4;
  static_assert(kWarpTokens == 16, "four bytes, or 64 bits, for marks of a block");

  // --- blocks -----------------------------------------------------------------------------------

  // The first `count` blocks.
  __device__ __forceinline__ void begin_announcing(int count = 2) const {
    if (warp_ != 0 || lane_ != 0) return;
    new (smem_.stream) BlockStream<P>(kp_, smem_.place.part);
    for (int number = 0; number < count; ++number) announce_next(number);
  }

  // The warps take turns.
  __device__ __forceinline__ void announce(int number) const {
    if (number % P::kLoadWarps != warp_) return;
    wait_block(number - 1);  // whoever announced it has put down the stream
    if (lane_ == 0) announce_next(number);
  }

  __device__ __forceinline__ void announce_next(int number) const {
    auto& stream = *reinterpret_cast<BlockStream<P>*>(smem_.stream);
    stream.next(kp_, smem_.place.slice, smem_.blocks[number % kAnnouncedBlocks]);
    ptx::mbarrier_arrive(&smem_.block_announced[number % kAnnouncedBlocks]);
  }

  __device__ __forceinline__ GatheredBlock block(int number) const {
    const uint32_t address = ptx::smem_address(&smem_.blocks[number % kAnnouncedBlocks]);
    const uint4 words[2] = {ptx::ld_shared_16(address), ptx::ld_shared_16(address + 16)};
    return reinterpret_cast<const GatheredBlock&>(words);
  }

  __device__ __forceinline__ GatheredBlock wait_block(int number) const {
    ptx::mbarrier_wait(&smem_.block_announced[number % kAnnouncedBlocks],
                       number / kAnnouncedBlocks & 1);
    return block(number);
  }

  // --- tokens -----------------------------------------------------------------------------------

  // Where this lane's tokens are; zeros in place of one that does not exist.
  struct Tokens {
    const uint8_t* token[kLaneTokens];
    int to_scales[kLaneTokens];
    // How many there are to copy from here: if dense, as many of this warp as lie side by side from
    // this one on, and none at the others of these.
    int count[kLaneTokens];

    __device__ __forceinline__ void set_zeros() {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        token[i] = reinterpret_cast<const uint8_t*>(kZeros);
        to_scales[i] = 0;
      }
    }
  };

  // What was loaded to find them: slots or, if dense, pages. -1 past the end.
  using Entries = int[kLaneTokens];

  __device__ __forceinline__ int token_of_block(int i) const {
    return first_token_ + (kLaneEach ? lane_ % kWarpTokens : 4 * i + lane_ / 8);
  }

  __device__ __forceinline__ void load_entries(const GatheredBlock& block, Entries& entries) const {
    const int32_t* source = block.entries;
    const int count = block.flags & kBlockExists ? block.count : 0;
    const int position = block.position;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const int token = token_of_block(i);
      const int entry = P::kSparse ? token : kp_.page_size[0].quotient(position + token);
      entries[i] = token < count ? source[entry] : -1;
    }
  }

  // Of a lane's token i whether `value`, as a bit for each token of the warp.
  __device__ __forceinline__ static uint32_t bits_of_tokens(bool value, int i) {
    const uint32_t lanes = __ballot_sync(kAllLanes, value);
    if constexpr (kLaneEach) return lanes & 0xffff;
    // One bit of every eight, side by side.
    return ((lanes & 0x01010101) * 0x10204080 >> 28) << 4 * i;
  }

  // Finds the tokens of a block. Returns what is to be said of it: a bit for each token of this
  // warp that exists, or if dense, whether one is in a page that is no page of the cache.
  __device__ __forceinline__ uint32_t find(const GatheredBlock& block, Entries& entries,
                                           Tokens& tokens) const {
    const int source = P::kSparse ? block.source : 0;
    const auto* data = static_cast<const uint8_t*>(cache(source));
    const FastDivide page_size = kp_.page_size[source];
    const uint32_t slots = kp_.slots[source];
    const uint32_t page_bytes = kp_.page_bytes[source];
    uint32_t mark = 0;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      // What follows must not be moved up to where it would wait for the load.
      asm volatile("" : "+r"(entries[i]));
      int slot = entries[i];
      bool exists;
      if constexpr (P::kSparse) {
        exists = static_cast<uint32_t>(slot) < slots;
        mark |= bits_of_tokens(exists, i);
        tokens.count[i] = 1;
      } else {
        const int token = token_of_block(i);
        exists = static_cast<uint32_t>(slot) < static_cast<uint32_t>(kp_.p.num_pages);
        mark |= __any_sync(kAllLanes, token < block.count && !exists);
        const int position = block.position + token;
        const int offset = position - page_size.quotient(position) * page_size.divisor;
        slot = slot * page_size.divisor + offset;
        const bool begins = offset == 0 || token == first_token_;
        tokens.count[i] = !exists  ? 1
                          : begins ? min(min(page_size.divisor - offset, block.count - token),
                                         first_token_ + kWarpTokens - token)
                                   : 0;
      }
      slot = exists ? slot : 0;
      const uint8_t* token;
      int to_scales = 0;
      if constexpr (kFormat == CacheFormat::kFp8V4) {
        const int page = page_size.quotient(slot);
        const int offset = slot - page * page_size.divisor;
        token = data + static_cast<uint64_t>(static_cast<uint32_t>(page)) * page_bytes +
                static_cast<uint64_t>(static_cast<uint32_t>(offset)) * kTokenBytes;
        to_scales = Format<kFormat>::to_scales(page_size.divisor, offset);
      } else {
        token = data + static_cast<uint64_t>(static_cast<uint32_t>(slot)) * kTokenBytes;
      }
      tokens.token[i] = exists ? token : reinterpret_cast<const uint8_t*>(kZeros);
      tokens.to_scales[i] = exists ? to_scales : 0;
    }
    return mark;
  }

  static constexpr int kTokenBytes = kFormat == CacheFormat::kPlain ? S::kDim * 2
                                     : kFormat == CacheFormat::kFp8V32
                                         ? fp8_formats::V32::kTokenBytes
                                         : fp8_formats::V4::kTokenBytes;

  __device__ __forceinline__ const void* cache(int source) const {
    if constexpr (P::kSparse) {
      return kp_.p.sources[source].cache;
    } else {
      return kp_.p.k_cache;
    }
  }

  // Tells the math warpgroups of the block in the buffer.
  __device__ __forceinline__ void set_mark(int buffer, uint32_t mark) {
    if (lane_ != 0) return;
    if constexpr (P::kSparse) {
      reinterpret_cast<uint16_t*>(&smem_.marks[buffer])[warp_] = mark;
    } else {
      reinterpret_cast<uint8_t*>(&smem_.marks[buffer].x)[warp_] = mark;
    }
  }

  const KernelParams<P>& kp_;
  SharedStorage<P>& smem_;
  int lane_;
  int warp_;
  int first_token_;  // of this warp in a block
};

}  // namespace flashmla::sm90::gathered_decode
