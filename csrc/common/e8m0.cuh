// Scales of the V4 format.
#pragma once

#include <cstdint>

namespace flashmla {

// 2^(code - 127): the code is the exponent of a float32, but for 0, which is a subnormal, and 255,
// which is NaN.
__device__ __forceinline__ float e8m0_to_float(uint32_t code) {
  const uint32_t bits = code == 0 ? 0x400000 : code << 23;
  return __uint_as_float(code == 255 ? 0x7FC00000 : bits);
}

}  // namespace flashmla
