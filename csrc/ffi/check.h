// Checks of a handler: each returns an ffi::Error that names the failing expression and the shapes.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "launch.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla {

template <typename Buffer>
std::string describe(const char* name, const Buffer& buffer) {
  std::string text = std::string(" ") + name + "[";
  bool first = true;
  for (const int64_t dimension : buffer.dimensions()) {
    text += (first ? "" : ", ") + std::to_string(dimension);
    first = false;
  }
  return text + "]";
}

inline xla::ffi::Error to_error(const char* op, const Status& status) {
  if (status.ok()) return xla::ffi::Error::Success();
  return xla::ffi::Error::Internal(std::string(op) + ": " + status.where + ": " +
                                   cudaGetErrorName(status.error) + " (" +
                                   cudaGetErrorString(status.error) + ")");
}

// Compute capability of the current device as major * 10 + minor.
inline Status compute_capability(int* capability) {
  int device = 0;
  int major = 0;
  int minor = 0;
  FLASHMLA_RETURN_IF_ERROR(cudaGetDevice(&device));
  FLASHMLA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  FLASHMLA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  *capability = major * 10 + minor;
  return {};
}

}  // namespace flashmla

// Returns from the enclosing function with the ffi::Error that `expr` gives, unless it succeeded.
#define FLASHMLA_RETURN_IF_FAILURE(expr) \
  do {                                   \
    ::xla::ffi::Error error_ = (expr);   \
    if (error_.failure()) return error_; \
  } while (0)

// Returns InvalidArgument with the expression and shapes() (a std::string) unless `condition`.
#define FLASHMLA_CHECK(op, condition, shapes)                                                      \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      return ::xla::ffi::Error::InvalidArgument(std::string(op) + ": expected " #condition " of" + \
                                                (shapes)());                                       \
    }                                                                                              \
  } while (0)
