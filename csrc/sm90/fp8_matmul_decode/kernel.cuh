// Decode for sm_90a over V3.2 caches with FP8 products.
#pragma once

#include "sm90/fp8_matmul_decode/loader.cuh"
#include "sm90/fp8_matmul_decode/math_group.cuh"

namespace flashmla::sm90::fp8_matmul_decode {

template <typename P>
__global__ void __launch_bounds__(P::kThreads, 1)
    fp8_matmul_decode_kernel(const __grid_constant__ KernelParams<P> kp) {
  auto& smem = shared_storage<P>(ptx::dynamic_smem());
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);

  if (!begin_cta<P>(kp, smem)) return;

  if (warpgroup == kMathGroups) {
    ptx::setmaxnreg_dec<P::kLoadRegisters>();
    Loader<P>(kp, smem).run();
  } else {
    ptx::setmaxnreg_inc<P::kMathRegisters>();
    MathGroup<P>(kp, smem, warpgroup).run();
  }
}

}  // namespace flashmla::sm90::fp8_matmul_decode
