#include "sm90/dense_decode/launch.cuh"

namespace flashmla::sm90::dense_decode {
template Status launch<__nv_bfloat16, 512, 512>(const DenseDecodeParams&, cudaStream_t);
template Status launch<__half, 512, 512>(const DenseDecodeParams&, cudaStream_t);
}  // namespace flashmla::sm90::dense_decode
