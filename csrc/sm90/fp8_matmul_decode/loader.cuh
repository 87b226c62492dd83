// The loading warpgroup of decode with FP8 products: copies tokens as they are, and transposes the
// codes of those that have come, since FP8 products take values only with the tokens of a column
// side by side.
#pragma once

#include "sm90/fp8_matmul_decode/storage.cuh"
#include "sm90/gathered_decode/token_finder.cuh"

namespace flashmla::sm90::fp8_matmul_decode {

using gathered_decode::kAllLanes;
using gathered_decode::TokenFinder;

template <typename P>
class Loader : TokenFinder<P, CacheFormat::kFp8V32> {
  using Base = TokenFinder<P, CacheFormat::kFp8V32>;
  using F = fp8_formats::V32;
  using Base::first_token_;
  using Base::kLaneTokens;
  using Base::lane_;
  using Base::smem_;
  using Base::warp_;
  using typename Base::Tokens;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    Base::begin_announcing();
    more_ = Base::wait_block(0).flags & kBlockExists;
    typename Base::Entries entries[kBuffers];  // of the next two blocks
    load_entries(entries);
    // Blocks come in pairs, but for the last one of a piece.
    while (more_) {
      uint32_t marks[kBuffers];
      marks[0] = copy(0, entries[0]);
      const bool paired = more_ && Base::block(number_).buffer == 1;
      if (paired) {
        marks[1] = copy(1, entries[1]);
        ptx::cp_async_wait<1>();
        announce_keys(0, marks[0]);
        ptx::cp_async_wait<0>();
        announce_keys(1, marks[1]);
      } else {
        ptx::cp_async_wait<0>();
        announce_keys(0, marks[0]);
      }
      load_entries(entries);
      announce_values(paired);
    }
  }

 private:
  // The chunk of 16 bytes of this lane in the row of its token i, swizzled with the row.
  __device__ __forceinline__ uint32_t chunk_of(int i) const {
    return (lane_ % 8 ^ (4 * (i & 1) + lane_ / 8)) << 4;
  }

  __device__ __forceinline__ void load_entries(typename Base::Entries (&entries)[kBuffers]) const {
#pragma unroll
    for (int i = 0; i < kBuffers; ++i) {
      Base::load_entries(Base::wait_block(number_ + i), entries[i]);
    }
  }

  // Copies the next block to its buffer. Returns its mark, and finds out whether there is another.
  __device__ __forceinline__ uint32_t copy(int buffer, typename Base::Entries& entries) {
    Tokens tokens;
    uint32_t mark = Base::find(Base::block(number_), entries, tokens);
    if (!P::kSparse && Base::block(number_).flags & kBlockIsBad) mark |= 1;
    Base::announce(number_ + 2);
    ++number_;
    more_ = Base::wait_block(number_).flags & kBlockExists;

    ptx::mbarrier_wait(&smem_.keys_empty[buffer], keys_parity_ >> buffer & 1);
    keys_parity_ ^= 1 << buffer;
    const uint32_t row = first_token_ + lane_ / 8;
    const uint32_t codes = ptx::smem_address(smem_.codes[0][0]) +
                           buffer * static_cast<int>(sizeof(smem_.codes[0])) + row * kGroupColumns;
    const uint32_t rope =
        ptx::smem_address(smem_.rope[0]) + buffer * kSubTileBytes + row * kRowBytes;
    const uint32_t scales =
        ptx::smem_address(smem_.raw_scales[0]) + (buffer * kTokens + row) * sizeof(uint4);
    const int chunk = lane_ % 8 * 16;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const uint8_t* token = tokens.token[i];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        ptx::cp_async_16(codes + 4 * i * kGroupColumns + group * kCodeTileBytes + chunk_of(i),
                         token + chunk + group * kGroupColumns, true);
      }
      ptx::cp_async_16(rope + 4 * i * kRowBytes + chunk_of(i), token + chunk + F::kRopeOffset,
                       true);
      if (lane_ % 8 == i) {
        ptx::cp_async_16(scales + 4 * i * sizeof(uint4), token + F::kScalesOffset, true);
      }
    }
    ptx::cp_async_commit();
    return mark;
  }

  // Announces the block in the buffer, which has come.
  __device__ __forceinline__ void announce_keys(int buffer, uint32_t mark) {
    __syncwarp();
    Base::set_mark(buffer, mark);
    const int token = token_of_scales(), group = group_of_scales();
    const uint2 bits = scales_of(buffer);
    // An infinite scale is as good as NaN.
    const float scales[2] = {__uint_as_float(bits.x), __uint_as_float(bits.y)};
    smem_.scales[buffer][group][token] = scales[0] + 0.f * scales[0];
    smem_.scales[buffer][group + 1][token] = scales[1] + 0.f * scales[1];
    // The largest magnitudes, as integers, of which NaN is the largest.
    const uint32_t x = bits.x & 0x7fffffff, y = bits.y & 0x7fffffff;
    uint4 most;
    most.x = __reduce_max_sync(kAllLanes, group == 0 ? x : 0);
    most.y = __reduce_max_sync(kAllLanes, group == 0 ? y : 0);
    most.z = __reduce_max_sync(kAllLanes, group != 0 ? x : 0);
    most.w = __reduce_max_sync(kAllLanes, group != 0 ? y : 0);
    if (lane_ == 0) smem_.warp_max[buffer][warp_] = most;
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&smem_.keys_full[buffer]);
  }

  // Two lanes a token, each with the scales of two groups.
  __device__ __forceinline__ int token_of_scales() const { return first_token_ + lane_ / 2; }
  __device__ __forceinline__ int group_of_scales() const { return lane_ % 2 * 2; }
  __device__ __forceinline__ uint2 scales_of(int buffer) const {
    return ptx::ld_shared_8(ptx::smem_address(&smem_.raw_scales[buffer][token_of_scales()]) +
                            group_of_scales() * 4);
  }

  // Transposes the codes of a pair, or of a single block, and announces the values.
  __device__ __forceinline__ void announce_values(bool paired) {
    ptx::mbarrier_wait(&smem_.values_empty, values_parity_);
    values_parity_ ^= 1;
    ptx::named_barrier_sync(kBarrierLoaders, P::kLoadThreads);  // warp_max of all warps
    const int group = group_of_scales();
    uint2 most = {0, 0};
    const int blocks = paired ? 2 : 1;
#pragma unroll 1
    for (int buffer = 0; buffer < blocks; ++buffer) {
      transpose(buffer);
#pragma unroll
      for (int warp = 0; warp < P::kLoadWarps; ++warp) {
        const uint2 other =
            ptx::ld_shared_8(ptx::smem_address(&smem_.warp_max[buffer][warp]) + group * 4);
        most = {max(most.x, other.x), max(most.y, other.y)};
      }
    }
#pragma unroll 1
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      // The weights of a block that is not there are 0, and its scales must not be NaN.
      const uint2 bits = buffer < blocks ? scales_of(buffer) : uint2{0, 0};
      relate(buffer, group, bits.x, most.x);
      relate(buffer, group + 1, bits.y, most.y);
    }
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&smem_.values_full);
    // Maxima have been read: new ones may be written.
    ptx::named_barrier_sync(kBarrierLoaders, P::kLoadThreads);
  }

  // Stores this lane's token's scale relative to a power of two above the largest one. If that is
  // not finite the group's values are NaN.
  __device__ __forceinline__ void relate(int buffer, int group, uint32_t scale,
                                         uint32_t most) const {
    const int token = token_of_scales();
    const uint32_t exponent = min((most >> 23) + 1, 254u);
    const float inverse = __uint_as_float(max((254 - exponent) << 23, 0x00400000u));
    smem_.relative_scales[buffer][group][token] = __float2half_rn(__uint_as_float(scale) * inverse);
    if (token == 0) {
      smem_.reference[group] = most >= 0x7f800000 ? NAN : __uint_as_float(exponent << 23);
    }
  }

  // Turns the codes of this warp's tokens into 16 bytes of every column. In a column the tokens of
  // a warp, which are columns 2q and 2q + 1 of two accumulator tiles of the scores for each q, lie
  // in the order in which a thread has their weights: 0 1 8 9, 2 3 10 11, ...; and of 16 columns
  // the even ones come first.
  __device__ __forceinline__ void transpose(int buffer) const {
    // Matrix m of the load: tokens 8 * (m % 2) + lane % 8, chunk m / 2 of two.
    const int token = first_token_ + lane_ % 16;
    const uint32_t source = ptx::smem_address(smem_.codes[0][0]) +
                            buffer * static_cast<int>(sizeof(smem_.codes[0])) +
                            token * kGroupColumns;
    const int chunk = lane_ / 16 ^ (token & 7);
    // Matrix m of the store: even (m % 2 == 0) or odd columns of chunk m / 2.
    const int row = lane_;
    const uint32_t target = ptx::smem_address(smem_.values[0][0]) +
                            buffer * static_cast<int>(sizeof(smem_.values[0])) + row * kTokens +
                            ((warp_ ^ (row >> 1 & 3)) << 4);
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      uint32_t r[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::ldmatrix_x4_trans(source + group * kCodeTileBytes + ((chunk ^ 2 * i) << 4), r[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::stmatrix_x4(
            target + (4 * group + i) * 32 * kTokens, __byte_perm(r[i][0], r[i][1], 0x6420),
            __byte_perm(r[i][0], r[i][1], 0x7531), __byte_perm(r[i][2], r[i][3], 0x6420),
            __byte_perm(r[i][2], r[i][3], 0x7531));
      }
    }
  }

  static constexpr int kBarrierLoaders = 4;

  int number_ = 0;  // of the next block
  bool more_;       // whether it exists
  // Fresh barriers let the first wait pass.
  uint32_t keys_parity_ = 3;  // a bit for each buffer
  uint32_t values_parity_ = 1;
};

}  // namespace flashmla::sm90::fp8_matmul_decode
