// The launchers of decode over V3.2 caches for more than 32 rows, with products in FP8 or with
// scales that are promised to be simple.
#pragma once

#include "launch.h"

namespace flashmla::sm90::fp8_many_rows_decode {

// Whether products in FP8 are asked for, or the kernel here is faster than that for any scales, and
// simple ones are promised.
bool takes(const DecodeParams& params);

Status launch(const DenseDecodeParams& params, cudaStream_t stream);
Status launch(const SparseDecodeParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90::fp8_many_rows_decode
