// FFI handler of dense decode: checks the buffers, fills the parameters, launches.
#include "common/schedule.h"
#include "ffi/check.h"

namespace ffi = xla::ffi;

namespace flashmla {
namespace {

constexpr const char* kOp = "flashmla_dense_decode";

ffi::Error dense_decode(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k_cache,
                        ffi::Buffer<ffi::S32> block_table, ffi::Buffer<ffi::S32> cache_seqlens,
                        ffi::Buffer<ffi::S32> schedule, ffi::Buffer<ffi::F32> attn_sink,
                        ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::Buffer<ffi::F32>> lse,
                        ffi::Result<ffi::Buffer<ffi::F32>> partial_out,
                        ffi::Result<ffi::Buffer<ffi::F32>> partial_lse,
                        ffi::Result<ffi::Buffer<ffi::S32>> status, float softmax_scale, bool causal,
                        bool batch_invariant) {
  const auto shapes = [&] {
    return describe("q", q) + describe("k_cache", k_cache) + describe("block_table", block_table) +
           describe("cache_seqlens", cache_seqlens) + describe("schedule", schedule) +
           describe("attn_sink", attn_sink) + describe("out", *out) + describe("lse", *lse) +
           describe("partial_out", *partial_out) + describe("partial_lse", *partial_lse);
  };
  const auto q_dims = q.dimensions();
  const auto k_dims = k_cache.dimensions();
  const auto table_dims = block_table.dimensions();
  const auto schedule_dims = schedule.dimensions();
  const auto sink_dims = attn_sink.dimensions();
  const auto out_dims = out->dimensions();
  const auto partial_dims = partial_out->dimensions();
  FLASHMLA_CHECK(kOp, q_dims.size() == 4 && k_dims.size() == 4 && out_dims.size() == 4, shapes);
  FLASHMLA_CHECK(kOp, table_dims.size() == 2 && cache_seqlens.dimensions().size() == 1, shapes);
  FLASHMLA_CHECK(kOp, schedule_dims.size() == 2 && schedule_dims[1] == 8, shapes);
  FLASHMLA_CHECK(kOp, partial_dims.size() == 4 && partial_lse->dimensions().size() == 3, shapes);
  FLASHMLA_CHECK(kOp, lse->dimensions().size() == 3, shapes);
  for (const auto dims : {q_dims, k_dims, table_dims, schedule_dims, partial_dims}) {
    for (const int64_t size : dims) FLASHMLA_CHECK(kOp, size >= 0 && size <= INT32_MAX, shapes);
  }

  DenseDecodeParams p{};
  p.batch = static_cast<int>(q_dims[0]);
  p.seq_q = static_cast<int>(q_dims[1]);
  p.heads_q = static_cast<int>(q_dims[2]);
  p.head_dim = static_cast<int>(q_dims[3]);
  p.num_pages = static_cast<int>(k_dims[0]);
  p.page_size = static_cast<int>(k_dims[1]);
  p.heads_kv = static_cast<int>(k_dims[2]);
  p.head_dim_v = static_cast<int>(out_dims[3]);
  p.table_width = static_cast<int>(table_dims[1]);
  p.num_parts = static_cast<int>(schedule_dims[0]);
  p.num_slots = static_cast<int>(partial_dims[0]);
  if (out->element_count() == 0) return ffi::Error::Success();

  FLASHMLA_CHECK(kOp, q.element_type() == k_cache.element_type(), shapes);
  FLASHMLA_CHECK(kOp, q.element_type() == out->element_type(), shapes);
  FLASHMLA_CHECK(kOp, p.heads_kv > 0 && p.heads_q % p.heads_kv == 0, shapes);
  FLASHMLA_CHECK(kOp, k_dims[3] == p.head_dim && p.page_size > 0, shapes);
  FLASHMLA_CHECK(kOp, table_dims[0] == p.batch && cache_seqlens.dimensions()[0] == p.batch, shapes);
  FLASHMLA_CHECK(kOp, out_dims[0] == p.batch && out_dims[1] == p.seq_q, shapes);
  FLASHMLA_CHECK(kOp, out_dims[2] == p.heads_q, shapes);
  FLASHMLA_CHECK(kOp, lse->element_count() == size_t(q_dims[0] * q_dims[1] * q_dims[2]), shapes);
  FLASHMLA_CHECK(kOp, p.num_parts > 0, shapes);
  const int64_t rows = int64_t{p.seq_q} * (p.heads_q / p.heads_kv);
  FLASHMLA_CHECK(kOp, rows * p.heads_kv <= INT32_MAX, shapes);
  FLASHMLA_CHECK(kOp, partial_dims[1] == p.heads_kv && partial_dims[2] == rows, shapes);
  FLASHMLA_CHECK(kOp, partial_dims[3] == p.head_dim_v && status->element_count() == 1, shapes);
  FLASHMLA_CHECK(kOp,
                 int64_t(partial_lse->element_count()) == int64_t{p.num_slots} * p.heads_kv * rows,
                 shapes);
  // The slots follow from the schedule and must be there, or pieces would be written past the end.
  if (batch_invariant) {
    FLASHMLA_CHECK(kOp, p.num_slots % p.batch == 0, shapes);
    p.slots_per_request = p.num_slots / p.batch;
    const int64_t capacity = int64_t{p.table_width} * p.page_size;
    FLASHMLA_CHECK(kOp, p.slots_per_request >= schedule::max_invariant_splits(capacity), shapes);
  } else {
    FLASHMLA_CHECK(kOp, p.num_parts == 1 || p.num_slots >= 2 * int64_t{p.num_parts}, shapes);
  }
  const bool has_sink = attn_sink.element_count() > 0;
  p.sink_per_request = sink_dims.size() == 2;
  if (has_sink) {
    FLASHMLA_CHECK(kOp, sink_dims.size() == 1 || sink_dims.size() == 2, shapes);
    FLASHMLA_CHECK(kOp, sink_dims.back() == p.heads_q, shapes);
    FLASHMLA_CHECK(kOp, sink_dims.size() == 1 || sink_dims[0] == p.batch, shapes);
  }

  switch (q.element_type()) {
    case ffi::DataType::BF16:
      p.dtype = DataType::kBFloat16;
      break;
    case ffi::DataType::F16:
      p.dtype = DataType::kFloat16;
      break;
    default:
      return ffi::Error::InvalidArgument(std::string(kOp) + ": q must be bfloat16 or float16");
  }
  p.softmax_scale = softmax_scale;
  p.causal = causal;
  p.batch_invariant = batch_invariant;
  p.q = q.untyped_data();
  p.k_cache = k_cache.untyped_data();
  p.block_table = block_table.typed_data();
  p.cache_seqlens = cache_seqlens.typed_data();
  p.schedule = schedule.typed_data();
  p.attn_sink = has_sink ? attn_sink.typed_data() : nullptr;
  p.out = out->untyped_data();
  p.lse = lse->typed_data();
  p.partial_out = partial_out->typed_data();
  p.partial_lse = partial_lse->typed_data();
  p.schedule_is_broken = status->typed_data();

  int capability = 0;
  if (Status status = compute_capability(&capability); !status.ok()) return to_error(kOp, status);
  if (capability != 90) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      std::string(kOp) + ": no kernel for compute capability " +
                          std::to_string(capability / 10) + "." + std::to_string(capability % 10));
  }
  if (Status status = launch_dense_decode_sm90(p, stream); !status.ok()) {
    return to_error(kOp, status);
  }
  return to_error(kOp, launch_combine(p, stream));
}

}  // namespace
}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashMlaDenseDecode, flashmla::dense_decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("softmax_scale")
                                  .Attr<bool>("causal")
                                  .Attr<bool>("batch_invariant"),
                              {ffi::Traits::kCmdBufferCompatible});
