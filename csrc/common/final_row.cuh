// A row's results from the maximum of its scores and the sum of its weights: where the attention
// kernels and the merge end.
#pragma once

#include "params.h"

namespace flashmla {

struct FinalRow {
  float lse;     // natural logarithm
  float factor;  // of the sum of weighted values
};

// From the base-2 maximum of a row's scores and the sum of its weights, which is 0 only if the row
// attended to nothing: every term of its first block is at least exp2(0) for its maximum. The
// request may lie in shared memory, which is read only if there are sinks.
__device__ __forceinline__ FinalRow final_row(const DecodeParams& p, const int& request, int head,
                                              float max, float sum) {
  constexpr float kLn2 = 0.6931471805599453f;
  const bool empty = sum == 0.f;
  // No multiply-adds are made of this, so that all kernels that it becomes a part of round alike.
  const float lse = __fmul_rn(max + log2f(sum), kLn2);
  FinalRow result = {empty ? INFINITY : lse, empty ? 0.f : 1.f / sum};
  if (p.attn_sink != nullptr && !empty) {
    const int64_t base = p.sink_per_request ? static_cast<int64_t>(request) * p.heads_q : 0;
    result.factor /= __fadd_rn(1.f, expf(p.attn_sink[base + head] - result.lse));
  }
  return result;
}

}  // namespace flashmla
