#include "sm90/gathered_decode/launch.cuh"

namespace flashmla::sm90::gathered_decode {
FLASHMLA_GATHERED_DECODE(, __nv_bfloat16, 512, true, kFp8V4, SparseDecodeParams)
}  // namespace flashmla::sm90::gathered_decode
