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

// Rows of `columns` values that fill such a block, between `least` and `most`: a multiple of 16, which divides most
// sequences, and not of the register tile's rows, whose height the kernels vary.
int64_t rows_of_block(int64_t block_values, int64_t columns, int64_t least, int64_t most) {
  return round_to(std::clamp(block_values / std::max<int64_t>(columns, 1), least, most), 16);
}

// Rows that pay for the partial sums of a split, which are written and read again; fewer where threads would be idle.
constexpr int64_t kRowsOfSplit = 256;

// Parts of each of `sums` sums over `rows`: as many as the threads want and the error needs, of whole blocks of rows.
int64_t splits_of(int64_t sums, int64_t rows, int64_t block, int64_t wanted, int threads) {
  sums = std::max<int64_t>(sums, 1);
  const int64_t large = round_to(kRowsOfSplit, block);
  const int64_t most = ceil_div(rows, sums * ceil_div(rows, large) >= threads ? large : block);
  const int64_t accurate = std::min(ceil_div(rows, kRowsInOneSum), kMostSums);
  return std::clamp(std::max(ceil_div(wanted, sums), accurate), int64_t{1}, std::max<int64_t>(most, 1));
}

// Rows of query, key, value and of all that is as long, read and written. Of more bytes than this nothing of a result
// is left in the caches of most processors when it is read, and writing past them saves reading its lines before.
// (Forward + backward, fp32, D = 64, one thread, Xeon with AMX: 7 % less time at B = 8, H = 12, N = 512, K = 64; at B =
// 1, H = 8, K = 128 6 % at N = 16,384, 3 % at 4,096, 2 % at 1,024, which is left to the caches.)
constexpr int64_t kStreamedBytes = 24 << 20;

// Tiles take less time for the same bytes: at N = 2,048 (8 MB) 12 % less forward, 25 % less with backward; at 1,024 5 %
// and 0 %, which is left to the caches.
constexpr int64_t kStreamedByTiles = 6 << 20;

int64_t bytes_of_rows(const Problem& p, unsigned stages) {
  const int64_t query = p.heads * (p.cu_seqlens_q ? p.total_q : p.batch * p.len_q);
  const int64_t key = p.heads_kv * (p.cu_seqlens_k ? p.total_k : p.batch * p.len_k);
  int64_t values = 0;
  if (stages & kProject) values += key * (p.head_dim + p.value_dim);
  if (stages & kAttend) values += query * (p.head_dim + p.value_dim);
  if (stages & kAttendBackward) values += query * (2 * p.head_dim + p.value_dim);
  if (stages & kProjectBackward) values += 2 * key * (p.head_dim + p.value_dim);
  if (stages & (kPool | kPoolBackward)) values += key * (p.head_dim + p.value_dim);
  return values * (p.dtype == DType::kFloat32 ? 4 : 2);
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
  if (plan.stages & (kPool | kPoolBackward)) return PoolScratch(plan, nullptr).bytes;
  int64_t bytes = FinishScratch<Word>(plan, nullptr).bytes;
  if (plan.stages & kProject) bytes = std::max(bytes, ProjectScratch<Word>(plan, nullptr).bytes);
  if (plan.stages & kAttend) bytes = std::max(bytes, AttendScratch<Word>(plan, nullptr).bytes);
  if (plan.stages & kAttendBackward) bytes = std::max(bytes, AttendBackwardScratch<Word>(plan, nullptr).bytes);
  if (plan.stages & kProjectBackward) bytes = std::max(bytes, ProjectBackwardScratch<Word>(plan, nullptr).bytes);
  return bytes;
}

}    // namespace

int threads_for(const Problem& problem, unsigned stages, int threads) {
  const Problem& p = problem;
  const int64_t times = stages & (kPool | kPoolBackward) ? 8 : p.proj_dim;    // each value is moved, and no more
  const double rows = static_cast<double>(p.batch) * static_cast<double>(p.heads * p.len_q + p.heads_kv * p.len_k);
  const double operations = 2.0 * rows * static_cast<double>(times * (p.head_dim + p.value_dim));
  constexpr double kOperationsPerThread = 2e6;    // some tens of microseconds on one thread; chosen by judgment
  return static_cast<int>(std::clamp(operations / kOperationsPerThread, 1.0, static_cast<double>(threads)));
}

namespace {

// Values of one operand in tiles that is made once and read many times, from L2, if they have one term.
constexpr int64_t kTileBlockValues = 262144;

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
  plan.backward_chunk =
      std::min(round_to(std::max<int64_t>(even_share, 32), 32), std::clamp(rows, int64_t{32}, int64_t{128}));
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
  plan.words_per_value = p.dtype == DType::kBFloat16 ? shape.bf16_values : 1;
  plan.padded_k = round_to(p.proj_dim, shape.tile_columns);
  plan.padded_d = round_to(p.head_dim, shape.tile_columns);
  plan.padded_dv = round_to(p.value_dim, shape.tile_columns);

  const int64_t wanted = threads == 1 ? 1 : kTasksPerThread * threads;    // alone, each more is a partial to add
  const int64_t pairs = p.batch * p.heads_kv;

  plan.chunk = rows_of_block(kBlockValues, p.proj_dim, 64, 256);
  plan.heads_in_group = p.per_head_proj ? 1 : std::min<int64_t>(8, std::max<int64_t>(p.heads_kv, 1));
  plan.query_tile = rows_of_block(kBlockValues / 2, p.proj_dim, 16, 192);
  const int64_t query_tiles = p.batch * p.heads * ceil_div(p.len_q, plan.query_tile);
  plan.query_block = plan.query_tile * std::clamp(query_tiles / (4 * wanted), int64_t{1}, int64_t{8});
  plan.backward_tile = rows_of_block(kBlockValues / 2, p.proj_dim, 16, 192);
  const int64_t parts = (p.shared_kv ? 1 : 2) * plan.matrices();
  const int64_t even_share = ceil_div(p.len_k, ceil_div(wanted, std::max<int64_t>(parts, 1)));
  plan.backward_chunk =
      std::min(round_to(std::max<int64_t>(even_share, 32), 16), rows_of_block(kBlockValues, p.proj_dim, 64, 256));
  if (shape.tiles) size_tiles(plan, wanted, even_share);

  // Many threads: where splits are too few, groups of fewer heads, each of which copies E for itself.
  const int64_t most_splits = ceil_div(p.len_k, round_to(kRowsOfSplit, plan.chunk));
  while (plan.heads_in_group > 1 && p.batch * plan.group_count() * most_splits < wanted) plan.heads_in_group /= 2;
  plan.splits = splits_of(p.batch * plan.group_count(), p.len_k, plan.chunk, wanted, threads);
  plan.backward_splits = splits_of(pairs, p.len_q, plan.backward_tile, wanted, threads);

  // Heads that lie side by side are pooled together, so that memory is read in its order, while all sums stay in L2.
  if (stages & kPool && p.key.head_stride < p.key.row_stride) {
    plan.pool_heads = std::clamp<int64_t>(2 * kBlockValues / (p.proj_dim * plan.widest()), 1, p.heads_kv);
    while (plan.pool_heads > 1 && 2 * p.batch * plan.pool_groups() < wanted) plan.pool_heads /= 2;
  }
  const int64_t finish_unit = shape.tiles ? 32 : 16;
  const int64_t finished = 2 * (stages & kPool ? p.batch * plan.pool_groups() : pairs);
  const int64_t finish_parts =
      std::clamp(ceil_div(wanted, std::max<int64_t>(finished, 1)), int64_t{1}, ceil_div(p.proj_dim, finish_unit));
  plan.finish_rows = round_to(ceil_div(p.proj_dim, finish_parts), finish_unit);
  // Gradients of K' are divided by their counts once a block.
  plan.pool_block = std::max(round_to(ceil_div(p.len_k, ceil_div(wanted, std::max<int64_t>(2 * pairs, 1))), 16),
                             2 * round_to(p.proj_dim, 16));

  plan.stream = bytes_of_rows(p, stages) > (shape.tiles ? kStreamedByTiles : kStreamedBytes);

  plan.need_grad_key_proj = p.needs_grad_key_proj();
  plan.need_grad_value_proj = p.needs_grad_value_proj();

  const auto add = [&plan](TaskKind kind, int64_t tasks) { plan.phases[plan.phase_count++] = {kind, tasks}; };
  const int64_t finish_tasks = finished * plan.finish_parts();
  if (stages & kProject) add(kProjectTask, p.batch * plan.group_count() * plan.splits);
  if (stages & (kProject | kAttend)) add(kFinishProjectTask, finish_tasks);
  if (stages & kAttend) add(kAttendTask, p.batch * p.heads * ceil_div(p.len_q, plan.query_block));
  if (stages & kAttendBackward) {
    add(kPrepareBackwardTask, finish_tasks);
    add(kAttendBackwardTask, pairs * plan.backward_splits);
  }
  if (stages & (kAttendBackward | kProjectBackward)) add(kFinishBackwardTask, finish_tasks);
  if (stages & kProjectBackward) add(kProjectBackwardTask, parts * plan.project_backward_chunks());
  if (stages & kPool) add(kPoolTask, finish_tasks);
  if (stages & kPoolBackward) add(kPoolBackwardTask, 2 * pairs * ceil_div(p.len_k, plan.pool_block));

  // Splits need a partial each; the finishing task reads them in order.
  const int64_t partials =
      (stages & kProject ? plan.splits : 0) + (stages & kAttendBackward ? plan.backward_splits : 0);
  const auto reserve = [&plan](int64_t bytes) {
    const int64_t at = plan.workspace_bytes;
    plan.workspace_bytes += round_to(bytes, 64);
    return at;
  };
  if (shape.tiles) plan.not_finite = reserve(64);
  plan.partials = reserve(pairs * partials * Partial(plan, nullptr).bytes);
  const bool wide = plan.words_per_value == 4;    // words of 8 bytes
  plan.panels_stride = shape.tiles ? TilePanels(plan, nullptr).bytes
                       : wide      ? Panels<uint64_t>(plan, nullptr).bytes
                                   : Panels<float>(plan, nullptr).bytes;
  plan.panels = reserve(pairs * plan.panels_stride);
  plan.scratch_stride = shape.tiles ? tile_scratch_bytes(plan)
                        : wide      ? scratch_bytes<uint64_t>(plan)
                                    : scratch_bytes<float>(plan);
  plan.scratch = reserve(threads * plan.scratch_stride);
  return plan;
}

bool run_plan(const Plan& plan, int threads, const ParallelFor& parallel) {
  const TaskFunction* tasks = plan.table->tasks[static_cast<int>(plan.problem.dtype)];
  const auto* not_finite = reinterpret_cast<const int32_t*>(plan.workspace + plan.not_finite);
  if (plan.terms) *reinterpret_cast<int32_t*>(plan.workspace + plan.not_finite) = 0;
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
  return plan.terms == 0 || *not_finite == 0;
}

}    // namespace linformer::cpu
