// Decode for sm_90a over V3.2 caches in tiles of 64 rows: the products have tokens where other
// kernels have rows. Codes are multiplied as they are, or are converted on their way from shared
// memory to the tensor cores if scales are simple (fp8_operands.cuh): tokens with other ones make
// NaN.
#pragma once

#include "sm90/fp8_many_rows_decode/score_group.cuh"
#include "sm90/fp8_many_rows_decode/value_group.cuh"

namespace flashmla::sm90::fp8_many_rows_decode {

template <typename P>
__global__ void __launch_bounds__(P::kThreads, 1)
    fp8_many_rows_decode_kernel(const __grid_constant__ KernelParams<P> kp) {
  auto& smem = shared_storage<P>(ptx::dynamic_smem());
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (!begin_cta<P>(kp, smem)) return;
  if (warpgroup < P::kScoreGroups) {
    ptx::setmaxnreg_dec<P::kScoreRegisters>();
    ScoreGroup<P>(kp, smem).run();
  } else if (warpgroup < P::kThreads / 128) {
    ptx::setmaxnreg_inc<P::kValueRegisters>();
    ValueGroup<P>(kp, smem, warpgroup).run();
  } else {
    // Never: but the compiler goes by the largest number that it finds, and would else make every
    // product wait for the last one.
    ptx::setmaxnreg_inc<240>();
  }
}

}  // namespace flashmla::sm90::fp8_many_rows_decode
