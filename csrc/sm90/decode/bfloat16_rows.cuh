// Rows of bfloat16 queries that a kernel scales by powers of two, in pairs of elements.
#pragma once

#include "common/ptx.cuh"

namespace flashmla::sm90::decode {

// The largest magnitude, as the bits of a bfloat16, of eight.
__device__ __forceinline__ uint32_t largest(const uint4& x) {
  const uint32_t m = __vmaxu2(__vmaxu2(x.x & 0x7fff7fff, x.y & 0x7fff7fff),
                              __vmaxu2(x.z & 0x7fff7fff, x.w & 0x7fff7fff));
  return max(m >> 16, m & 0xffff);
}

template <typename To>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t pair, float factor) {
  const float2 x = ptx::unpack<__nv_bfloat16>(pair);
  return ptx::pack<To>(x.x * factor, x.y * factor);
}

}  // namespace flashmla::sm90::decode
