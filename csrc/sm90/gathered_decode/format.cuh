// How tokens lie in a cache of each format, and how FP8 values become bfloat16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/fp8_formats.h"
#include "common/ptx.cuh"
#include "common/schedule.h"
#include "params.h"

namespace flashmla::sm90::gathered_decode {

// What is read instead of a token that does not exist.
constexpr int kMostTokenBytes = 576 * 2;
static __device__ const uint4 kZeros[kMostTokenBytes / sizeof(uint4)] = {};

// Four e4m3 codes as float32, exact: the low and the high half of `codes`.
__device__ __forceinline__ void codes_to_floats(uint32_t codes, float2& lo, float2& hi) {
  uint32_t halves[2];
  ptx::e4m3_to_f16(codes, halves[0], halves[1]);
  lo = __half22float2(reinterpret_cast<const __half2&>(halves[0]));
  hi = __half22float2(reinterpret_cast<const __half2&>(halves[1]));
}

// Four e4m3 values times their scale, rounded to bfloat16 once: as exact as can be for any scale.
// NaN codes, and NaN or infinite scales, give NaN.
__device__ __forceinline__ uint2 dequantize(uint32_t codes, float scale) {
  uint2 result;
  float2 a, b;
  codes_to_floats(codes, a, b);
  result.x = ptx::pack<__nv_bfloat16>(a.x * scale, a.y * scale);
  result.y = ptx::pack<__nv_bfloat16>(b.x * scale, b.y * scale);
  return result;
}

template <CacheFormat kFormat>
struct Format;

// 512 x e4m3, 4 x float32 scales, 64 x bfloat16 in a row of 656 bytes.
template <>
struct Format<CacheFormat::kFp8V32> : fp8_formats::V32 {
  static constexpr int kRightTiles = 4;  // of 64 latent values in the right half of the values

  // Scales of one half of a token's values: one for two sub-tiles.
  static constexpr int kHalfScaleBytes = 8;
  __device__ __forceinline__ static const uint8_t* scales(const uint8_t* token, int, int half) {
    return token + kScalesOffset + half * kHalfScaleBytes;
  }
  struct HalfScales {
    uint2 bits;

    __device__ __forceinline__ void read(uint32_t address) { bits = ptx::ld_shared_8(address); }
    __device__ __forceinline__ void of_tiles(float (&scales)[4]) const {
      scales[0] = scales[1] = __uint_as_float(bits.x);
      scales[2] = scales[3] = __uint_as_float(bits.y);
    }
  };
};

// In each page first 576 bytes a token: 448 x e4m3 and 64 x bfloat16; then 8 bytes a token: 7 x
// e8m0 scales. Pages are padded to a multiple of 576 bytes.
template <>
struct Format<CacheFormat::kFp8V4> : fp8_formats::V4 {
  static constexpr int kRightTiles = 3;

  // From the token at `offset` in a page to its scales.
  __device__ __forceinline__ static int to_scales(int page_size, int offset) {
    return page_size * kTokenBytes - offset * (kTokenBytes - kTokenScaleBytes);
  }

  // Scales of one half of a token's values: a byte for each sub-tile.
  static constexpr int kHalfScaleBytes = 4;
  __device__ __forceinline__ static const uint8_t* scales(const uint8_t* token, int to_scales,
                                                          int half) {
    return token + to_scales + half * kHalfScaleBytes;
  }
  struct HalfScales {
    uint32_t codes;

    __device__ __forceinline__ void read(uint32_t address) { codes = ptx::ld_shared_4(address); }
    // 2^(code - 127): the code is the exponent of a float32, but for 0, which is the one subnormal,
    // and 255, which is NaN.
    __device__ __forceinline__ void of_tiles(float (&scales)[4]) const {
      const uint32_t nans = ((codes & 0x7f7f7f7f) + 0x01010101) & codes;  // in the top bits
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t exponent = __byte_perm(codes, 0, 0x0444 | i << 12) >> 1;
        const uint32_t nan = ptx::top_bit_of_byte(nans, i);
        scales[i] = __uint_as_float(max(exponent, 0x00400000u) | nan);
      }
    }
  };
};

}  // namespace flashmla::sm90::gathered_decode
