// FFI handler of get_mla_metadata: plans the tile schedule on the device.
#include "ffi/check.h"

namespace ffi = xla::ffi;

namespace flashmla {
namespace {

constexpr const char* kOp = "flashmla_metadata";

ffi::Error metadata(cudaStream_t stream, ffi::Buffer<ffi::S32> lengths,
                    ffi::Buffer<ffi::S32> extra_lengths,
                    ffi::Result<ffi::Buffer<ffi::S32>> schedule,
                    ffi::Result<ffi::Buffer<ffi::S32>> num_splits, int32_t row_tiles,
                    bool batch_invariant, bool sparse, int32_t default_length, int32_t max_length,
                    int32_t extra_default_length, int32_t extra_max_length) {
  const auto shapes = [&] {
    return describe("lengths", lengths) + describe("extra_lengths", extra_lengths) +
           describe("schedule", *schedule) + describe("num_splits", *num_splits);
  };
  const auto schedule_dims = schedule->dimensions();
  FLASHMLA_CHECK(kOp, schedule_dims.size() == 2 && schedule_dims[1] == 8, shapes);
  FLASHMLA_CHECK(kOp, schedule_dims[0] > 0 && schedule_dims[0] <= INT32_MAX, shapes);
  FLASHMLA_CHECK(kOp, num_splits->element_count() > 0, shapes);
  FLASHMLA_CHECK(kOp, num_splits->element_count() <= size_t{INT32_MAX}, shapes);
  const size_t batch = num_splits->element_count() - 1;

  ScheduleParams p{};
  p.batch = static_cast<int>(batch);
  p.num_parts = static_cast<int>(schedule_dims[0]);
  p.row_tiles = row_tiles;
  p.batch_invariant = batch_invariant;
  p.sparse = sparse;
  p.default_length = default_length;
  p.max_length = max_length;
  p.extra_default_length = extra_default_length;
  p.extra_max_length = extra_max_length;
  // An empty array stands for an absent one: every request then has the default length.
  if (lengths.element_count() > 0) {
    FLASHMLA_CHECK(kOp, lengths.element_count() == batch, shapes);
    p.lengths = lengths.typed_data();
  }
  if (extra_lengths.element_count() > 0) {
    FLASHMLA_CHECK(kOp, extra_lengths.element_count() == batch, shapes);
    p.extra_lengths = extra_lengths.typed_data();
  }
  p.schedule = schedule->typed_data();
  p.num_splits = num_splits->typed_data();
  return to_error(kOp, launch_schedule(p, stream));
}

}  // namespace
}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashMlaMetadata, flashmla::metadata,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int32_t>("row_tiles")
                                  .Attr<bool>("batch_invariant")
                                  .Attr<bool>("sparse")
                                  .Attr<int32_t>("default_length")
                                  .Attr<int32_t>("max_length")
                                  .Attr<int32_t>("extra_default_length")
                                  .Attr<int32_t>("extra_max_length"),
                              {ffi::Traits::kCmdBufferCompatible});
