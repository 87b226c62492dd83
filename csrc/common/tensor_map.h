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

// Columns of a 128-byte-swizzled sub-tile of 16-bit elements.
constexpr int kTensorMapColumns = 64;

template <int kRank>
Status encode_swizzled(CUtensorMap* map, const void* data, CUtensorMapDataType type,
                       const cuuint64_t (&sizes)[kRank], const cuuint64_t (&strides)[kRank - 1],
                       const cuuint32_t (&box)[kRank], const char* what) {
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  if (Status status = tensor_map_encoder(&encode); !status.ok()) return status;
  cuuint32_t element_strides[kRank];
  for (cuuint32_t& stride : element_strides) stride = 1;
  const CUresult result =
      encode(map, type, kRank, const_cast<void*>(data), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return {cudaErrorInvalidValue, what};
  return {};
}

// A paged cache [pages, page_size, heads, dim] of 16-bit elements, page_size a multiple of 8, read
// in boxes of 64 columns x 8 tokens x box_sub_tiles x box_groups; in shared memory group of 8
// tokens after group, in it sub-tile after sub-tile. Coordinates: column in the sub-tile, token in
// the group, sub-tile (those of all heads in a row), group (those of all pages in a row).
inline Status encode_paged_cache(CUtensorMap* map, const void* cache, CUtensorMapDataType type,
                                 int pages, int page_size, int heads, int dim, int box_groups,
                                 int box_sub_tiles) {
  const auto size = [](int n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t token_bytes = size(heads) * size(dim) * 2;
  // An empty cache has no page to address, and no box of it is ever asked for.
  const cuuint64_t groups = size(pages > 0 ? pages : 1) * size(page_size / 8);
  return encode_swizzled<4>(
      map, cache, type, {kTensorMapColumns, 8, size(heads) * size(dim / kTensorMapColumns), groups},
      {token_bytes, kTensorMapColumns * 2, 8 * token_bytes},
      {kTensorMapColumns, 8, static_cast<cuuint32_t>(box_sub_tiles),
       static_cast<cuuint32_t>(box_groups)},
      "cuTensorMapEncodeTiled of the cache");
}

// Rows [batch, rows, dim] of 16-bit elements, read in boxes of 64 columns x box_rows x all
// sub-tiles of one batch entry; in shared memory sub-tile after sub-tile. Rows past the last come
// as zeros. Coordinates: column in the sub-tile, row, sub-tile, batch entry.
inline Status encode_rows(CUtensorMap* map, const void* data, CUtensorMapDataType type, int batch,
                          int rows, int dim, int box_rows) {
  const auto size = [](int n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t row_bytes = size(dim) * 2;
  const cuuint64_t sub_tiles = size(dim / kTensorMapColumns);
  return encode_swizzled<4>(
      map, data, type, {kTensorMapColumns, size(rows), sub_tiles, size(batch)},
      {row_bytes, kTensorMapColumns * 2, size(rows) * row_bytes},
      {kTensorMapColumns, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(sub_tiles), 1},
      "cuTensorMapEncodeTiled of the rows");
}

}  // namespace flashmla
