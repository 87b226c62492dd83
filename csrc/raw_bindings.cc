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

using flashmla::DenseDecodeParams;
using flashmla::ScheduleParams;
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

Status launch(const ScheduleParams& p, cudaStream_t stream) {
  return flashmla::launch_schedule(p, stream);
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

}  // namespace

void bind_raw(nb::module_& m) {
  nb::module_ raw =
      m.def_submodule("raw", "Launchers on raw device addresses; nothing is checked.");

  nb::class_<DenseDecodeParams> dense(raw, "DenseDecodeParams");
  dense.def("__init__", [](DenseDecodeParams* p) { new (p) DenseDecodeParams{}; })
      .def_rw("batch", &DenseDecodeParams::batch)
      .def_rw("seq_q", &DenseDecodeParams::seq_q)
      .def_rw("heads_q", &DenseDecodeParams::heads_q)
      .def_rw("heads_kv", &DenseDecodeParams::heads_kv)
      .def_rw("head_dim", &DenseDecodeParams::head_dim)
      .def_rw("head_dim_v", &DenseDecodeParams::head_dim_v)
      .def_rw("num_pages", &DenseDecodeParams::num_pages)
      .def_rw("page_size", &DenseDecodeParams::page_size)
      .def_rw("table_width", &DenseDecodeParams::table_width)
      .def_rw("num_parts", &DenseDecodeParams::num_parts)
      .def_rw("softmax_scale", &DenseDecodeParams::softmax_scale)
      .def_rw("causal", &DenseDecodeParams::causal)
      .def_rw("batch_invariant", &DenseDecodeParams::batch_invariant)
      .def_rw("sink_per_request", &DenseDecodeParams::sink_per_request)
      .def_rw("num_slots", &DenseDecodeParams::num_slots)
      .def_rw("slots_per_request", &DenseDecodeParams::slots_per_request)
      .def_prop_rw(
          "is_fp16",
          [](const DenseDecodeParams& p) { return p.dtype == flashmla::DataType::kFloat16; },
          [](DenseDecodeParams& p, bool fp16) {
            p.dtype = fp16 ? flashmla::DataType::kFloat16 : flashmla::DataType::kBFloat16;
          });
  bind_pointer(dense, "q", &DenseDecodeParams::q);
  bind_pointer(dense, "k_cache", &DenseDecodeParams::k_cache);
  bind_pointer(dense, "block_table", &DenseDecodeParams::block_table);
  bind_pointer(dense, "cache_seqlens", &DenseDecodeParams::cache_seqlens);
  bind_pointer(dense, "schedule", &DenseDecodeParams::schedule);
  bind_pointer(dense, "attn_sink", &DenseDecodeParams::attn_sink);
  bind_pointer(dense, "out", &DenseDecodeParams::out);
  bind_pointer(dense, "lse", &DenseDecodeParams::lse);
  bind_pointer(dense, "partial_out", &DenseDecodeParams::partial_out);
  bind_pointer(dense, "partial_lse", &DenseDecodeParams::partial_lse);
  bind_pointer(dense, "schedule_is_broken", &DenseDecodeParams::schedule_is_broken);

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
  raw.def("run", &run<ScheduleParams>, nb::arg("params"));
  raw.def("time", &time<DenseDecodeParams>, nb::arg("params"), nb::arg("launches") = 20,
          nb::arg("replays") = 5,
          "Microseconds per launch, of each replay of a CUDA graph of back-to-back launches.");
  raw.def("time", &time<ScheduleParams>, nb::arg("params"), nb::arg("launches") = 20,
          nb::arg("replays") = 5);
}
