#include "sm90/gathered_decode/launch.cuh"

namespace flashmla::sm90::gathered_decode {
FLASHMLA_GATHERED_DECODE(, __nv_bfloat16, 576, true, kPlain, SparseDecodeParams)
FLASHMLA_GATHERED_DECODE(, __half, 576, true, kPlain, SparseDecodeParams)
}  // namespace flashmla::sm90::gathered_decode
