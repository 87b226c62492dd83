// Decode for sm_90a over keys that are gathered token by token: sparse decode, where every query
// token chooses its own, and dense decode over FP8 caches, whose values become bfloat16 on the way.
#pragma once

#include "sm90/decode/math_group.cuh"
#include "sm90/gathered_decode/loader.cuh"

namespace flashmla::sm90::gathered_decode {

template <typename P, CacheFormat kFormat>
__global__ void __launch_bounds__(P::kThreads, 1)
    gathered_decode_kernel(const __grid_constant__ KernelParams<P> kp,
                           const __grid_constant__ CUtensorMap queries) {
  auto& smem = shared_storage<P>(ptx::dynamic_smem());
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) ptx::prefetch_tensor_map(&queries);
  if (!begin_cta<P>(kp, smem, 1, P::kLoadThreads)) return;

  if (warpgroup == kMathGroups) {
    ptx::setmaxnreg_dec<P::kLoadRegisters>();
    if constexpr (kFormat == CacheFormat::kPlain) {
      CopyingLoader<P>(kp, queries, smem).run();
    } else {
      ConvertingLoader<P, kFormat>(kp, queries, smem).run();
    }
  } else if (warpgroup == 0) {
    ptx::setmaxnreg_inc<P::kMathRegisters>();
    MathGroup<P, 0>(kp, smem).run();
  } else {
    ptx::setmaxnreg_inc<P::kMathRegisters>();
    MathGroup<P, 1>(kp, smem).run();
  }
  // The other CTA may still write to this one's shared memory, or arrive at its barriers.
  if constexpr (P::kPaired) ptx::cluster_sync();
}

}  // namespace flashmla::sm90::gathered_decode
