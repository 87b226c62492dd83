#include "common/most_blocks.h"
#include "sm90/decode/launch.cuh"
#include "sm90/fp8_power_decode/fp8_power_decode.h"
#include "sm90/fp8_power_decode/kernel.cuh"
#include "sm90/gathered_decode/fill_params.cuh"

namespace flashmla::sm90::fp8_power_decode {
namespace {

template <bool kSparse>
Status launch_kernel(const typename Problem<kSparse>::Params& params, cudaStream_t stream) {
  using P = Problem<kSparse>;
  KernelParams<P> kp;
  if (Status status = gathered_decode::fill_params<P>(params, P::kFormat, &kp); !status.ok()) {
    return status;
  }
  return launch_cta<P>(&fp8_power_decode_kernel<P>, kp, stream);
}

}  // namespace

bool takes(const DecodeParams& params) {
  // The choice may not depend on the batch.
  if (!params.power_of_two_scales || params.batch_invariant) return false;
  const int rows = partial::rows_of_slice(params);
  // So many blocks for a CTA, as far as the host knows lengths: a piece begins and ends slowly.
  constexpr int kLeastBlocks = 7;
  const int row_tiles = schedule::ceil_div(rows, kRows);
  return rows > 32 && most_blocks(params) >= int64_t{kLeastBlocks} * row_tiles * params.num_parts;
}

Status launch(const DenseDecodeParams& params, cudaStream_t stream) {
  return launch_kernel<false>(params, stream);
}

Status launch(const SparseDecodeParams& params, cudaStream_t stream) {
  return launch_kernel<true>(params, stream);
}

}  // namespace flashmla::sm90::fp8_power_decode
