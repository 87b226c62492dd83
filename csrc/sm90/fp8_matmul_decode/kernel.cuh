// Decode for sm_90a over V3.2 caches with FP8 products.
#pragma once

#include "sm90/fp8_matmul_decode/loader.cuh"
#include "sm90/fp8_matmul_decode/math_group.cuh"

namespace flashmla::sm90::fp8_matmul_decode {

template <typename P>
__global__ void __launch_bounds__(P::kThreads, 1)
    fp8_matmul_decode_kernel(const __grid_constant__ KernelParams<P> kp) {
  run_cta<P, Loader<P>, MathGroup<P>>(kp);
}

}  // namespace flashmla::sm90::fp8_matmul_decode
