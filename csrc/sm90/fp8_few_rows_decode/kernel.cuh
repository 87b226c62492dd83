// Decode for sm_90a over FP8 caches for few rows: the products have tokens where other kernels
// have rows, and values are converted on their way from shared memory to the tensor cores.
#pragma once

#include "sm90/fp8_few_rows_decode/math_group.cuh"
#include "sm90/gathered_decode/fp8_loader.cuh"

namespace flashmla::sm90::fp8_few_rows_decode {

template <typename P>
__global__ void __launch_bounds__(P::kThreads, 1)
    fp8_few_rows_decode_kernel(const __grid_constant__ KernelParams<P> kp) {
  run_cta<P, gathered_decode::Fp8Loader<P>, MathGroup<P>>(kp);
}

}  // namespace flashmla::sm90::fp8_few_rows_decode
