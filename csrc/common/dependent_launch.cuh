// Host side of programmatic dependent launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace flashmla {

// Launches a kernel that may start before the kernels before it have finished, and waits for them
// itself (ptx::grid_dependency_wait), in clusters of CTAs that lie side by side. `grid_name` is
// what an error calls the grid.
template <typename... Params>
Status launch_dependent_clusters(void (*kernel)(Params...), const char* grid_name,
                                 unsigned cluster_ctas, int64_t ctas, int threads,
                                 size_t shared_bytes, cudaStream_t stream,
                                 const std::type_identity_t<Params>&... params) {
  // x alone reaches 2^31 - 1; y and z would stop at 65,535.
  if (ctas > INT32_MAX) return {cudaErrorInvalidConfiguration, grid_name};
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster_ctas, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(ctas);
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster_ctas > 1 ? 2 : 1;
  FLASHMLA_RETURN_IF_ERROR(cudaLaunchKernelEx(&config, kernel, params...));
  return {};
}

template <typename... Params>
Status launch_dependent(void (*kernel)(Params...), const char* grid_name, int64_t ctas, int threads,
                        size_t shared_bytes, cudaStream_t stream,
                        const std::type_identity_t<Params>&... params) {
  return launch_dependent_clusters(kernel, grid_name, 1, ctas, threads, shared_bytes, stream,
                                   params...);
}

// One cluster of CTAs that work together.
template <typename... Params>
Status launch_dependent_cluster(void (*kernel)(Params...), const char* grid_name, unsigned ctas,
                                int threads, size_t shared_bytes, cudaStream_t stream,
                                const std::type_identity_t<Params>&... params) {
  return launch_dependent_clusters(kernel, grid_name, ctas, ctas, threads, shared_bytes, stream,
                                   params...);
}

}  // namespace flashmla
