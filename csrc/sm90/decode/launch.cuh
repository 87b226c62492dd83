// Host side that the decode kernels for sm_90a share.
#pragma once

#include "common/dependent_launch.cuh"
#include "common/tensor_map.h"
#include "sm90/decode/cta.cuh"

namespace flashmla::sm90::decode {

template <typename P, typename... TensorMaps>
Status launch_cta(void (*kernel)(KernelParams<P>, TensorMaps...), const KernelParams<P>& kp,
                  cudaStream_t stream, const TensorMaps&... maps) {
  constexpr int kBytes = kSharedBytes<P>;
  FLASHMLA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const int64_t ctas = static_cast<int64_t>(kp.row_tiles) * kp.p.slices * kp.p.num_parts;
  // Pairs of row tiles are clusters also where they share nothing: on neighbouring multiprocessors
  // they read the same keys faster, by up to 10% where batches are cut.
  const unsigned cluster_ctas = kp.row_tiles % 2 == 0 ? 2 : P::kClusterCtas;
  return launch_dependent_clusters(kernel, "grid of the attention kernel", cluster_ctas, ctas,
                                   P::kThreads, kBytes, stream, kp, maps...);
}

}  // namespace flashmla::sm90::decode
