#include "sm90/dense_decode/launch.cuh"

namespace flashmla {

Status launch_dense_decode_sm90(const DenseDecodeParams& params, cudaStream_t stream) {
  namespace impl = sm90::dense_decode;
  if (params.head_dim != impl::kDim || params.head_dim_v != impl::kDimV ||
      !impl::page_size_supported(params.page_size)) {
    return {cudaErrorNotSupported, "head dimensions or page size of the dense decode kernel"};
  }
  switch (params.dtype) {
    case DataType::kBFloat16:
      return impl::launch<__nv_bfloat16>(params, stream);
    case DataType::kFloat16:
      return impl::launch<__half>(params, stream);
  }
  return {cudaErrorNotSupported, "type of the dense decode kernel"};
}

}  // namespace flashmla
