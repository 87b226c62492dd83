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

// A paged cache [pages, page_size, heads, dim] of 16-bit elements, seen as 64-column sub-tiles and
// read in 128-byte-swizzled boxes: 64 columns x box_tokens x box_sub_tiles of one head and page, in
// shared memory sub-tile after sub-tile. Coordinates: column in the sub-tile, token in the page,
// sub-tile, head, page.
inline Status encode_paged_cache(CUtensorMap* map, const void* cache, CUtensorMapDataType type,
                                 int pages, int page_size, int heads, int dim, int box_tokens,
                                 int box_sub_tiles) {
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  if (Status status = tensor_map_encoder(&encode); !status.ok()) return status;
  constexpr cuuint64_t kColumns = 64;
  constexpr cuuint64_t kElementBytes = 2;
  const auto size = [](int n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t row_bytes = size(dim) * kElementBytes;
  // An empty cache has no page to address, and no box of it is ever asked for.
  const cuuint64_t sizes[5] = {kColumns, size(page_size), size(dim) / kColumns, size(heads),
                               size(pages > 0 ? pages : 1)};
  const cuuint64_t strides[4] = {size(heads) * row_bytes, kColumns * kElementBytes, row_bytes,
                                 size(page_size) * size(heads) * row_bytes};
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(kColumns), static_cast<cuuint32_t>(box_tokens),
                             static_cast<cuuint32_t>(box_sub_tiles), 1, 1};
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(map, type, 5, const_cast<void*>(cache), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return {cudaErrorInvalidValue, "cuTensorMapEncodeTiled of the cache"};
  }
  return {};
}

}  // namespace flashmla
