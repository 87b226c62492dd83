// The XLA FFI handlers of the library and the custom-call targets they are registered under.
//
// To add an operation: define its handler in csrc/ffi/<op>.cc with XLA_FFI_DEFINE_HANDLER_SYMBOL,
// declare it here and add its row to kRegistrations. Nothing else lists the handlers.
//
// Only the C header is included: the C++ one (xla/ffi/api/ffi.h) costs seconds of compile time.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* FlashMlaCacheAppend(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* FlashMlaCacheGather(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* FlashMlaDenseDecode(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* FlashMlaMetadata(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* FlashMlaSparseDecode(XLA_FFI_CallFrame* call_frame);
}

namespace flashmla {

struct Registration {
  const char* target;  // name given to jax.ffi.register_ffi_target and jax.ffi.ffi_call
  XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*);
};

inline constexpr Registration kRegistrations[] = {
    {"flashmla_cache_append", FlashMlaCacheAppend},
    {"flashmla_cache_gather", FlashMlaCacheGather},
    {"flashmla_dense_decode", FlashMlaDenseDecode},
    {"flashmla_metadata", FlashMlaMetadata},
    {"flashmla_sparse_decode", FlashMlaSparseDecode},
};

}  // namespace flashmla
