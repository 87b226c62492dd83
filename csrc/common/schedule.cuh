// Device side of the schedule: proof that it is one, and the walk over a part's pieces.
#pragma once

#include "common/schedule.h"
#include "params.h"

namespace flashmla::schedule {

struct Expected {
  int batch;
  int row_tiles;
  int num_parts;
  int32_t stamp;
};

__device__ __forceinline__ Row load_row(const int32_t* schedule, int part) {
  const int4* rows = reinterpret_cast<const int4*>(schedule) + 2 * static_cast<int64_t>(part);
  const int4 lo = rows[0];
  const int4 hi = rows[1];
  return Row{lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
}

__device__ __forceinline__ bool precedes_or_equals(int r0, int u0, int r1, int u1) {
  return r0 < r1 || (r0 == r1 && u0 <= u1);
}

// False if the row by itself cannot be one of a schedule for this call.
__device__ __forceinline__ bool row_can_be_right(const Row& row, const Expected& expected) {
  return row.batch == expected.batch && row.row_tiles == expected.row_tiles &&
         row.stamp == expected.stamp && row.num_parts == expected.num_parts &&
         row.begin_request >= 0 && row.begin_unit >= 0 && row.end_unit >= 0 &&
         row.end_request <= expected.batch &&
         (row.end_request != expected.batch || row.end_unit == 0) &&
         precedes_or_equals(row.begin_request, row.begin_unit, row.end_request, row.end_unit);
}

// True if row `part` is no link of an unbroken chain from (0, 0) to (batch, 0) made for this
// call. If no row is broken, the rows are a partition of the work, whatever else they hold.
__device__ __forceinline__ bool row_is_broken(const int32_t* schedule, int part,
                                              const Expected& expected) {
  const Row row = load_row(schedule, part);
  const bool last = part + 1 == expected.num_parts;
  const Row next = load_row(schedule, last ? part : part + 1);
  if (!row_can_be_right(row, expected)) return true;
  if (part == 0 && (row.begin_request != 0 || row.begin_unit != 0)) return true;
  if (last) return row.end_request != expected.batch;
  return next.begin_request != row.end_request || next.begin_unit != row.end_unit;
}

// This thread's share of the proof over all rows; combine with __syncthreads_or.
__device__ __forceinline__ bool any_row_broken(const int32_t* schedule, const Expected& expected,
                                               int thread, int num_threads) {
  bool broken = false;
  for (int part = thread; part < expected.num_parts; part += num_threads) {
    broken |= row_is_broken(schedule, part, expected);
  }
  return broken;
}

// Consecutive blocks of one request.
struct Piece {
  int request;
  int length;        // tokens of the request's first run; its blocks come first
  int extra_length;  // of its second run
  int first_block;   // first_block >= end_block: nothing to attend to
  int end_block;
  int slot;     // where the partial result goes; -1: the piece is the whole request
  bool poison;  // the length does not fit the table: the result is NaN
  // Whether the part's piece before this one is of another request, so that queries are to be
  // loaded, and whether the next one is, so that they can be given up. For kernels that keep them.
  bool needs_queries;
  bool frees_queries;
};

// Requests of one run, whose lengths are given, and which are NaN if longer than fits.
struct SequenceLengths {
  const int32_t* lengths;
  int64_t most;

  __device__ __forceinline__ explicit SequenceLengths(const DecodeParams& p)
      : lengths(p.runs[0].lengths), most(p.runs[0].most) {}

  // Sets the lengths of the request and whether it is NaN; returns its blocks.
  __device__ __forceinline__ int read(int request, Piece& piece) const {
    const int length = lengths[request];
    piece.poison = length > most;
    // One poisoned block stands for a request whose length makes no sense.
    piece.length = piece.poison ? 1 : max(length, 0);
    piece.extra_length = 0;
    return blocks_of(piece.length);
  }
};

// Requests of two runs, whose lengths may be given and are clipped.
struct ChoiceLengths {
  const RunLengths (&runs)[kMaxRuns];

  __device__ __forceinline__ explicit ChoiceLengths(const DecodeParams& p) : runs(p.runs) {}

  __device__ __forceinline__ int read(int request, Piece& piece) const {
    piece.poison = false;
    piece.length = clipped(runs[0], request);
    piece.extra_length = clipped(runs[1], request);
    return blocks_of(piece.length) + blocks_of(piece.extra_length);
  }

 private:
  __device__ __forceinline__ static int clipped(const RunLengths& run, int request) {
    const int most = static_cast<int>(run.most);
    return run.lengths == nullptr ? most : max(min(run.lengths[request], most), 0);
  }
};

// Walks over the pieces of one part of a schedule that is not broken. Every warp role walks on its
// own and sees the same pieces.
template <typename Lengths>
class PieceWalk {
 public:
  __device__ __forceinline__ PieceWalk(const DecodeParams& p, int part) : part_(part) {
    const Row row = load_row(p.schedule, part);
    request_ = row.begin_request;
    unit_ = row.begin_unit;
    end_request_ = row.end_request;
    end_unit_ = row.end_unit;
  }

  __device__ __forceinline__ bool next(const DecodeParams& p, Piece& piece) {
    const Lengths lengths(p);
    while (request_ < end_request_ || (request_ == end_request_ && end_unit_ > 0)) {
      piece.request = request_;
      piece.needs_queries = piece.frees_queries = true;
      const int blocks = lengths.read(request_, piece);
      const bool stops_here = request_ == end_request_;
      if (!p.batch_invariant) {
        piece.first_block = min(unit_, blocks);
        piece.end_block = stops_here ? min(end_unit_, blocks) : blocks;
        // Of a part's pieces only the first can start inside a request and only the last can
        // stop inside one, so two slots a part are enough.
        piece.slot = (unit_ > 0 || stops_here) ? 2 * part_ + (unit_ == 0 ? 1 : 0) : -1;
        advance_request();
        return true;
      }
      const int split_blocks = invariant_split_blocks(blocks);
      const int splits = ceil_div(blocks, split_blocks);
      if (splits <= 1) {
        const bool mine = unit_ == 0;
        piece.first_block = 0;
        piece.end_block = blocks;
        piece.slot = -1;
        advance_request();
        if (mine) return true;
        continue;
      }
      if (unit_ >= (stops_here ? min(end_unit_, splits) : splits)) {
        advance_request();
        continue;
      }
      piece.first_block = unit_ * split_blocks;
      piece.end_block = min(piece.first_block + split_blocks, blocks);
      piece.slot = request_ * p.slots_per_request + unit_;
      piece.needs_queries = !inside_request_;
      ++unit_;
      piece.frees_queries = unit_ >= (stops_here ? min(end_unit_, splits) : splits);
      inside_request_ = true;
      return true;
    }
    return false;
  }

 private:
  __device__ __forceinline__ void advance_request() {
    ++request_;
    unit_ = 0;
    inside_request_ = false;
  }

  int part_;
  int request_;
  int unit_;
  int end_request_;
  int end_unit_;
  bool inside_request_ = false;  // a piece of it was the last one
};

}  // namespace flashmla::schedule
