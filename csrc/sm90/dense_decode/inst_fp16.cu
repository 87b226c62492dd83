#include "sm90/dense_decode/launch.cuh"

namespace flashmla::sm90::dense_decode {
template Status launch<__half>(const DenseDecodeParams&, cudaStream_t);
}  // namespace flashmla::sm90::dense_decode
