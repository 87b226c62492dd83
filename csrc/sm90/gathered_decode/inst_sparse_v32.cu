#include "sm90/gathered_decode/launch.cuh"

namespace flashmla::sm90::gathered_decode {
FLASHMLA_GATHERED_DECODE(, __nv_bfloat16, 576, true, kFp8V32, SparseDecodeParams)
}  // namespace flashmla::sm90::gathered_decode
