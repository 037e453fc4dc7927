// Whether the kernels for compute capability 9.0 take a problem, and their launches.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "hopper.h"
#include "plan.h"

namespace linformer::cuda {
namespace {

struct HopperInfo {
  DType type;
  int keys, pieces;
  const char* name;
  int shared_bytes;
};
#define LINFORMER_INFO(name, type, keys, pieces) \
  {DType::type, keys, pieces, #name, HopperProject<keys, pieces>::kSharedBytes},
constexpr HopperInfo kProjectKernels[] = {LINFORMER_HOPPER_PROJECT_KERNELS(LINFORMER_INFO)};
#undef LINFORMER_INFO
#define LINFORMER_INFO(name, type, keys, pieces) \
  {DType::type, keys, pieces, #name, HopperAttend<keys, pieces>::kSharedBytes},
constexpr HopperInfo kAttendKernels[] = {LINFORMER_HOPPER_ATTEND_KERNELS(LINFORMER_INFO)};
#undef LINFORMER_INFO

template <size_t kCount>
const HopperInfo& kernel_for(const HopperInfo (&kernels)[kCount], const Problem& p, int pieces) {
  const HopperInfo* found = nullptr;
  for (const HopperInfo& one : kernels) {
    if (one.type != p.dtype || one.pieces != pieces || one.keys < p.proj_dim) continue;
    if (!found || one.keys < found->keys) found = &one;
  }
  return *found;
}

constexpr int64_t kMostKeys = 256;
constexpr int64_t kElementBytes = 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A box of `box_rows` rows by 64 columns; `heads` and `batch` as they are stored.
TensorMap map_of(const Problem& p, const Rows& rows, int64_t columns, int64_t count, int64_t heads, int64_t batch,
                 int box_rows) {
  TensorMap map;
  map.address = rows.data;
  map.type = p.dtype == DType::kFloat16 ? kTensorMapFloat16 : kTensorMapBFloat16;
  map.swizzle = kTensorMapSwizzle128;
  map.rank_minus_1 = 3;
  const int64_t sizes[] = {columns, count, heads, batch};
  const int64_t strides[] = {rows.row_stride, rows.head_stride, rows.batch_stride};
  for (int i = 0; i < 4; ++i) map.sizes[i] = static_cast<uint32_t>(sizes[i]);
  uint64_t packed = static_cast<uint64_t>(ceil_div(columns * kElementBytes, 16) * 16);
  for (int i = 0; i < 3; ++i) {    // a dimension of one may have any stride: that of a packed tensor
    map.strides[i] = sizes[i + 1] > 1 ? static_cast<uint64_t>(strides[i] * kElementBytes) : packed;
    packed = map.strides[i] * map.sizes[i + 1];
  }
  map.box[0] = kHopperColumns;
  map.box[1] = static_cast<uint16_t>(box_rows);
  return map;
}

// What a tensor map can say: strides of 16 bytes and more, none of them 0, as an expanded tensor has.
bool can_be_mapped(const TensorMap& map) {
  for (int i = 0; i < map.rank_minus_1; ++i) {
    if (map.strides[i] == 0 || map.strides[i] % 16 || map.strides[i] >= uint64_t{1} << 40) return false;
  }
  return reinterpret_cast<uintptr_t>(map.address) % 16 == 0;
}
bool can_be_mapped(const std::vector<TensorMap>& maps) {
  return std::all_of(maps.begin(), maps.end(), [](const TensorMap& map) { return can_be_mapped(map); });
}

}    // namespace

bool plan_hopper(Plan& plan, const Arguments& arguments, unsigned stages, const Device& device) {
  Arguments a = arguments;
  const Problem& p = a.p;
  const int64_t widest = std::max(p.head_dim, p.value_dim);
  const bool taken = device.hopper && p.dtype != DType::kFloat32 && widest > kHopperColumns / 2 &&
                     widest <= 2 * kHopperColumns && p.proj_dim <= kMostKeys && !p.mask && !p.key_bias &&
                     !p.per_batch_proj && !p.cu_seqlens_q && !p.cu_seqlens_k && p.dropout_p == 0.0 && p.scale != 0.0;
  if (!taken) return false;
  for (int64_t size : {p.batch, p.heads_kv, p.proj_dim, p.head_dim, p.value_dim}) {
    if (size == 0) return false;
  }
  a.parts = static_cast<int32_t>(ceil_div(widest, kHopperColumns));
  std::vector<Launch> launches;
  if (stages & kProject) {
    const int64_t columns = std::min(p.len_k, p.seq_len_max);
    const int64_t matrices = p.per_head_proj ? p.heads_kv : 1;
    const int64_t pieces = a.parts * (p.per_head_proj ? p.batch : p.batch * p.heads_kv);
    const auto ctas_of = [&](int pieces_of_cta) {
      return 2 * matrices * ceil_div(pieces, kHopperCluster * pieces_of_cta) * kHopperCluster;
    };
    // Two pieces a CTA read E half as often; but where they leave half of the multiprocessors idle, one.
    const int of_cta = 2 * ctas_of(2) > device.multiprocessors ? 2 : 1;
    const int64_t ctas = ctas_of(of_cta);
    // It does not split sequences: with fewer CTAs than that, forward.cu, which does, has more multiprocessors at work.
    if (columns == 0 || 2 * ctas < device.multiprocessors || ctas > INT32_MAX) return false;
    a.units = static_cast<int32_t>(ceil_div(pieces, kHopperCluster * of_cta));
    const HopperInfo& kernel = kernel_for(kProjectKernels, p, of_cta);
    const auto matrix = [&](const Rows& rows) {
      return map_of(p, rows, columns, p.proj_dim, matrices, 1, kernel.keys / kHopperCluster);
    };
    const auto rows = [&](const Rows& rows, int64_t width) {
      return map_of(p, rows, width, columns, p.heads_kv, p.batch, kHopperStep);
    };
    std::vector<TensorMap> maps = {matrix(p.proj_key), matrix(p.proj_value), rows(p.key, p.head_dim),
                                   rows(p.value, p.value_dim)};
    if (!can_be_mapped(maps) || kernel.shared_bytes > device.shared_bytes) return false;
    launches.push_back({kernel.name, static_cast<uint32_t>(ctas), kHopperThreads,
                        static_cast<uint32_t>(kernel.shared_bytes), a, maps});
  }
  if (stages & kAttend) {
    const HopperInfo& kernel = kernel_for(kAttendKernels, p, a.parts);
    const int64_t tiles = p.batch * p.heads * ceil_div(p.len_q, kHopperRows);
    if (tiles == 0 || tiles > INT32_MAX / 2) return false;
    a.attend_tiles = static_cast<int32_t>(tiles);
    const auto keys = [&](const Rows& rows, int64_t width) {
      return map_of(p, rows, width, p.proj_dim, p.heads_kv, p.batch, kernel.keys);
    };
    std::vector<TensorMap> maps = {map_of(p, p.query, p.head_dim, p.len_q, p.heads, p.batch, kHopperRows),
                                   keys(p.key_proj, p.head_dim), keys(p.value_proj, p.value_dim),
                                   map_of(p, p.out, p.value_dim, p.len_q, p.heads, p.batch, kHopperRows / 2)};
    if (!can_be_mapped(maps) || kernel.shared_bytes > device.shared_bytes) return false;
    launches.push_back({kernel.name, static_cast<uint32_t>(std::min<int64_t>(tiles, device.multiprocessors)),
                        kHopperThreads, static_cast<uint32_t>(kernel.shared_bytes), a, maps, !launches.empty()});
  }
  plan.launches.insert(plan.launches.end(), launches.begin(), launches.end());
  return true;
}

HopperArguments joined(const Launch& launch) {
  HopperArguments all;
  std::copy(launch.maps.begin(), launch.maps.end(), all.maps);
  all.a = launch.arguments;
  return all;
}

}    // namespace linformer::cuda
