// Host side of the dense decode kernel for one shape and 16-bit type. Included by the
// instantiation files.
#pragma once

#include <type_traits>

#include "common/tensor_map.h"
#include "sm90/decode/launch.cuh"
#include "sm90/dense_decode/kernel.cuh"

namespace flashmla::sm90::dense_decode {

template <typename T, int kDim, int kDimV>
Status launch(const DenseDecodeParams& params, cudaStream_t stream) {
  using S = Shape<kDim, kDimV>;
  using P = Problem<T, S, /*kSparse=*/false, Loading::kCopied>;
  KernelParams<P> kp;
  kp.p = params;
  kp.group = params.heads_q / params.heads_kv;
  kp.must_gather_queries = params.heads_kv > 1;
  kp.rows = partial::rows_of_slice(params);
  kp.row_tiles = schedule::ceil_div(kp.rows, kRows);

  TensorMaps maps{};
  constexpr CUtensorMapDataType type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // An empty cache may have no address, which the encoder would reject. Nothing is read through it.
  const void* cache = params.num_pages > 0 ? params.k_cache : params.q;
  const auto encode_keys = [&](CUtensorMap* map, int sub_tiles) {
    return encode_paged_cache(map, cache, type, params.num_pages, params.page_size, params.heads_kv,
                              kDim, box_tokens(params.page_size) / kGroupTokens, sub_tiles);
  };
  if (Status status = encode_keys(&maps.keys_half, S::kHalfTiles); !status.ok()) return status;
  if (S::kHasRope) {
    if (Status status = encode_keys(&maps.keys_rope, 1); !status.ok()) return status;
  }
  if (!kp.must_gather_queries) {
    if (Status status =
            encode_rows(&maps.queries, params.q, type, params.batch, kp.rows, kDim, kRows);
        !status.ok()) {
      return status;
    }
  }
  return launch_cta<P>(&dense_decode_kernel<P>, kp, stream, maps);
}

#define FLASHMLA_DECLARE_DENSE_DECODE(DIM, DIM_V)                                    \
  extern template Status launch<__nv_bfloat16, DIM, DIM_V>(const DenseDecodeParams&, \
                                                           cudaStream_t);            \
  extern template Status launch<__half, DIM, DIM_V>(const DenseDecodeParams&, cudaStream_t);

FLASHMLA_DECLARE_DENSE_DECODE(576, 512)
FLASHMLA_DECLARE_DENSE_DECODE(512, 512)
FLASHMLA_DECLARE_DENSE_DECODE(320, 256)
FLASHMLA_DECLARE_DENSE_DECODE(256, 256)
#undef FLASHMLA_DECLARE_DENSE_DECODE

}  // namespace flashmla::sm90::dense_decode
