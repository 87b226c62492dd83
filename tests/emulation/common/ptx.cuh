// In place of csrc/common/ptx.cuh: what the kernels of csrc/smxx use of it.
#pragma once

#include "simt.h"

namespace flashmla::ptx {

inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

template <typename T>
uint32_t pack(float lo, float hi);

template <>
inline uint32_t pack<__half>(float lo, float hi) {
  const auto bits = [](float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); };
  return bits(lo) | static_cast<uint32_t>(bits(hi)) << 16;
}

template <>
inline uint32_t pack<__nv_bfloat16>(float lo, float hi) {
  const auto bits = [](float x) {
    if (std::isnan(x)) return 0x7fffu;
    const uint32_t word = std::bit_cast<uint32_t>(x);
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
  };
  return bits(lo) | bits(hi) << 16;
}

}  // namespace flashmla::ptx
