// C += A B for one CTA: tiles of both operands stream through shared memory in stages, asynchronously.
#pragma once

#include "tile.cuh"

namespace linformer::cuda {

// C += A B of one stage, the part of this warp: tile (m, n) at c[m * kTilesN + n], row 4 x 2 position by warp_row and
// warp_column.
template <DType kType, class Shape>
LINFORMER_DEVICE void multiply_stage(float (&c)[Shape::kTilesM * Shape::kTilesN][4], const Element<kType>* a_tile,
                                     const Element<kType>* b_tile, bool allow_tf32) {
  if constexpr (kType == DType::kFloat32) {
    if (allow_tf32) return multiply_stage<kTf32, Shape>(c, a_tile, b_tile, true);
  }
  const int row = warp_id() / 2 * Shape::kWarpM, column = warp_id() % 2 * Shape::kWarpN;
  const OperandA<kType, Shape::kAcrossA, Shape::kPitchA> a_rows(a_tile + row * (Shape::kAcrossA ? 1 : Shape::kPitchA));
  const OperandB<kType, Shape::kAcrossB, Shape::kPitchB> b_columns(b_tile +
                                                                   column * (Shape::kAcrossB ? 1 : Shape::kPitchB));
  constexpr int kSummed = Step<kType>::kSummed, kTilesN = Shape::kTilesN;
  repeat<Shape::kStep / kSummed>([&](auto k) {
    FragmentA<kType> a[Shape::kTilesM];
    repeat<Shape::kTilesM>([&](auto m) { a_rows.template load<16 * m, k * kSummed>(a[m]); });
    repeat<kTilesN / 2>([&](auto n) {
      FragmentB<kType> b;
      b_columns.template load<16 * n, k * kSummed>(b);
#pragma unroll
      for (int m = 0; m < Shape::kTilesM; ++m) {
        multiply<kType>(c[m * kTilesN + 2 * n], a[m], b, 0);
        multiply<kType>(c[m * kTilesN + 2 * n + 1], a[m], b, 1);
      }
    });
  });
}

// `load(a, b)` fills one stage, the next. Warps with `active` false (all their columns are padding) only keep the
// barriers.
template <DType kType, class Shape, class Load>
LINFORMER_DEVICE void multiply_stages(float (&c)[Shape::kTilesM * Shape::kTilesN][4], Element<kType>* shared, int steps,
                                      bool active, bool allow_tf32, Load&& load) {
  constexpr int kStages = Shape::kStages, kStageElements = Shape::kElementsA + Shape::kElementsB;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load(shared + s * kStageElements, shared + s * kStageElements + Shape::kElementsA);
    commit_copies();
  }
  int slot = 0;
  for (int s = 0; s < steps; ++s) {
    wait_copies<kStages - 2>();
    __syncthreads();    // stage s is there for all, and nobody reads the stage before it any more
    if (s + kStages - 1 < steps) {
      Element<kType>* to = shared + (slot == 0 ? kStages - 1 : slot - 1) * kStageElements;
      load(to, to + Shape::kElementsA);
    }
    commit_copies();
    if (active) {
      const Element<kType>* a_tile = shared + slot * kStageElements;
      multiply_stage<kType, Shape>(c, a_tile, a_tile + Shape::kElementsA, allow_tf32);
    }
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
  wait_copies<0>();
  __syncthreads();
}

// C, rounded to the type, through shared memory to rows that are written 16 bytes at a time: target(row, column) says
// where 16 bytes of C go. Only what exists is written.
template <DType kType>
struct Target {
  Element<kType>* data = nullptr;    // nullptr: nowhere
  int columns = 0;                   // that exist from here on
  bool aligned = false;
  bool zero = false;    // write zeros instead
};
template <DType kType, class Shape, class Where>
LINFORMER_DEVICE void store_tile(const float (&c)[Shape::kTilesM * Shape::kTilesN][4], Element<kType>* shared,
                                 const Where& target) {
  constexpr int kPitch = Shape::kPitchC, kChunk = 16 / kBytes<kType>, kChunks = Shape::kN / kChunk;
  static_assert(Shape::kM * kPitch * kBytes<kType> <= Shape::kSharedBytes);
  const int warp_row = warp_id() / 2 * Shape::kWarpM + lane_id() / 4;
  const int warp_column = warp_id() % 2 * Shape::kWarpN + lane_id() % 4 * 2;
#pragma unroll
  for (int m = 0; m < Shape::kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::kTilesN; ++n) {
      const float (&tile)[4] = c[m * Shape::kTilesN + n];
      Element<kType>* at = shared + (warp_row + 16 * m) * kPitch + warp_column + 8 * n;
      store_pair<kType>(at, tile[0], tile[1], 2, true);
      store_pair<kType>(at + 8 * kPitch, tile[2], tile[3], 2, true);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < Shape::kM * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * kChunk;
    const Target<kType> to = target(row, column);
    if (!to.data) continue;
    uint4 chunk = *reinterpret_cast<const uint4*>(shared + row * kPitch + column);
    if (to.zero) chunk = make_uint4(0, 0, 0, 0);
    store_chunk<kType>(to.data, chunk, to.columns, to.aligned);
  }
}

}    // namespace linformer::cuda
