// Where a task's buffers lie. Each layout is one struct built from the plan over a base address: plan.cpp builds it
// over nothing to learn its size, the kernels over their memory. Values are counted in fp32 or words: 4 bytes, of four
// bf16 8.
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
  float* bias;    // gradient of the key bias
  int64_t bytes;
  Partial(const Plan& plan, std::byte* base) {
    Carver carver(base);
    const int64_t rows = plan.terms ? plan.padded_k : plan.problem.proj_dim;    // tiles are whole
    key = carver.take<float>(rows * plan.padded_d);
    value = carver.take<float>(rows * plan.padded_dv);
    bias = carver.take<float>(plan.problem.grad_key_bias ? plan.padded_k : 0);
    bytes = carver.used();
  }
};

// Sums of a part of K' or V', or its gradients over their counts.
struct PoolScratch {
  float *rows, *count;
  int64_t ld, bytes;
  PoolScratch(const Plan& plan, std::byte* base) {
    Carver carver(base);
    ld = plan.widest();
    const int64_t k = plan.stages & kPool ? plan.pool_heads * plan.finish_rows : plan.problem.proj_dim;
    rows = carver.take<float>(k * ld);
    count = carver.take<float>(k);
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
  float *scores, *out, *keep, *inverse_sum, *bias;
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
    bias = carver.take<float>(plan.padded_k);
    bytes = carver.used();
  }
};

template <class Word>
struct AttendBackwardScratch {
  Word *query, *grad_out;    // by rows
  Word* panel;               // of query or grad_out, summed over the query rows
  float *scores, *grad_scores, *grad_query, *inverse_sum;
  float* keep;                                                      // dropout factors of the rows of a word
  float *bias, *grad_bias;                                          // of the rows of K'; the tile's sum
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
    keep = carver.take<float>(plan.words_per_value * plan.padded_k);
    inverse_sum = carver.take<float>(tile);
    bias = carver.take<float>(plan.padded_k);
    grad_bias = carver.take<float>(plan.padded_k);
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

// The same for the build of AMX tiles. A tile is 1 KB: 16 rows of 32 bf16 or of 16 fp32. Operands have plan.terms tiles
// in the place of one, results one of fp32.
class TileCarver {
 public:
  TileCarver(const Plan& plan, std::byte* base) : carver_(base), terms_(plan.terms) {}
  std::byte* operand(int64_t rows, int64_t columns) { return take((rows + 15) / 16 * ((columns + 31) / 32) * terms_); }
  std::byte* result(int64_t rows, int64_t columns) { return take((rows + 15) / 16 * ((columns + 15) / 16)); }
  std::byte* take(int64_t tiles) { return carver_.take<std::byte>(tiles * 1024); }
  float* floats(int64_t count) { return carver_.take<float>(count); }
  int64_t used() const { return carver_.used(); }

 private:
  Carver carver_;
  int64_t terms_;
};

struct TilePanels {
  std::byte *key_t = nullptr, *value = nullptr;    // as in Panels
  std::byte *key = nullptr, *value_t = nullptr;
  std::byte *grad_key = nullptr, *grad_key_t = nullptr;
  std::byte *grad_value = nullptr, *grad_value_t = nullptr;
  int64_t bytes;
  TilePanels(const Plan& plan, std::byte* base) {
    TileCarver carver(plan, base);
    const auto key_panel = [&] { return carver.operand(plan.padded_k, plan.padded_d); };
    const auto value_panel = [&] { return carver.operand(plan.padded_k, plan.padded_dv); };
    if (plan.stages & (kAttend | kAttendBackward)) key_t = key_panel();
    if (plan.stages & kAttend) value = value_panel();
    if (plan.stages & kAttendBackward) {
      key = key_panel();
      value_t = value_panel();
    }
    if (plan.stages & kProjectBackward) {
      grad_key = key_panel();
      grad_key_t = key_panel();
      grad_value = value_panel();
      grad_value_t = value_panel();
    }
    bytes = carver.used();
  }
};

struct TileProjectScratch {
  std::byte *proj, *panel;    // a chunk of E; 32 columns of a chunk of key or value
  int64_t bytes;
  TileProjectScratch(const Plan& plan, std::byte* base) {
    TileCarver carver(plan, base);
    proj = carver.operand(plan.padded_k, plan.chunk);
    panel = carver.operand(plan.chunk, 32);
    bytes = carver.used();
  }
};

struct TileFinishScratch {
  std::byte* row;    // a row of tiles
  float* rows;       // dK' or dV', K x D
  int64_t bytes;
  TileFinishScratch(const Plan& plan, std::byte* base) {
    TileCarver carver(plan, base);
    row = carver.operand(16, plan.widest());
    rows = carver.floats(plan.stages & kAttendBackward ? plan.padded_k * plan.widest() : 0);
    bytes = carver.used();
  }
};

struct TileAttendScratch {
  std::byte *query, *scores, *out;    // all of a tile of queries; 16 rows, a block of K; the tile's sums, or 16 rows
  float *keep, *reference, *sum;      // 16 rows of dropout factors; a number a query
  float* bias;                        // of the rows of K'
  int64_t bytes;
  TileAttendScratch(const Plan& plan, std::byte* base) {
    TileCarver carver(plan, base);
    query = carver.operand(plan.query_tile, plan.padded_d);
    scores = carver.take(plan.k_block / 32 * (plan.terms > 2 ? plan.terms : 2));
    out = carver.result(plan.query_tile, plan.padded_dv);
    keep = carver.floats(16 * plan.k_block);
    reference = carver.floats(plan.query_tile);
    sum = carver.floats(plan.query_tile);
    bias = carver.floats(plan.padded_k);
    bytes = carver.used();
  }
};

struct TileAttendBackwardScratch {
  std::byte *query, *grad_out;        // 16 rows
  std::byte *query_t, *grad_out_t;    // a tile of queries
  std::byte *scores, *grad_scores;    // 16 rows
  std::byte *p_pairs, *ds_pairs;      // a tile of queries: P and dS as B
  std::byte *out, *square;            // 16 rows of dQ; a pair of tiles before it is transposed
  float *keep, *bias, *grad_bias;
  int64_t bytes;
  TileAttendBackwardScratch(const Plan& plan, std::byte* base) {
    TileCarver carver(plan, base);
    query = carver.operand(16, plan.padded_d);
    grad_out = carver.operand(16, plan.padded_dv);
    query_t = carver.operand(plan.padded_d, plan.backward_tile);
    grad_out_t = carver.operand(plan.padded_dv, plan.backward_tile);
    scores = carver.take(plan.padded_k / 32 * (plan.terms > 2 ? plan.terms : 2));
    grad_scores = carver.result(16, plan.padded_k);
    p_pairs = carver.operand(plan.padded_k, plan.backward_tile);
    ds_pairs = carver.operand(plan.padded_k, plan.backward_tile);
    out = carver.result(16, plan.padded_d);
    square = carver.operand(32, plan.widest());
    keep = carver.floats(16 * plan.padded_k);
    bias = carver.floats(plan.padded_k);
    grad_bias = carver.floats(plan.padded_k);
    bytes = carver.used();
  }
};

struct TileProjectBackwardScratch {
  std::byte *proj_t, *rows;        // E^T of a chunk; key or value of a chunk, of the heads of a group
  std::byte *grad_proj_t, *out;    // dE^T of a chunk; dK of 32 rows
  int64_t bytes;
  TileProjectBackwardScratch(const Plan& plan, std::byte* base) {
    TileCarver carver(plan, base);
    proj_t = carver.operand(plan.backward_chunk, plan.padded_k);
    rows = carver.operand(plan.backward_chunk * plan.heads_in_group, plan.widest());
    grad_proj_t = carver.result(plan.backward_chunk, plan.padded_k);
    out = carver.result(32, plan.widest() > 64 ? plan.widest() : 64);
    bytes = carver.used();
  }
};

}    // namespace
}    // namespace linformer::cpu
