// The launchers: plain C++ between the FFI handlers and the CUDA sources.
// Each enqueues on `stream` and returns without synchronising.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace flashmla {

// What went wrong: `error` is cudaSuccess or the CUDA error, `where` the expression that gave it.
struct Status {
  cudaError_t error = cudaSuccess;
  const char* where = "";

  bool ok() const { return error == cudaSuccess; }
};

// Attention of a few query tokens over a paged latent cache; split requests are left in pieces.
Status launch_dense_decode_sm90(const DenseDecodeParams& params, cudaStream_t stream);

// The same over tokens that are chosen for each query token, from one cache or two.
Status launch_sparse_decode_sm90(const SparseDecodeParams& params, cudaStream_t stream);

// Whether the kernel that these two choose leaves pieces in float instead of rounded ones: see
// common/partial_results.h.
bool leaves_float_pieces(const DecodeParams& params);

// Merges the pieces of split requests; nothing to do for requests in one piece.
Status launch_combine(const DecodeParams& params, cudaStream_t stream);

// Plans which part of the work each row of the grid takes.
Status launch_schedule(const ScheduleParams& params, cudaStream_t stream);

// Writes tokens to their slots of a paged cache, normalised, rotated and quantised as asked.
Status launch_cache_append(const CacheAppendParams& params, cudaStream_t stream);

// Reads slots of a paged cache, dequantised.
Status launch_cache_gather(const CacheGatherParams& params, cudaStream_t stream);

}  // namespace flashmla

// Returns from the enclosing function with a Status unless `expr` gives cudaSuccess.
#define FLASHMLA_RETURN_IF_ERROR(expr)          \
  do {                                          \
    const cudaError_t error_ = (expr);          \
    if (error_ != cudaSuccess) {                \
      return ::flashmla::Status{error_, #expr}; \
    }                                           \
  } while (0)
