// The Python module jax_flashmla._ext: the FFI handlers as capsules, and facts about this build.
//
// Importing it touches neither the driver nor a device.

#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>

#include <string_view>

#include "ffi/registry.h"

namespace nb = nanobind;

void bind_raw(nb::module_& m);  // csrc/raw_bindings.cc

namespace {

// The capsule name that XLA requires of custom-call targets.
constexpr const char* kCapsuleName = "xla._CUSTOM_CALL_TARGET";

nb::dict registrations() {
  nb::dict targets;
  for (const flashmla::Registration& r : flashmla::kRegistrations) {
    targets[r.target] = nb::capsule(reinterpret_cast<void*>(r.handler), kCapsuleName);
  }
  return targets;
}

// JAX_FLASHMLA_ARCHITECTURES is the comma-separated list that CMake compiled for, like "80,90a".
nb::tuple architectures() {
  nb::list names;
  std::string_view rest = JAX_FLASHMLA_ARCHITECTURES;
  while (!rest.empty()) {
    const std::string_view name = rest.substr(0, rest.find(','));
    names.append(nb::str(name.data(), name.size()));
    rest.remove_prefix(name.size() == rest.size() ? name.size() : name.size() + 1);
  }
  return nb::tuple(names);
}

nb::dict build_info() {
  nb::dict info;
  info["version"] = JAX_FLASHMLA_VERSION;
  info["cuda"] = true;
  info["cuda_compiler"] = JAX_FLASHMLA_CUDA_COMPILER_VERSION;
  info["cuda_runtime"] = CUDART_VERSION;
  info["architectures"] = architectures();
  info["ffi_api_version"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  return info;
}

// The newest CUDA version the installed driver supports, as 1000 * major + 10 * minor; 0 without
// a driver.
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace

NB_MODULE(_ext, m) {
  // Interpreters that end with objects still alive are not worth a report on stderr.
  nb::set_leak_warnings(false);
  m.doc() = "Compiled part of jax_flashmla: XLA FFI handlers and their CUDA kernels.";
  m.def("registrations", &registrations, "Custom-call target names and their handlers.");
  m.def("build_info", &build_info, "Versions and architectures this extension was built with.");
  m.def("driver_version", &driver_version,
        "Newest CUDA version of the installed driver (13000 for 13.0), 0 without one.");
  bind_raw(m);
}
