// Host side of the dense decode kernel for one 16-bit type. Included by the instantiation files.
#pragma once

#include <type_traits>

#include "common/tensor_map.h"
#include "sm90/dense_decode/kernel.cuh"

namespace flashmla::sm90::dense_decode {

template <typename T>
Status launch(const DenseDecodeParams& params, cudaStream_t stream) {
  KernelParams kp;
  kp.p = params;
  kp.group = params.heads_q / params.heads_kv;
  kp.must_gather_queries = params.heads_kv > 1;
  kp.rows = params.seq_q * kp.group;
  kp.row_tiles = schedule::ceil_div(kp.rows, kRows);

  TensorMaps maps;
  constexpr CUtensorMapDataType type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // An empty cache may have no address, which the encoder would reject. Nothing is read through it.
  const void* cache = params.num_pages > 0 ? params.k_cache : params.q;
  const auto encode = [&](CUtensorMap* map, int sub_tiles) {
    return encode_paged_cache(map, cache, type, params.num_pages, params.page_size, params.heads_kv,
                              kDim, box_tokens(params.page_size), sub_tiles);
  };
  if (Status status = encode(&maps.copy, kSubTilesPerCopy); !status.ok()) return status;
  if (Status status = encode(&maps.sub_tile, 1); !status.ok()) return status;
  if (!kp.must_gather_queries) {
    // Requests are the pages of this one, and a request's rows their tokens.
    if (Status status = encode_paged_cache(&maps.queries, params.q, type, params.batch, kp.rows,
                                           /*heads=*/1, kDim, kRows, kSubTiles);
        !status.ok()) {
      return status;
    }
  }

  auto* kernel = &dense_decode_kernel<T>;
  FLASHMLA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  // x alone reaches 2^31 - 1; y and z would stop at 65,535.
  const int64_t ctas = static_cast<int64_t>(kp.row_tiles) * params.heads_kv * params.num_parts;
  if (ctas > INT32_MAX) return {cudaErrorInvalidConfiguration, "grid of the attention kernel"};
  kernel<<<static_cast<unsigned>(ctas), kThreads, kSharedBytes, stream>>>(kp, maps);
  FLASHMLA_RETURN_IF_ERROR(cudaGetLastError());
  return {};
}

extern template Status launch<__nv_bfloat16>(const DenseDecodeParams&, cudaStream_t);
extern template Status launch<__half>(const DenseDecodeParams&, cudaStream_t);

}  // namespace flashmla::sm90::dense_decode
