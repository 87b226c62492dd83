// Host side of the gathering decode kernels for one format. Included by the instantiation files.
#pragma once

#include <type_traits>

#include "sm90/decode/launch.cuh"
#include "sm90/gathered_decode/fill_params.cuh"
#include "sm90/gathered_decode/kernel.cuh"

namespace flashmla::sm90::gathered_decode {

template <typename T, int kDim, bool kSparse, CacheFormat kFormat, bool kPaired, typename Params>
Status launch_tiles(const Params& params, cudaStream_t stream) {
  constexpr Loading kLoading =
      kFormat == CacheFormat::kPlain ? Loading::kGathered : Loading::kConverted;
  using P = Problem<T, Shape<kDim, 512>, kSparse, kLoading, kPaired>;
  KernelParams<P> kp;
  if (Status status = fill_params<P>(params, kFormat, &kp); !status.ok()) return status;

  CUtensorMap queries;
  constexpr CUtensorMapDataType type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int64_t entries = static_cast<int64_t>(params.batch) * kp.p.slices;
  if (entries > INT32_MAX) return {cudaErrorInvalidValue, "batch * seq_q"};
  if (Status status =
          encode_rows(&queries, params.q, type, static_cast<int>(entries), kp.rows, kDim, kRows);
      !status.ok()) {
    return status;
  }
  return launch_cta<P>(&gathered_decode_kernel<P, kFormat>, kp, stream, queries);
}

template <typename T, int kDim, bool kSparse, CacheFormat kFormat, typename Params>
Status launch(const Params& params, cudaStream_t stream) {
  if constexpr (kFormat != CacheFormat::kPlain) {
    const int rows = kSparse ? params.heads_q : params.seq_q * params.heads_q;
    if (schedule::ceil_div(rows, kRows) % 2 == 0) {
      return launch_tiles<T, kDim, kSparse, kFormat, true>(params, stream);
    }
  }
  return launch_tiles<T, kDim, kSparse, kFormat, false>(params, stream);
}

#define FLASHMLA_GATHERED_DECODE(PREFIX, TYPE, DIM, SPARSE, FORMAT, PARAMS)                    \
  PREFIX template Status launch<TYPE, DIM, SPARSE, CacheFormat::FORMAT, PARAMS>(const PARAMS&, \
                                                                                cudaStream_t);

// Every instance has a file of its own.
FLASHMLA_GATHERED_DECODE(extern, __nv_bfloat16, 576, true, kFp8V32, SparseDecodeParams)
FLASHMLA_GATHERED_DECODE(extern, __nv_bfloat16, 512, true, kFp8V4, SparseDecodeParams)
FLASHMLA_GATHERED_DECODE(extern, __nv_bfloat16, 576, true, kPlain, SparseDecodeParams)
FLASHMLA_GATHERED_DECODE(extern, __half, 576, true, kPlain, SparseDecodeParams)
FLASHMLA_GATHERED_DECODE(extern, __nv_bfloat16, 512, true, kPlain, SparseDecodeParams)
FLASHMLA_GATHERED_DECODE(extern, __half, 512, true, kPlain, SparseDecodeParams)
FLASHMLA_GATHERED_DECODE(extern, __nv_bfloat16, 576, false, kFp8V32, DenseDecodeParams)

}  // namespace flashmla::sm90::gathered_decode
