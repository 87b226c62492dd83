// The launchers of decode over V3.2 caches with simple scales.
#pragma once

#include "launch.h"

namespace flashmla::sm90::fp8_power_decode {

// Whether the kernel here is faster than that for any scales, and scales are promised to be simple.
bool takes(const DecodeParams& params);

Status launch(const DenseDecodeParams& params, cudaStream_t stream);
Status launch(const SparseDecodeParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90::fp8_power_decode
