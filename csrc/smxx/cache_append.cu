// Writes tokens to slots of a paged cache: rounded to its type or quantised to its FP8 format, and
// before that the latent part normalised and the RoPE part rotated, if asked.
//
// A warp takes a token at a time. Lane l holds chunks l, l + 32, ... of 8 elements of the latent
// part, so that loads and stores of a warp are of consecutive bytes.
//
// RMS norm, in float32 and without fused multiply-add, so that it can be done again elsewhere to
// the bit: a lane adds the squares of its elements in ascending order to 0; then lane l adds the
// sum of lane l ^ 16 to its own, and so on with 8, 4, 2, 1. With mean = sum / latent,
//   y = (x * (1 / sqrt(mean + eps))) * weight,
// every operation rounded, and y rounded to the type of kv_c.
//
// RoPE: a cos - b sin and a sin + b cos of a pair (a, b), in float32, every operation rounded, and
// the result rounded to the type of k_pe.
#include <algorithm>

#include "common/cache_format.cuh"
#include "common/dependent_launch.cuh"
#include "common/fast_divide.h"
#include "common/ptx.cuh"
#include "launch.h"

namespace flashmla {
namespace {

using namespace cache_format;

__device__ __forceinline__ float add_square(float sum, float x) {
  return __fadd_rn(sum, __fmul_rn(x, x));
}

__device__ __forceinline__ float add_lanes(float sum) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, step));
  }
  return sum;
}

// 1 / sqrt(mean + eps) of the sums of all lanes.
__device__ __forceinline__ float norm_factor(float sum, int latent, float eps) {
  const float mean = __fdiv_rn(add_lanes(sum), static_cast<float>(latent));
  return __fdiv_rn(1.f, __fsqrt_rn(__fadd_rn(mean, eps)));
}

// The same bits: a reciprocal and a product with a power of two are rounded as quotients are.
template <int kLatent>
__device__ __forceinline__ float norm_factor(float sum, float eps) {
  sum = add_lanes(sum);
  float mean;
  if constexpr ((kLatent & (kLatent - 1)) == 0) {
    mean = __fmul_rn(sum, 1.f / kLatent);
  } else {
    mean = __fdiv_rn(sum, static_cast<float>(kLatent));
  }
  return __frcp_rn(__fsqrt_rn(__fadd_rn(mean, eps)));
}

__device__ __forceinline__ float normalised(float x, float factor, float weight) {
  return __fmul_rn(__fmul_rn(x, factor), weight);
}

// A chunk, rounded to its type.
template <DataType kType>
__device__ __forceinline__ void normalise(float (&x)[kChunk], float factor,
                                          const float (&weight)[kChunk],
                                          BitsOf<kType> (&bits)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = normalised(x[i], factor, weight[i]);
  round_numbers<kType>(x, bits);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = Element<kType>::widen(bits[i]);
}

// Two columns of the RoPE part that turn together.
struct Pair {
  float a;
  float b;
  int first;   // column of a
  int second;  // column of b; rope if there is none
};

__device__ __forceinline__ Pair load_pair(const CacheAppendParams& p, int64_t row, int index) {
  Pair pair;
  const bool split = p.rope_layout == RopeLayout::kHalfSplit;
  pair.first = split ? index : 2 * index;
  pair.second = split ? index + p.rope / 2 : 2 * index + 1;
  const int64_t base = row * p.k_pe_stride;
  pair.a = load_float(p.k_pe_dtype, p.k_pe, base + pair.first);
  pair.b = pair.second < p.rope ? load_float(p.k_pe_dtype, p.k_pe, base + pair.second) : 0.f;
  if (p.rope_layout == RopeLayout::kNone) return pair;
  const int64_t angle = row * (p.rope / 2) + index;
  const float cos = p.rope_cos[angle];
  const float sin = p.rope_sin[angle];
  const float a = __fsub_rn(__fmul_rn(pair.a, cos), __fmul_rn(pair.b, sin));
  const float b = __fadd_rn(__fmul_rn(pair.a, sin), __fmul_rn(pair.b, cos));
  pair.a = rounded(p.k_pe_dtype, a);
  pair.b = rounded(p.k_pe_dtype, b);
  return pair;
}

template <DataType kType, bool kAligned>
__device__ __forceinline__ void store_pair(const CacheAppendParams& p, const Pair& pair,
                                           BitsOf<kType>* target) {
  const bool as_it_is = p.k_pe_dtype == kType && p.rope_layout == RopeLayout::kNone;
  BitsOf<kType> bits[2];
  bits[0] = as_it_is ? Element<kType>::narrow(pair.a) : Element<kType>::round(pair.a);
  bits[1] = as_it_is ? Element<kType>::narrow(pair.b) : Element<kType>::round(pair.b);
  if (kAligned && pair.second == pair.first + 1 && pair.second < p.rope) {
    store<true>(target + pair.first, bits);
    return;
  }
  target[pair.first] = bits[0];
  if (pair.second < p.rope) target[pair.second] = bits[1];
}

// ---------------------------------------------------------------------------------------------
// FP8 formats
// ---------------------------------------------------------------------------------------------

template <CacheFormat kFormat, DataType kType, bool kAligned>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 4)
    append_fp8_kernel(const CacheAppendParams p) {
  using Format = Fp8<kFormat>;
  constexpr int kChunks = (Format::kLatent / kChunk + kLanes - 1) / kLanes;  // of a lane
  constexpr int kTileLanes = Format::kTile / kChunk;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int lane = threadIdx.x % kLanes;
  const int64_t token = int64_t{blockIdx.x} * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (token >= p.tokens) return;
  const auto column_of = [&](int c) { return (c * kLanes + lane) * kChunk; };

  // All loads before the slot decides, which would cost its latency again.
  const int slot = p.slots[token];
  float x[kChunks][kChunk] = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (column_of(c) < Format::kLatent) {
      load_floats<kAligned, kType>(p.kv_c, token * p.kv_c_stride + column_of(c), x[c]);
    }
  }
  const Pair pair = load_pair(p, token, lane);
  if (!is_slot(slot, p.num_pages, p.page_size)) return;

  if (p.norm_weight != nullptr) {
    float weight[kChunks][kChunk] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (column_of(c) < Format::kLatent) {
        load_floats<kAligned>(p.norm_dtype, p.norm_weight, column_of(c), weight[c]);
      }
    }
    float sum = 0.f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum = add_square(sum, x[c][i]);
    }
    const float factor = norm_factor(sum, Format::kLatent, p.norm_eps);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      BitsOf<kType> bits[kChunk];
      normalise<kType>(x[c], factor, weight[c], bits);
    }
  }

  const Place<uint8_t> place =
      place_of<kFormat>(static_cast<uint8_t*>(p.cache), slot, p.page_size, p.page_bytes);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int column = column_of(c);
    // fmaxf leaves out NaN.
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) amax = fmaxf(amax, fabsf(x[c][i]));
#pragma unroll
    for (int step = kTileLanes / 2; step > 0; step /= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, step));
    }
    const int tile = column / Format::kTile;
    const bool stores_scale = lane % kTileLanes == 0;
    float quotient[kChunk];
    if (kFormat == CacheFormat::kFp8V4 || p.power_of_two_scales) {
      const int k = power_of_two_exponent(amax);
      const float inverse = power_of_two(-k);
      // Exact, but where the quotient is so small that its code is 0 anyway.
#pragma unroll
      for (int i = 0; i < kChunk; ++i) quotient[i] = __fmul_rn(x[c][i], inverse);
      if (stores_scale) {
        if constexpr (kFormat == CacheFormat::kFp8V4) {
          // The byte after the last scale is padding.
          place.scales[tile] = static_cast<uint8_t>(column < Format::kLatent ? k + 127 : 0);
        } else {
          reinterpret_cast<uint32_t*>(place.scales)[tile] = static_cast<uint32_t>(k + 127) << 23;
        }
      }
    } else {
      const float scale = fminf(fmaxf(__fdiv_rn(amax, kE4m3Max), kMinScale), kMaxScale);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) quotient[i] = __fdiv_rn(x[c][i], scale);
      if (stores_scale) reinterpret_cast<float*>(place.scales)[tile] = scale;
    }
    const uint32_t codes[2] = {e4m3_codes(quotient, x[c]), e4m3_codes(quotient + 4, x[c] + 4)};
    if (column < Format::kLatent) {
      if constexpr (kAligned) {
        *reinterpret_cast<uint2*>(place.data + column) = uint2{codes[0], codes[1]};
      } else {
        // The cache is aligned to words at least.
        store<false>(reinterpret_cast<uint32_t*>(place.data + column), codes);
      }
    }
  }
  store_pair<DataType::kBFloat16, true>(p, pair, reinterpret_cast<uint16_t*>(place.rope));
}

// ---------------------------------------------------------------------------------------------
// Plain caches
// ---------------------------------------------------------------------------------------------

// kAligned: rows and their parts begin at multiples of 16 bytes and consist of whole chunks.
template <DataType kIn, DataType kOut, bool kAligned>
__device__ __forceinline__ void append_row(const CacheAppendParams& p, int64_t row, int lane,
                                           BitsOf<kOut>* target) {
  const auto* source = static_cast<const BitsOf<kIn>*>(p.kv_c) + row * p.kv_c_stride;
  if (p.norm_weight != nullptr) {
    float sum = 0.f;
    for (int column = lane * kChunk; column < p.latent; column += kLanes * kChunk) {
      if constexpr (kAligned) {
        float x[kChunk];
        load_floats<true, kIn>(source, column, x);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum = add_square(sum, x[i]);
      } else {
        for (int i = column; i < min(column + kChunk, p.latent); ++i) {
          sum = add_square(sum, Element<kIn>::widen(source[i]));
        }
      }
    }
    const float factor = norm_factor(sum, p.latent, p.norm_eps);
    if constexpr (kAligned) {
      for (int column = lane * kChunk; column < p.latent; column += kLanes * kChunk) {
        float x[kChunk];
        float weight[kChunk];
        load_floats<true, kIn>(source, column, x);
        load_floats<true>(p.norm_dtype, p.norm_weight, column, weight);
        BitsOf<kIn> bits[kChunk];
        normalise<kIn>(x, factor, weight, bits);
        if constexpr (kIn == kOut) {
          store<true>(target + column, bits);
        } else {
          store_rounded<kOut, true>(target + column, x);
        }
      }
    } else {
      for (int i = lane; i < p.latent; i += kLanes) {
        const float weight = load_float(p.norm_dtype, p.norm_weight, i);
        target[i] = Element<kOut>::round(
            rounded(kIn, normalised(Element<kIn>::widen(source[i]), factor, weight)));
      }
    }
  } else if constexpr (kAligned) {
#pragma unroll 2
    for (int column = lane * kChunk; column < p.latent; column += kLanes * kChunk) {
      BitsOf<kIn> bits[kChunk];
      load<true>(source + column, bits);
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
    for (int i = lane; i < p.latent; i += kLanes) {
      if constexpr (kIn == kOut) {
        target[i] = source[i];
      } else {
        target[i] = Element<kOut>::round(Element<kIn>::widen(source[i]));
      }
    }
  }
  for (int index = lane; index < (p.rope + 1) / 2; index += kLanes) {
    store_pair<kOut, kAligned>(p, load_pair(p, row, index), target + p.latent);
  }
}

template <DataType kIn, DataType kOut, bool kAligned>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 4)
    append_plain_kernel(const CacheAppendParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int lane = threadIdx.x % kLanes;
  const int64_t token = int64_t{blockIdx.x} * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (token >= p.tokens) return;
  const int slot = p.slots[token];
  if (!is_slot(slot, p.num_pages, p.page_size)) return;
  const int columns = p.latent + p.rope;
  auto* target = static_cast<BitsOf<kOut>*>(p.cache) + int64_t{slot} * p.heads * columns;
  for (int head = 0; head < p.heads; ++head, target += columns) {
    append_row<kIn, kOut, kAligned>(p, token * p.heads + head, lane, target);
  }
}

// ---------------------------------------------------------------------------------------------
// The common case
// ---------------------------------------------------------------------------------------------

// bfloat16 to a plain bfloat16 cache of 512 and 64 columns, or to an FP8 format with scales that
// are powers of two; everything aligned. Latency decides the time, so a warp takes several tokens
// and loads all of the next one before it computes.

// CTAs of an SM: as many as the registers allow without spills.
template <CacheFormat kFormat, bool kNormed>
constexpr int kCommonCtas = kFormat != CacheFormat::kPlain && kNormed ? 3 : 4;

constexpr int kMaxCommon = 1 << 26;  // tokens and strides, so that 32 bits hold 32 times as many
constexpr int kPlainLatent = 512;
constexpr int kTokenChunks = 2;       // of a lane
constexpr int kWords = kChunk / 2;    // of a chunk
constexpr int kPairs = kFp8Rope / 2;  // one of each lane
static_assert(kPairs == kLanes);

// What a lane takes of a token.
struct TokenLoads {
  int slot;
  uint32_t latent[kTokenChunks][kWords];  // two elements a word
  uint32_t rope[2];  // a pair in the first word, or a and b of a half split in one each
  float cos;
  float sin;
};

__device__ __forceinline__ float low_element(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_element(uint32_t word) {
  return __uint_as_float(word & 0xFFFF0000);
}

// A pair as bfloat16 in a word. A NaN becomes what the conversion instruction makes of it.
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <int kLatent, RopeLayout kLayout>
__device__ __forceinline__ void load_token(const CacheAppendParams& p, uint32_t token,
                                           uint32_t lane, TokenLoads& loads) {
  // is_common has seen to it that 32 bits of the strides suffice.
  const uint64_t row = uint64_t{token} * static_cast<uint32_t>(p.kv_c_stride);
  const uint64_t rope_row = uint64_t{token} * static_cast<uint32_t>(p.k_pe_stride);
  loads.slot = p.slots[token];
  const auto* latent = static_cast<const uint16_t*>(p.kv_c) + (row + lane * kChunk);
#pragma unroll
  for (int c = 0; c < kTokenChunks; ++c) {
    if ((c * kLanes + lane) * kChunk < kLatent) {
      load<true>(reinterpret_cast<const uint32_t*>(latent + c * kLanes * kChunk), loads.latent[c]);
    }
  }
  const auto* rope = static_cast<const uint16_t*>(p.k_pe);
  if constexpr (kLayout == RopeLayout::kHalfSplit) {
    rope += rope_row + lane;
    loads.rope[0] = rope[0];
    loads.rope[1] = rope[kPairs];
  } else {
    loads.rope[0] = *reinterpret_cast<const uint32_t*>(rope + (rope_row + 2 * lane));
  }
  if constexpr (kLayout != RopeLayout::kNone) {
    const uint32_t angle = token * kPairs + lane;
    loads.cos = p.rope_cos[angle];
    loads.sin = p.rope_sin[angle];
  }
}

template <int kLatent>
__device__ __forceinline__ void normalise_token(uint32_t (&words)[kTokenChunks][kWords], float eps,
                                                const float (&weight)[kTokenChunks][kChunk]) {
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < kTokenChunks; ++c) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      sum = add_square(sum, low_element(words[c][w]));
      sum = add_square(sum, high_element(words[c][w]));
    }
  }
  const float factor = norm_factor<kLatent>(sum, eps);
#pragma unroll
  for (int c = 0; c < kTokenChunks; ++c) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      words[c][w] = round_pair(normalised(low_element(words[c][w]), factor, weight[c][2 * w]),
                               normalised(high_element(words[c][w]), factor, weight[c][2 * w + 1]));
    }
  }
}

// The largest magnitude in each tile that the lane has a chunk of; NaN is left out. They have the
// upper 16 bits of a float32 only, so that two are reduced at once.
template <int kTileLanes>
__device__ __forceinline__ void tile_maxima(const uint32_t (&words)[kTokenChunks][kWords],
                                            float (&amax)[kTokenChunks]) {
  static_assert(kTokenChunks == 2);
#pragma unroll
  for (int c = 0; c < kTokenChunks; ++c) {
    amax[c] = 0.f;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      amax[c] = fmaxf(amax[c], fabsf(low_element(words[c][w])));
      amax[c] = fmaxf(amax[c], fabsf(high_element(words[c][w])));
    }
  }
  uint32_t both = __byte_perm(__float_as_uint(amax[0]), __float_as_uint(amax[1]), 0x7632);
#pragma unroll
  for (int step = kTileLanes / 2; step > 0; step /= 2) {
    both = __vmaxu2(both, __shfl_xor_sync(kAllLanes, both, step));
  }
  amax[0] = low_element(both);
  amax[1] = high_element(both);
}

// The e4m3 codes of four numbers, saturated; 0x7F of a NaN.
__device__ __forceinline__ uint32_t four_codes(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  uint32_t codes;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}\n"
      : "=r"(codes)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return codes;
#else
  const auto two = [](float x, float y) -> uint32_t {
    return __nv_cvt_float2_to_fp8x2(make_float2(x, y), __NV_SATFINITE, __NV_E4M3);
  };
  return two(a, b) | two(c, d) << 16;
#endif
}

// The codes of four elements; a NaN keeps its sign.
__device__ __forceinline__ uint32_t codes_of(uint32_t first, uint32_t second, float inverse) {
  const uint32_t codes =
      four_codes(__fmul_rn(low_element(first), inverse), __fmul_rn(high_element(first), inverse),
                 __fmul_rn(low_element(second), inverse), __fmul_rn(high_element(second), inverse));
  return codes | (__byte_perm(first, second, 0x7531) & 0x80808080);
}

template <RopeLayout kLayout>
__device__ __forceinline__ void store_rope(const TokenLoads& loads, int lane, uint16_t* target) {
  if constexpr (kLayout == RopeLayout::kNone) {
    reinterpret_cast<uint32_t*>(target)[lane] = loads.rope[0];
  } else {
    constexpr bool kSplit = kLayout == RopeLayout::kHalfSplit;
    const float a = low_element(loads.rope[0]);
    const float b = kSplit ? low_element(loads.rope[1]) : high_element(loads.rope[0]);
    const float first = __fsub_rn(__fmul_rn(a, loads.cos), __fmul_rn(b, loads.sin));
    const float second = __fadd_rn(__fmul_rn(a, loads.sin), __fmul_rn(b, loads.cos));
    const uint32_t pair = round_pair(first, second);
    // Arithmetic gives positive NaN.
    constexpr uint32_t kNan = 0x7FC0;
    const uint32_t low = isnan(first) ? kNan : pair;
    const uint32_t high = isnan(second) ? kNan << 16 : pair;
    if constexpr (kSplit) {
      target[lane] = static_cast<uint16_t>(low);
      target[lane + kPairs] = static_cast<uint16_t>(high >> 16);
    } else {
      reinterpret_cast<uint32_t*>(target)[lane] = __byte_perm(low, high, 0x7610);
    }
  }
}

// As place_of.
template <CacheFormat kFormat>
__device__ __forceinline__ Place<uint8_t> quick_place_of(uint8_t* cache, int slot,
                                                         const FastDivide& page_size,
                                                         int64_t page_bytes) {
  using Format = Fp8<kFormat>;
  if constexpr (kFormat == CacheFormat::kFp8V32) {
    return place_of<kFormat>(cache, slot, page_size.divisor, page_bytes);
  } else {
    // Unsigned products are cheaper; none of the numbers is negative.
    const uint32_t page = page_size.quotient(slot);
    const uint64_t offset = slot - page * page_size.divisor;
    uint8_t* begin = cache + page * static_cast<uint64_t>(page_bytes);
    uint8_t* data = begin + offset * Format::kTokenBytes;
    uint8_t* scales = begin + int64_t{page_size.divisor} * Format::kTokenBytes;
    return {data, scales + offset * Format::kTokenScaleBytes, data + Format::kRopeAt};
  }
}

template <CacheFormat kFormat>
constexpr int latent_of() {
  if constexpr (kFormat == CacheFormat::kPlain) {
    return kPlainLatent;
  } else {
    return Fp8<kFormat>::kLatent;
  }
}

template <CacheFormat kFormat, RopeLayout kLayout, bool kNormed>
__global__ void __launch_bounds__(kMaxWarps* kLanes, (kCommonCtas<kFormat, kNormed>))
    append_common_kernel(const CacheAppendParams p, const FastDivide page_size, uint32_t slots) {
  constexpr int kLatent = latent_of<kFormat>();
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int lane = threadIdx.x % kLanes;
  const int warps = blockDim.x / kLanes;
  const uint32_t step = gridDim.x * warps;
  const uint32_t tokens = static_cast<uint32_t>(p.tokens);
  uint32_t token = blockIdx.x * warps + threadIdx.x / kLanes;
  if (token >= tokens) return;

  TokenLoads next = {};
  load_token<kLatent, kLayout>(p, token, lane, next);
  float weight[kTokenChunks][kChunk] = {};
  if constexpr (kNormed) {
#pragma unroll
    for (int c = 0; c < kTokenChunks; ++c) {
      const int column = (c * kLanes + lane) * kChunk;
      if (column < kLatent) load_floats<true>(p.norm_dtype, p.norm_weight, column, weight[c]);
    }
  }

  while (token < tokens) {
    TokenLoads now = next;
    token += step;
    if (token < tokens) load_token<kLatent, kLayout>(p, token, lane, next);
    // Negative ones are too large without a sign.
    if (static_cast<uint32_t>(now.slot) >= slots) continue;
    if constexpr (kNormed) normalise_token<kLatent>(now.latent, p.norm_eps, weight);
    if constexpr (kFormat == CacheFormat::kPlain) {
      auto* row = static_cast<uint16_t*>(p.cache) + int64_t{now.slot} * (kLatent + kFp8Rope);
#pragma unroll
      for (int c = 0; c < kTokenChunks; ++c) {
        store<true>(reinterpret_cast<uint32_t*>(row + (c * kLanes + lane) * kChunk), now.latent[c]);
      }
      store_rope<kLayout>(now, lane, row + kLatent);
    } else {
      using Format = Fp8<kFormat>;
      constexpr int kTileLanes = Format::kTile / kChunk;
      const Place<uint8_t> place = quick_place_of<kFormat>(static_cast<uint8_t*>(p.cache), now.slot,
                                                           page_size, p.page_bytes);
      float amax[kTokenChunks];
      tile_maxima<kTileLanes>(now.latent, amax);
      int exponent[kTokenChunks];
#pragma unroll
      for (int c = 0; c < kTokenChunks; ++c) {
        exponent[c] = power_of_two_exponent(amax[c]);
        // Exact, but where the quotient is so small that its code is 0 anyway.
        const float inverse = power_of_two(-exponent[c]);
        const int column = (c * kLanes + lane) * kChunk;
        if (column < kLatent) {
          *reinterpret_cast<uint2*>(place.data + column) =
              uint2{codes_of(now.latent[c][0], now.latent[c][1], inverse),
                    codes_of(now.latent[c][2], now.latent[c][3], inverse)};
        }
      }
      // The first two lanes of a tile store the scale of a chunk each.
      const int chunk = lane % kTileLanes;
      if (chunk < kTokenChunks) {
        const int tile = chunk * (kLanes / kTileLanes) + lane / kTileLanes;
        const int biased = (chunk == 0 ? exponent[0] : exponent[1]) + 127;
        if constexpr (kFormat == CacheFormat::kFp8V4) {
          // The byte after the last scale is padding.
          place.scales[tile] = static_cast<uint8_t>(tile < kLatent / Format::kTile ? biased : 0);
        } else {
          reinterpret_cast<uint32_t*>(place.scales)[tile] = static_cast<uint32_t>(biased) << 23;
        }
      }
      store_rope<kLayout>(now, lane, reinterpret_cast<uint16_t*>(place.rope));
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------

template <typename Kernel>
Status launch(Kernel kernel, const CacheAppendParams& p, cudaStream_t stream) {
  const int warps = warps_of(p.tokens);
  return launch_dependent(kernel, "grid of the append kernel", (p.tokens + warps - 1) / warps,
                          warps * kLanes, 0, stream, p);
}

template <CacheFormat kFormat>
Status launch_fp8(const CacheAppendParams& p, bool aligned, cudaStream_t stream) {
  return with_type(p.kv_c_dtype, [&]<DataType kType>() {
    return launch(aligned ? &append_fp8_kernel<kFormat, kType, true>
                          : &append_fp8_kernel<kFormat, kType, false>,
                  p, stream);
  });
}

// Whether append_common_kernel can take it, but for the alignment.
bool is_common(const CacheAppendParams& p) {
  const bool fits = p.format != CacheFormat::kPlain
                        ? p.format == CacheFormat::kFp8V4 || p.power_of_two_scales
                        : p.dtype == DataType::kBFloat16 && p.heads == 1 &&
                              p.latent == kPlainLatent &&
                              (p.norm_weight != nullptr || p.rope_layout != RopeLayout::kNone);
  return fits && p.rope == kFp8Rope && p.kv_c_dtype == DataType::kBFloat16 &&
         p.k_pe_dtype == DataType::kBFloat16 && p.num_pages > 0 && p.page_size > 0 &&
         p.tokens > 0 && p.tokens <= kMaxCommon && p.kv_c_stride >= 0 &&
         p.kv_c_stride <= kMaxCommon && p.k_pe_stride >= 0 && p.k_pe_stride <= kMaxCommon &&
         reinterpret_cast<uintptr_t>(p.k_pe) % 4 == 0 && p.k_pe_stride % 2 == 0;
}

template <CacheFormat kFormat, RopeLayout kLayout, bool kNormed>
Status launch_common(const CacheAppendParams& p, cudaStream_t stream) {
  int device = 0;
  int sms = 0;
  FLASHMLA_RETURN_IF_ERROR(cudaGetDevice(&device));
  FLASHMLA_RETURN_IF_ERROR(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  const int warps = warps_of(p.tokens);
  const int64_t ctas =
      std::min<int64_t>((p.tokens + warps - 1) / warps,
                        int64_t{sms} * kCommonCtas<kFormat, kNormed> * kMaxWarps / warps);
  // A slot is an int32.
  const int64_t slots = std::min<int64_t>(int64_t{p.num_pages} * p.page_size, int64_t{1} << 31);
  return launch_dependent(&append_common_kernel<kFormat, kLayout, kNormed>,
                          "grid of the append kernel", ctas, warps * kLanes, 0, stream, p,
                          FastDivide(p.page_size), static_cast<uint32_t>(slots));
}

template <CacheFormat kFormat, RopeLayout kLayout>
Status launch_common(const CacheAppendParams& p, cudaStream_t stream) {
  return p.norm_weight != nullptr ? launch_common<kFormat, kLayout, true>(p, stream)
                                  : launch_common<kFormat, kLayout, false>(p, stream);
}

template <CacheFormat kFormat>
Status launch_common(const CacheAppendParams& p, cudaStream_t stream) {
  switch (p.rope_layout) {
    case RopeLayout::kInterleaved:
      return launch_common<kFormat, RopeLayout::kInterleaved>(p, stream);
    case RopeLayout::kHalfSplit:
      return launch_common<kFormat, RopeLayout::kHalfSplit>(p, stream);
    default:
      return launch_common<kFormat, RopeLayout::kNone>(p, stream);
  }
}

// Whether 16 bytes of kv_c, of the norm's weight and of the cache can be moved at once.
bool is_aligned_all(const CacheAppendParams& p) {
  return is_aligned(p.kv_c) && is_aligned(p.norm_weight) && is_aligned(p.cache) &&
         p.kv_c_stride * size_of(p.kv_c_dtype) % 16 == 0;
}

}  // namespace

Status launch_cache_append(const CacheAppendParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.num_pages == 0) return {};
  CacheAppendParams p = params;
  if (p.format != CacheFormat::kPlain && !fits_words(p.cache, p.page_bytes)) {
    return {cudaErrorMisalignedAddress, "cache of the append kernel"};
  }
  if (is_common(p) && is_aligned_all(p) &&
      (p.format != CacheFormat::kFp8V4 || p.page_bytes % 16 == 0)) {
    switch (p.format) {
      case CacheFormat::kPlain:
        return launch_common<CacheFormat::kPlain>(p, stream);
      case CacheFormat::kFp8V32:
        return launch_common<CacheFormat::kFp8V32>(p, stream);
      case CacheFormat::kFp8V4:
        return launch_common<CacheFormat::kFp8V4>(p, stream);
    }
  }
  switch (p.format) {
    case CacheFormat::kFp8V32:
      return launch_fp8<CacheFormat::kFp8V32>(p, is_aligned_all(p), stream);
    case CacheFormat::kFp8V4:
      return launch_fp8<CacheFormat::kFp8V4>(p, is_aligned_all(p) && p.page_bytes % 16 == 0,
                                             stream);
    case CacheFormat::kPlain:
      break;
  }
  if (p.rope == 0 && p.norm_weight == nullptr && p.kv_c_stride == p.latent &&
      int64_t{p.heads} * p.latent <= kMaxColumns) {
    // Heads that follow each other in both places are one row.
    p.latent *= p.heads;
    p.kv_c_stride = p.latent;
    p.heads = 1;
  }
  const bool aligned = is_aligned_all(p) && p.latent % kChunk == 0 && p.rope % kChunk == 0;
  return with_type(p.dtype, [&]<DataType kOut>() {
    return with_type(p.kv_c_dtype, [&]<DataType kIn>() {
      return launch(
          aligned ? &append_plain_kernel<kIn, kOut, true> : &append_plain_kernel<kIn, kOut, false>,
          p, stream);
    });
  });
}

}  // namespace flashmla
