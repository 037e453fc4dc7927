// Forward for compute capability 9.0: K' = E key, V' = F value, out = softmax(scale query K'^T) V', for 16 bits, heads
// 33 to 128 wide, K up to 256, and without mask, bias, dropout or packed sequences; the rest is forward.cu's.
//
// Two launches, the second of which may start while the first ends. One launch with tickets would also mix the two
// kinds of work on a multiprocessor; both are near the rate of the memory, so there is little to mix.
//
// Projection: a CTA computes all of K' or V' of one piece or two of heads, 64 columns each. A stage is 64 columns of E
// and 64 rows of the pieces; the two CTAs of a cluster have the same E, so each fetches half of it for both.
//
// Attention: a CTA takes a run of tiles of 128 query rows. K' and V' of a head are in shared memory for all its tiles,
// those of the next head are fetched meanwhile, where there is room. All K scores of a row are in registers, so there
// is one softmax and no second pass; but heads over 64 wide take 128 of them at a time, with the online softmax.
//
// Written by hand and not on CuTe: the instructions are eight, and an emulator that names the line of a mistake helps
// more where the line says what it does. A thread of the last warpgroup copies (TMA), the other two multiply (wgmma);
// mbarriers count bytes on the way in and warps on the way out.
#include "attend.cuh"
#include "hopper.cuh"
#include "kernels.h"

namespace linformer::cuda {
namespace {

constexpr int kConsumers = 8;    // warps

static_assert(sizeof(HopperArguments) <= 4096, "of which a launch takes no more");

LINFORMER_DEVICE uint32_t aligned_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return (shared_address(memory) + 1023u) & ~1023u;
}

// The slots of a ring, one behind the other, and the parity that its barriers have when the slot is used.
template <int kSlots>
struct Ring {
  int slot = 0, parity = 0;

  LINFORMER_DEVICE void next() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <DType kType, int kKeys, int kPieces>
LINFORMER_DEVICE void project(const HopperArguments& all) {
  using Shape = HopperProject<kKeys, kPieces>;
  constexpr int kBlocks = kKeys / 128;    // of 64 rows, of a warpgroup
  const Arguments& a = all.a;
  const Problem& p = a.p;
  const uint32_t stages = aligned_shared();
  const uint32_t full = stages + Shape::kStages * Shape::kStageBytes, empty = full + 8 * Shape::kStages;
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shape::kStages; ++s) {
      init_barrier(full + 8 * s, 1);
      init_barrier(empty + 8 * s, kHopperCluster * kConsumers);
    }
    publish_barriers();
  }
  sync_cluster();

  // Pieces of heads that share a matrix are one list, head by head of a sequence, then the next sequence.
  const int cluster = blockIdx.x / kHopperCluster;
  const int matrices = p.per_head_proj ? static_cast<int>(p.heads_kv) : 1;
  const int matrix = cluster / a.units % matrices;
  const bool value = cluster / a.units / matrices != 0;
  const int first = (cluster % a.units * kHopperCluster + rank) * kPieces;
  const auto place = [&](int piece, int* column, int* head, int* b) {
    const int in_list = p.per_head_proj ? 1 : static_cast<int>(p.heads_kv), index = (first + piece) / a.parts;
    *column = (first + piece) % a.parts * kHopperColumns;
    *head = p.per_head_proj ? matrix : index % in_list;
    *b = index / in_list;    // past the end: reads as zero
  };
  const int steps = (static_cast<int>(min(p.len_k, p.seq_len_max)) + kHopperStep - 1) / kHopperStep;

  Ring<Shape::kStages> ring;
  if (warp_id() == kConsumers) {
    if (lane_id() == 0) {
      int columns[kPieces], heads[kPieces], sequences[kPieces];
      for (int i = 0; i < kPieces; ++i) place(i, columns + i, heads + i, sequences + i);
      const TensorMap& matrix_map = all.maps[value ? kMapProjValue : kMapProjKey];
      const TensorMap& rows_map = all.maps[value ? kMapValue : kMapKey];
      const int half = rank * kKeys / kHopperCluster;
      for (int step = 0; step < steps; ++step, ring.next()) {
        const uint32_t to = stages + ring.slot * Shape::kStageBytes, barrier = full + 8 * ring.slot;
        if (step >= Shape::kStages) wait_barrier(empty + 8 * ring.slot, ring.parity ^ 1);
        expect_bytes(barrier, Shape::kStageBytes);
        load_box_for_both(to + half * kHopperRowBytes, matrix_map, barrier, step * kHopperStep, half, matrix);
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          load_box(to + Shape::kMatrixBytes + i * Shape::kPieceBytes, rows_map, barrier, columns[i], step * kHopperStep,
                   heads[i], sequences[i]);
        }
      }
    }
    __syncwarp();
  } else if (warp_id() < kConsumers) {
    const int group = warp_id() / 4;
    float c[kBlocks][8 * kPieces][4];
    const auto release = [&](int slot) {    // in both CTAs, as both fetch for both
      if (lane_id() < kHopperCluster) arrive_in(empty + 8 * slot, lane_id());
    };
    int last = 0;
    for (int step = 0; step < steps; ++step) {
      wait_barrier(full + 8 * ring.slot, ring.parity);
      const uint32_t rows = stages + ring.slot * Shape::kStageBytes, columns = rows + Shape::kMatrixBytes;
      begin_products();
#pragma unroll
      for (int k = 0; k < kHopperStep; k += 16) {
        const uint64_t right = operand_at(columns + k * kHopperRowBytes, Shape::kPieceBytes);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const uint64_t left = operand_at(rows + (2 * i + group) * 64 * kHopperRowBytes + k * 2);
          multiply_turned<kType>(c[i], left, right, step > 0 || k > 0);
        }
      }
      end_products();
      wait_products<1>();
      if (step > 0) release(last);
      last = ring.slot;
      ring.next();
    }
    wait_products<0>();
    release(last);
    let_next_launch_start();

    const int g = lane_id() / 4, t = lane_id() % 4;
    const Rows& target = value ? p.value_proj : p.key_proj;
    const int width = static_cast<int>(value ? p.value_dim : p.head_dim);
    const bool aligned = (a.aligned & (value ? kAlignedValueProj : kAlignedKeyProj)) != 0;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      int column, head, b;
      place(piece, &column, &head, &b);
      if (b >= p.batch) break;
      column += 2 * t;
      Element<kType>* to = rows_at<kType>(target, b, head, 0) + column;
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const int row = (i / 2 * 2 + group) * 64 + warp_id() % 4 * 16 + g + i % 2 * 8;
        if (row >= p.proj_dim) continue;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const float* sums = c[i / 2][8 * piece + n] + i % 2 * 2;
          store_pair<kType>(to + row * target.row_stride + 8 * n, sums[0], sums[1], width - column - 8 * n, aligned);
        }
      }
    }
  }
  sync_cluster();    // nobody leaves while the other still arrives at its barriers
}

// A tile of queries, counted tile by tile of a head, head by head of a sequence.
struct QueryTile {
  int row, head, head_kv, b;

  LINFORMER_DEVICE QueryTile(const Problem& p, int tile) {
    const int tiles = (static_cast<int>(p.len_q) + kHopperRows - 1) / kHopperRows, heads = static_cast<int>(p.heads);
    row = tile % tiles * kHopperRows;
    head = tile / tiles % heads;
    head_kv = head / (heads / static_cast<int>(p.heads_kv));
    b = tile / tiles / heads;
  }
};

// What a thread that copies tells those that multiply with each slot: a tile, whether its K' and V' are other ones than
// those before, or that there are no more. So these need no registers to count, of which scores leave few.
constexpr int kNoMore = -1;

template <DType kType, int kKeys, int kPieces>
LINFORMER_DEVICE void attend(const HopperArguments& all) {
  using Shape = HopperAttend<kKeys, kPieces>;
  constexpr int kHeadBytes = 2 * Shape::kKeyBytes, kHalfBytes = Shape::kHalfBytes, kBlock = Shape::kBlock;
  constexpr bool kOnce = kBlock == kKeys;
  const Arguments& a = all.a;
  const Problem& p = a.p;
  const uint32_t keys = aligned_shared();
  const uint32_t queries = keys + Shape::kKeyStages * kHeadBytes;
  const uint32_t outs = queries + Shape::kStages * Shape::kRowsBytes;
  const uint32_t full = outs + Shape::kRowsBytes, empty = full + 8 * Shape::kStages;
  const uint32_t keys_full = empty + 8 * Shape::kStages, keys_empty = keys_full + 8 * Shape::kKeyStages;
  __shared__ int told[Shape::kStages];
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shape::kStages; ++s) {
      init_barrier(full + 8 * s, 1);
      init_barrier(empty + 8 * s, kConsumers);
    }
    for (int s = 0; s < Shape::kKeyStages; ++s) {
      init_barrier(keys_full + 8 * s, 1);
      init_barrier(keys_empty + 8 * s, kConsumers);
    }
    publish_barriers();
  }
  __syncthreads();

  Ring<Shape::kStages> ring;
  Ring<Shape::kKeyStages> key_ring;

  if (warp_id() >= kConsumers) {
    give_registers<24>();
    if (threadIdx.x != 32 * kConsumers) return;
    wait_for_launch_before();
    fence_async();    // its threads wrote K' and V'
    const int from = static_cast<int>(static_cast<int64_t>(a.attend_tiles) * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(static_cast<int64_t>(a.attend_tiles) * (blockIdx.x + 1) / gridDim.x);
    int head_kv = -1, b = 0, loads = 0;
    for (int tile = from; tile <= end; ++tile, ring.next()) {
      const uint32_t barrier = full + 8 * ring.slot;
      if (tile - from >= Shape::kStages) wait_barrier(empty + 8 * ring.slot, ring.parity ^ 1);
      if (tile == end) {
        told[ring.slot] = kNoMore;
        arrive(barrier);
        break;
      }
      const QueryTile at(p, tile);
      const bool fresh = head_kv != at.head_kv || b != at.b;
      told[ring.slot] = 2 * tile + fresh;
      expect_bytes(barrier, Shape::kRowsBytes);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        load_box(queries + ring.slot * Shape::kRowsBytes + i * 2 * kHalfBytes, all.maps[kMapQuery], barrier,
                 i * kHopperColumns, at.row, at.head, at.b);
      }
      if (!fresh) continue;
      head_kv = at.head_kv;
      b = at.b;
      const uint32_t keys_barrier = keys_full + 8 * key_ring.slot, place = keys + key_ring.slot * kHeadBytes;
      if (loads++ >= Shape::kKeyStages) wait_barrier(keys_empty + 8 * key_ring.slot, key_ring.parity ^ 1);
      expect_bytes(keys_barrier, kHeadBytes);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const uint32_t to = place + i * Shape::kPieceBytes;
        load_box(to, all.maps[kMapKeyProj], keys_barrier, i * kHopperColumns, 0, head_kv, b);
        load_box(to + Shape::kKeyBytes, all.maps[kMapValueProj], keys_barrier, i * kHopperColumns, 0, head_kv, b);
      }
      key_ring.next();
    }
    return;
  }

  take_registers<240>();
  const int group = warp_id() / 4, lane = lane_id();
  const uint32_t staged = outs + group * kHalfBytes;
  const int staged_row = warp_id() % 4 * 16 + lane % 16;
  const bool stores = threadIdx.x % 128 == 0;
  const Softmax softmax(a);
  const int proj_dim = static_cast<int>(p.proj_dim);
  bool first = true;
  const auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) arrive(barrier);
  };
  for (;; ring.next()) {
    wait_barrier(full + 8 * ring.slot, ring.parity);
    const int tile = told[ring.slot];
    if (tile == kNoMore) break;
    if (tile % 2) {
      if (!first) {
        release(keys_empty + 8 * key_ring.slot);
        key_ring.next();
      }
      first = false;
      wait_barrier(keys_full + 8 * key_ring.slot, key_ring.parity);
    }
    const uint32_t key_tile = keys + key_ring.slot * kHeadBytes;
    const uint32_t query_tile = queries + ring.slot * Shape::kRowsBytes + group * kHalfBytes;
    const uint32_t values = key_tile + Shape::kKeyBytes;
    float out[8 * kPieces][4];
    if constexpr (!kOnce) clear(out);
    float largest[2] = {a.lowest, a.lowest}, sum[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (int block = 0; block < kKeys; block += kBlock) {
      float scores[kBlock / 8][4];
      begin_products();
#pragma unroll
      for (int k = 0; k < kPieces * kHopperColumns; k += 16) {
        const int piece = k / kHopperColumns, byte = k % kHopperColumns * 2;
        const uint64_t left = operand_at(query_tile + piece * 2 * kHalfBytes + byte);
        const uint64_t right = operand_at(key_tile + piece * Shape::kPieceBytes + block * kHopperRowBytes + byte);
        if (k == 0) {
          multiply_along<kType, false>(scores, left, right);
        } else {
          multiply_along<kType, true>(scores, left, right);
        }
      }
      end_products();
      wait_products<0>();
      if (block + kBlock == kKeys) release(empty + 8 * ring.slot);

      softmax.orient(scores);
      Softmax::cut(scores, proj_dim - block);
      float correction[2];
      softmax.step(scores, largest, sum, correction, kOnce || block == 0);
      uint32_t weights[kBlock / 16][4];
#pragma unroll
      for (int k = 0; k < kBlock / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = scores[2 * k + i / 2] + i % 2 * 2;
          weights[k][i] = pack<kType>(pair[0], pair[1]);
        }
      }
      if constexpr (!kOnce) {
#pragma unroll
        for (int n = 0; n < 8 * kPieces; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[n][e] *= correction[e / 2];
        }
      }
      begin_products();
#pragma unroll
      for (int k = 0; k < kBlock / 16; ++k) {
        const uint64_t right = operand_at(values + (block + 16 * k) * kHopperRowBytes, Shape::kPieceBytes);
        if (kOnce && k == 0) {
          multiply_turned<kType, false>(out, weights[k], right);
        } else {
          multiply_turned<kType, true>(out, weights[k], right);
        }
      }
      end_products();
      wait_products<0>();
    }

    const float scale[2] = {Softmax::over(1.0f, quad_sum(sum[0])), Softmax::over(1.0f, quad_sum(sum[1]))};
    if (stores) wait_stores_read();
    sync_warpgroup(1 + group);    // the tile before this one has left
#pragma unroll
    for (int n = 0; n < 8 * kPieces; n += 2) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = out[n + i / 2] + i % 2 * 2;
        words[i] = pack<kType>(pair[0] * scale[i % 2], pair[1] * scale[i % 2]);
      }
      const uint32_t swizzled = static_cast<uint32_t>((n % 8 + lane / 16) ^ (staged_row % 8));
      store_matrices(staged + n / 8 * 2 * kHalfBytes + staged_row * kHopperRowBytes + 16 * swizzled, words[0], words[1],
                     words[2], words[3]);
    }
    fence_async();
    sync_warpgroup(1 + group);
    if (stores) {
      const QueryTile at(p, tile / 2);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        store_box(all.maps[kMapOut], staged + i * 2 * kHalfBytes, i * kHopperColumns, at.row + 64 * group, at.head,
                  at.b);
      }
    }
  }
  if (stores) wait_stores_read();
}

}    // namespace

#define LINFORMER_KERNEL(name, type, keys, pieces)                                                 \
  extern "C" __global__ void __cluster_dims__(kHopperCluster) __launch_bounds__(kHopperThreads, 1) \
      name(const __grid_constant__ HopperArguments all) {                                          \
    project<DType::type, keys, pieces>(all);                                                       \
  }
LINFORMER_KERNELS_OF_TYPE(LINFORMER_HOPPER_PROJECT_, LINFORMER_KERNEL)
#undef LINFORMER_KERNEL

#define LINFORMER_KERNEL(name, type, keys, pieces)                                                                    \
  extern "C" __global__ void __launch_bounds__(kHopperThreads, 1) name(const __grid_constant__ HopperArguments all) { \
    attend<DType::type, keys, pieces>(all);                                                                           \
  }
LINFORMER_KERNELS_OF_TYPE(LINFORMER_HOPPER_ATTEND_, LINFORMER_KERNEL)

}    // namespace linformer::cuda
