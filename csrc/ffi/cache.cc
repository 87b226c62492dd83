// FFI handlers of the cache's writer and reader: check the buffers, fill the parameters, launch.
#include "common/fp8_formats.h"
#include "ffi/check.h"

namespace ffi = xla::ffi;

namespace flashmla {
namespace {

constexpr const char* kAppend = "flashmla_cache_append";
constexpr const char* kGather = "flashmla_cache_gather";

// Sizes of a cache, as its array and the attributes tell them.
struct CacheSizes {
  CacheFormat format;
  int64_t num_pages;
  int64_t page_size;
  int64_t page_bytes;  // kFp8V4
  int64_t heads;
  int64_t columns;  // of a head, d
  DataType dtype;   // kPlain
};

bool to_data_type(ffi::DataType from, DataType* to) {
  switch (from) {
    case ffi::DataType::BF16:
      *to = DataType::kBFloat16;
      return true;
    case ffi::DataType::F16:
      *to = DataType::kFloat16;
      return true;
    case ffi::DataType::F32:
      *to = DataType::kFloat32;
      return true;
    default:
      return false;
  }
}

ffi::Error read_sizes(const char* op, const ffi::AnyBuffer& cache, int32_t format,
                      int32_t page_size, CacheSizes* sizes) {
  const auto shapes = [&] {
    return describe("cache", cache) + " in format " + std::to_string(format) + " with page_size " +
           std::to_string(page_size);
  };
  const auto dims = cache.dimensions();
  FLASHMLA_CHECK(op, format >= 0 && format <= 2 && page_size > 0, shapes);
  for (const int64_t size : dims) FLASHMLA_CHECK(op, size >= 0 && size <= INT32_MAX, shapes);
  CacheSizes s{static_cast<CacheFormat>(format), 0, page_size, 0, 1, 0, DataType::kBFloat16};
  if (s.format == CacheFormat::kFp8V4) {
    FLASHMLA_CHECK(op, dims.size() == 2 && cache.element_type() == ffi::DataType::U8, shapes);
    s.page_bytes = fp8_formats::V4::page_bytes(page_size);
    s.columns = 512;
    FLASHMLA_CHECK(op, dims[1] == s.page_bytes, shapes);
  } else {
    FLASHMLA_CHECK(op, dims.size() == 4 && dims[1] == page_size, shapes);
    if (s.format == CacheFormat::kFp8V32) {
      FLASHMLA_CHECK(op, cache.element_type() == ffi::DataType::U8, shapes);
      FLASHMLA_CHECK(op, dims[2] == 1 && dims[3] == fp8_formats::V32::kTokenBytes, shapes);
      s.columns = 576;
    } else {
      FLASHMLA_CHECK(op, to_data_type(cache.element_type(), &s.dtype), shapes);
      FLASHMLA_CHECK(op, dims[2] > 0 && dims[3] > 0 && dims[3] <= kMaxColumns, shapes);
      s.heads = dims[2];
      s.columns = dims[3];
    }
  }
  s.num_pages = dims[0];
  *sizes = s;
  return ffi::Error::Success();
}

ffi::Error cache_append(cudaStream_t stream, ffi::AnyBuffer cache, ffi::Buffer<ffi::S32> slots,
                        ffi::AnyBuffer kv_c, ffi::AnyBuffer k_pe, ffi::AnyBuffer norm_weight,
                        ffi::Buffer<ffi::F32> rope_cos, ffi::Buffer<ffi::F32> rope_sin,
                        ffi::Result<ffi::AnyBuffer> result, int32_t format, int32_t page_size,
                        int32_t latent, bool power_of_two_scales, float norm_eps,
                        bool rope_interleaved) {
  const auto shapes = [&] {
    return describe("cache", cache) + describe("slots", slots) + describe("kv_c", kv_c) +
           describe("k_pe", k_pe) + describe("norm_weight", norm_weight) +
           describe("rope_cos", rope_cos) + describe("rope_sin", rope_sin) +
           describe("result", *result) + " with latent " + std::to_string(latent);
  };
  CacheSizes sizes;
  if (ffi::Error error = read_sizes(kAppend, cache, format, page_size, &sizes); error.failure()) {
    return error;
  }
  FLASHMLA_CHECK(kAppend, result->element_type() == cache.element_type(), shapes);
  FLASHMLA_CHECK(kAppend, result->element_count() == cache.element_count(), shapes);
  // Otherwise the bytes of all other tokens would be missing from the result.
  FLASHMLA_CHECK(kAppend, result->untyped_data() == cache.untyped_data(), shapes);
  FLASHMLA_CHECK(kAppend, slots.dimensions().size() == 1, shapes);
  const int64_t tokens = slots.dimensions()[0];
  if (tokens == 0 || cache.element_count() == 0) return ffi::Error::Success();

  CacheAppendParams p{};
  p.format = sizes.format;
  p.dtype = sizes.dtype;
  p.num_pages = static_cast<int>(sizes.num_pages);
  p.page_size = page_size;
  p.page_bytes = sizes.page_bytes;
  p.heads = static_cast<int>(sizes.heads);
  p.tokens = tokens;
  p.power_of_two_scales = power_of_two_scales;
  FLASHMLA_CHECK(kAppend, latent >= 0 && latent <= sizes.columns, shapes);
  FLASHMLA_CHECK(kAppend, sizes.format == CacheFormat::kPlain || latent == sizes.columns - 64,
                 shapes);
  p.latent = latent;
  p.rope = static_cast<int>(sizes.columns - latent);
  const auto kv_dims = kv_c.dimensions();
  FLASHMLA_CHECK(kAppend, kv_dims.size() == 3 && kv_dims[0] == tokens, shapes);
  FLASHMLA_CHECK(kAppend, kv_dims[1] == sizes.heads, shapes);
  FLASHMLA_CHECK(kAppend, to_data_type(kv_c.element_type(), &p.kv_c_dtype), shapes);
  p.kv_c = kv_c.untyped_data();
  p.kv_c_stride = kv_dims[2];
  // An empty array stands for an absent one: then the RoPE part is in kv_c.
  if (k_pe.element_count() > 0) {
    const auto pe_dims = k_pe.dimensions();
    FLASHMLA_CHECK(kAppend, pe_dims.size() == 3 && pe_dims[0] == tokens, shapes);
    FLASHMLA_CHECK(kAppend, pe_dims[1] == sizes.heads && pe_dims[2] == p.rope, shapes);
    FLASHMLA_CHECK(kAppend, kv_dims[2] == latent, shapes);
    FLASHMLA_CHECK(kAppend, to_data_type(k_pe.element_type(), &p.k_pe_dtype), shapes);
    p.k_pe = k_pe.untyped_data();
    p.k_pe_stride = p.rope;
  } else {
    FLASHMLA_CHECK(kAppend, kv_dims[2] == sizes.columns, shapes);
    const int64_t bytes = p.kv_c_dtype == DataType::kFloat32 ? 4 : 2;
    p.k_pe_dtype = p.kv_c_dtype;
    p.k_pe = p.rope > 0 ? static_cast<const char*>(p.kv_c) + latent * bytes : nullptr;
    p.k_pe_stride = sizes.columns;
  }
  if (norm_weight.element_count() > 0) {
    FLASHMLA_CHECK(kAppend, sizes.heads == 1, shapes);
    FLASHMLA_CHECK(kAppend, norm_weight.dimensions().size() == 1, shapes);
    FLASHMLA_CHECK(kAppend, norm_weight.dimensions()[0] == latent, shapes);
    FLASHMLA_CHECK(kAppend, to_data_type(norm_weight.element_type(), &p.norm_dtype), shapes);
    p.norm_weight = norm_weight.untyped_data();
    p.norm_eps = norm_eps;
  }
  if (rope_cos.element_count() > 0 || rope_sin.element_count() > 0) {
    FLASHMLA_CHECK(kAppend, sizes.heads == 1 && p.rope > 0 && p.rope % 2 == 0, shapes);
    for (const auto dims : {rope_cos.dimensions(), rope_sin.dimensions()}) {
      FLASHMLA_CHECK(kAppend, dims.size() == 2 && dims[0] == tokens, shapes);
      FLASHMLA_CHECK(kAppend, dims[1] == p.rope / 2, shapes);
    }
    p.rope_layout = rope_interleaved ? RopeLayout::kInterleaved : RopeLayout::kHalfSplit;
    p.rope_cos = rope_cos.typed_data();
    p.rope_sin = rope_sin.typed_data();
  }
  p.slots = slots.typed_data();
  p.cache = result->untyped_data();
  return to_error(kAppend, launch_cache_append(p, stream));
}

ffi::Error cache_gather(cudaStream_t stream, ffi::AnyBuffer cache, ffi::Buffer<ffi::S32> slots,
                        ffi::Result<ffi::AnyBuffer> out, int32_t format, int32_t page_size) {
  const auto shapes = [&] {
    return describe("cache", cache) + describe("slots", slots) + describe("out", *out);
  };
  CacheSizes sizes;
  if (ffi::Error error = read_sizes(kGather, cache, format, page_size, &sizes); error.failure()) {
    return error;
  }
  const auto out_dims = out->dimensions();
  FLASHMLA_CHECK(kGather, slots.dimensions().size() == 1 && out_dims.size() == 3, shapes);
  FLASHMLA_CHECK(kGather, out_dims[0] == slots.dimensions()[0], shapes);
  FLASHMLA_CHECK(kGather, out_dims[1] == sizes.heads && out_dims[2] == sizes.columns, shapes);

  CacheGatherParams p{};
  p.format = sizes.format;
  p.dtype = sizes.dtype;
  p.num_pages = static_cast<int>(sizes.num_pages);
  p.page_size = page_size;
  p.page_bytes = sizes.page_bytes;
  p.columns = sizes.heads * sizes.columns;
  p.tokens = out_dims[0];
  FLASHMLA_CHECK(kGather, to_data_type(out->element_type(), &p.out_dtype), shapes);
  p.cache = cache.untyped_data();
  p.slots = slots.typed_data();
  p.out = out->untyped_data();
  return to_error(kGather, launch_cache_gather(p, stream));
}

}  // namespace
}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashMlaCacheAppend, flashmla::cache_append,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("format")
                                  .Attr<int32_t>("page_size")
                                  .Attr<int32_t>("latent")
                                  .Attr<bool>("power_of_two_scales")
                                  .Attr<float>("norm_eps")
                                  .Attr<bool>("rope_interleaved"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashMlaCacheGather, flashmla::cache_gather,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("format")
                                  .Attr<int32_t>("page_size"),
                              {ffi::Traits::kCmdBufferCompatible});
