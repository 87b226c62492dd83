// What the handlers of all decode operations share: the buffers they have in common, caches of
// every format, and the checks of both.
#pragma once

#include "common/fp8_formats.h"
#include "common/partial_results.h"
#include "common/schedule.h"
#include "ffi/check.h"

namespace flashmla {

struct DecodeBuffers {
  const xla::ffi::AnyBuffer& q;
  const xla::ffi::Buffer<xla::ffi::S32>& schedule;
  const xla::ffi::Buffer<xla::ffi::F32>& attn_sink;  // empty: there is none
  xla::ffi::Result<xla::ffi::AnyBuffer>& out;
  xla::ffi::Result<xla::ffi::Buffer<xla::ffi::F32>>& lse;
  xla::ffi::Result<xla::ffi::Buffer<xla::ffi::F32>>& partial_out;
  xla::ffi::Result<xla::ffi::Buffer<xla::ffi::F32>>& partial_sums;
  xla::ffi::Result<xla::ffi::Buffer<xla::ffi::S32>>& status;
};

inline std::string describe(const DecodeBuffers& x) {
  return describe("q", x.q) + describe("schedule", x.schedule) +
         describe("attn_sink", x.attn_sink) + describe("out", *x.out) + describe("lse", *x.lse) +
         describe("partial_out", *x.partial_out) + describe("partial_sums", *x.partial_sums) +
         describe("status", *x.status);
}

template <typename Dimensions>
bool all_fit_int32(const Dimensions& dimensions) {
  for (const int64_t size : dimensions) {
    if (size < 0 || size > INT32_MAX) return false;
  }
  return true;
}

struct PagedCache {
  const void* data;
  int num_pages;
  int page_size;
  int heads_kv;
};

// Checks that `cache` is one of `format` with pages of `page_size` tokens, and goes with q.
template <typename Shapes>
xla::ffi::Error read_cache(const char* op, const xla::ffi::AnyBuffer& cache, int32_t format,
                           int32_t page_size, const xla::ffi::AnyBuffer& q, const Shapes& shapes,
                           PagedCache* result) {
  using xla::ffi::DataType;

  const auto q_dims = q.dimensions();
  const auto cache_dims = cache.dimensions();
  const DataType cache_type = cache.element_type();
  FLASHMLA_CHECK(op, q_dims.size() == 4 && all_fit_int32(cache_dims) && page_size > 0, shapes);
  const int64_t head_dim = q_dims[3];
  int heads_kv = 1;
  switch (static_cast<CacheFormat>(format)) {
    case CacheFormat::kPlain:
      FLASHMLA_CHECK(op, cache_dims.size() == 4 && cache_dims[1] == page_size && cache_dims[2] > 0,
                     shapes);
      FLASHMLA_CHECK(op, cache_type == q.element_type() && cache_dims[3] == head_dim, shapes);
      heads_kv = static_cast<int>(cache_dims[2]);
      break;
    case CacheFormat::kFp8V32:
      FLASHMLA_CHECK(op, cache_dims.size() == 4 && cache_dims[1] == page_size && cache_dims[2] == 1,
                     shapes);
      FLASHMLA_CHECK(op, cache_dims[3] == fp8_formats::V32::kTokenBytes && head_dim == 576, shapes);
      FLASHMLA_CHECK(op, cache_type == DataType::U8 || cache_type == DataType::F8E4M3FN, shapes);
      FLASHMLA_CHECK(op, q.element_type() == DataType::BF16, shapes);
      break;
    case CacheFormat::kFp8V4: {
      const int64_t page_bytes = fp8_formats::V4::page_bytes(page_size);
      FLASHMLA_CHECK(op, cache_dims.size() == 2 && cache_dims[1] == page_bytes && head_dim == 512,
                     shapes);
      FLASHMLA_CHECK(op, cache_type == DataType::U8 && q.element_type() == DataType::BF16, shapes);
      break;
    }
    default:
      return xla::ffi::Error::InvalidArgument(std::string(op) + ": there is no cache format " +
                                              std::to_string(format));
  }
  *result = {cache.untyped_data(), static_cast<int>(cache_dims[0]), page_size, heads_kv};
  return xla::ffi::Error::Success();
}

// Checks the common buffers and fills in DecodeParams, all but the runs. A request has at most
// `capacity` tokens, those of each run filled up to whole blocks. No dimension of out may be 0.
template <typename Shapes>
xla::ffi::Error fill_decode_params(const char* op, const DecodeBuffers& x, int heads_kv,
                                   bool sparse, int32_t cache_format, int64_t capacity,
                                   float softmax_scale, bool batch_invariant, const Shapes& shapes,
                                   DecodeParams* p) {
  const auto q_dims = x.q.dimensions();
  const auto out_dims = x.out->dimensions();
  const auto lse_dims = x.lse->dimensions();
  const auto schedule_dims = x.schedule.dimensions();
  const auto sink_dims = x.attn_sink.dimensions();
  const auto partial_dims = x.partial_out->dimensions();
  const auto sums_dims = x.partial_sums->dimensions();
  FLASHMLA_CHECK(op, q_dims.size() == 4 && out_dims.size() == 4 && lse_dims.size() == 3, shapes);
  FLASHMLA_CHECK(op, schedule_dims.size() == 2 && schedule_dims[1] == 8, shapes);
  FLASHMLA_CHECK(op, partial_dims.size() == 4 && sums_dims.size() == 4, shapes);
  FLASHMLA_CHECK(op, all_fit_int32(q_dims) && all_fit_int32(out_dims), shapes);
  FLASHMLA_CHECK(op, all_fit_int32(schedule_dims) && all_fit_int32(partial_dims), shapes);

  p->batch = static_cast<int>(q_dims[0]);
  p->seq_q = static_cast<int>(q_dims[1]);
  p->heads_q = static_cast<int>(q_dims[2]);
  p->heads_kv = heads_kv;
  p->head_dim = static_cast<int>(q_dims[3]);
  p->head_dim_v = static_cast<int>(out_dims[3]);
  p->num_parts = static_cast<int>(schedule_dims[0]);
  p->num_slots = static_cast<int>(partial_dims[0]);
  FLASHMLA_CHECK(op, p->num_parts > 0 && heads_kv > 0 && p->heads_q % heads_kv == 0, shapes);
  FLASHMLA_CHECK(op, x.q.element_type() == x.out->element_type(), shapes);
  FLASHMLA_CHECK(op, out_dims[0] == p->batch && out_dims[1] == p->seq_q, shapes);
  FLASHMLA_CHECK(op, out_dims[2] == p->heads_q && p->head_dim_v > 0, shapes);
  FLASHMLA_CHECK(op, lse_dims[0] == p->batch && lse_dims[1] == p->heads_q, shapes);
  FLASHMLA_CHECK(op, lse_dims[2] == p->seq_q, shapes);

  const int64_t rows = int64_t{p->seq_q} * (p->heads_q / heads_kv);
  FLASHMLA_CHECK(op, rows * heads_kv <= INT32_MAX, shapes);
  p->sparse = sparse;
  p->format = static_cast<CacheFormat>(cache_format);
  p->slices = sparse ? p->seq_q : heads_kv;
  const int slabs = partial::slabs_of_slice(partial::rows_of_slice(*p));
  FLASHMLA_CHECK(op, partial_dims[1] == p->slices && partial_dims[2] == slabs, shapes);
  FLASHMLA_CHECK(op, partial_dims[3] == partial::floats(p->head_dim_v, p->format), shapes);
  FLASHMLA_CHECK(op, sums_dims[0] == p->num_slots && sums_dims[1] == p->slices, shapes);
  FLASHMLA_CHECK(op, sums_dims[2] == slabs && sums_dims[3] == partial::sums(p->format), shapes);
  FLASHMLA_CHECK(op, x.status->element_count() == 1, shapes);
  // The slots follow from the schedule and must be there, or pieces would be written past the end.
  if (batch_invariant) {
    FLASHMLA_CHECK(op, p->batch > 0 && p->num_slots % p->batch == 0, shapes);
    p->slots_per_request = p->num_slots / p->batch;
    FLASHMLA_CHECK(op, p->slots_per_request >= schedule::max_invariant_splits(capacity), shapes);
  } else {
    FLASHMLA_CHECK(op, p->num_parts == 1 || p->num_slots >= 2 * int64_t{p->num_parts}, shapes);
  }
  const bool has_sink = x.attn_sink.element_count() > 0;
  p->sink_per_request = sink_dims.size() == 2;
  if (has_sink) {
    FLASHMLA_CHECK(op, sink_dims.size() == 1 || sink_dims.size() == 2, shapes);
    FLASHMLA_CHECK(op, sink_dims.back() == p->heads_q, shapes);
    FLASHMLA_CHECK(op, sink_dims.size() == 1 || sink_dims[0] == p->batch, shapes);
  }

  switch (x.q.element_type()) {
    case xla::ffi::DataType::BF16:
      p->dtype = DataType::kBFloat16;
      break;
    case xla::ffi::DataType::F16:
      p->dtype = DataType::kFloat16;
      break;
    default:
      return xla::ffi::Error::InvalidArgument(std::string(op) + ": q must be bfloat16 or float16");
  }
  p->softmax_scale = softmax_scale;
  p->batch_invariant = batch_invariant;
  p->q = x.q.untyped_data();
  p->schedule = x.schedule.typed_data();
  p->attn_sink = has_sink ? x.attn_sink.typed_data() : nullptr;
  p->out = x.out->untyped_data();
  p->lse = x.lse->typed_data();
  p->partial_out = x.partial_out->typed_data();
  p->partial_sums = x.partial_sums->typed_data();
  p->schedule_is_broken = x.status->typed_data();
  return xla::ffi::Error::Success();
}

// Unimplemented, with the reason, where the current device has no decode kernels.
inline xla::ffi::Error check_device(const char* op) {
  int capability = 0;
  if (Status status = compute_capability(&capability); !status.ok()) return to_error(op, status);
  if (capability == 90) return xla::ffi::Error::Success();
  return xla::ffi::Error(xla::ffi::ErrorCode::kUnimplemented,
                         std::string(op) + ": no kernel for compute capability " +
                             std::to_string(capability / 10) + "." +
                             std::to_string(capability % 10));
}

}  // namespace flashmla
