#include "plan.h"

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <initializer_list>

#include "../philox.h"
#include "kernels.h"

namespace linformer::cuda {
namespace {

struct ForwardInfo {
  const char* name;
  DType type;
  int dim;
  int project_rows, project_tiles;    // of a projection tile: rows, accumulator tiles of a thread
  int query_rows, buffers;            // of a tile of queries; tiles in shared memory, at most
  int keys, key_bytes, staged_bytes;
  int shared_bytes;    // at the least
};
#define LINFORMER_INFO(name, type, dim, rows, warp_rows)             \
  {#name,                                                            \
   DType::type,                                                      \
   dim,                                                              \
   rows,                                                             \
   Forward<DType::type, dim, rows, warp_rows>::Project::kTilesM *    \
       Forward<DType::type, dim, rows, warp_rows>::Project::kTilesN, \
   Forward<DType::type, dim, rows, warp_rows>::kQueryRows,           \
   Forward<DType::type, dim, rows, warp_rows>::kBuffers,             \
   Forward<DType::type, dim, rows, warp_rows>::kKeys,                \
   Forward<DType::type, dim, rows, warp_rows>::kKeyBytes,            \
   Forward<DType::type, dim, rows, warp_rows>::kStagedBytes,         \
   Forward<DType::type, dim, rows, warp_rows>::kSharedBytes},
constexpr ForwardInfo kForwardKernels[] = {LINFORMER_FORWARD_KERNELS(LINFORMER_INFO)};
#undef LINFORMER_INFO

struct BackwardInfo {
  const char* name;
  DType type;
  int dim;
  bool biased;
  int column_rows, parts, tiles;    // of a column tile: rows, parts of the columns, accumulator tiles of a thread
  int keys, key_bytes, staged_bytes;
  int shared_bytes;    // at the least
};
#define LINFORMER_INFO(name, type, dim, biased) \
  {#name,                                       \
   DType::type,                                 \
   dim,                                         \
   biased,                                      \
   Backward<DType::type, dim>::kColumnRows,     \
   Backward<DType::type, dim>::kParts,          \
   2 * Backward<DType::type, dim>::kOut / 8,    \
   Backward<DType::type, dim>::kKeys,           \
   Backward<DType::type, dim>::kKeyBytes,       \
   Backward<DType::type, dim>::kStagedBytes,    \
   Backward<DType::type, dim>::kSharedBytes},
constexpr BackwardInfo kBackwardKernels[] = {LINFORMER_BACKWARD_KERNELS(LINFORMER_INFO)};
#undef LINFORMER_INFO

struct ProjectBackwardInfo {
  const char* name;
  DType type;
  int shared_bytes;
};
#define LINFORMER_INFO(name, type) {#name, DType::type, ProjectBackward<DType::type>::kSharedBytes},
constexpr ProjectBackwardInfo kProjectBackwardKernels[] = {LINFORMER_PROJECT_BACKWARD_KERNELS(LINFORMER_INFO)};
#undef LINFORMER_INFO

struct PoolInfo {
  const char* name;
  DType type;
};
#define LINFORMER_INFO(name, type) {#name, DType::type},
constexpr PoolInfo kPoolKernels[] = {LINFORMER_POOL_KERNELS(LINFORMER_INFO)};
constexpr PoolInfo kPoolBackwardKernels[] = {LINFORMER_POOL_BACKWARD_KERNELS(LINFORMER_INFO)};
#undef LINFORMER_INFO

constexpr const char* kTooManyTiles = "there are more than 2^31 tiles of work";
constexpr int64_t kBackwardQueryRows = Backward<DType::kFloat16, 32>::kQueryRows;
constexpr int64_t kProjectBackwardRows = ProjectBackward<DType::kFloat16>::kRows;
constexpr int64_t kSplitRows = 256;       // of a sequence, at the least, in a part of a tile
constexpr int64_t kPartRows = 48;         // that a tile sums while a part goes to memory, or comes from there
constexpr int64_t kMostQueryTiles = 8;    // of one item: K' and V' are read once for 1024 query rows

constexpr const char* kNoMemory = "the kernels need more shared memory than this GPU has";

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The workspace, one piece behind the other.
class Layout {
 public:
  explicit Layout(std::byte* base) : base_(base) {}
  template <class T>
  T* add(int64_t bytes) {
    T* at = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base_) + static_cast<uintptr_t>(used_));
    used_ += ceil_div(bytes, 256) * 256;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

uint32_t alignment_of(const Problem& p) {
  const int64_t elements = p.dtype == DType::kFloat32 ? 4 : 8;
  const auto is_aligned = [&](const Rows& r) {
    return reinterpret_cast<uintptr_t>(r.data) % 16 == 0 && r.batch_stride % elements == 0 &&
           r.head_stride % elements == 0 && r.row_stride % elements == 0;
  };
  const struct {
    const Rows& rows;
    uint32_t bit;
  } all[] = {
      {p.query, kAlignedQuery},
      {p.key, kAlignedKey},
      {p.value, kAlignedValue},
      {p.out, kAlignedOut},
      {p.proj_key, kAlignedProjKey},
      {p.proj_value, kAlignedProjValue},
      {p.key_proj, kAlignedKeyProj},
      {p.value_proj, kAlignedValueProj},
      {p.grad_out, kAlignedGradOut},
      {p.grad_query, kAlignedGradQuery},
      {p.grad_key_proj, kAlignedGradKeyProj},
      {p.grad_value_proj, kAlignedGradValueProj},
      {p.grad_key, kAlignedGradKey},
      {p.grad_value, kAlignedGradValue},
      {p.grad_proj_key, kAlignedGradProjKey},
      {p.grad_proj_value, kAlignedGradProjValue},
  };
  uint32_t bits = 0;
  for (const auto& one : all) bits |= is_aligned(one.rows) ? one.bit : 0;
  return bits;
}

Arguments arguments_of(const Problem& p) {
  Arguments a;
  a.p = p;
  a.aligned = alignment_of(p);
  // Not 0, so that minus infinity, which stands for a score that does not exist, times it is minus infinity.
  a.exponent = std::max(std::fabs(p.scale) * 1.4426950408889634f, FLT_TRUE_MIN);
  a.negative = p.scale < 0.0f;
  a.lowest = -INFINITY;
  if (p.key_bias) {
    a.score_factor = p.scale * 1.4426950408889634f;
    a.exponent = 1.0f;
    a.lowest = -FLT_MAX;
    a.negative = false;
  }
  if (p.dtype != DType::kFloat16) {
    while (std::ldexp(1.0, static_cast<int>(a.headroom)) < static_cast<double>(p.proj_dim)) ++a.headroom;
  }
  if (p.dropout_p > 0.0) {
    a.drop_below = std::max(dropout_threshold(p.dropout_p), 1u);
    a.keep_multiplier = static_cast<float>(1.0 / (1.0 - p.dropout_p));
  }
  return a;
}

int padded_dim(const Problem& p) {
  const int64_t widest = std::max(p.head_dim, p.value_dim);
  for (int dim : {32, 64, 96, 128, 256}) {
    if (widest <= dim) return dim;
  }
  return 0;
}

// Tiles of `rows` rows over all sequences; for packed ones, whose lengths only the GPU knows, at most.
int64_t items(bool packed, int64_t batch, int64_t total, int64_t longest, int64_t rows) {
  return packed ? total / rows + batch : batch * ceil_div(longest, rows);
}

// Of a sequence; of packed ones, whose lengths only the GPU knows, the mean.
int64_t rows_of(bool packed, int64_t batch, int64_t total, int64_t longest) {
  return packed ? total / std::max<int64_t>(batch, 1) : longest;
}

// Parts of each of so many tiles that sum over `rows`: those that take the least time, counted in rows. A
// multiprocessor has one CTA; a last wave that fills few of them takes as long as the others, and more parts fill it
// better. But they go through memory, and the CTA that comes last adds those of its tile. `filled`: other work follows
// that fills the last wave, and only where there are too few tiles for one wave they are split.
int64_t splits_for(int64_t tiles, const Device& device, int64_t rows, bool filled) {
  if (filled && tiles >= device.multiprocessors) return 1;
  const auto time = [&](int64_t splits) {
    const int64_t part = splits > 1 ? kPartRows : 0;
    return ceil_div(tiles * splits, device.multiprocessors) * (ceil_div(rows, splits) + part) + splits * part;
  };
  int64_t best = 1;
  for (int64_t splits = 2; splits <= rows / kSplitRows && splits <= device.multiprocessors; ++splits) {
    if (time(splits) < time(best)) best = splits;
  }
  return best;
}

void set_units(Arguments& a, int dim) {
  const Problem& p = a.p;
  a.piece = piece_columns(dim);
  a.parts = dim / a.piece;
  const int64_t slots = kTileColumns / a.piece;
  const int64_t pieces_of_head = a.parts * (p.shared_kv ? 2 : 1);
  a.unit_heads = static_cast<int32_t>(p.per_head_proj ? 1 : std::max<int64_t>(1, slots / pieces_of_head));
  a.units = static_cast<int32_t>(ceil_div(p.heads_kv, a.unit_heads));
  a.unit_tiles = static_cast<int32_t>(ceil_div(a.unit_heads * pieces_of_head, slots) * (p.shared_kv ? 1 : 2));
}

int64_t set_query_items(Arguments& a, const Device& device, int64_t query_rows) {
  const Problem& p = a.p;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t tiles = items(packed, p.batch, p.total_q, p.len_q, query_rows) * p.heads;
  a.query_tiles = static_cast<int32_t>(std::clamp<int64_t>(tiles / device.multiprocessors, 1, kMostQueryTiles));
  a.query_items = static_cast<int32_t>(items(packed, p.batch, p.total_q, p.len_q, a.query_tiles * query_rows));
  return static_cast<int64_t>(a.query_items) * p.heads;
}

uint32_t grid_of(int64_t tickets, const Device& device) {
  return static_cast<uint32_t>(std::min<int64_t>(tickets, device.multiprocessors));
}

void plan_forward(Plan& plan, Layout& layout, const Problem& problem, unsigned stages, const Device& device, int dim) {
  // Blocks of K' and V', with a number of the bias a row, that K has, and that fit beside tiles of queries.
  const int64_t bias_bytes = problem.key_bias ? 4 : 0;
  const auto wanted = [&](const ForwardInfo& of) { return ceil_div(problem.proj_dim, of.keys); };
  const auto fitting = [&](const ForwardInfo& of, int64_t buffers) {
    return (device.shared_bytes - buffers * of.staged_bytes) / (of.key_bytes + bias_bytes) / of.keys;
  };
  const auto holds = [&](const ForwardInfo& of) { return fitting(of, 1) >= wanted(of); };
  const ForwardInfo* kernel = nullptr;
  for (const ForwardInfo& one : kForwardKernels) {
    if (one.type != problem.dtype || one.dim != dim || one.shared_bytes > device.shared_bytes) continue;
    // Tall tiles only where K fills them. Fewer query rows a warp only where K' and V' stay in shared memory for that,
    // as with K = 256 in 99 KB, which have no room for tall tiles. Counted for B = 4, N = 4096 on 84 multiprocessors
    // (tests/emulated.py): L2 bytes 234 -> 210 MiB, instructions -7 %; wavefronts of shared memory +25 %, which stay
    // below the time of the products there, at half the rate of 8.0.
    if (!kernel || (one.project_rows > kernel->project_rows && problem.proj_dim > kernel->project_rows) ||
        (one.project_rows == kernel->project_rows && holds(one) && !holds(*kernel))) {
      kernel = &one;
    }
  }
  if (!kernel) {
    plan.refusal = kNoMemory;
    return;
  }
  Arguments a = arguments_of(problem);
  set_units(a, dim);
  int64_t tiles = 0, tickets = 0;
  if (stages & kProject) {
    a.row_blocks = static_cast<int32_t>(ceil_div(problem.proj_dim, kernel->project_rows));
    tiles = problem.batch * a.units * a.unit_tiles * a.row_blocks;
    const int64_t rows = rows_of(problem.cu_seqlens_k, problem.batch, problem.total_k, problem.len_k);
    a.splits = static_cast<int32_t>(splits_for(tiles, device, rows, (stages & kAttend) != 0));
    tickets = tiles * a.splits;
    if (tickets > INT_MAX) plan.refusal = kTooManyTiles;
    a.project_tiles = static_cast<int32_t>(tickets);
  }
  if (stages & kAttend) {
    const int64_t attend = set_query_items(a, device, kernel->query_rows);
    if (attend + tickets > INT_MAX) plan.refusal = kTooManyTiles;
    a.attend_tiles = static_cast<int32_t>(attend);
    tickets += attend;
  }
  if (tickets == 0 || plan.refusal) return;
  a.ticket = layout.add<uint32_t>(4);
  a.ready = layout.add<uint32_t>(4 * problem.batch * a.units);
  a.arrived = layout.add<uint32_t>(a.splits > 1 ? 4 * tiles : 0);
  plan.counter_bytes = layout.used();
  a.partial = layout.add<float>(a.splits > 1 ? tiles * a.splits * kernel->project_tiles * 4 * kThreads * 4 : 0);
  // All of K' and V', or as much as fits. Two tiles of queries where there is room.
  a.query_buffers = a.query_tiles > 1 && fitting(*kernel, 2) >= wanted(*kernel) ? kernel->buffers : 1;
  a.keys = static_cast<int32_t>(std::min(wanted(*kernel), fitting(*kernel, a.query_buffers)) * kernel->keys);
  const int64_t shared_bytes = std::max<int64_t>(
      kernel->shared_bytes, a.query_buffers * kernel->staged_bytes + a.keys * (kernel->key_bytes + bias_bytes));
  plan.launches.push_back({kernel->name, grid_of(tickets, device), kThreads, static_cast<uint32_t>(shared_bytes), a});
}

void plan_attend_backward(Plan& plan, Layout& layout, const Problem& problem, bool want_key_proj, bool want_value_proj,
                          const Device& device, int dim) {
  const BackwardInfo* kernel = nullptr;
  for (const BackwardInfo& one : kBackwardKernels) {
    if (one.type != problem.dtype || one.dim != dim || one.biased != (problem.key_bias != nullptr)) continue;
    if (one.shared_bytes <= device.shared_bytes) kernel = &one;
  }
  if (!kernel) {
    plan.refusal = kNoMemory;
    return;
  }
  Arguments a = arguments_of(problem);
  a.want_key_proj = want_key_proj;
  a.want_value_proj = want_value_proj;
  const int64_t rows = set_query_items(a, device, kBackwardQueryRows);
  int64_t tiles = 0, columns = 0;
  if (want_key_proj || want_value_proj || problem.grad_key_bias) {
    a.column_blocks = static_cast<int32_t>(ceil_div(problem.proj_dim, kernel->column_rows));
    tiles = problem.batch * problem.heads_kv * a.column_blocks * kernel->parts;
    const int64_t group = problem.heads / std::max<int64_t>(problem.heads_kv, 1);
    const int64_t of_head = rows_of(problem.cu_seqlens_q, problem.batch, problem.total_q, problem.len_q);
    a.column_splits = static_cast<int32_t>(splits_for(tiles, device, group * of_head, false));
    columns = tiles * a.column_splits;
  }
  if (rows + columns > INT_MAX) plan.refusal = kTooManyTiles;
  if (rows + columns == 0 || plan.refusal) return;
  a.attend_tiles = static_cast<int32_t>(rows);
  a.column_tiles = static_cast<int32_t>(columns);
  a.ticket = layout.add<uint32_t>(4);
  a.ready = layout.add<uint32_t>(4 * problem.batch * problem.heads_kv);
  a.arrived = layout.add<uint32_t>(a.column_splits > 1 ? 4 * tiles : 0);
  plan.counter_bytes = layout.used();
  a.partial = layout.add<float>(a.column_splits > 1 ? tiles * a.column_splits * kernel->tiles * 4 * kThreads * 4 : 0);
  a.partial_bias = layout.add<float>(
      a.column_splits > 1 && problem.grad_key_bias ? tiles * a.column_splits * kernel->column_rows * 4 * 4 : 0);
  const int64_t query_rows = problem.cu_seqlens_q ? problem.total_q : problem.batch * problem.len_q;
  a.statistics = layout.add<float>(query_rows * problem.heads * 16);
  // All of K' and V' if they fit, else one block, with a number of the bias a row.
  const int key_bytes = kernel->key_bytes + (problem.key_bias ? 4 : 0);
  const int64_t all = ceil_div(problem.proj_dim, kernel->keys) * kernel->keys;
  a.keys = static_cast<int32_t>(kernel->staged_bytes + all * key_bytes <= device.shared_bytes ? all : kernel->keys);
  const int64_t shared_bytes = std::max<int64_t>(kernel->shared_bytes, kernel->staged_bytes + a.keys * key_bytes);
  plan.launches.push_back(
      {kernel->name, grid_of(rows + columns, device), kThreads, static_cast<uint32_t>(shared_bytes), a});
}

void plan_project_backward(Plan& plan, const Problem& problem, const Device& device, int dim) {
  const ProjectBackwardInfo* kernel = nullptr;
  for (const ProjectBackwardInfo& one : kProjectBackwardKernels) {
    if (one.type == problem.dtype && one.shared_bytes <= device.shared_bytes) kernel = &one;
  }
  if (!kernel) {
    plan.refusal = kNoMemory;
    return;
  }
  Arguments a = arguments_of(problem);
  set_units(a, dim);
  int64_t matrix = 0, input = 0;
  if (problem.grad_proj_key.data || problem.grad_proj_value.data) {
    a.row_blocks = static_cast<int32_t>(ceil_div(problem.proj_dim, kProjectBackwardRows));
    a.matrix_blocks = static_cast<int32_t>(ceil_div(problem.seq_len_max, kTileColumns));
    const int64_t own = (problem.per_head_proj ? problem.heads_kv : 1) * (problem.per_batch_proj ? problem.batch : 1);
    matrix = (problem.shared_kv ? 1 : 2) * own * a.row_blocks * a.matrix_blocks;
  }
  if (problem.grad_key.data || problem.grad_value.data) {
    a.input_items = static_cast<int32_t>(
        items(problem.cu_seqlens_k, problem.batch, problem.total_k, problem.len_k, kProjectBackwardRows));
    input = static_cast<int64_t>(a.input_items) * a.units * a.unit_tiles;
  }
  if (matrix + input > INT_MAX) plan.refusal = kTooManyTiles;
  if (matrix + input == 0 || plan.refusal) return;
  a.matrix_tiles = static_cast<int32_t>(matrix);
  a.input_tiles = static_cast<int32_t>(input);
  plan.launches.push_back(
      {kernel->name, grid_of(matrix + input, device), kThreads, static_cast<uint32_t>(kernel->shared_bytes), a});
}

void plan_pool(Plan& plan, const Problem& problem, unsigned stages) {
  const bool forward = (stages & kPool) != 0;
  Arguments a = arguments_of(problem);
  const int64_t parts = forward ? problem.batch * ceil_div(problem.proj_dim, kPoolRows)
                                : items(problem.cu_seqlens_k, problem.batch, problem.total_k, problem.len_k, kPoolKeys);
  const int64_t tasks = 2 * problem.heads_kv * parts;
  if (tasks > INT_MAX) plan.refusal = kTooManyTiles;
  if (tasks == 0 || plan.refusal) return;
  a.pool_tasks = static_cast<int32_t>(tasks);
  for (const PoolInfo& one : forward ? kPoolKernels : kPoolBackwardKernels) {
    if (one.type != problem.dtype) continue;
    plan.launches.push_back({one.name, static_cast<uint32_t>(ceil_div(tasks, kWarps)), kThreads, 0, a});
  }
}

}    // namespace

Plan make_plan(const Problem& problem, unsigned stages, const Device& device, std::byte* workspace) {
  Plan plan;
  Layout layout(workspace);
  Problem p = problem;
  const int dim = padded_dim(p);
  if (!dim) {
    plan.refusal = "heads are wider than 256";
    return plan;
  }
  if (std::max({p.batch, p.heads, p.len_q, p.len_k, p.total_q, p.total_k, p.seq_len_max, p.proj_dim}) >
      INT_MAX - 65536) {
    plan.refusal = "a size is larger than 2^31 - 2^16";
    return plan;
  }
  if (p.batch == 0 && !(stages & kProjectBackward)) return plan;
  if (stages & (kProject | kAttend) && !plan_hopper(plan, arguments_of(p), stages, device)) {
    plan_forward(plan, layout, p, stages, device, dim);
  }
  if (stages & kAttendBackward) {
    const bool both = (stages & kProjectBackward) != 0;
    const bool want_key = p.needs_grad_key_proj(), want_value = p.needs_grad_value_proj();
    const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
    Layout* at = &layout;
    const auto gradient = [&](int64_t columns) {
      const int64_t stride = ceil_div(columns, 8) * 8;
      Rows rows;
      rows.batch_stride = p.heads_kv * p.proj_dim * stride;
      rows.head_stride = p.proj_dim * stride;
      rows.row_stride = stride;
      rows.data = at->add<void>(std::max<int64_t>(p.batch * rows.batch_stride, 1) * bytes);
      return rows;
    };
    // Counters first; then what one launch leaves for the other.
    Problem attend = p;
    Layout first(workspace);
    Plan probe;
    plan_attend_backward(probe, first, attend, want_key, want_value, device, dim);
    layout.add<void>(first.used());
    if (both && want_key) p.grad_key_proj = gradient(p.head_dim);
    if (both && want_value) p.grad_value_proj = gradient(p.value_dim);
    Layout again(workspace);
    if (p.batch) plan_attend_backward(plan, again, p, want_key, want_value, device, dim);
  }
  if (stages & (kPool | kPoolBackward)) plan_pool(plan, p, stages);
  if (stages & kProjectBackward && !plan.refusal) plan_project_backward(plan, p, device, dim);
  plan.workspace_bytes = layout.used();
  return plan;
}

std::vector<Region> regions_of(const Problem& p) {
  std::vector<Region> regions;
  const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const auto add = [&](const char* name, const void* data, int64_t size) {
    if (data && size > 0) regions.push_back({name, data, size});
  };
  const auto add_rows = [&](const char* name, const Rows& r, int64_t batch, int64_t heads, int64_t rows,
                            int64_t columns) {
    if (batch * heads * rows * columns == 0) return;
    add(name, r.data,
        bytes * ((batch - 1) * r.batch_stride + (heads - 1) * r.head_stride + (rows - 1) * r.row_stride + columns));
  };
  const int64_t batch_q = p.cu_seqlens_q ? 1 : p.batch, rows_q = p.cu_seqlens_q ? p.total_q : p.len_q;
  const int64_t batch_k = p.cu_seqlens_k ? 1 : p.batch, rows_k = p.cu_seqlens_k ? p.total_k : p.len_k;
  const int64_t matrices = p.per_head_proj ? p.heads_kv : 1, batch_e = p.per_batch_proj ? p.batch : 1;
  add_rows("query", p.query, batch_q, p.heads, rows_q, p.head_dim);
  add_rows("out", p.out, batch_q, p.heads, rows_q, p.value_dim);
  add_rows("grad_out", p.grad_out, batch_q, p.heads, rows_q, p.value_dim);
  add_rows("grad_query", p.grad_query, batch_q, p.heads, rows_q, p.head_dim);
  add_rows("key", p.key, batch_k, p.heads_kv, rows_k, p.head_dim);
  add_rows("value", p.value, batch_k, p.heads_kv, rows_k, p.value_dim);
  add_rows("grad_key", p.grad_key, batch_k, p.heads_kv, rows_k, p.head_dim);
  add_rows("grad_value", p.grad_value, batch_k, p.heads_kv, rows_k, p.value_dim);
  add_rows("proj_key", p.proj_key, batch_e, matrices, p.proj_dim, p.seq_len_max);
  add_rows("proj_value", p.proj_value, batch_e, matrices, p.proj_dim, p.seq_len_max);
  add_rows("grad_proj_key", p.grad_proj_key, batch_e, matrices, p.proj_dim, p.seq_len_max);
  add_rows("grad_proj_value", p.grad_proj_value, batch_e, matrices, p.proj_dim, p.seq_len_max);
  add_rows("key_proj", p.key_proj, p.batch, p.heads_kv, p.proj_dim, p.head_dim);
  add_rows("value_proj", p.value_proj, p.batch, p.heads_kv, p.proj_dim, p.value_dim);
  add_rows("grad_key_proj", p.grad_key_proj, p.batch, p.heads_kv, p.proj_dim, p.head_dim);
  add_rows("grad_value_proj", p.grad_value_proj, p.batch, p.heads_kv, p.proj_dim, p.value_dim);
  if (p.mask && p.batch && p.len_k) {
    add("mask", p.mask, (p.batch - 1) * p.mask_batch_stride + (p.len_k - 1) * p.mask_row_stride + 1);
  }
  const int64_t rows_of_k = p.batch * p.heads_kv * p.proj_dim;
  if (rows_of_k) {
    add("key_bias", p.key_bias,
        4 * ((p.batch - 1) * p.key_bias_batch_stride + (p.heads_kv - 1) * p.key_bias_head_stride + p.proj_dim));
  }
  add("grad_key_bias", p.grad_key_bias, 4 * rows_of_k);
  add("count", p.count, 4 * rows_of_k);
  if (p.segments && batch_k * rows_k) {
    add("segments", p.segments,
        4 * ((batch_k - 1) * p.segments_batch_stride + (p.heads_kv - 1) * p.segments_head_stride +
             (rows_k - 1) * p.segments_row_stride + 1));
  }
  add("cu_seqlens_q", p.cu_seqlens_q, 8 * (p.batch + 1));
  add("cu_seqlens_k", p.cu_seqlens_k, 8 * (p.batch + 1));
  add("rng_state", p.rng_state, 16);
  return regions;
}

}    // namespace linformer::cuda
