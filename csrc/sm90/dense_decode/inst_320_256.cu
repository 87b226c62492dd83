#include "sm90/dense_decode/launch.cuh"

namespace flashmla::sm90::dense_decode {
template Status launch<__nv_bfloat16, 320, 256>(const DenseDecodeParams&, cudaStream_t);
template Status launch<__half, 320, 256>(const DenseDecodeParams&, cudaStream_t);
}  // namespace flashmla::sm90::dense_decode
