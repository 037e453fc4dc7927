// The CPU plan: which tasks an operation consists of, in which order, and where each finds its memory.
//
// make_plan is a pure function of the problem, the stages wanted, the machine's vector shape and the number of threads.
// run_plan is the one place that executes tasks: a single parallel region in which threads draw tickets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "../problem.h"

namespace linformer::cpu {

// What a kernel build can do. A word is what a matrix product takes of an operand at a time: one fp32, or two or four
// bf16 that are neighbours along the summed dimension.
struct Shape {
  int64_t tile_columns = 0;    // columns of the register tile, the width of a packed panel
  int64_t bf16_values = 1;     // of bf16 problems in a word; 1: they are fp32 there
  bool tiles = false;          // products of AMX tiles: layouts and sizes of their own
};

enum TaskKind {
  kProjectTask,            // (b, head group, split): partial K' and V' of some chunks of the sequence
  kFinishProjectTask,      // a FinishPart: sum of the partials, K' or V' written, panels for kAttendTask
  kAttendTask,             // (b, head, query block): out
  kPrepareBackwardTask,    // a FinishPart: panels of K' or V' for kAttendBackwardTask
  kAttendBackwardTask,     // (b, kv head, split): dQ, partial dK' and dV'
  kFinishBackwardTask,     // a FinishPart: sum of the partials, dK' or dV' written, panels for kProjectBackwardTask
  kProjectBackwardTask,    // (which of E and F, sequence, head, chunk): dK or dV of the chunk, dE or dF of its columns
  kPoolTask,               // a PoolPart: rows of K' or V' of some heads, and their counts
  kPoolBackwardTask,       // (b, kv head, key or value, block of the sequence): dK or dV
  kTaskKinds
};

struct Phase {
  TaskKind kind = kProjectTask;
  int64_t tasks = 0;
};

struct KernelTable;

struct Plan {
  Problem problem;
  const KernelTable* table = nullptr;
  unsigned stages = 0;

  Shape shape;
  int64_t terms = 0;              // of tiles: bf16 numbers that a value is cut into; 0 without tiles
  int64_t words_per_value = 1;    // values in a word
  int64_t padded_k = 0;           // K, D and D_v rounded up to whole panels
  int64_t padded_d = 0;
  int64_t padded_dv = 0;
  int64_t chunk = 0;             // rows of the sequence projected at a time
  int64_t splits = 1;            // independent parts of a sequence in kProjectTask
  int64_t heads_in_group = 1;    // heads that share one copy of a chunk of E
  int64_t finish_rows = 0;       // rows of K' or V' in a FinishPart, a multiple of 16
  int64_t query_tile = 0;        // query rows whose scores are in cache together
  int64_t query_block = 0;       // query rows of a kAttendTask
  int64_t k_block = 0;           // of tiles: columns of the scores that are in cache together
  int64_t backward_tile = 0;     // as query_tile, in kAttendBackwardTask
  int64_t backward_splits = 1;
  int64_t backward_chunk = 0;         // rows of the sequence in kProjectBackwardTask
  int64_t pool_block = 0;             // and in kPoolBackwardTask
  int64_t pool_heads = 1;             // heads of a kPoolTask
  bool stream = false;                // results are too large to stay in the caches
  bool need_grad_key_proj = false;    // dK' or dV' is wanted by somebody
  bool need_grad_value_proj = false;

  Phase phases[4];
  int phase_count = 0;

  // Memory, in bytes from the start of the workspace.
  int64_t not_finite = 0;    // of tiles: an int32 that is set when a result is infinite or NaN
  int64_t partials = 0;      // fp32 (b, kv head, split, K, padded D + padded D_v)
  int64_t panels = 0;        // words, one set of panels a (b, kv head)
  int64_t panels_stride = 0;
  int64_t scratch = 0;    // one piece a thread
  int64_t scratch_stride = 0;
  int64_t workspace_bytes = 0;
  std::byte* workspace = nullptr;    // set by the caller, aligned to 64 bytes

  int64_t widest() const { return padded_d > padded_dv ? padded_d : padded_dv; }
  int64_t words(int64_t values) const { return (values + words_per_value - 1) / words_per_value; }
  int64_t project_backward_chunks() const {
    // Columns of E beyond the longest sequence have a gradient too: zero.
    const bool all = problem.grad_proj_key.data || problem.grad_proj_value.data;
    return ((all ? problem.seq_len_max : problem.len_k) + backward_chunk - 1) / backward_chunk;
  }
  // Independent parts of kProjectBackwardTask: of E, or of F, of a sequence and a head where they have their own.
  int64_t matrices() const { return (problem.per_batch_proj ? problem.batch : 1) * heads_of_matrices(); }
  int64_t heads_of_matrices() const { return problem.per_head_proj ? problem.heads_kv : 1; }
  int64_t group_count() const { return (problem.heads_kv + heads_in_group - 1) / heads_in_group; }
  int64_t pool_groups() const { return (problem.heads_kv + pool_heads - 1) / pool_heads; }
  int64_t finish_parts() const { return (problem.proj_dim + finish_rows - 1) / finish_rows; }
};

// What a task of the phases between the large ones serves: some rows of K' or of V' of one (b, kv head).
struct FinishPart {
  int64_t b, h, bh;
  bool value;             // V' and not K'
  int64_t first, rows;    // of K
  FinishPart(const Plan& plan, int64_t task) {
    const int64_t parts = plan.finish_parts();
    bh = task / parts / 2;
    b = bh / plan.problem.heads_kv;
    h = bh % plan.problem.heads_kv;
    value = task / parts % 2 != 0;
    first = task % parts * plan.finish_rows;
    const int64_t left = plan.problem.proj_dim - first;
    rows = left < plan.finish_rows ? left : plan.finish_rows;
  }
};

// Which rows of K' or of V' a kPoolTask sums up, of heads that lie side by side.
struct PoolPart {
  int64_t b, head0, head1;
  bool value;             // V' and not K'
  int64_t first, rows;    // of K
  PoolPart(const Plan& plan, int64_t task) {
    const int64_t parts = plan.finish_parts(), groups = plan.pool_groups();
    first = task % parts * plan.finish_rows;
    const int64_t left = plan.problem.proj_dim - first;
    rows = left < plan.finish_rows ? left : plan.finish_rows;
    value = task / parts % 2 != 0;
    head0 = task / parts / 2 % groups * plan.pool_heads;
    head1 = head0 + plan.pool_heads < plan.problem.heads_kv ? head0 + plan.pool_heads : plan.problem.heads_kv;
    b = task / parts / 2 / groups;
  }
};

// Which heads of which sequences a kProjectBackwardTask serves, and with which rows of the sequence.
struct MatrixPart {
  int64_t n0, columns, used;    // columns of E from n0 on; those that the longest sequence has
  int64_t head0, head1, b0, b1;
  bool value;    // F and not E
  MatrixPart(const Plan& plan, int64_t task) {
    const Problem& p = plan.problem;
    const int64_t chunks = plan.project_backward_chunks(), heads = plan.heads_of_matrices();
    const int64_t matrix = task / chunks % plan.matrices();
    n0 = task % chunks * plan.backward_chunk;
    const int64_t left = p.seq_len_max - n0, rows = p.len_k - n0;
    columns = left < plan.backward_chunk ? left : plan.backward_chunk;
    used = rows < columns ? rows : columns;
    head0 = p.per_head_proj ? matrix % heads : 0;
    head1 = p.per_head_proj ? head0 + 1 : p.heads_kv;
    b0 = p.per_batch_proj ? matrix / heads : 0;
    b1 = p.per_batch_proj ? b0 + 1 : p.batch;
    value = task / chunks / plan.matrices() != 0;
  }
};

// Threads worth waking: a problem of microseconds is done sooner than a second thread is there.
int threads_for(const Problem& problem, unsigned stages, int threads);

Plan make_plan(const Problem& problem, unsigned stages, const KernelTable& table, int threads);

// parallel(n, body) must call body(i) for every i in [0, n), on as many threads as it likes.
using ParallelFor = std::function<void(int64_t, const std::function<void(int64_t)>&)>;

// False where a result of tiles is not finite: the problem is to be planned for plan.table->without_tiles and run
// again.
bool run_plan(const Plan& plan, int threads, const ParallelFor& parallel);

}    // namespace linformer::cpu
