// Exchanges among the four lanes that hold a row of a wgmma accumulator.
#pragma once

#include <cstdint>

namespace flashmla {

// With the lane `distance` away: the lower lane keeps a and gets the other's a as b, the upper one
// keeps b and gets the other's b as a.
__device__ __forceinline__ void exchange(uint32_t& a, uint32_t& b, bool upper, int distance) {
  const uint32_t other = __shfl_xor_sync(0xffffffff, upper ? a : b, distance);
  (upper ? a : b) = other;
}

// Transposes four words of each of four neighbouring lanes: x[j] of lane q becomes x[q] of lane j.
// All lanes of the warp take part.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1;
  const bool upper = threadIdx.x & 2;
  exchange(x[0], x[1], odd, 1);
  exchange(x[2], x[3], odd, 1);
  exchange(x[0], x[2], upper, 2);
  exchange(x[1], x[3], upper, 2);
}

}  // namespace flashmla
