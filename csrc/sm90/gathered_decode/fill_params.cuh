// Host side of the kernels that look up tokens themselves: what they have to know of the caches.
#pragma once

#include <algorithm>

#include "common/fp8_formats.h"
#include "launch.h"
#include "sm90/decode/cta.cuh"

namespace flashmla::sm90::gathered_decode {

using namespace decode;

struct PageCount {
  int pages;
  int page_size;
};

inline PageCount pages_of(const SparseDecodeParams& p, int source) {
  // A source that is absent has no pages, of any size.
  const SparseSource& s = p.sources[source];
  return s.topk > 0 ? PageCount{s.num_pages, s.page_size} : PageCount{0, 1};
}

inline PageCount pages_of(const DenseDecodeParams& p, int) { return {p.num_pages, p.page_size}; }

// Everything of `kp` but what a kernel adds.
template <typename P>
Status fill_params(const typename P::Params& params, CacheFormat format, KernelParams<P>* kp) {
  kp->p = params;
  kp->rows = partial::rows_of_slice(params);
  kp->row_tiles = schedule::ceil_div(kp->rows, kRows);
  kp->group = params.heads_q;
  kp->must_gather_queries = false;

  for (int i = 0; i < kMaxRuns; ++i) {
    const auto [pages, page_size] = pages_of(params, i);
    if (page_size < 1) return {cudaErrorInvalidValue, "page_size"};
    kp->page_size[i] = FastDivide(page_size);
    const int64_t slots = static_cast<int64_t>(pages) * page_size;
    kp->slots[i] = static_cast<uint32_t>(std::min(slots, int64_t{1} << 31));
    const int64_t page_bytes = fp8_formats::V4::page_bytes(page_size);
    if (format == CacheFormat::kFp8V4 && page_bytes > INT32_MAX) {
      return {cudaErrorNotSupported, "page_size of the sparse decode kernel"};
    }
    kp->page_bytes[i] = static_cast<uint32_t>(page_bytes);
  }
  return {};
}

}  // namespace flashmla::sm90::gathered_decode
