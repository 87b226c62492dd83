// How much work there can be, as far as the host knows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/schedule.h"
#include "params.h"

namespace flashmla {

// Blocks of all requests if they are as long as they can be: lengths are on the device.
inline int64_t most_blocks(const DecodeParams& p) {
  int64_t blocks = 0;
  for (const RunLengths& run : p.runs) {
    const int64_t most = std::min<int64_t>(std::max<int64_t>(run.most, 0), INT32_MAX);
    blocks += schedule::blocks_of(static_cast<int>(most));
  }
  return blocks * p.batch;
}

}  // namespace flashmla
