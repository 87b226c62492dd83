// Tokens of a paged cache: their elements on the bits, e4m3 codes, and where a token lies.
//
// jax_flashmla/quantization.py describes the formats and the rounding. Every conversion here is
// exact or rounded to the nearest, ties to even, subnormals included; so results have the bits of
// numpy.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "common/fp8_formats.h"
#include "params.h"

namespace flashmla::cache_format {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kChunk = 8;  // elements that a lane takes at once
constexpr uint32_t kInfinityBits = 0x7F800000;

// ---------------------------------------------------------------------------------------------
// Elements
// ---------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_nan(uint32_t float_bits) {
  return (float_bits & 0x7FFFFFFF) > kInfinityBits;
}

// widen: to float32, exact, a NaN with its sign and payload.
// round: to the nearest; a NaN becomes the quiet one of its sign.
// narrow: the reverse of widen, for values that need no rounding.
template <DataType kType>
struct Element;

template <>
struct Element<DataType::kBFloat16> {
  using Bits = uint16_t;

  __device__ __forceinline__ static float widen(Bits x) {
    return __uint_as_float(uint32_t{x} << 16);
  }
  __device__ __forceinline__ static Bits round(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (is_nan(bits)) return static_cast<Bits>((bits >> 16 & 0x8000) | 0x7FC0);
    return static_cast<Bits>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  __device__ __forceinline__ static Bits narrow(float x) {
    return static_cast<Bits>(__float_as_uint(x) >> 16);
  }
};

template <>
struct Element<DataType::kFloat16> {
  using Bits = uint16_t;

  __device__ __forceinline__ static float widen(Bits x) {
    // The conversion instruction drops the sign of a NaN.
    const uint32_t special = (x & 0x8000u) << 16 | kInfinityBits | (x & 0x3FFu) << 13;
    const float number = __half2float(__ushort_as_half(x));
    return (x & 0x7C00) == 0x7C00 ? __uint_as_float(special) : number;
  }
  __device__ __forceinline__ static Bits round(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (is_nan(bits)) return static_cast<Bits>((bits >> 16 & 0x8000) | 0x7E00);
    return __half_as_ushort(__float2half_rn(x));
  }
  __device__ __forceinline__ static Bits narrow(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (is_nan(bits)) {
      return static_cast<Bits>((bits >> 16 & 0x8000) | 0x7C00 | (bits >> 13 & 0x3FF));
    }
    return __half_as_ushort(__float2half_rn(x));
  }
};

template <>
struct Element<DataType::kFloat32> {
  using Bits = uint32_t;

  __device__ __forceinline__ static float widen(Bits x) { return __uint_as_float(x); }
  __device__ __forceinline__ static Bits round(float x) { return __float_as_uint(x); }
  __device__ __forceinline__ static Bits narrow(float x) { return __float_as_uint(x); }
};

template <DataType kType>
using BitsOf = typename Element<kType>::Bits;

// Consecutive T at `source`, by 16 or 8 bytes where aligned to them.
template <bool kAligned, typename T, int kCount>
__device__ __forceinline__ void load(const T* source, T (&values)[kCount]) {
  constexpr int kBytes = sizeof(T) * kCount;
  if constexpr (kAligned && kBytes % 16 == 0) {
    constexpr int kPerVector = 16 / sizeof(T);
#pragma unroll
    for (int v = 0; v < kBytes / 16; ++v) {
      union {
        uint4 vector;
        T values[kPerVector];
      } part;
      part.vector = reinterpret_cast<const uint4*>(source)[v];
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) values[v * kPerVector + i] = part.values[i];
    }
  } else if constexpr (kAligned && kBytes == 8) {
    union {
      uint2 vector;
      T values[kCount];
    } part;
    part.vector = *reinterpret_cast<const uint2*>(source);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = part.values[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = source[i];
  }
}

template <bool kAligned, typename T, int kCount>
__device__ __forceinline__ void store(T* target, const T (&values)[kCount]) {
  constexpr int kBytes = sizeof(T) * kCount;
  if constexpr (kAligned && kBytes % 16 == 0) {
    constexpr int kPerVector = 16 / sizeof(T);
#pragma unroll
    for (int v = 0; v < kBytes / 16; ++v) {
      union {
        uint4 vector;
        T values[kPerVector];
      } part;
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) part.values[i] = values[v * kPerVector + i];
      reinterpret_cast<uint4*>(target)[v] = part.vector;
    }
  } else if constexpr (kAligned && (kBytes == 8 || kBytes == 4)) {
    union {
      uint32_t words[kBytes / 4];
      T values[kCount];
    } part;
#pragma unroll
    for (int i = 0; i < kCount; ++i) part.values[i] = values[i];
    if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(target) = uint2{part.words[0], part.words[1]};
    } else {
      *reinterpret_cast<uint32_t*>(target) = part.words[0];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) target[i] = values[i];
  }
}

template <bool kAligned, DataType kType, int kCount>
__device__ __forceinline__ void load_floats(const void* base, int64_t index, float (&x)[kCount]) {
  BitsOf<kType> bits[kCount];
  load<kAligned>(static_cast<const BitsOf<kType>*>(base) + index, bits);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = Element<kType>::widen(bits[i]);
}

// The same for a type that is not known to the compiler.
template <bool kAligned, int kCount>
__device__ __forceinline__ void load_floats(DataType type, const void* base, int64_t index,
                                            float (&x)[kCount]) {
  switch (type) {
    case DataType::kBFloat16:
      return load_floats<kAligned, DataType::kBFloat16>(base, index, x);
    case DataType::kFloat16:
      return load_floats<kAligned, DataType::kFloat16>(base, index, x);
    case DataType::kFloat32:
      return load_floats<kAligned, DataType::kFloat32>(base, index, x);
  }
}

__device__ __forceinline__ float load_float(DataType type, const void* base, int64_t index) {
  float x[1];
  load_floats<false>(type, base, index, x);
  return x[0];
}

// As Element::round by the conversion instruction, two at once. A NaN becomes any.
template <DataType kType>
__device__ __forceinline__ void round_numbers(const float (&x)[kChunk],
                                              BitsOf<kType> (&bits)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; i += 2) {
    if constexpr (kType == DataType::kBFloat16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i], x[i + 1]);
      bits[i] = __bfloat16_as_ushort(pair.x);
      bits[i + 1] = __bfloat16_as_ushort(pair.y);
    } else if constexpr (kType == DataType::kFloat16) {
      const __half2 pair = __floats2half2_rn(x[i], x[i + 1]);
      bits[i] = __half_as_ushort(pair.x);
      bits[i + 1] = __half_as_ushort(pair.y);
    } else {
      bits[i] = __float_as_uint(x[i]);
      bits[i + 1] = __float_as_uint(x[i + 1]);
    }
  }
}

// A float32 as it comes back from a result of this type.
__device__ __forceinline__ float rounded(DataType type, float x) {
  switch (type) {
    case DataType::kBFloat16:
      return __bfloat162float(__float2bfloat16_rn(x));
    case DataType::kFloat16:
      return __half2float(__float2half_rn(x));
    case DataType::kFloat32:
      return x;
  }
  return x;
}

template <DataType kType, bool kAligned>
__device__ __forceinline__ void store_rounded(BitsOf<kType>* target, const float (&x)[kChunk]) {
  BitsOf<kType> bits[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) bits[i] = Element<kType>::round(x[i]);
  store<kAligned>(target, bits);
}

// ---------------------------------------------------------------------------------------------
// FP8
// ---------------------------------------------------------------------------------------------

constexpr float kE4m3Max = 448.f;
constexpr float kMinScale = 1e-4f;
constexpr float kMaxScale = 255.f;
constexpr int kMinExponent = -13;  // 2^-13 is kMinScale rounded up to a power of two
constexpr int kMaxExponent = 7;

// The e4m3 codes of four quotients x / scale, saturated. NaN gives a NaN code with the sign of x,
// which arithmetic has dropped from the quotient.
__device__ __forceinline__ uint32_t e4m3_codes(const float* quotient, const float* x) {
  const auto two = [](const float* q) -> uint32_t {
    return __nv_cvt_float2_to_fp8x2(make_float2(q[0], q[1]), __NV_SATFINITE, __NV_E4M3);
  };
  // The first byte of each x.
  const auto tops = [](const float* x) {
    return __byte_perm(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x0073);
  };
  const uint32_t signs = __byte_perm(tops(x), tops(x + 2), 0x5410) & 0x80808080;
  return two(quotient) | two(quotient + 2) << 16 | signs;
}

// The values of two e4m3 codes, exact.
__device__ __forceinline__ float2 e4m3_values(uint32_t codes) {
  const __half2_raw halves =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return __half22float2(__half2(halves));
}

// The exponent k of 2^ceil(log2(max(amax / 448, 1e-4))), capped. 448 is 1.75 * 2^8.
__device__ __forceinline__ int power_of_two_exponent(float amax) {
  const uint32_t bits = __float_as_uint(amax);
  const int exponent = static_cast<int>(bits >> 23) - 127;
  const int k = exponent - 8 + ((bits & 0x7FFFFF) > 0x600000);
  return min(max(k, kMinExponent), kMaxExponent);
}

// 2^k of a k in [-126, 127].
__device__ __forceinline__ float power_of_two(int k) {
  return __uint_as_float(static_cast<uint32_t>(k + 127) << 23);
}

// ---------------------------------------------------------------------------------------------
// Places
// ---------------------------------------------------------------------------------------------

template <CacheFormat kFormat>
struct Fp8;

template <>
struct Fp8<CacheFormat::kFp8V32> : fp8_formats::V32 {
  static constexpr int kScaleBytes = 4;
  static constexpr int kRopeAt = kRopeOffset;
};

template <>
struct Fp8<CacheFormat::kFp8V4> : fp8_formats::V4 {
  static constexpr int kScaleBytes = 1;
  static constexpr int kRopeAt = kRopeOffset;
};

constexpr int kFp8Rope = 64;

// Where the parts of one token are.
template <typename Byte>
struct Place {
  Byte* data;
  Byte* scales;
  Byte* rope;
};

template <CacheFormat kFormat, typename Byte>
__device__ __forceinline__ Place<Byte> place_of(Byte* cache, int slot, int page_size,
                                                int64_t page_bytes) {
  using Format = Fp8<kFormat>;
  if constexpr (kFormat == CacheFormat::kFp8V32) {
    Byte* row = cache + int64_t{slot} * Format::kTokenBytes;
    return {row, row + Format::kLatent, row + Format::kRopeAt};
  } else {
    Byte* page = cache + slot / page_size * page_bytes;
    const int64_t offset = slot % page_size;
    Byte* data = page + offset * Format::kTokenBytes;
    Byte* scales = page + int64_t{page_size} * Format::kTokenBytes;
    return {data, scales + offset * Format::kTokenScaleBytes, data + Format::kRopeAt};
  }
}

__device__ __forceinline__ bool is_slot(int slot, int num_pages, int page_size) {
  return slot >= 0 && slot < int64_t{num_pages} * page_size;
}

// ---------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------

// A warp takes a token. Few tokens get a CTA each, so that they spread over the SMs.
constexpr int kMaxWarps = 8;

inline int warps_of(int64_t tokens) {
  const int64_t warps = tokens / 256;
  return warps < 1 ? 1 : warps > kMaxWarps ? kMaxWarps : static_cast<int>(warps);
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Whether the bytes of a cache can be accessed as the formats need it at least.
inline bool fits_words(const void* cache, int64_t page_bytes) {
  return reinterpret_cast<uintptr_t>(cache) % 4 == 0 && page_bytes % 4 == 0;
}

inline int64_t size_of(DataType type) { return type == DataType::kFloat32 ? 4 : 2; }

// Calls `function` with the type as a template argument.
template <typename Function>
auto with_type(DataType type, const Function& function) {
  switch (type) {
    case DataType::kFloat16:
      return function.template operator()<DataType::kFloat16>();
    case DataType::kFloat32:
      return function.template operator()<DataType::kFloat32>();
    default:
      return function.template operator()<DataType::kBFloat16>();
  }
}

}  // namespace flashmla::cache_format
