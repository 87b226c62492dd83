// Tensor maps for the copy engine, encoded per call from the buffers' addresses.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "launch.h"

namespace flashmla {

// The driver's encoder, looked up through the runtime so that nothing links libcuda and the
// library loads on machines without a driver.
inline Status tensor_map_encoder(decltype(&cuTensorMapEncodeTiled)* encoder) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  FLASHMLA_RETURN_IF_ERROR(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                            12000, cudaEnableDefault, &result));
  if (result != cudaDriverEntryPointSuccess || function == nullptr) {
    return {cudaErrorNotSupported, "cuTensorMapEncodeTiled is not in this driver"};
  }
  *encoder = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  return {};
}

// A paged cache [pages, page_size, heads, dim] of 16-bit elements, read in 128-byte-swizzled boxes
// of box_columns x box_tokens elements of one head and page. Coordinates: column, head, token,
// page.
inline Status encode_paged_cache(CUtensorMap* map, const void* cache, CUtensorMapDataType type,
                                 int pages, int page_size, int heads, int dim, int box_columns,
                                 int box_tokens) {
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  if (Status status = tensor_map_encoder(&encode); !status.ok()) return status;
  constexpr cuuint64_t kElementBytes = 2;
  // An empty cache has no page to address, and no box of it is ever asked for.
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(page_size),
                               static_cast<cuuint64_t>(pages > 0 ? pages : 1)};
  const cuuint64_t strides[3] = {sizes[0] * kElementBytes, sizes[0] * sizes[1] * kElementBytes,
                                 sizes[0] * sizes[1] * sizes[2] * kElementBytes};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns), 1,
                             static_cast<cuuint32_t>(box_tokens), 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, type, 4, const_cast<void*>(cache), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return {cudaErrorInvalidValue, "cuTensorMapEncodeTiled of the cache"};
  }
  return {};
}

}  // namespace flashmla
