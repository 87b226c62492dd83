#include "common/most_blocks.h"
#include "sm90/decode/launch.cuh"
#include "sm90/fp8_many_rows_decode/fp8_many_rows_decode.h"
#include "sm90/fp8_many_rows_decode/kernel.cuh"
#include "sm90/gathered_decode/fill_params.cuh"

namespace flashmla::sm90::fp8_many_rows_decode {
namespace {

template <typename P>
Status launch_kernel(const typename P::Params& params, cudaStream_t stream) {
  KernelParams<P> kp;
  if (Status status = gathered_decode::fill_params<P>(params, P::kFormat, &kp); !status.ok()) {
    return status;
  }
  return launch_cta<P>(&fp8_many_rows_decode_kernel<P>, kp, stream);
}

template <bool kSparse, typename Params>
Status launch_products(const Params& params, cudaStream_t stream) {
  return params.fp8_matmul ? launch_kernel<Problem<kSparse, Products::kFp8>>(params, stream)
                           : launch_kernel<Problem<kSparse, Products::kFp16>>(params, stream);
}

}  // namespace

bool takes(const DecodeParams& params) {
  const int rows = partial::rows_of_slice(params);
  if (rows <= 32) return false;
  if (params.fp8_matmul) return true;
  // The choice may not depend on the batch.
  if (!params.power_of_two_scales || params.batch_invariant) return false;
  // So many blocks for a CTA, as far as the host knows lengths: a piece begins and ends slowly.
  constexpr int kLeastBlocks = 7;
  const int row_tiles = schedule::ceil_div(rows, kRows);
  return most_blocks(params) >= int64_t{kLeastBlocks} * row_tiles * params.num_parts;
}

Status launch(const DenseDecodeParams& params, cudaStream_t stream) {
  return launch_products<false>(params, stream);
}

Status launch(const SparseDecodeParams& params, cudaStream_t stream) {
  return launch_products<true>(params, stream);
}

}  // namespace flashmla::sm90::fp8_many_rows_decode
