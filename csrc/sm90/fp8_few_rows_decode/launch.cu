#include "sm90/decode/launch.cuh"
#include "sm90/fp8_few_rows_decode/fp8_few_rows_decode.h"
#include "sm90/fp8_few_rows_decode/kernel.cuh"
#include "sm90/gathered_decode/fill_params.cuh"

namespace flashmla::sm90::fp8_few_rows_decode {
namespace {

template <bool kSparse, int kTileRows, typename Params>
Status launch_tiles(const Params& params, cudaStream_t stream) {
  using P = Problem<kSparse, kTileRows>;
  KernelParams<P> kp;
  if (Status status = gathered_decode::fill_params<P>(params, params.format, &kp); !status.ok()) {
    return status;
  }
  return launch_cta<P>(&fp8_few_rows_decode_kernel<P>, kp, stream);
}

template <bool kSparse, typename Params>
Status launch_kernel(const Params& params, cudaStream_t stream) {
  const int rows = partial::rows_of_slice(params);
  if (rows <= 16) return launch_tiles<kSparse, 16>(params, stream);
  return launch_tiles<kSparse, 32>(params, stream);
}

}  // namespace

bool takes(const DecodeParams& params) { return partial::rows_of_slice(params) <= 32; }

Status launch(const DenseDecodeParams& params, cudaStream_t stream) {
  return launch_kernel<false>(params, stream);
}

Status launch(const SparseDecodeParams& params, cudaStream_t stream) {
  return launch_kernel<true>(params, stream);
}

}  // namespace flashmla::sm90::fp8_few_rows_decode
