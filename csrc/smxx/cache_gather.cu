// Reads slots of a paged cache, dequantised: value = e4m3 * scale in float32, rounded to the type
// of the result. A warp takes a token, in chunks of 8 elements as cache_append.cu.
#include "common/cache_format.cuh"
#include "common/dependent_launch.cuh"
#include "common/e8m0.cuh"
#include "common/ptx.cuh"
#include "launch.h"

namespace flashmla {
namespace {

using namespace cache_format;

// The scale of a tile.
template <CacheFormat kFormat>
__device__ __forceinline__ float load_scale(const uint8_t* scales, int tile) {
  if constexpr (kFormat == CacheFormat::kFp8V32) {
    return reinterpret_cast<const float*>(scales)[tile];
  } else {
    return e8m0_to_float(scales[tile]);
  }
}

// Not 0 if one of four codes is NaN.
__device__ __forceinline__ uint32_t has_nan_code(uint32_t codes) {
  return ((codes & 0x7F7F7F7F) + 0x01010101) & 0x80808080;
}

// A product code * scale; a NaN is the quiet one, with the sign of its code unless the scale is
// NaN.
__device__ __forceinline__ float with_sign_of_nan(float product, uint32_t sign, float scale) {
  if (!is_nan(__float_as_uint(product))) return product;
  return __uint_as_float(0x7FC00000 | (is_nan(__float_as_uint(scale)) ? 0 : sign));
}

template <CacheFormat kFormat, DataType kType, bool kAligned>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 4)
    gather_fp8_kernel(const CacheGatherParams p) {
  using Format = Fp8<kFormat>;
  constexpr int kChunks = (Format::kLatent / kChunk + kLanes - 1) / kLanes;  // of a lane
  constexpr int kColumns = Format::kLatent + kFp8Rope;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int lane = threadIdx.x % kLanes;
  const int64_t token = int64_t{blockIdx.x} * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (token >= p.tokens) return;
  const int slot = p.slots[token];
  const bool valid = is_slot(slot, p.num_pages, p.page_size);
  auto* target = static_cast<BitsOf<kType>*>(p.out) + token * kColumns;

  uint32_t codes[kChunks][kChunk / 4] = {};
  float scale[kChunks] = {};
  uint16_t rope[2] = {};
  if (valid) {
    const Place<const uint8_t> place =
        place_of<kFormat>(static_cast<const uint8_t*>(p.cache), slot, p.page_size, p.page_bytes);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = (c * kLanes + lane) * kChunk;
      if (column >= Format::kLatent) break;
      load<kAligned>(reinterpret_cast<const uint32_t*>(place.data + column), codes[c]);
      scale[c] = load_scale<kFormat>(place.scales, column / Format::kTile);
    }
    load<false>(reinterpret_cast<const uint16_t*>(place.rope) + 2 * lane, rope);
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int column = (c * kLanes + lane) * kChunk;
    if (column >= Format::kLatent) break;
    float x[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) {
      const float2 values = e4m3_values(codes[c][i / 4] >> (i % 4 * 8) & 0xFFFF);
      x[i] = __fmul_rn(values.x, scale[c]);
      x[i + 1] = __fmul_rn(values.y, scale[c]);
    }
    // Without a NaN code and with a finite scale there is no NaN, as nearly always.
    const uint32_t nan_codes = has_nan_code(codes[c][0]) | has_nan_code(codes[c][1]);
    if (nan_codes == 0 && fabsf(scale[c]) < INFINITY) {
      BitsOf<kType> bits[kChunk];
      round_numbers<kType>(x, bits);
      store<kAligned>(target + column, bits);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const uint32_t sign = codes[c][i / 4] << (24 - i % 4 * 8) & 0x80000000;
        x[i] = with_sign_of_nan(x[i], sign, scale[c]);
      }
      store_rounded<kType, kAligned>(target + column, x);
    }
  }
  BitsOf<kType> bits[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kType == DataType::kBFloat16) {
      bits[i] = rope[i];
    } else {
      bits[i] = Element<kType>::round(Element<DataType::kBFloat16>::widen(rope[i]));
    }
  }
  store<kAligned>(target + Format::kLatent + 2 * lane, bits);
}

template <DataType kIn, DataType kOut, bool kAligned>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 4)
    gather_plain_kernel(const CacheGatherParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int lane = threadIdx.x % kLanes;
  const int64_t token = int64_t{blockIdx.x} * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (token >= p.tokens) return;
  const int slot = p.slots[token];
  const bool valid = is_slot(slot, p.num_pages, p.page_size);
  const auto* source =
      static_cast<const BitsOf<kIn>*>(p.cache) + (valid ? int64_t{slot} * p.columns : 0);
  auto* target = static_cast<BitsOf<kOut>*>(p.out) + token * p.columns;
  if constexpr (kAligned) {
#pragma unroll 2
    for (int64_t column = lane * kChunk; column < p.columns; column += kLanes * kChunk) {
      BitsOf<kIn> bits[kChunk] = {};
      if (valid) load<true>(source + column, bits);
      if constexpr (kIn == kOut) {
        store<true>(target + column, bits);
      } else {
        float x[kChunk];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) x[i] = Element<kIn>::widen(bits[i]);
        store_rounded<kOut, true>(target + column, x);
      }
    }
  } else {
    for (int64_t column = lane; column < p.columns; column += kLanes) {
      const BitsOf<kIn> bits = valid ? source[column] : BitsOf<kIn>{0};
      if constexpr (kIn == kOut) {
        target[column] = bits;
      } else {
        target[column] = Element<kOut>::round(Element<kIn>::widen(bits));
      }
    }
  }
}

template <typename Kernel>
Status launch(Kernel kernel, const CacheGatherParams& p, cudaStream_t stream) {
  const int warps = warps_of(p.tokens);
  return launch_dependent(kernel, "grid of the gather kernel", (p.tokens + warps - 1) / warps,
                          warps * kLanes, 0, stream, p);
}

template <CacheFormat kFormat>
Status launch_fp8(const CacheGatherParams& p, bool aligned, cudaStream_t stream) {
  return with_type(p.out_dtype, [&]<DataType kType>() {
    return launch(aligned ? &gather_fp8_kernel<kFormat, kType, true>
                          : &gather_fp8_kernel<kFormat, kType, false>,
                  p, stream);
  });
}

}  // namespace

Status launch_cache_gather(const CacheGatherParams& params, cudaStream_t stream) {
  if (params.tokens == 0) return {};
  if (params.format != CacheFormat::kPlain && !fits_words(params.cache, params.page_bytes)) {
    return {cudaErrorMisalignedAddress, "cache of the gather kernel"};
  }
  bool aligned = is_aligned(params.cache) && is_aligned(params.out);
  switch (params.format) {
    case CacheFormat::kFp8V32:
      return launch_fp8<CacheFormat::kFp8V32>(params, aligned, stream);
    case CacheFormat::kFp8V4:
      return launch_fp8<CacheFormat::kFp8V4>(params, aligned && params.page_bytes % 16 == 0,
                                             stream);
    case CacheFormat::kPlain:
      break;
  }
  aligned = aligned && params.columns % kChunk == 0;
  return with_type(params.out_dtype, [&]<DataType kOut>() {
    return with_type(params.dtype, [&]<DataType kIn>() {
      return launch(
          aligned ? &gather_plain_kernel<kIn, kOut, true> : &gather_plain_kernel<kIn, kOut, false>,
          params, stream);
    });
  });
}

}  // namespace flashmla
