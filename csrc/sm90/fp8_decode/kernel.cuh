// Decode for sm_90a over V3.2 caches for few rows: the products have tokens where other kernels
// have rows, and values are converted on their way from shared memory to the tensor cores.
#pragma once

#include "sm90/fp8_decode/loader.cuh"
#include "sm90/fp8_decode/math_group.cuh"

namespace flashmla::sm90::fp8_decode {

template <typename P>
__global__ void __launch_bounds__(P::kThreads, 1)
    fp8_decode_kernel(const __grid_constant__ KernelParams<P> kp) {
  auto& smem = shared_storage<P>(ptx::dynamic_smem());
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);

  if (!begin_cta<P>(kp, smem)) return;

  if (warpgroup == P::kMathGroups) {
    ptx::setmaxnreg_dec<P::kLoadRegisters>();
    Loader<P>(kp, smem).run();
  } else {
    ptx::setmaxnreg_inc<P::kMathRegisters>();
    MathGroup<P>(kp, smem, warpgroup).run();
  }
}

}  // namespace flashmla::sm90::fp8_decode
