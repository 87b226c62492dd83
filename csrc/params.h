// Parameters of every launcher: one plain struct an operation. All pointers are device
// pointers to row-major contiguous arrays; the shape stands beside each, "may be null" where so.
#pragma once

#include <cstdint>

namespace flashmla {

enum class DataType : int { kBFloat16 = 0, kFloat16 = 1 };

struct DenseDecodeParams {
  // Sizes.
  int batch;              // b: requests
  int seq_q;              // s_q: query tokens of a request
  int heads_q;            // h_q
  int heads_kv;           // h_kv, divides h_q
  int head_dim;           // d of queries and keys
  int head_dim_v;         // values are the first head_dim_v columns of the keys
  int num_pages;          // pages of the cache
  int page_size;          // tokens of a page
  int table_width;        // entries of one row of the block table
  int num_parts;          // rows of the schedule = parts the work is divided into
  float softmax_scale;    // multiplies q.k, in natural-log units
  bool causal;            // query i sees keys j <= s_k - s_q + i
  bool batch_invariant;   // split boundaries depend on the request's own length only
  bool sink_per_request;  // attn_sink is [b, h_q] instead of [h_q]
  DataType dtype;

  // Inputs.
  const void* q;        // [b, s_q, h_q, d]
  const void* k_cache;  // [num_pages, page_size, h_kv, d]
  const int32_t*
      block_table;  // [b, table_width]; entries past a request's length may hold anything
  const int32_t* cache_seqlens;  // [b]
  const int32_t* schedule;       // [num_parts, 8], see common/schedule.cuh
  const float* attn_sink;        // [h_q] or [b, h_q]; may be null

  // Results.
  void* out;   // [b, s_q, h_q, dv] of the type of q
  float* lse;  // [b, h_q, s_q], natural logarithm

  // Workspace for requests that are cut into several pieces.
  float* partial_out;  // [num_slots, h_kv, s_q * h_q / h_kv, dv]
  float* partial_lse;  // [num_slots, h_kv, s_q * h_q / h_kv], base 2, -inf for an empty piece
  int32_t* schedule_is_broken;  // [1]: the attention kernel tells the merge that all is NaN
  int num_slots;                // 2 * num_parts, or batch * slots_per_request when batch_invariant
  int slots_per_request;
};

struct ScheduleParams {
  int batch;      // b
  int num_parts;  // rows to plan
  int row_tiles;  // 64-row tiles of one request, over all KV heads: stamped into the rows
  bool batch_invariant;
  bool sparse;               // stamped only
  int default_length;        // used where lengths is null (sparse: topk)
  int max_length;            // lengths are clipped to it (sparse: topk); negative: no bound
  int extra_default_length;  // the same for a second cache; 0 without one
  int extra_max_length;
  const int32_t* lengths;        // [b]; may be null
  const int32_t* extra_lengths;  // [b]; may be null
  int32_t* schedule;             // [num_parts, 8]
  int32_t* num_splits;           // [b + 1]
};

}  // namespace flashmla
