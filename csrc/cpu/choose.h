// Which segment each position of a sequence belongs to, where some are chosen by the queries: the interface of
// choose.cpp.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace linformer::cpu {

// Of the problem: dtype, sizes, query, key, mask, offsets; proj_dim is the number of segments.
struct SegmentChoice {
  Problem problem;
  int64_t singles = 0;    // segments of one position: `first`, `last`, and those that the mean query chooses
  int64_t first = 0, last = 0;
  int32_t* segments = nullptr;    // the result, strides as in Problem
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// The segments of one head of a sequence; tasks are batch * heads_kv.
void choose_segments(const SegmentChoice& choice, int64_t task);

}    // namespace linformer::cpu
