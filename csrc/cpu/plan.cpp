#include "plan.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "kernels.h"
#include "layout.h"

namespace linformer::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_to(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// Tasks a thread should find in a phase, so that a thread that is interrupted leaves work for the others.
constexpr int64_t kTasksPerThread = 4;

// Rows of a sequence that are added up in one go: a sum over more is cut into several, up to a limit, so that its error
// stays below that of plain PyTorch. (Error of K' relative to PyTorch's, root mean square, fp32: 65,536 rows in one sum
// 1.42, in 8 sums 0.61; 262,144 rows 1.62, 0.61.)
constexpr int64_t kRowsInOneSum = 16384, kMostSums = 16;

// Values of a block that is streamed from L2 while panels stay in L1: 128 KB of fp32.
constexpr int64_t kBlockValues = 32768;

// Rows of `columns` values that fill such a block, whole register tiles, between `least` and `most`.
int64_t rows_of_block(int64_t block_values, int64_t columns, int64_t least, int64_t most, int64_t tile_rows) {
  return round_to(std::clamp(block_values / std::max<int64_t>(columns, 1), least, most), tile_rows);
}

// Parts of a sum over `rows`: as many as are wanted for the threads and for its error, at least one `block` of rows
// each.
int64_t splits_of(int64_t wanted, int64_t rows, int64_t block) {
  const int64_t accurate = std::min(ceil_div(rows, kRowsInOneSum), kMostSums);
  return std::clamp(std::max(wanted, accurate), int64_t{1}, std::max<int64_t>(ceil_div(rows, block), 1));
}

int64_t tile_scratch_bytes(const Plan& plan) {
  int64_t bytes = TileFinishScratch(plan, nullptr).bytes;
  if (plan.stages & kProject) bytes = std::max(bytes, TileProjectScratch(plan, nullptr).bytes);
  if (plan.stages & kAttend) bytes = std::max(bytes, TileAttendScratch(plan, nullptr).bytes);
  if (plan.stages & kAttendBackward) bytes = std::max(bytes, TileAttendBackwardScratch(plan, nullptr).bytes);
  if (plan.stages & kProjectBackward) bytes = std::max(bytes, TileProjectBackwardScratch(plan, nullptr).bytes);
  return bytes;
}

template <class Word>
int64_t scratch_bytes(const Plan& plan) {
  int64_t bytes = FinishScratch<Word>(plan, nullptr).bytes;
  if (plan.stages & kProject) bytes = std::max(bytes, ProjectScratch<Word>(plan, nullptr).bytes);
  if (plan.stages & kAttend) bytes = std::max(bytes, AttendScratch<Word>(plan, nullptr).bytes);
  if (plan.stages & kAttendBackward) bytes = std::max(bytes, AttendBackwardScratch<Word>(plan, nullptr).bytes);
  if (plan.stages & kProjectBackward) bytes = std::max(bytes, ProjectBackwardScratch<Word>(plan, nullptr).bytes);
  return bytes;
}

}    // namespace

int threads_for(const Problem& problem, int threads) {
  const Problem& p = problem;
  const double rows = static_cast<double>(p.batch) * static_cast<double>(p.heads * p.len_q + p.heads_kv * p.len_k);
  const double operations = 2.0 * rows * static_cast<double>(p.proj_dim * (p.head_dim + p.value_dim));
  constexpr double kOperationsPerThread = 2e6;    // some tens of microseconds on one thread; chosen by judgment
  return static_cast<int>(std::clamp(operations / kOperationsPerThread, 1.0, static_cast<double>(threads)));
}

namespace {

// Values of one operand in tiles that is made once and read many times, from L2, if they have one term.
constexpr int64_t kTileBlockValues = 262144;

// Of results larger than that a core's caches keep nothing for who reads them next, and a write past the caches saves
// reading the line first: forward at N = 4096, K = 128 in bf16 8 %, backward 25 %; at 1 MB a result, still 5 %.
constexpr int64_t kStreamedBytes = 1 << 20;

void size_tiles(Plan& plan, int64_t wanted, int64_t even_share) {
  const Problem& p = plan.problem;
  const int64_t rows = round_to(kTileBlockValues * 2 / (plan.terms + 1) / plan.padded_k, 32);
  // 32 columns of key or value of a chunk, all their terms, and a row of tiles of E stay in L1.
  plan.chunk = std::clamp(rows, int64_t{64}, plan.terms == 3 ? int64_t{128} : int64_t{256});
  // Blocks of 64, 128, 256 columns at K = 256: 4.1, 4.1, 4.9 ms for the scores in bf16, 14.8, 13.7, 13.2 in fp32.
  plan.k_block = std::min(plan.padded_k, int64_t{128});
  plan.query_tile = plan.k_block < plan.padded_k ? 256 : 64;
  const int64_t query_tiles = p.batch * p.heads * ceil_div(p.len_q, plan.query_tile);
  plan.query_block = plan.query_tile * std::clamp(query_tiles / (4 * wanted), int64_t{1}, int64_t{8});
  plan.backward_tile = std::clamp(rows, int64_t{32}, int64_t{256});
  plan.backward_chunk = std::min(round_to(even_share, 32), std::clamp(rows, int64_t{32}, int64_t{128}));
  const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  plan.stream = p.batch * p.heads * p.len_q * p.value_dim * bytes >= kStreamedBytes;
}

}    // namespace

Plan make_plan(const Problem& problem, unsigned stages, const KernelTable& table, int threads) {
  const Problem& p = problem;
  const Shape& shape = table.shape;
  Plan plan;
  plan.problem = problem;
  plan.table = &table;
  plan.shape = shape;
  plan.stages = stages;
  if (shape.tiles) plan.terms = p.dtype == DType::kFloat32 ? 3 : p.dtype == DType::kFloat16 ? 2 : 1;
  plan.words_per_value = shape.paired_bf16 && p.dtype == DType::kBFloat16 ? 2 : 1;
  plan.padded_k = round_to(p.proj_dim, shape.tile_columns);
  plan.padded_d = round_to(p.head_dim, shape.tile_columns);
  plan.padded_dv = round_to(p.value_dim, shape.tile_columns);

  const int64_t wanted = threads == 1 ? 1 : kTasksPerThread * threads;    // alone, each more is a partial to add
  const int64_t pairs = p.batch * p.heads_kv;

  plan.chunk = rows_of_block(kBlockValues, p.proj_dim, 64, 256, 16);
  plan.heads_in_group = p.per_head_proj ? 1 : std::min<int64_t>(8, std::max<int64_t>(p.heads_kv, 1));
  const int64_t groups = std::max<int64_t>(p.batch * plan.group_count(), 1);
  plan.query_tile = rows_of_block(kBlockValues / 2, p.proj_dim, shape.tile_rows, 192, shape.tile_rows);
  const int64_t query_tiles = p.batch * p.heads * ceil_div(p.len_q, plan.query_tile);
  plan.query_block = plan.query_tile * std::clamp(query_tiles / (4 * wanted), int64_t{1}, int64_t{8});

  plan.backward_tile = rows_of_block(kBlockValues / 2, p.proj_dim, shape.tile_rows, 192, shape.tile_rows);
  const int64_t parts = (p.shared_kv ? 1 : 2) * (p.per_head_proj ? p.heads_kv : 1);
  const int64_t even_share = ceil_div(p.len_k, ceil_div(wanted, std::max<int64_t>(parts, 1)));
  plan.backward_chunk = std::min(round_to(std::max<int64_t>(even_share, 32), shape.tile_rows),
                                 rows_of_block(kBlockValues, p.proj_dim, 64, 256, shape.tile_rows));
  if (shape.tiles) size_tiles(plan, wanted, even_share);

  plan.splits = splits_of(ceil_div(wanted, groups), p.len_k, plan.chunk);
  plan.backward_splits = splits_of(ceil_div(wanted, std::max<int64_t>(pairs, 1)), p.len_q, plan.backward_tile);

  plan.need_grad_key_proj = p.needs_grad_key_proj();
  plan.need_grad_value_proj = p.needs_grad_value_proj();

  const auto add = [&plan](TaskKind kind, int64_t tasks) { plan.phases[plan.phase_count++] = {kind, tasks}; };
  if (stages & kProject) add(kProjectTask, p.batch * plan.group_count() * plan.splits);
  if (stages & (kProject | kAttend)) add(kFinishProjectTask, pairs);
  if (stages & kAttend) add(kAttendTask, p.batch * p.heads * ceil_div(p.len_q, plan.query_block));
  if (stages & kAttendBackward) {
    add(kPrepareBackwardTask, pairs);
    add(kAttendBackwardTask, pairs * plan.backward_splits);
  }
  if (stages & (kAttendBackward | kProjectBackward)) add(kFinishBackwardTask, pairs);
  if (stages & kProjectBackward) add(kProjectBackwardTask, parts * plan.project_backward_chunks());

  // Splits need a partial each; the finishing task reads them in order.
  const int64_t partials =
      (stages & kProject ? plan.splits : 0) + (stages & kAttendBackward ? plan.backward_splits : 0);
  const auto reserve = [&plan](int64_t bytes) {
    const int64_t at = plan.workspace_bytes;
    plan.workspace_bytes += round_to(bytes, 64);
    return at;
  };
  if (shape.tiles) plan.not_a_number = reserve(64);
  plan.partials = reserve(pairs * partials * Partial(plan, nullptr).bytes);
  plan.panels_stride = shape.tiles ? TilePanels(plan, nullptr).bytes : Panels<float>(plan, nullptr).bytes;
  plan.panels = reserve(pairs * plan.panels_stride);
  plan.scratch_stride = shape.tiles ? tile_scratch_bytes(plan) : scratch_bytes<float>(plan);
  plan.scratch = reserve(threads * plan.scratch_stride);
  return plan;
}

bool run_plan(const Plan& plan, int threads, const ParallelFor& parallel) {
  const TaskFunction* tasks = plan.table->tasks[static_cast<int>(plan.problem.dtype)];
  const auto* not_a_number = reinterpret_cast<const int32_t*>(plan.workspace + plan.not_a_number);
  if (plan.terms) *reinterpret_cast<int32_t*>(plan.workspace + plan.not_a_number) = 0;
  int64_t total = 0;
  for (int i = 0; i < plan.phase_count; ++i) total += plan.phases[i].tasks;

  // Threads draw tickets in the order of the phases. A ticket waits until every task of the phases before it is done:
  // those tickets were drawn earlier, by threads that are running, so the wait ends however few threads there are.
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  parallel(std::min<int64_t>(threads, total), [&](int64_t worker) {
    std::byte* scratch = plan.workspace + plan.scratch + worker * plan.scratch_stride;
    for (;;) {
      int64_t ticket = next.fetch_add(1, std::memory_order_relaxed);
      if (ticket >= total) return;
      int phase = 0;
      int64_t before = 0;
      while (ticket - before >= plan.phases[phase].tasks) before += plan.phases[phase++].tasks;
      // acquire pairs with the release below: what the earlier phases wrote is visible.
      for (int spins = 0; done.load(std::memory_order_acquire) < before; ++spins) {
        if (spins > 1000) std::this_thread::yield();
      }
      tasks[plan.phases[phase].kind](plan, ticket - before, scratch);
      done.fetch_add(1, std::memory_order_release);
    }
  });
  return plan.terms == 0 || *not_a_number == 0;
}

}    // namespace linformer::cpu
