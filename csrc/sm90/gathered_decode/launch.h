// The launcher of dense decode over FP8 caches, which launch_dense_decode_sm90 turns to.
#pragma once

#include "launch.h"

namespace flashmla::sm90::gathered_decode {

Status launch_dense(const DenseDecodeParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90::gathered_decode
