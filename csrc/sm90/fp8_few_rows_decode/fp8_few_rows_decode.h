// The launchers of decode over FP8 caches for few rows.
#pragma once

#include "launch.h"

namespace flashmla::sm90::fp8_few_rows_decode {

// Whether the kernels here are for so few rows of a request and slice (query tokens x heads).
bool takes(const DecodeParams& params);

Status launch(const DenseDecodeParams& params, cudaStream_t stream);
Status launch(const SparseDecodeParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90::fp8_few_rows_decode
