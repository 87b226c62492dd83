#include "sm90/gathered_decode/launch.cuh"

namespace flashmla::sm90::gathered_decode {
FLASHMLA_GATHERED_DECODE(, __nv_bfloat16, 576, false, kFp8V32, DenseDecodeParams)
}  // namespace flashmla::sm90::gathered_decode
