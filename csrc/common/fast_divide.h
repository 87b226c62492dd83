// Division of non-negative int32 by a number that is known before a kernel is launched.
#pragma once

#include <cstdint>

#include "common/schedule.h"

namespace flashmla {

// n / d = n * m >> (31 + s) for 0 <= n < 2^31, where s = ceil(log2 d) and m = ceil(2^(31 + s) / d)
// (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
struct FastDivide {
  int32_t divisor;
  uint32_t multiplier;
  uint32_t shift;

  FastDivide() = default;
  explicit FastDivide(int32_t d) : divisor(d), shift(0) {
    while ((int64_t{1} << shift) < d) ++shift;
    const uint64_t power = uint64_t{1} << (31 + shift);
    multiplier = static_cast<uint32_t>((power + d - 1) / d);
  }

#if defined(__CUDACC__)
  __device__ __forceinline__ int32_t quotient(int32_t n) const {
    return static_cast<int32_t>(__umulhi(2 * static_cast<uint32_t>(n), multiplier) >> shift);
  }
#endif
};

}  // namespace flashmla
