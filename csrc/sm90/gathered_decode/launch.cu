#include "sm90/fp8_few_rows_decode/fp8_few_rows_decode.h"
#include "sm90/fp8_many_rows_decode/fp8_many_rows_decode.h"
#include "sm90/gathered_decode/launch.cuh"
#include "sm90/gathered_decode/launch.h"

namespace flashmla {
namespace {

namespace impl = sm90::gathered_decode;

template <typename T>
Status launch_plain(const SparseDecodeParams& params, cudaStream_t stream) {
  if (params.head_dim == 576) {
    return impl::launch<T, 576, true, CacheFormat::kPlain>(params, stream);
  }
  if (params.head_dim == 512) {
    return impl::launch<T, 512, true, CacheFormat::kPlain>(params, stream);
  }
  return {cudaErrorNotSupported, "head_dim of the sparse decode kernel"};
}

}  // namespace

Status launch_sparse_decode_sm90(const SparseDecodeParams& params, cudaStream_t stream) {
  if (params.head_dim_v != 512) {
    return {cudaErrorNotSupported, "head_dim_v of the sparse decode kernel"};
  }
  switch (params.format) {
    case CacheFormat::kFp8V32:
      if (sm90::fp8_few_rows_decode::takes(params)) {
        return sm90::fp8_few_rows_decode::launch(params, stream);
      }
      if (sm90::fp8_many_rows_decode::takes(params)) {
        return sm90::fp8_many_rows_decode::launch(params, stream);
      }
      return impl::launch<__nv_bfloat16, 576, true, CacheFormat::kFp8V32>(params, stream);
    case CacheFormat::kFp8V4:
      if (sm90::fp8_few_rows_decode::takes(params)) {
        return sm90::fp8_few_rows_decode::launch(params, stream);
      }
      return impl::launch<__nv_bfloat16, 512, true, CacheFormat::kFp8V4>(params, stream);
    case CacheFormat::kPlain:
      return params.dtype == DataType::kFloat16 ? launch_plain<__half>(params, stream)
                                                : launch_plain<__nv_bfloat16>(params, stream);
  }
  return {cudaErrorNotSupported, "cache format of the sparse decode kernel"};
}

// Kernels that multiply FP8 codes from registers: of a row a lane has too little there for a scale
// of its own.
bool leaves_float_pieces(const DecodeParams& params) {
  switch (params.format) {
    case CacheFormat::kFp8V32:
      return sm90::fp8_few_rows_decode::takes(params) || sm90::fp8_many_rows_decode::takes(params);
    case CacheFormat::kFp8V4:
      return sm90::fp8_few_rows_decode::takes(params);
    case CacheFormat::kPlain:
      return false;
  }
  return false;
}

}  // namespace flashmla

namespace flashmla::sm90::gathered_decode {

Status launch_dense(const DenseDecodeParams& params, cudaStream_t stream) {
  if (params.format != CacheFormat::kFp8V32) {
    return {cudaErrorNotSupported, "cache format of the dense decode kernel"};
  }
  if (params.head_dim_v != 512) {
    return {cudaErrorNotSupported, "head_dim_v of the dense decode kernel"};
  }
  if (fp8_few_rows_decode::takes(params)) return fp8_few_rows_decode::launch(params, stream);
  if (fp8_many_rows_decode::takes(params)) return fp8_many_rows_decode::launch(params, stream);
  return launch<__nv_bfloat16, 576, false, CacheFormat::kFp8V32>(params, stream);
}

}  // namespace flashmla::sm90::gathered_decode
