// Parameters of every launcher: one plain struct an operation. All pointers are device
// pointers to row-major contiguous arrays; the shape stands beside each, "may be null" where so.
#pragma once

#include <cstdint>

namespace flashmla {

enum class DataType : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// How the bytes of a latent cache are to be read; jax_flashmla/quantization.py describes the
// formats.
enum class CacheFormat : int {
  kPlain = 0,   // elements of the type of q
  kFp8V32 = 1,  // d 576: 512 x e4m3, 4 x float32 scales, 64 x bfloat16: 656 bytes a token
  kFp8V4 = 2,   // d 512: 448 x e4m3 and 64 x bfloat16 a token, then 8 scale bytes a token
};

// Keys to attend to, for each request: runs of tokens, each in blocks of its own. Dense decode has
// one run, the sequence; sparse decode has the indices into each of its caches.
struct RunLengths {
  const int32_t* lengths;  // [b]; null: `most` for all
  int64_t most;            // longer ones are clipped to it, or make the request NaN
};
constexpr int kMaxRuns = 2;

// What all decode operations have in common, and all that the merge reads.
struct DecodeParams {
  // Sizes.
  int batch;             // b: requests
  int seq_q;             // s_q: query tokens of a request
  int heads_q;           // h_q
  int heads_kv;          // h_kv, divides h_q
  int slices;            // rows of a request (query tokens x heads) fall into so many slices that
                         // share no keys: KV heads, or, if sparse, query tokens
  int head_dim;          // d of queries and keys
  int head_dim_v;        // values are the first head_dim_v columns of the keys
  int num_parts;         // rows of the schedule = parts the work is divided into
  float softmax_scale;   // multiplies q.k, in natural-log units
  bool batch_invariant;  // split boundaries depend on the request's own length only
  CacheFormat format;    // of all caches
  bool fp8_matmul;       // products of latent columns in FP8; kFp8V32 caches only
  bool power_of_two_scales;  // a promise, for FP8 caches: from 2^-15 to 2^7, or 0. Others make NaN
  bool sink_per_request;     // attn_sink is [b, h_q] instead of [h_q]
  DataType dtype;

  RunLengths runs[kMaxRuns];
  bool sparse;  // query tokens choose their keys; else a length above `most` makes NaN

  // Inputs.
  const void* q;            // [b, s_q, h_q, d]
  const int32_t* schedule;  // [num_parts, 8], see common/schedule.cuh
  const float* attn_sink;   // [h_q] or [b, h_q]; may be null

  // Results.
  void* out;   // [b, s_q, h_q, dv] of the type of q
  float* lse;  // [b, h_q, s_q], natural logarithm

  // Workspace for requests that are cut into several pieces.
  float* partial_out;           // [num_slots, slices, slabs, ..]: see common/partial_results.h
  float* partial_sums;          // likewise
  int32_t* schedule_is_broken;  // [1]: the attention kernel tells the merge that all is NaN
  int num_slots;                // 2 * num_parts, or batch * slots_per_request when batch_invariant
  int slots_per_request;
};

// runs[0] holds cache_seqlens [b] and the capacity of the table.
struct DenseDecodeParams : DecodeParams {
  int num_pages;    // pages of the cache
  int page_size;    // tokens of a page
  int table_width;  // entries of one row of the block table
  bool causal;      // query i sees keys j <= s_k - s_q + i

  const void* k_cache;  // plain: [num_pages, page_size, h_kv, d]; bytes of the format else
  const int32_t*
      block_table;  // [b, table_width]; entries past a request's length may hold anything
};

// One cache that sparse decode chooses from.
struct SparseSource {
  const void* cache;       // as k_cache of dense decode, h_kv 1; may be null if num_pages is 0
  const int32_t* indices;  // [b, s_q, topk] slots; those that are none are skipped
  int num_pages;
  int page_size;
  int topk;  // 0 without this source
};

// runs[i] holds topk_length [b] (may be null) and topk of source i.
struct SparseDecodeParams : DecodeParams {
  SparseSource sources[kMaxRuns];
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

// Which columns of the RoPE part turn together.
enum class RopeLayout : int {
  kNone = 0,         // it is stored as it is
  kInterleaved = 1,  // 2i and 2i + 1
  kHalfSplit = 2,    // i and i + rope / 2
};

// Columns of a row of a plain cache, so that 32-bit columns can be stepped over.
constexpr int kMaxColumns = 1 << 30;

// New tokens for a paged cache. `row` is a token's key head: row = token * heads + head.
struct CacheAppendParams {
  // The cache. FP8 formats have one head, and latent and rope of the format.
  CacheFormat format;
  DataType dtype;  // of a plain cache
  int num_pages;
  int page_size;
  int64_t page_bytes;  // of kFp8V4: fp8_formats::V4::page_bytes(page_size)
  int heads;
  int latent;                // columns that kv_c gives
  int rope;                  // and k_pe; 0 without
  bool power_of_two_scales;  // of kFp8V32

  // The tokens.
  int64_t tokens;  // t
  DataType kv_c_dtype;
  DataType k_pe_dtype;
  DataType norm_dtype;
  RopeLayout rope_layout;
  float norm_eps;
  int64_t kv_c_stride;  // elements from one row to the next
  int64_t k_pe_stride;
  const void* kv_c;         // [t * heads, latent]
  const void* k_pe;         // [t * heads, rope]; null if rope is 0
  const void* norm_weight;  // [latent]; null: kv_c is not normalised. One head only
  const float* rope_cos;    // [t, rope / 2]; null if rope_layout is kNone. One head only
  const float* rope_sin;    // as rope_cos
  const int32_t* slots;     // [t]; a slot that is none skips its token

  void* cache;  // plain: [num_pages, page_size, heads, latent + rope]; bytes of the format else
};

// Tokens of a paged cache, dequantised; zeros for slots that are none.
struct CacheGatherParams {
  CacheFormat format;
  DataType dtype;  // of a plain cache
  int num_pages;
  int page_size;
  int64_t page_bytes;  // of kFp8V4: fp8_formats::V4::page_bytes(page_size)
  int64_t columns;     // heads * d of a plain cache
  int64_t tokens;      // n
  DataType out_dtype;
  const void* cache;     // as in CacheAppendParams
  const int32_t* slots;  // [n]
  void* out;             // [n, heads, d]
};

}  // namespace flashmla
