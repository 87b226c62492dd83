// FP8 codes on their way from shared memory to operands of the tensor cores, with tokens, or
// columns of the values, in their rows; and queries as these want them.
#pragma once

#include "common/e8m0.cuh"
#include "sm90/decode/bfloat16_rows.cuh"
#include "sm90/decode/cta.cuh"
#include "sm90/decode/fp8_tokens.h"
#include "sm90/gathered_decode/format.cuh"

namespace flashmla::sm90::decode {

// Of the rows that stand for eight tokens in an accumulator, which token `row` is: so that sixteen
// lanes, which load 32 bytes of four neighbouring rows, find them in different banks.
__device__ __forceinline__ int token_of_row(int row) { return (row & 3) * 2 + (row >> 2); }

// Waits for a block of a part. A warpgroup sees every second or third one, so it may be here before
// the last block in this place has come: blocks come in any order. Parity does not tell that from
// two blocks later, so it waits until that one was given back, too.
template <typename P>
__device__ __forceinline__ void wait_for_block(SharedStorage<P>& smem, int number) {
  const int stage = number % P::kStages;
  const uint32_t parity = number / P::kStages & 1;
  ptx::mbarrier_wait(&smem.empty[stage], parity ^ 1);
  ptx::mbarrier_wait(&smem.full[stage], parity);
}

// ---------------------------------------------------------------------------------------------
// Scales
// ---------------------------------------------------------------------------------------------

// The scales of a token: float32, or their exponents, a byte each.
template <typename P>
using TokenScales = std::conditional_t<P::kHasScalesApart, uint2, uint4>;

// Of V4, whose scales lie apart from the tokens. Those of tokens that do not exist are 1.
template <typename P>
__device__ __forceinline__ uint2 load_scales_apart(const SharedStorage<P>& smem, int stage,
                                                   int warp, int token) {
  const uint2 odd = smem.odd_scales[stage], exist = smem.marks[stage];
  const auto bit = [&](const uint2& of_tokens) {
    return (warp < 2 ? of_tokens.x : of_tokens.y) >> token % 32 & 1;
  };
  const uint2 scales =
      ptx::ld_shared_8(ptx::smem_address(&smem.token_scales[stage][token]) + bit(odd) * 8);
  return bit(exist) ? scales : uint2{0x7f7f7f7f, 0x7f7f7f7f};
}

__device__ __forceinline__ uint32_t word(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}
__device__ __forceinline__ float scale_of(const uint4& scales, int group) {
  return __uint_as_float(word(scales, group));
}
__device__ __forceinline__ float scale_of(const uint2& scales, int group) {
  return e8m0_to_float(__byte_perm(group < 4 ? scales.x : scales.y, 0, 0x4440 | group % 4));
}

// Whether a scale of these two tokens is no power of two, and not 0 either, or such that fp16 has
// not all values.
template <typename P>
__device__ __forceinline__ bool are_not_simple(const TokenScales<P> (&scales)[2]) {
  constexpr int kLeast = 127 - 15, kMost = 127 + 7;  // exponents of float32
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 2 * P::kGroups; ++i) {
    const uint32_t bits = __float_as_uint(scale_of(scales[i / P::kGroups], i % P::kGroups));
    // Exponent in the low bits, what must be 0 in the high ones.
    const uint32_t x = bits - (kLeast << 23);
    most = max(most, bits == 0 ? 0 : __funnelshift_r(x, x, 23));
  }
  return most > kMost - kLeast;
}

// Scales as the values need them: of each group, for each q = lane % 4, those of tokens in rows
// 8 * m + 2 * q + {0, 1}, at 2 * m. This is the place of that of the token in row `row` of eight,
// of those 8 * m and up.
__device__ __forceinline__ int place_of_scale(int group, int row, int m) {
  return ((group * 4 + row / 2) * 8 + m) * 2 + row % 2;
}

__device__ __forceinline__ void load_value_scales(uint32_t address, __half2 (&scales)[4]) {
  const uint4 bits = ptx::ld_shared_16(address);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t x = word(bits, i);
    scales[i] = reinterpret_cast<const __half2&>(x);
  }
}
__device__ __forceinline__ void load_value_scales(uint32_t address, float2 (&scales)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 bits = ptx::ld_shared_16(address + 16 * i);
    scales[2 * i] = {__uint_as_float(bits.x), __uint_as_float(bits.y)};
    scales[2 * i + 1] = {__uint_as_float(bits.z), __uint_as_float(bits.w)};
  }
}

// ---------------------------------------------------------------------------------------------
// Codes
// ---------------------------------------------------------------------------------------------

// The type of converted values.
template <bool kSimple>
using Element = std::conditional_t<kSimple, __half, __nv_bfloat16>;

// The scale of a token and group, and how codes become values: with a simple one as fp16, which is
// exact, else as bfloat16, rounded once.
template <bool kSimple>
struct Factor {
  __half2 scale;

  __device__ __forceinline__ void set(float x) { scale = __float2half2_rn(x); }
  __device__ __forceinline__ void convert(uint32_t codes, uint32_t& lo, uint32_t& hi) const {
    ptx::e4m3_to_f16(codes, lo, hi);
    lo = product(lo, scale);
    hi = product(hi, scale);
  }
  __device__ __forceinline__ static uint32_t product(uint32_t pair, __half2 scale) {
    const __half2 x = __hmul2(reinterpret_cast<const __half2&>(pair), scale);
    return reinterpret_cast<const uint32_t&>(x);
  }
};

template <>
struct Factor<false> {
  float scale;

  __device__ __forceinline__ void set(float x) { scale = x; }
  __device__ __forceinline__ void convert(uint32_t codes, uint32_t& lo, uint32_t& hi) const {
    const uint2 values = gathered_decode::dequantize(codes, scale);
    lo = values.x;
    hi = values.y;
  }
};

// The same for two tokens with two columns each, [token][column], whose values come out by columns.
__device__ __forceinline__ void convert_columns(uint32_t codes, __half2 scales, uint32_t& first,
                                                uint32_t& second) {
  ptx::e4m3_to_f16(__byte_perm(codes, 0, 0x3120), first, second);
  first = Factor<true>::product(first, scales);
  second = Factor<true>::product(second, scales);
}

__device__ __forceinline__ void convert_columns(uint32_t codes, float2 scales, uint32_t& first,
                                                uint32_t& second) {
  float2 x, y;
  gathered_decode::codes_to_floats(codes, x, y);
  first = ptx::pack<__nv_bfloat16>(x.x * scales.x, y.x * scales.y);
  second = ptx::pack<__nv_bfloat16>(x.y * scales.x, y.y * scales.y);
}

// ---------------------------------------------------------------------------------------------
// Operands from registers
// ---------------------------------------------------------------------------------------------

// For two steps of a product. There are kOperands of them: while the products with others run, one
// is made.
using Operand = uint32_t[2][4];
constexpr int kOperands = 2;

__device__ __forceinline__ void set(uint32_t (&a)[4], uint32_t x0, uint32_t x1, uint32_t x2,
                                    uint32_t x3) {
  a[0] = x0;
  a[1] = x1;
  a[2] = x2;
  a[3] = x3;
}

// An operand is in use until here.
template <int kSteps>
__device__ __forceinline__ void hold(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}
__device__ __forceinline__ void wait_for(Operand& a) {
  wgmma::wait<kOperands - 1>();
  hold(a);
}
__device__ __forceinline__ void wait_for_all(Operand (&a)[kOperands]) {
  wgmma::wait<0>();
#pragma unroll
  for (int i = 0; i < kOperands; ++i) hold(a[i]);
}

// 32 columns of a thread's two tokens: of each the 8 bytes at 8 * (lane % 4).
struct RawKeys {
  uint2 token[2];
};
template <typename P>
__device__ __forceinline__ RawKeys load_raw_keys(uint32_t address) {
  return {ptx::ld_shared_8(address), ptx::ld_shared_8(address + 8 * P::kStride)};
}

// Two steps, of queries from the address `q` on.
template <typename Element, int kAccumulators>
__device__ __forceinline__ void issue_scores(const Operand& a, uint32_t q,
                                             float (&s)[kAccumulators], bool accumulate) {
  const uint64_t b = wgmma::k_major(q, kGroupBytes);
  wgmma::fence();
  wgmma::narrow_rs(Element{}, s, a[0], b, accumulate);
  wgmma::narrow_rs(Element{}, s, a[1], b + wgmma::distance(32), true);
  wgmma::commit();
}

// Begins the scores with those of the RoPE columns. `chunks`: the 8 bytes of the thread's first
// token, `q`: the RoPE columns of the queries.
template <typename P, int kAccumulators>
__device__ __forceinline__ void rope_scores(uint32_t chunks, uint32_t q, int lane,
                                            Operand (&a)[kOperands], float (&s)[kAccumulators]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // Of 32 columns the 8 at 8 * (lane % 4).
    const uint32_t columns = chunks + lane % 4 * 8 + P::K::kRopeOffset + 64 * i;
    const uint4 x = ptx::ld_shared_16(columns);
    const uint4 y = ptx::ld_shared_16(columns + 8 * P::kStride);
    set(a[i][0], x.x, y.x, x.y, y.y);
    set(a[i][1], x.z, y.z, x.w, y.w);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) issue_scores<typename P::T>(a[i], q + 64 * i, s, i > 0);
}

// Stores P, a token a column, from accumulators with tokens in their rows, 16 for each warp.
template <typename Element, int kAccumulators>
__device__ __forceinline__ void store_p(uint32_t p, int warp, int lane,
                                        const float (&s)[kAccumulators]) {
  // Matrix m of a store: rows 8 * (m / 2) and up of the tile, tokens 8 * (m % 2) and up of the
  // warp.
  const int row_in_tile = lane / 16 * 8 + lane % 8;
  const int chunk = 2 * warp + lane / 8 % 2;
  const uint32_t place = p + row_in_tile * kRowBytes + ((chunk ^ (row_in_tile & 7)) << 4);
#pragma unroll
  for (int pair = 0; pair < kAccumulators / 8; ++pair) {
    uint32_t x[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int i = 4 * (2 * pair + m / 2) + 2 * (m % 2);
      x[m] = ptx::pack<Element>(s[i], s[i + 1]);
    }
    ptx::stmatrix_x4_trans(place + pair * 2 * kGroupBytes, x[0], x[1], x[2], x[3]);
  }
}

// Of accumulators of RoPE columns, whose first 8 rows are a warp's first 8 columns, too, makes the
// first rows even columns and the others odd ones.
template <int kAccumulators>
__device__ __forceinline__ void interleave(float (&out)[kAccumulators], int lane) {
  const bool first_half = lane < 16;
  const int even = lane / 4 % 4 * 8 + lane % 4;  // the lane that has the even column, of 8
#pragma unroll
  for (int i = 0; i < kAccumulators / 2; ++i) {
    float& x = out[i / 2 * 4 + i % 2];
    float& y = out[i / 2 * 4 + i % 2 + 2];
    float columns[2];
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const float of_first = __shfl_sync(0xffffffff, x, even + 4 * odd);
      const float of_second = __shfl_sync(0xffffffff, y, even + 4 * odd);
      columns[odd] = first_half ? of_first : of_second;
    }
    x = columns[0];
    y = columns[1];
  }
}

// ---------------------------------------------------------------------------------------------
// Accumulators
// ---------------------------------------------------------------------------------------------

// What shared memory has of a thread's rows of the problem, which are the columns of its
// accumulators: two of every eight, 8 * j + 2 * (lane % 4) + e at 2 * j + e.
template <int kTileRows>
struct RowsOfThread {
  float of_row[kTileRows / 4];
};
template <int kTileRows>
__device__ __forceinline__ RowsOfThread<kTileRows> load_rows(const float (&of_tile)[kTileRows],
                                                             int lane) {
  RowsOfThread<kTileRows> rows;
  const uint32_t address = ptx::smem_address(of_tile) + lane % 4 * sizeof(float2);
#pragma unroll
  for (int j = 0; j < kTileRows / 8; ++j) {
    const uint2 pair = ptx::ld_shared_8(address + j * 8 * sizeof(float));
    rows.of_row[2 * j] = __uint_as_float(pair.x);
    rows.of_row[2 * j + 1] = __uint_as_float(pair.y);
  }
  return rows;
}

// The row, of a thread's, that an accumulator belongs to.
__device__ __forceinline__ constexpr int row_of(int i) { return i / 4 * 2 + i % 2; }

// -inf for tokens that a row does not attend to, NaN for a block that cannot be loaded. `visible`:
// dense, the tokens that each row attends to. token(h): of the block, of the thread's two; row(i):
// of the tile, of the thread's.
template <typename P, int kAccumulators, typename Token, typename Row>
__device__ __forceinline__ void mask_scores(int block, uint2 marks, const int* visible, int warp,
                                            const Token& token, const Row& row,
                                            float (&s)[kAccumulators]) {
  if constexpr (P::kSparse) {
    if ((marks.x & marks.y) == 0xffffffff) [[likely]]
      return;
    const uint32_t exist = warp < 2 ? marks.x : marks.y;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!(exist >> token(h) % 32 & 1)) {
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) {
          if (i / 2 % 2 == h) s[i] = -INFINITY;
        }
      }
    }
    wgmma::hold(s);
  } else {
    if (marks.x != 0) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) s[i] = NAN;
      wgmma::hold(s);
    }
    // The first row sees the fewest.
    if ((block + 1) * kTokens > visible[0]) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) {
        if (block * kTokens + token(i / 2 % 2) >= visible[row(row_of(i))]) {
          s[i] = -INFINITY;
        }
      }
      wgmma::hold(s);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Queries
// ---------------------------------------------------------------------------------------------

// A row of queries, of which a lane has up to three chunks of 8 columns, 32 apart, as products want
// it: times a power of two, so that the largest latent column lies in [2^kTop, 2^(kTop + 1)), but
// none is made more than 2^kMost times as large. RoPE columns that are 2^kMargin times as large
// count too, lest they become infinite. Defaults are for latent columns as fp16.
template <typename P, int kTop = 14, int kMost = 40, int kMargin = 32>
struct ScaledRow {
  static constexpr int kChunks = P::S::kDim / 8;
  static constexpr int kCodeChunks = P::kCodeTiles * kSubTileColumns / 8;

  float factor;
  float undo;  // undoes it; NaN if the row is not finite

  __device__ __forceinline__ ScaledRow(const uint4 (&x)[3], int lane) {
    // Exponents of float32.
    uint32_t latent_most = 0, rope_most = 0;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const uint32_t most = largest(x[k]);
      const bool is_latent = 32 * k + lane < kCodeChunks;
      latent_most = max(latent_most, is_latent ? most : 0);
      rope_most = max(rope_most, is_latent ? 0 : most);
    }
    latent_most = __reduce_max_sync(0xffffffff, latent_most);
    rope_most = __reduce_max_sync(0xffffffff, rope_most);
    const int exponent =
        max(max(static_cast<int>(latent_most >> 7), static_cast<int>(rope_most >> 7) - kMargin),
            127 + kTop - kMost);
    factor = __uint_as_float((2 * 127 + kTop - exponent) << 23);
    undo = max(latent_most, rope_most) >= 0x7f80 ? NAN : __uint_as_float((exponent - kTop) << 23);
  }

  __device__ __forceinline__ uint4 chunk(const uint4& x, int number) const {
    return number < kCodeChunks ? scaled<__half>(x) : scaled<typename P::T>(x);
  }
  // A latent one as e4m3.
  __device__ __forceinline__ uint2 codes(const uint4& x) const {
    return {codes(x.x, x.y), codes(x.z, x.w)};
  }

 private:
  template <typename To>
  __device__ __forceinline__ uint4 scaled(const uint4& x) const {
    return {scaled_pair<To>(x.x, factor), scaled_pair<To>(x.y, factor),
            scaled_pair<To>(x.z, factor), scaled_pair<To>(x.w, factor)};
  }
  __device__ __forceinline__ uint32_t codes(uint32_t first, uint32_t second) const {
    const float2 x = ptx::unpack<__nv_bfloat16>(first), y = ptx::unpack<__nv_bfloat16>(second);
    return ptx::pack_e4m3(x.x * factor, x.y * factor, y.x * factor, y.y * factor);
  }
};

// Stores 8 columns of a tile where the products look for what lanes with q = lane % 4 have of the
// keys: of 32 columns 8 side by side, in each of two steps four, as pairs at 16 * step + {0, 8} +
// 2 * q.
__device__ __forceinline__ void store_chunk(const uint4& x, uint32_t tile_row, int row, int chunk) {
  const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int place = chunk / 4 * 4 + i;
    ptx::st_shared_4(tile_row + ((place ^ (row & 7)) << 4) + chunk % 4 * 4, pairs[i]);
  }
}

}  // namespace flashmla::sm90::decode
