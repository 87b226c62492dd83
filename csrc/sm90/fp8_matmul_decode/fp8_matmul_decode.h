// The launchers of decode with FP8 products, which those of dense and sparse decode turn to.
#pragma once

#include "launch.h"

namespace flashmla::sm90::fp8_matmul_decode {

Status launch(const DenseDecodeParams& params, cudaStream_t stream);
Status launch(const SparseDecodeParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90::fp8_matmul_decode
