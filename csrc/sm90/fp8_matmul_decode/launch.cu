#include "sm90/fp8_matmul_decode/fp8_matmul_decode.h"

#include "sm90/decode/launch.cuh"
#include "sm90/fp8_matmul_decode/kernel.cuh"
#include "sm90/gathered_decode/fill_params.cuh"

namespace flashmla::sm90::fp8_matmul_decode {
namespace {

template <bool kSparse, typename Params>
Status launch_kernel(const Params& params, cudaStream_t stream) {
  using P = Problem<kSparse>;
  KernelParams<P> kp;
  if (Status status = gathered_decode::fill_params<P>(params, params.format, &kp); !status.ok()) {
    return status;
  }
  return launch_cta<P>(&fp8_matmul_decode_kernel<P>, kp, stream);
}

}  // namespace

Status launch(const DenseDecodeParams& params, cudaStream_t stream) {
  return launch_kernel<false>(params, stream);
}

Status launch(const SparseDecodeParams& params, cudaStream_t stream) {
  return launch_kernel<true>(params, stream);
}

}  // namespace flashmla::sm90::fp8_matmul_decode
