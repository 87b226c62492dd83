#include "sm90/dense_decode/launch.cuh"

namespace flashmla::sm90::dense_decode {
template Status launch<__nv_bfloat16>(const DenseDecodeParams&, cudaStream_t);
}  // namespace flashmla::sm90::dense_decode
