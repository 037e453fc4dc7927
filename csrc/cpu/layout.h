// Where a task's buffers lie. Each layout is one struct built from the plan over a base address: plan.cpp builds it
// over nothing to learn its size, the kernels over their memory. Values are counted in fp32 or words, both 4 bytes.
#pragma once

#include "plan.h"

namespace linformer::cpu {
namespace {    // also compiled into kernels.cpp, see simd.h

class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base_) + static_cast<uintptr_t>(used_));
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

// Distance of two rows of `count` 4-byte values: whole vectors of 64 bytes and one more, because a power of two would
// send the rows of a tile to the same few sets of the cache.
constexpr int64_t padded_row(int64_t count) { return (count + 15) / 16 * 16 + 16; }

// fp32 K' and V', or dK' and dV', of one split.
struct Partial {
  float *key, *value;
  int64_t bytes;
  Partial(const Plan& plan, std::byte* base) {
    Carver carver(base);
    key = carver.take<float>(plan.problem.proj_dim * plan.padded_d);
    value = carver.take<float>(plan.problem.proj_dim * plan.padded_dv);
    bytes = carver.used();
  }
};

// Panels that every task of one (b, kv head) reads.
template <class Word>
struct Panels {
  Word *key_t = nullptr, *value = nullptr;                // forward: K'^T (D x K), V' (K x D_v)
  Word *key = nullptr, *value_t = nullptr;                // backward: K' (K x D), V'^T (D_v x K)
  Word *grad_key = nullptr, *grad_key_t = nullptr;        // backward: dK' (K x D), dK'^T (D x K)
  Word *grad_value = nullptr, *grad_value_t = nullptr;    // backward: dV', dV'^T
  int64_t bytes;
  Panels(const Plan& plan, std::byte* base) {
    const Problem& p = plan.problem;
    Carver carver(base);
    const auto panel = [&](int64_t columns, int64_t steps) { return carver.take<Word>(columns * plan.words(steps)); };
    if (plan.stages & (kAttend | kAttendBackward)) key_t = panel(plan.padded_k, p.head_dim);
    if (plan.stages & kAttend) value = panel(plan.padded_dv, p.proj_dim);
    if (plan.stages & kAttendBackward) {
      key = panel(plan.padded_d, p.proj_dim);
      value_t = panel(plan.padded_k, p.value_dim);
    }
    if (plan.stages & kProjectBackward) {
      grad_key = panel(plan.padded_d, p.proj_dim);
      grad_key_t = panel(plan.padded_k, p.head_dim);
      grad_value = panel(plan.padded_dv, p.proj_dim);
      grad_value_t = panel(plan.padded_k, p.value_dim);
    }
    bytes = carver.used();
  }
};

template <class Word>
struct ProjectScratch {
  Word *proj, *panel;    // a chunk of E by rows; a panel of key or value
  int64_t ld, bytes;
  ProjectScratch(const Plan& plan, std::byte* base) {
    Carver carver(base);
    ld = padded_row(plan.words(plan.chunk));
    proj = carver.take<Word>(plan.problem.proj_dim * ld);
    panel = carver.take<Word>(plan.shape.tile_columns * plan.words(plan.chunk));
    bytes = carver.used();
  }
};

// Both finishing tasks and the one that prepares the backward: a FinishPart as words by rows.
template <class Word>
struct FinishScratch {
  Word* rows;
  int64_t ld, bytes;
  FinishScratch(const Plan& plan, std::byte* base) {
    const Problem& p = plan.problem;
    Carver carver(base);
    ld = padded_row(plan.words(p.head_dim > p.value_dim ? p.head_dim : p.value_dim));
    rows = carver.take<Word>(plan.finish_rows * ld);
    bytes = carver.used();
  }
};

template <class Word>
struct AttendScratch {
  Word* query;
  float *scores, *out, *keep, *inverse_sum;
  int64_t ld_query, ld_scores, bytes;
  AttendScratch(const Plan& plan, std::byte* base) {
    Carver carver(base);
    ld_query = padded_row(plan.words(plan.problem.head_dim));
    ld_scores = padded_row(plan.padded_k);
    query = carver.take<Word>(plan.query_tile * ld_query);
    scores = carver.take<float>(plan.query_tile * ld_scores);
    out = carver.take<float>(plan.query_tile * plan.padded_dv);
    keep = carver.take<float>(plan.padded_k);
    inverse_sum = carver.take<float>(plan.query_tile);
    bytes = carver.used();
  }
};

template <class Word>
struct AttendBackwardScratch {
  Word *query, *grad_out;    // by rows
  Word* panel;               // of query or grad_out, summed over the query rows
  float *scores, *grad_scores, *grad_query, *inverse_sum;
  float* keep;                                                      // dropout factors of two rows
  Word *scores_columns, *grad_scores_columns, *grad_scores_rows;    // P and dS as operands
  int64_t ld_query, ld_grad_out, ld_scores, ld_rows, bytes;
  AttendBackwardScratch(const Plan& plan, std::byte* base) {
    const Problem& p = plan.problem;
    const int64_t tile = plan.backward_tile;
    Carver carver(base);
    ld_query = padded_row(plan.words(p.head_dim));
    ld_grad_out = padded_row(plan.words(p.value_dim));
    ld_scores = padded_row(plan.padded_k);
    query = carver.take<Word>(tile * ld_query);
    grad_out = carver.take<Word>(tile * ld_grad_out);
    panel = carver.take<Word>(plan.words(tile) * plan.shape.tile_columns);
    scores = carver.take<float>(tile * ld_scores);
    grad_scores = carver.take<float>(tile * ld_scores);
    grad_query = carver.take<float>(tile * plan.padded_d);
    keep = carver.take<float>(2 * plan.padded_k);
    inverse_sum = carver.take<float>(tile);
    if (plan.words_per_value == 1) {    // fp32 rows are operands as they stand, both ways
      ld_rows = ld_scores;
      scores_columns = reinterpret_cast<Word*>(scores);
      grad_scores_columns = grad_scores_rows = reinterpret_cast<Word*>(grad_scores);
    } else {
      ld_rows = padded_row(plan.words(p.proj_dim));
      scores_columns = carver.take<Word>(plan.words(tile) * ld_scores);
      grad_scores_columns = carver.take<Word>(plan.words(tile) * ld_scores);
      grad_scores_rows = carver.take<Word>(tile * ld_rows);
    }
    bytes = carver.used();
  }
};

template <class Word>
struct ProjectBackwardScratch {
  Word *proj, *rows;                 // a chunk of E by columns; a chunk of key by rows
  float *grad_rows, *grad_proj_t;    // dK of the chunk; dE^T of its columns
  int64_t ld_proj, ld_rows, bytes;
  ProjectBackwardScratch(const Plan& plan, std::byte* base) {
    const Problem& p = plan.problem;
    Carver carver(base);
    ld_proj = padded_row(plan.backward_chunk);
    ld_rows = padded_row(plan.words(p.head_dim > p.value_dim ? p.head_dim : p.value_dim));
    proj = carver.take<Word>(plan.words(p.proj_dim) * ld_proj);
    rows = carver.take<Word>(plan.backward_chunk * ld_rows);
    grad_rows =
        carver.take<float>(plan.backward_chunk * (plan.padded_d > plan.padded_dv ? plan.padded_d : plan.padded_dv));
    grad_proj_t = carver.take<float>(plan.backward_chunk * plan.padded_k);
    bytes = carver.used();
  }
};

}    // namespace
}    // namespace linformer::cpu
