// FFI handler of sparse decode: checks the buffers, fills the parameters, launches.
#include "ffi/decode.h"

namespace ffi = xla::ffi;

namespace flashmla {
namespace {

constexpr const char* kOp = "flashmla_sparse_decode";

// Checks one cache and the indices into it, and fills in run and source `i`. An empty `lengths`
// stands for none. Adds the tokens that a request may choose, in whole blocks, to `capacity`.
template <typename Shapes>
ffi::Error fill_source(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k_cache,
                       const ffi::Buffer<ffi::S32>& indices, const ffi::Buffer<ffi::S32>& lengths,
                       int32_t cache_format, int32_t page_size, const Shapes& shapes, int i,
                       int64_t* capacity, SparseDecodeParams* p) {
  PagedCache cache{};
  FLASHMLA_RETURN_IF_FAILURE(read_cache(kOp, k_cache, cache_format, page_size, q, shapes, &cache));
  FLASHMLA_CHECK(kOp, cache.heads_kv == 1, shapes);
  const auto q_dims = q.dimensions();
  const auto indices_dims = indices.dimensions();
  FLASHMLA_CHECK(kOp, indices_dims.size() == 3 && all_fit_int32(indices_dims), shapes);
  FLASHMLA_CHECK(kOp, indices_dims[0] == q_dims[0] && indices_dims[1] == q_dims[1], shapes);
  const bool has_lengths = lengths.element_count() > 0;
  FLASHMLA_CHECK(kOp, !has_lengths || lengths.element_count() == size_t(q_dims[0]), shapes);

  const int topk = static_cast<int>(indices_dims[2]);
  p->runs[i] = {has_lengths ? lengths.typed_data() : nullptr, topk};
  p->sources[i] = {cache.data, indices.typed_data(), cache.num_pages, page_size, topk};
  *capacity += int64_t{schedule::blocks_of(topk)} * schedule::kBlockTokens;
  return ffi::Error::Success();
}

ffi::Error sparse_decode(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k_cache,
                         ffi::Buffer<ffi::S32> indices, ffi::Buffer<ffi::S32> topk_length,
                         ffi::Buffer<ffi::F32> attn_sink, ffi::AnyBuffer extra_k_cache,
                         ffi::Buffer<ffi::S32> extra_indices,
                         ffi::Buffer<ffi::S32> extra_topk_length, ffi::Buffer<ffi::S32> schedule,
                         ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::Buffer<ffi::F32>> lse,
                         ffi::Result<ffi::Buffer<ffi::F32>> partial_out,
                         ffi::Result<ffi::Buffer<ffi::F32>> partial_sums,
                         ffi::Result<ffi::Buffer<ffi::S32>> status, float softmax_scale,
                         bool batch_invariant, bool fp8_matmul, bool power_of_two_scales,
                         int32_t cache_format, int32_t page_size, int32_t extra_page_size) {
  const DecodeBuffers common{q, schedule, attn_sink, out, lse, partial_out, partial_sums, status};
  const auto shapes = [&] {
    return describe(common) + describe("k_cache", k_cache) + describe("indices", indices) +
           describe("topk_length", topk_length) + describe("extra_k_cache", extra_k_cache) +
           describe("extra_indices", extra_indices) +
           describe("extra_topk_length", extra_topk_length) + " page_size " +
           std::to_string(page_size) + " extra_page_size " + std::to_string(extra_page_size);
  };
  if (out->element_count() == 0) return ffi::Error::Success();

  SparseDecodeParams p{};
  int64_t capacity = 0;
  FLASHMLA_RETURN_IF_FAILURE(fill_source(q, k_cache, indices, topk_length, cache_format, page_size,
                                         shapes, 0, &capacity, &p));
  // Pages of 0 tokens: there is no second cache, whereas one may well be empty.
  if (extra_page_size != 0) {
    FLASHMLA_RETURN_IF_FAILURE(fill_source(q, extra_k_cache, extra_indices, extra_topk_length,
                                           cache_format, extra_page_size, shapes, 1, &capacity,
                                           &p));
  } else {
    p.sources[1].page_size = 1;  // nothing is to be divided by 0
  }
  FLASHMLA_RETURN_IF_FAILURE(fill_decode_params(kOp, common, 1, /*sparse=*/true, cache_format,
                                                capacity, softmax_scale, batch_invariant, shapes,
                                                &p));
  FLASHMLA_CHECK(kOp, !fp8_matmul || p.format == CacheFormat::kFp8V32, shapes);
  FLASHMLA_CHECK(kOp, !power_of_two_scales || p.format != CacheFormat::kPlain, shapes);
  p.fp8_matmul = fp8_matmul;
  p.power_of_two_scales = power_of_two_scales;

  FLASHMLA_RETURN_IF_FAILURE(check_device(kOp));
  FLASHMLA_RETURN_IF_FAILURE(to_error(kOp, launch_sparse_decode_sm90(p, stream)));
  return to_error(kOp, launch_combine(p, stream));
}

}  // namespace
}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashMlaSparseDecode, flashmla::sparse_decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("softmax_scale")
                                  .Attr<bool>("batch_invariant")
                                  .Attr<bool>("fp8_matmul")
                                  .Attr<bool>("power_of_two_scales")
                                  .Attr<int32_t>("cache_format")
                                  .Attr<int32_t>("page_size")
                                  .Attr<int32_t>("extra_page_size"),
                              {ffi::Traits::kCmdBufferCompatible});
