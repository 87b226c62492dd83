// The power of two that makes a lane's partial results fit into float16: see
// common/partial_results.h.
#pragma once

#include <cstdint>

namespace flashmla::partial {

struct Scale {
  float factor;    // 2^-e
  float exponent;  // e
};

// For values whose magnitudes add up to `magnitude`, which then is between 1/2 and 1: so the
// largest of a hundred keeps all 11 bits, and so do those a thousandth of it. With an infinite or
// NaN value among them, as if they were as large as the weights, whose sum is `sum`.
__device__ __forceinline__ Scale scale_of(float magnitude, float sum) {
  // What bounds e keeps the sum of the weights, which is scaled, too, from both ends of float: it
  // is between 1 and 2^39. The largest floats fit into float16 with 2^-112; magnitudes below 2^-75
  // lose digits.
  constexpr int kLeast = -60;
  constexpr int kMost = 112;
  const float x = magnitude < INFINITY ? magnitude : sum;
  const int exponent = static_cast<int>(__float_as_uint(x) >> 23) - 126;
  const int e = x == 0.f ? 0 : max(min(exponent, kMost), kLeast);
  return {__uint_as_float(static_cast<uint32_t>(127 - e) << 23), static_cast<float>(e)};
}

}  // namespace flashmla::partial
