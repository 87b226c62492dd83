// In place of csrc/common/dependent_launch.cuh: runs the CTAs of a kernel one after the other.
#pragma once

#include <type_traits>

#include "launch.h"
#include "simt.h"

namespace flashmla {

template <typename... Params>
Status launch_dependent(void (*kernel)(Params...), const char*, int64_t ctas, int threads, size_t,
                        cudaStream_t, const std::type_identity_t<Params>&... params) {
  for (int64_t i = 0; i < ctas; ++i) {
    simt::run_cta(i, threads, [&] { kernel(params...); });
  }
  return {};
}

// Right for CTAs that do nothing with their clusters; those that do abort (ptx.cuh).
template <typename... Params>
Status launch_dependent_clusters(void (*kernel)(Params...), const char* name, unsigned,
                                 int64_t ctas, int threads, size_t bytes, cudaStream_t stream,
                                 const std::type_identity_t<Params>&... params) {
  return launch_dependent(kernel, name, ctas, threads, bytes, stream, params...);
}

// As one CTA, which ptx::cluster_ctas() says.
template <typename... Params>
Status launch_dependent_cluster(void (*kernel)(Params...), const char* name, unsigned, int threads,
                                size_t bytes, cudaStream_t stream,
                                const std::type_identity_t<Params>&... params) {
  return launch_dependent(kernel, name, 1, threads, bytes, stream, params...);
}

}  // namespace flashmla
