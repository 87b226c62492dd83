// FFI handler of dense decode: checks the buffers, fills the parameters, launches.
#include "ffi/decode.h"

namespace ffi = xla::ffi;

namespace flashmla {
namespace {

constexpr const char* kOp = "flashmla_dense_decode";

ffi::Error dense_decode(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k_cache,
                        ffi::Buffer<ffi::S32> block_table, ffi::Buffer<ffi::S32> cache_seqlens,
                        ffi::Buffer<ffi::S32> schedule, ffi::Buffer<ffi::F32> attn_sink,
                        ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::Buffer<ffi::F32>> lse,
                        ffi::Result<ffi::Buffer<ffi::F32>> partial_out,
                        ffi::Result<ffi::Buffer<ffi::F32>> partial_sums,
                        ffi::Result<ffi::Buffer<ffi::S32>> status, float softmax_scale, bool causal,
                        bool batch_invariant, bool fp8_matmul, bool power_of_two_scales,
                        int32_t cache_format, int32_t page_size) {
  const DecodeBuffers common{q, schedule, attn_sink, out, lse, partial_out, partial_sums, status};
  const auto shapes = [&] {
    return describe(common) + describe("k_cache", k_cache) + describe("block_table", block_table) +
           describe("cache_seqlens", cache_seqlens) + " page_size " + std::to_string(page_size);
  };
  if (out->element_count() == 0) return ffi::Error::Success();

  PagedCache cache{};
  FLASHMLA_RETURN_IF_FAILURE(read_cache(kOp, k_cache, cache_format, page_size, q, shapes, &cache));
  const auto table_dims = block_table.dimensions();
  const auto lengths_dims = cache_seqlens.dimensions();
  FLASHMLA_CHECK(kOp, table_dims.size() == 2 && lengths_dims.size() == 1, shapes);
  FLASHMLA_CHECK(kOp, all_fit_int32(table_dims), shapes);
  const int64_t capacity = table_dims[1] * page_size;
  DenseDecodeParams p{};
  FLASHMLA_RETURN_IF_FAILURE(fill_decode_params(kOp, common, cache.heads_kv, /*sparse=*/false,
                                                cache_format, capacity, softmax_scale,
                                                batch_invariant, shapes, &p));
  FLASHMLA_CHECK(kOp, table_dims[0] == p.batch && lengths_dims[0] == p.batch, shapes);
  FLASHMLA_CHECK(kOp, p.format == CacheFormat::kPlain || p.format == CacheFormat::kFp8V32, shapes);
  FLASHMLA_CHECK(kOp, !fp8_matmul || p.format == CacheFormat::kFp8V32, shapes);
  FLASHMLA_CHECK(kOp, !power_of_two_scales || p.format != CacheFormat::kPlain, shapes);
  p.fp8_matmul = fp8_matmul;
  p.power_of_two_scales = power_of_two_scales;

  p.runs[0] = {cache_seqlens.typed_data(), capacity};
  p.num_pages = cache.num_pages;
  p.page_size = page_size;
  p.table_width = static_cast<int>(table_dims[1]);
  p.causal = causal;
  p.k_cache = cache.data;
  p.block_table = block_table.typed_data();

  FLASHMLA_RETURN_IF_FAILURE(check_device(kOp));
  FLASHMLA_RETURN_IF_FAILURE(to_error(kOp, launch_dense_decode_sm90(p, stream)));
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
                                  .Attr<bool>("batch_invariant")
                                  .Attr<bool>("fp8_matmul")
                                  .Attr<bool>("power_of_two_scales")
                                  .Attr<int32_t>("cache_format")
                                  .Attr<int32_t>("page_size"),
                              {ffi::Traits::kCmdBufferCompatible});
