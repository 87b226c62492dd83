#include "sm90/decode/launch.cuh"
#include "sm90/fp8_few_rows_decode/fp8_few_rows_decode.h"
#include "sm90/fp8_few_rows_decode/kernel.cuh"
#include "sm90/gathered_decode/fill_params.cuh"

namespace flashmla::sm90::fp8_few_rows_decode {
namespace {

template <CacheFormat kFormat, bool kSparse, int kTileRows, typename Params>
Status launch_tiles(const Params& params, cudaStream_t stream) {
  using P = Problem<kFormat, kSparse, kTileRows>;
  KernelParams<P> kp;
  if (Status status = gathered_decode::fill_params<P>(params, kFormat, &kp); !status.ok()) {
    return status;
  }
  return launch_cta<P>(&fp8_few_rows_decode_kernel<P>, kp, stream);
}

template <CacheFormat kFormat, bool kSparse, typename Params>
Status launch_kernel(const Params& params, cudaStream_t stream) {
  const int rows = partial::rows_of_slice(params);
  if (rows <= 16) return launch_tiles<kFormat, kSparse, 16>(params, stream);
  return launch_tiles<kFormat, kSparse, 32>(params, stream);
}

}  // namespace

bool takes(const DecodeParams& params) { return partial::rows_of_slice(params) <= 32; }

Status launch(const DenseDecodeParams& params, cudaStream_t stream) {
  return launch_kernel<CacheFormat::kFp8V32, false>(params, stream);
}

Status launch(const SparseDecodeParams& params, cudaStream_t stream) {
  if (params.format == CacheFormat::kFp8V4) {
    return launch_kernel<CacheFormat::kFp8V4, true>(params, stream);
  }
  return launch_kernel<CacheFormat::kFp8V32, true>(params, stream);
}

}  // namespace flashmla::sm90::fp8_few_rows_decode
