// In place of csrc/common/wgmma.cuh. A warp computes its 16 rows of a product at once, and does not
// wait for the other three.
#pragma once

#include "common/ptx.cuh"

namespace flashmla::wgmma {

// Descriptors: the address, the distances of groups of columns and of rows, all in 16 bytes and 16
// bits each, and whether rows have 64 bytes.
constexpr uint64_t distance(int bytes) { return static_cast<uint64_t>(bytes >> 4); }
constexpr uint64_t k64Bytes = uint64_t{1} << 48;

inline uint64_t k_major(uint32_t address, int group_stride) {
  return distance(group_stride) << 32 | address >> 4;
}
inline uint64_t mn_major(uint32_t address, int column_stride, int group_stride) {
  return distance(group_stride) << 32 | distance(column_stride) << 16 | address >> 4;
}
inline uint64_t k_major_64b(uint32_t address) { return k64Bytes | k_major(address, 512); }

inline void fence() {}
inline void commit() {}
template <int kPending>
void wait() {}
template <int kCount>
void hold(float (&)[kCount]) {}

// Elements, and the types that stand for them.
struct E4m3 {};
inline float element(__half, uint32_t bits) {
  return std::bit_cast<_Float16>(static_cast<uint16_t>(bits));
}
inline float element(__nv_bfloat16, uint32_t bits) { return std::bit_cast<float>(bits << 16); }
inline float element(E4m3, uint32_t bits) { return ptx::e4m3_value(bits); }
template <typename T>
constexpr uint32_t kBytes = std::is_same_v<T, E4m3> ? 1 : 2;

inline uint32_t address_of(uint64_t descriptor) {
  return (static_cast<uint32_t>(descriptor) & 0xffff) << 4;
}

template <typename T>
float load(T type, uint32_t place, bool is_64b) {
  place ^= (place >> 7 & (is_64b ? 3 : 7)) << 4;
  if constexpr (kBytes<T> == 1) return element(type, ptx::smem<uint8_t>(place));
  return element(type, ptx::smem<uint16_t>(place));
}

// Row r, element k of the reduction axis.
template <typename T>
float k_major_element(T type, uint64_t descriptor, uint32_t r, uint32_t k) {
  const bool is_64b = descriptor & k64Bytes;
  const uint32_t group_stride = (descriptor >> 32 & 0xffff) << 4;
  return load(
      type,
      address_of(descriptor) + r / 8 * group_stride + r % 8 * (is_64b ? 64 : 128) + k * kBytes<T>,
      is_64b);
}
// Column n, element k of the reduction axis.
template <typename T>
float mn_major_element(T type, uint64_t descriptor, uint32_t n, uint32_t k) {
  const uint32_t column_stride = (descriptor >> 16 & 0xffff) << 4;
  const uint32_t group_stride = (descriptor >> 32 & 0xffff) << 4;
  return load(type,
              address_of(descriptor) + n / 64 * column_stride + k / 8 * group_stride + k % 8 * 128 +
                  n % 64 * 2,
              false);
}

// d (+)= a(row, k) * b(column, k), for `kSteps` elements of the reduction axis.
template <uint32_t kSteps, int kAccumulators, typename A, typename B>
void multiply(float (&d)[kAccumulators], bool accumulate, const A& a, const B& b) {
  const uint32_t lane = simt::lane();
  for (uint32_t h = 0; h < 2; ++h) {
    float row[kSteps];
    for (uint32_t k = 0; k < kSteps; ++k) row[k] = a(h, k);
    for (int i = 0; i < kAccumulators / 2; ++i) {
      const int index = i / 2 * 4 + 2 * h + i % 2;
      const uint32_t column = i / 2 * 8 + lane % 4 * 2 + i % 2;
      float sum = accumulate ? d[index] : 0.f;
      for (uint32_t k = 0; k < kSteps; ++k) sum += row[k] * b(column, k);
      d[index] = sum;
    }
  }
}

// An operand from registers: those of the four lanes that have the same rows.
template <typename T>
class Registers {
 public:
  explicit Registers(const uint32_t (&a)[4]) {
    const unsigned lane = simt::lane();
    for (int i = 0; i < 4; ++i) {
      simt::warp().exchange(lane, a[i], [&](const std::vector<uint32_t>& words) {
        for (int j = 0; j < 4; ++j) quad_[j][i] = words[lane / 4 * 4 + j];
        return 0;
      });
    }
  }
  float operator()(uint32_t h, uint32_t k) const {
    constexpr uint32_t kInWord = 4 / kBytes<T>;
    const uint32_t word = quad_[k / kInWord % 4][k / (4 * kInWord) * 2 + h];
    constexpr uint32_t kBits = 8 * kBytes<T>;
    return element(T{}, word >> k % kInWord * kBits & ((1u << kBits) - 1));
  }

 private:
  uint32_t quad_[4][4];
};

// One from shared memory: row h of this lane.
template <typename T>
auto rows_of(T type, uint64_t a) {
  const uint32_t first = simt::thread_index.x % 128 / 32 * 16 + simt::lane() / 4;
  return [=](uint32_t h, uint32_t k) { return k_major_element(type, a, first + 8 * h, k); };
}

template <typename T>
void m64n64k16_ss(T type, float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  multiply<16>(d, accumulate, rows_of(type, a),
               [&](uint32_t n, uint32_t k) { return k_major_element(type, b, n, k); });
}
template <typename T, int kAccumulators>
void values_ss(T type, float (&d)[kAccumulators], uint64_t a, uint64_t b) {
  multiply<16>(d, true, rows_of(type, a),
               [&](uint32_t n, uint32_t k) { return mn_major_element(type, b, n, k); });
}
template <typename T, int kAccumulators>
void values_rs(T type, float (&d)[kAccumulators], const uint32_t (&a)[4], uint64_t b) {
  multiply<16>(d, true, Registers<T>(a),
               [&](uint32_t n, uint32_t k) { return mn_major_element(type, b, n, k); });
}
template <typename T, int kAccumulators>
void narrow_rs(T type, float (&d)[kAccumulators], const uint32_t (&a)[4], uint64_t b,
               bool accumulate) {
  multiply<32 / kBytes<T>>(d, accumulate, Registers<T>(a),
                           [&](uint32_t n, uint32_t k) { return k_major_element(type, b, n, k); });
}

}  // namespace flashmla::wgmma
