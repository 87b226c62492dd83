// jax_flashmla._ext.raw: the launchers without XLA around them, on raw device addresses. For tests
// that sweep thousands of shapes (no compilation per shape) and for benchmarks (a CUDA graph of
// back-to-back launches). Nothing here checks an address: not for applications.

#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

namespace nb = nanobind;

namespace {

using flashmla::CacheAppendParams;
using flashmla::CacheGatherParams;
using flashmla::DecodeParams;
using flashmla::DenseDecodeParams;
using flashmla::ScheduleParams;
using flashmla::SparseDecodeParams;
using flashmla::Status;

void throw_if_error(const Status& status) {
  if (!status.ok()) {
    throw std::runtime_error(std::string(status.where) + ": " + cudaGetErrorString(status.error));
  }
}

#define RAW_TRY(expr) throw_if_error(Status{(expr), #expr})

Status launch(const DenseDecodeParams& p, cudaStream_t stream) {
  if (Status status = flashmla::launch_dense_decode_sm90(p, stream); !status.ok()) return status;
  return flashmla::launch_combine(p, stream);
}

Status launch(const SparseDecodeParams& p, cudaStream_t stream) {
  if (Status status = flashmla::launch_sparse_decode_sm90(p, stream); !status.ok()) return status;
  return flashmla::launch_combine(p, stream);
}

Status launch(const ScheduleParams& p, cudaStream_t stream) {
  return flashmla::launch_schedule(p, stream);
}

Status launch(const CacheAppendParams& p, cudaStream_t stream) {
  return flashmla::launch_cache_append(p, stream);
}

Status launch(const CacheGatherParams& p, cudaStream_t stream) {
  return flashmla::launch_cache_gather(p, stream);
}

class Stream {
 public:
  Stream() { RAW_TRY(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

template <typename Params>
void run(const Params& p) {
  Stream stream;
  throw_if_error(launch(p, stream));
  RAW_TRY(cudaStreamSynchronize(stream));
}

// Microseconds per launch of each replay of a CUDA graph of `launches` back-to-back launches.
template <typename Params>
std::vector<float> time(const Params& p, int launches, int replays) {
  if (launches < 1 || replays < 1) throw std::invalid_argument("launches and replays must be >= 1");
  Stream stream;
  throw_if_error(launch(p, stream));
  RAW_TRY(cudaStreamSynchronize(stream));

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  RAW_TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) throw_if_error(launch(p, stream));
  RAW_TRY(cudaStreamEndCapture(stream, &graph));
  RAW_TRY(cudaGraphInstantiate(&executable, graph, 0));
  RAW_TRY(cudaEventCreate(&begin));
  RAW_TRY(cudaEventCreate(&end));
  RAW_TRY(cudaGraphLaunch(executable, stream));
  std::vector<float> times;
  for (int i = 0; i < replays; ++i) {
    RAW_TRY(cudaEventRecord(begin, stream));
    RAW_TRY(cudaGraphLaunch(executable, stream));
    RAW_TRY(cudaEventRecord(end, stream));
    RAW_TRY(cudaEventSynchronize(end));
    float milliseconds = 0;
    RAW_TRY(cudaEventElapsedTime(&milliseconds, begin, end));
    times.push_back(milliseconds * 1000.f / static_cast<float>(launches));
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  return times;
}

// A pointer member as an integer attribute.
template <typename Class, typename Params, typename Pointer>
void bind_pointer(Class& c, const char* name, Pointer Params::* member) {
  c.def_prop_rw(
      name, [member](const Params& p) { return reinterpret_cast<uintptr_t>(p.*member); },
      [member](Params& p, uintptr_t address) { p.*member = reinterpret_cast<Pointer>(address); });
}

// An enumeration as an integer attribute.
template <typename Class, typename Params, typename Enum>
void bind_enum(Class& c, const char* name, Enum Params::* member) {
  c.def_prop_rw(
      name, [member](const Params& p) { return static_cast<int>(p.*member); },
      [member](Params& p, int value) { p.*member = static_cast<Enum>(value); });
}

void bind_cache(nb::module_& raw) {
  nb::class_<CacheAppendParams> append(raw, "CacheAppendParams");
  append.def("__init__", [](CacheAppendParams* p) { new (p) CacheAppendParams{}; })
      .def_rw("num_pages", &CacheAppendParams::num_pages)
      .def_rw("page_size", &CacheAppendParams::page_size)
      .def_rw("page_bytes", &CacheAppendParams::page_bytes)
      .def_rw("heads", &CacheAppendParams::heads)
      .def_rw("latent", &CacheAppendParams::latent)
      .def_rw("rope", &CacheAppendParams::rope)
      .def_rw("power_of_two_scales", &CacheAppendParams::power_of_two_scales)
      .def_rw("tokens", &CacheAppendParams::tokens)
      .def_rw("norm_eps", &CacheAppendParams::norm_eps)
      .def_rw("kv_c_stride", &CacheAppendParams::kv_c_stride)
      .def_rw("k_pe_stride", &CacheAppendParams::k_pe_stride);
  bind_enum(append, "format", &CacheAppendParams::format);
  bind_enum(append, "dtype", &CacheAppendParams::dtype);
  bind_enum(append, "kv_c_dtype", &CacheAppendParams::kv_c_dtype);
  bind_enum(append, "k_pe_dtype", &CacheAppendParams::k_pe_dtype);
  bind_enum(append, "norm_dtype", &CacheAppendParams::norm_dtype);
  bind_enum(append, "rope_layout", &CacheAppendParams::rope_layout);
  bind_pointer(append, "kv_c", &CacheAppendParams::kv_c);
  bind_pointer(append, "k_pe", &CacheAppendParams::k_pe);
  bind_pointer(append, "norm_weight", &CacheAppendParams::norm_weight);
  bind_pointer(append, "rope_cos", &CacheAppendParams::rope_cos);
  bind_pointer(append, "rope_sin", &CacheAppendParams::rope_sin);
  bind_pointer(append, "slots", &CacheAppendParams::slots);
  bind_pointer(append, "cache", &CacheAppendParams::cache);

  nb::class_<CacheGatherParams> gather(raw, "CacheGatherParams");
  gather.def("__init__", [](CacheGatherParams* p) { new (p) CacheGatherParams{}; })
      .def_rw("num_pages", &CacheGatherParams::num_pages)
      .def_rw("page_size", &CacheGatherParams::page_size)
      .def_rw("page_bytes", &CacheGatherParams::page_bytes)
      .def_rw("columns", &CacheGatherParams::columns)
      .def_rw("tokens", &CacheGatherParams::tokens);
  bind_enum(gather, "format", &CacheGatherParams::format);
  bind_enum(gather, "dtype", &CacheGatherParams::dtype);
  bind_enum(gather, "out_dtype", &CacheGatherParams::out_dtype);
  bind_pointer(gather, "cache", &CacheGatherParams::cache);
  bind_pointer(gather, "slots", &CacheGatherParams::slots);
  bind_pointer(gather, "out", &CacheGatherParams::out);

  raw.def("run", &run<CacheAppendParams>, nb::arg("params"));
  raw.def("run", &run<CacheGatherParams>, nb::arg("params"));
  raw.def("time", &time<CacheAppendParams>, nb::arg("params"), nb::arg("launches") = 20,
          nb::arg("replays") = 5);
  raw.def("time", &time<CacheGatherParams>, nb::arg("params"), nb::arg("launches") = 20,
          nb::arg("replays") = 5);
}

int checked_run(int i) {
  if (i < 0 || i >= flashmla::kMaxRuns) throw std::out_of_range("runs and sources are 0 and 1");
  return i;
}

}  // namespace

void bind_raw(nb::module_& m) {
  nb::module_ raw =
      m.def_submodule("raw", "Launchers on raw device addresses; nothing is checked.");

  nb::class_<DecodeParams> decode(raw, "DecodeParams");
  decode.def_rw("batch", &DecodeParams::batch)
      .def_rw("seq_q", &DecodeParams::seq_q)
      .def_rw("heads_q", &DecodeParams::heads_q)
      .def_rw("heads_kv", &DecodeParams::heads_kv)
      .def_rw("head_dim", &DecodeParams::head_dim)
      .def_rw("head_dim_v", &DecodeParams::head_dim_v)
      .def_rw("num_parts", &DecodeParams::num_parts)
      .def_rw("softmax_scale", &DecodeParams::softmax_scale)
      .def_rw("batch_invariant", &DecodeParams::batch_invariant)
      .def_rw("fp8_matmul", &DecodeParams::fp8_matmul)
      .def_rw("power_of_two_scales", &DecodeParams::power_of_two_scales)
      .def_rw("sink_per_request", &DecodeParams::sink_per_request)
      .def_rw("slices", &DecodeParams::slices)
      .def_rw("sparse", &DecodeParams::sparse)
      .def_rw("num_slots", &DecodeParams::num_slots)
      .def_rw("slots_per_request", &DecodeParams::slots_per_request)
      .def_prop_rw(
          "is_fp16", [](const DecodeParams& p) { return p.dtype == flashmla::DataType::kFloat16; },
          [](DecodeParams& p, bool fp16) {
            p.dtype = fp16 ? flashmla::DataType::kFloat16 : flashmla::DataType::kBFloat16;
          })
      .def(
          "set_run",
          [](DecodeParams& p, int i, uintptr_t lengths, int64_t most) {
            p.runs[checked_run(i)] = {reinterpret_cast<const int32_t*>(lengths), most};
          },
          nb::arg("i"), nb::arg("lengths"), nb::arg("most"),
          "Address of the lengths of run i (0: all are `most`), and the largest one there can be.");
  bind_enum(decode, "cache_format", &DecodeParams::format);
  bind_pointer(decode, "q", &DecodeParams::q);
  bind_pointer(decode, "schedule", &DecodeParams::schedule);
  bind_pointer(decode, "attn_sink", &DecodeParams::attn_sink);
  bind_pointer(decode, "out", &DecodeParams::out);
  bind_pointer(decode, "lse", &DecodeParams::lse);
  bind_pointer(decode, "partial_out", &DecodeParams::partial_out);
  bind_pointer(decode, "partial_sums", &DecodeParams::partial_sums);
  bind_pointer(decode, "schedule_is_broken", &DecodeParams::schedule_is_broken);

  nb::class_<DenseDecodeParams, DecodeParams> dense(raw, "DenseDecodeParams");
  dense.def("__init__", [](DenseDecodeParams* p) { new (p) DenseDecodeParams{}; })
      .def_rw("num_pages", &DenseDecodeParams::num_pages)
      .def_rw("page_size", &DenseDecodeParams::page_size)
      .def_rw("table_width", &DenseDecodeParams::table_width)
      .def_rw("causal", &DenseDecodeParams::causal);
  bind_pointer(dense, "k_cache", &DenseDecodeParams::k_cache);
  bind_pointer(dense, "block_table", &DenseDecodeParams::block_table);

  nb::class_<SparseDecodeParams, DecodeParams> sparse(raw, "SparseDecodeParams");
  sparse.def("__init__", [](SparseDecodeParams* p) { new (p) SparseDecodeParams{}; })
      .def(
          "set_source",
          [](SparseDecodeParams& p, int i, uintptr_t cache, uintptr_t indices, int num_pages,
             int page_size, int topk) {
            p.sources[checked_run(i)] = {reinterpret_cast<const void*>(cache),
                                         reinterpret_cast<const int32_t*>(indices), num_pages,
                                         page_size, topk};
          },
          nb::arg("i"), nb::arg("cache"), nb::arg("indices"), nb::arg("num_pages"),
          nb::arg("page_size"), nb::arg("topk"), "Cache i and the indices into it, by address.");

  nb::class_<ScheduleParams> schedule(raw, "ScheduleParams");
  schedule.def("__init__", [](ScheduleParams* p) { new (p) ScheduleParams{}; })
      .def_rw("batch", &ScheduleParams::batch)
      .def_rw("num_parts", &ScheduleParams::num_parts)
      .def_rw("row_tiles", &ScheduleParams::row_tiles)
      .def_rw("batch_invariant", &ScheduleParams::batch_invariant)
      .def_rw("sparse", &ScheduleParams::sparse)
      .def_rw("default_length", &ScheduleParams::default_length)
      .def_rw("max_length", &ScheduleParams::max_length)
      .def_rw("extra_default_length", &ScheduleParams::extra_default_length)
      .def_rw("extra_max_length", &ScheduleParams::extra_max_length);
  bind_pointer(schedule, "lengths", &ScheduleParams::lengths);
  bind_pointer(schedule, "extra_lengths", &ScheduleParams::extra_lengths);
  bind_pointer(schedule, "schedule", &ScheduleParams::schedule);
  bind_pointer(schedule, "num_splits", &ScheduleParams::num_splits);

  raw.def("run", &run<DenseDecodeParams>, nb::arg("params"), "Launches and waits.");
  raw.def("run", &run<SparseDecodeParams>, nb::arg("params"));
  raw.def("run", &run<ScheduleParams>, nb::arg("params"));
  raw.def("time", &time<DenseDecodeParams>, nb::arg("params"), nb::arg("launches") = 20,
          nb::arg("replays") = 5,
          "Microseconds per launch, of each replay of a CUDA graph of back-to-back launches.");
  raw.def("time", &time<SparseDecodeParams>, nb::arg("params"), nb::arg("launches") = 20,
          nb::arg("replays") = 5);
  raw.def("time", &time<ScheduleParams>, nb::arg("params"), nb::arg("launches") = 20,
          nb::arg("replays") = 5);
  bind_cache(raw);
}
