// In place of csrc/common/wgmma.cuh: what csrc/sm90/fp8_decode uses of it. A warp computes its rows
// of a product at once, and does not wait for the other three.
#pragma once

#include "common/ptx.cuh"

namespace flashmla::wgmma {

constexpr uint64_t distance(int bytes) { return static_cast<uint64_t>(bytes >> 4); }

// The address in 16 bytes, and the distance of groups of 8 rows.
inline uint64_t k_major(uint32_t address, int group_stride) {
  return static_cast<uint64_t>(group_stride) << 32 | address >> 4;
}

inline void fence() {}
inline void commit() {}
template <int kPending>
void wait() {}
template <int kCount>
void hold(float (&)[kCount]) {}

inline float element(__half, uint16_t bits) { return std::bit_cast<_Float16>(bits); }
inline float element(__nv_bfloat16, uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

template <typename T, int kAccumulators>
void narrow_rs(T type, float (&d)[kAccumulators], const uint32_t (&a)[4], uint64_t b,
               bool accumulate) {
  const unsigned lane = simt::lane();
  uint32_t quad[4][4];  // operand of the lanes that have the same rows
  for (int i = 0; i < 4; ++i) {
    simt::warp().exchange(lane, a[i], [&](const std::vector<uint32_t>& words) {
      for (int j = 0; j < 4; ++j) quad[j][i] = words[lane / 4 * 4 + j];
      return 0;
    });
  }
  const uint32_t start = static_cast<uint32_t>(b) << 4;
  const uint32_t group_stride = static_cast<uint32_t>(b >> 32);
  for (int i = 0; i < kAccumulators; ++i) {
    const uint32_t column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    const int h = i / 2 % 2;
    float sum = accumulate ? d[i] : 0.f;
    for (uint32_t k = 0; k < 16; ++k) {
      const uint32_t pair = quad[k % 8 / 2][k / 8 * 2 + h];
      const uint32_t place = start + column / 8 * group_stride + column % 8 * 128 + 2 * k;
      const uint32_t swizzled = place ^ (place >> 7 & 7) << 4;
      sum += element(type, static_cast<uint16_t>(pair >> k % 2 * 16)) *
             element(type, ptx::smem<uint16_t>(swizzled));
    }
    d[i] = sum;
  }
}

}  // namespace flashmla::wgmma
