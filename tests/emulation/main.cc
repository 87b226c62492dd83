// Runs one launcher on arrays in files, decodes, or walks over a schedule as the attention kernels
// do. Arguments: merge, plan, decode or walk, a folder, and name=value for the integers of the
// parameters. Arrays are files of the folder, written back where they are results. late_copies:
// simt::CopyEngine::period.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

#include "common/schedule.cuh"
#include "launch.h"
#include "sm90/dense_decode/launch.cuh"
#include "sm90/fp8_few_rows_decode/fp8_few_rows_decode.h"
#include "sm90/fp8_many_rows_decode/fp8_many_rows_decode.h"
#include "sm90/gathered_decode/launch.cuh"

namespace {

using namespace flashmla;

std::map<std::string, int> numbers;
std::string folder;

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(2);
}

// An array on the heap, of exactly its size: sanitizers see what goes past it.
class Array {
 public:
  explicit Array(const std::string& name) : path_(folder + "/" + name) {
    std::ifstream file(path_, std::ios::binary);
    if (!file) return;
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    size_ = bytes.size();
    data_ = static_cast<char*>(std::malloc(size_));
    bytes.copy(data_, size_);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data_); }

  // Null without such a file.
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t size() const { return size_; }
  void write_back() const { std::ofstream(path_, std::ios::binary).write(data_, size_); }

 private:
  std::string path_;
  char* data_ = nullptr;
  size_t size_ = 0;
};

void check(Status status) {
  if (!status.ok()) fail(std::string("refused: ") + status.where);
}

// What merge and walk have in common.
DecodeParams decode_params(const Array& schedule, const Array& lengths) {
  DecodeParams p{};
  p.batch = numbers["batch"];
  p.num_parts = numbers["num_parts"];
  p.batch_invariant = numbers["batch_invariant"];
  p.runs[0] = {lengths, numbers["capacity"]};
  p.schedule = schedule;
  p.slots_per_request = schedule::max_invariant_splits(numbers["capacity"]);
  return p;
}

// The arrays of a decode operation and of its merge.
struct DecodeArrays {
  const Array q{"q"}, schedule{"schedule"}, lengths{"lengths"}, attn_sink{"attn_sink"};
  const Array out{"out"}, lse{"lse"}, partial_out{"partial_out"}, partial_sums{"partial_sums"};
  const Array schedule_is_broken{"schedule_is_broken"};

  DecodeParams params() const {
    DecodeParams p = decode_params(schedule, lengths);
    p.seq_q = numbers["seq_q"];
    p.heads_q = numbers["heads_q"];
    p.heads_kv = numbers["heads_kv"];
    p.sparse = numbers["sparse"];
    p.slices = p.sparse ? p.seq_q : p.heads_kv;
    p.head_dim = numbers["head_dim"];
    p.head_dim_v = numbers["head_dim_v"];
    p.softmax_scale = std::bit_cast<float>(numbers["softmax_scale"]);
    p.format = static_cast<CacheFormat>(numbers["format"]);
    p.fp8_matmul = numbers["fp8_matmul"];
    p.power_of_two_scales = numbers["power_of_two_scales"];
    p.dtype = numbers["is_fp16"] ? DataType::kFloat16 : DataType::kBFloat16;
    p.q = q;
    p.attn_sink = attn_sink;
    p.out = out;
    p.lse = lse;
    p.partial_out = partial_out;
    p.partial_sums = partial_sums;
    p.schedule_is_broken = schedule_is_broken;
    p.num_slots = numbers["num_slots"];
    return p;
  }
  void write_back() const {
    out.write_back();
    lse.write_back();
  }
};

void merge() {
  const DecodeArrays arrays;
  check(launch_combine(arrays.params(), nullptr));
  arrays.write_back();
}

// The kernels that are compiled here, of those that the launchers choose from; that for simple
// scales whatever it gains.
Status launch(const DenseDecodeParams& p) {
  if (p.format == CacheFormat::kPlain) {
    return sm90::dense_decode::launch<__nv_bfloat16, 576, 512>(p, nullptr);
  }
  if (p.fp8_matmul || p.power_of_two_scales) return sm90::fp8_many_rows_decode::launch(p, nullptr);
  return sm90::fp8_few_rows_decode::launch(p, nullptr);
}
Status launch(const SparseDecodeParams& p) {
  if (p.format == CacheFormat::kPlain) {
    return sm90::gathered_decode::launch<__nv_bfloat16, 576, true, CacheFormat::kPlain>(p, nullptr);
  }
  if (p.fp8_matmul || p.power_of_two_scales) return sm90::fp8_many_rows_decode::launch(p, nullptr);
  if (p.format == CacheFormat::kFp8V4 && !sm90::fp8_few_rows_decode::takes(p)) {
    return sm90::gathered_decode::launch<__nv_bfloat16, 512, true, CacheFormat::kFp8V4>(p, nullptr);
  }
  return sm90::fp8_few_rows_decode::launch(p, nullptr);
}

}  // namespace

bool flashmla::leaves_float_pieces(const DecodeParams& p) {
  return p.format != CacheFormat::kPlain &&
         (p.format != CacheFormat::kFp8V4 || sm90::fp8_few_rows_decode::takes(p));
}

namespace {

// Attention, dense or sparse, and its merge.
void decode() {
  const DecodeArrays arrays;
  const Array k_cache("k_cache"), table("table");
  const Array extra_k_cache("extra_k_cache"), extra_table("extra_table"),
      extra_lengths("extra_lengths");
  const auto run = [&](auto& p) {
    check(launch(p));
    check(launch_combine(p, nullptr));
  };
  if (numbers["sparse"]) {
    SparseDecodeParams p{arrays.params()};
    p.runs[1] = {extra_lengths, numbers["extra_topk"]};
    p.sources[0] = {k_cache, table, numbers["num_pages"], numbers["page_size"], numbers["topk"]};
    p.sources[1] = {extra_k_cache, extra_table, numbers["extra_num_pages"],
                    numbers["extra_page_size"], numbers["extra_topk"]};
    run(p);
  } else {
    DenseDecodeParams p{arrays.params()};
    p.num_pages = numbers["num_pages"];
    p.page_size = numbers["page_size"];
    p.table_width = numbers["table_width"];
    p.causal = numbers["causal"];
    p.k_cache = k_cache;
    p.block_table = table;
    run(p);
  }
  arrays.write_back();
}

void plan() {
  const Array lengths("lengths"), extra_lengths("extra_lengths"), schedule("schedule"),
      num_splits("num_splits");
  ScheduleParams p{};
  p.batch = numbers["batch"];
  p.num_parts = numbers["num_parts"];
  p.row_tiles = numbers["row_tiles"];
  p.batch_invariant = numbers["batch_invariant"];
  p.sparse = numbers["sparse"];
  p.default_length = numbers["topk"];
  p.max_length = p.sparse ? numbers["topk"] : -1;
  p.extra_default_length = p.extra_max_length = numbers["extra_topk"];
  p.extra_lengths = extra_lengths;
  p.lengths = lengths;
  p.schedule = schedule;
  p.num_splits = num_splits;
  check(launch_schedule(p, nullptr));
  schedule.write_back();
  num_splits.write_back();
}

// The pieces of all parts, [n, 7]: part, request, first and end block, slot, whether it is poison,
// and 1 where there is one. Nothing if the schedule is broken.
void walk() {
  const Array lengths("lengths"), schedule("schedule"), pieces("pieces"), is_broken("is_broken");
  const DecodeParams p = decode_params(schedule, lengths);
  const schedule::Expected expected{p.batch, numbers["row_tiles"], p.num_parts,
                                    schedule::expected_stamp(p.batch_invariant, false)};
  bool broken = false;
  for (int i = 0; i < 3; ++i) broken |= schedule::any_row_broken(p.schedule, expected, i, 3);
  static_cast<int32_t*>(is_broken)[0] = broken;
  is_broken.write_back();
  if (broken) return;

  const size_t room = pieces.size() / (9 * sizeof(int32_t));
  int32_t* row = pieces;
  size_t count = 0;
  for (int part = 0; part < p.num_parts; ++part) {
    schedule::PieceWalk<schedule::SequenceLengths> walk(p, part);
    schedule::Piece piece;
    while (walk.next(p, piece)) {
      if (count++ == room) fail("more pieces than there is room for");
      for (int value : {part, piece.request, piece.first_block, piece.end_block, piece.slot,
                        static_cast<int>(piece.poison), static_cast<int>(piece.needs_queries),
                        static_cast<int>(piece.frees_queries), 1}) {
        *row++ = value;
      }
    }
  }
  pieces.write_back();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) fail("usage: main merge|plan|decode|walk FOLDER [NAME=INTEGER ...]");
  folder = argv[2];
  for (int i = 3; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    if (equals == std::string::npos) fail("no NAME=INTEGER: " + argument);
    numbers[argument.substr(0, equals)] = std::atoi(argument.c_str() + equals + 1);
  }
  simt::copy_engine.period = numbers["late_copies"];
  const std::string what = argv[1];
  if (what == "merge") {
    merge();
  } else if (what == "plan") {
    plan();
  } else if (what == "decode") {
    decode();
  } else if (what == "walk") {
    walk();
  } else {
    fail("no such launcher: " + what);
  }
}
