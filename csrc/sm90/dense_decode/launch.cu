#include "sm90/dense_decode/launch.cuh"

#include "sm90/gathered_decode/launch.h"

namespace flashmla {
namespace {

namespace impl = sm90::dense_decode;

template <typename T>
Status launch(const DenseDecodeParams& params, cudaStream_t stream) {
  const auto has = [&](int dim, int dim_v) {
    return params.head_dim == dim && params.head_dim_v == dim_v;
  };
  if (has(576, 512)) return impl::launch<T, 576, 512>(params, stream);
  if (has(512, 512)) return impl::launch<T, 512, 512>(params, stream);
  if (has(320, 256)) return impl::launch<T, 320, 256>(params, stream);
  if (has(256, 256)) return impl::launch<T, 256, 256>(params, stream);
  return {cudaErrorNotSupported, "head dimensions of the dense decode kernel"};
}

}  // namespace

Status launch_dense_decode_sm90(const DenseDecodeParams& params, cudaStream_t stream) {
  if (params.format != CacheFormat::kPlain) {
    return sm90::gathered_decode::launch_dense(params, stream);
  }
  if (!impl::page_size_supported(params.page_size)) {
    return {cudaErrorNotSupported, "page size of the dense decode kernel"};
  }
  switch (params.dtype) {
    case DataType::kBFloat16:
      return launch<__nv_bfloat16>(params, stream);
    case DataType::kFloat16:
      return launch<__half>(params, stream);
  }
  return {cudaErrorNotSupported, "type of the dense decode kernel"};
}

}  // namespace flashmla
