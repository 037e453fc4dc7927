// Sizes of tiles: the one place where they stand. The kernels, the plan and the tests read them from here.
//
// Widths of a head are padded to 32, 64, 96, 128 or 256. Elements are counted, not bytes, unless a name says so.
#pragma once

#include "../problem.h"

namespace linformer::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kMmaRows = 16;    // of a tile of the tensor cores

template <DType kType>
constexpr int kBytes = kType == DType::kFloat32 ? 4 : 2;

// Row pitch in shared memory, in elements, for tiles read along their rows and across them. The padding makes the 8
// rows of an ldmatrix, and the lanes of a 32-bit fragment, fall into different banks.
constexpr int pitch_along(int columns) { return columns + 8; }
constexpr int pitch_across(DType type, int columns) { return columns + (type == DType::kFloat32 ? 4 : 8); }

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

// C (kM x kN) += A B over stages of kStep summed values.
//   kAcrossA: A is stored with its rows adjacent (as E is for E^T), else with the summed dimension adjacent
//   kAcrossB: B is stored with its columns adjacent, else with the summed dimension adjacent
template <DType kType, int kM_, int kN_, bool kAcrossA_, bool kAcrossB_>
struct Gemm {
  static constexpr int kM = kM_, kN = kN_;
  static constexpr bool kAcrossA = kAcrossA_, kAcrossB = kAcrossB_;
  static constexpr int kStep =
      128 / kBytes<kType>;    // a row of 128 bytes: eight lanes that copy it meet no bank twice
  static constexpr int kStages = 2;
  static constexpr int kPitchA = kAcrossA ? pitch_across(kType, kM) : pitch_along(kStep);
  static constexpr int kPitchB = kAcrossB ? pitch_across(kType, kN) : pitch_along(kStep);
  static constexpr int kPitchC = pitch_across(kType, kN);    // when C goes through shared memory
  static constexpr int kElementsA = (kAcrossA ? kStep : kM) * kPitchA;
  static constexpr int kElementsB = (kAcrossB ? kStep : kN) * kPitchB;
  static constexpr int kSharedBytes = kStages * (kElementsA + kElementsB) * kBytes<kType>;
  // Warps stand 4 x 2 over C.
  static constexpr int kWarpM = kM / 4, kWarpN = kN / 2;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
};

// Columns of a projection tile: one or more pieces of heads, side by side.
constexpr int kTileColumns = 128;
constexpr int piece_columns(int dim) { return smaller(dim, kTileColumns); }

// Columns of query rows staged in shared memory at a time.
constexpr int staged_columns(int dim, int most) { return dim <= most ? dim : (dim == 96 ? 48 : most); }

template <DType kType_, int kDim_, int kProjectRows_, int kRows_>
struct Forward {
  static constexpr DType kType = kType_;
  static constexpr int kDim = kDim_;
  static constexpr bool kWide = kType == DType::kFloat32;
  static constexpr int kProjectRows = kProjectRows_;    // of a projection tile
  using Project = Gemm<kType, kProjectRows, kTileColumns, false, true>;

  // Query rows of a warp, and of a CTA, at a time: where registers allow for 32 a warp, so that what is loaded of K'
  // and V' serves two products.
  static constexpr int kRows = kRows_, kRowTiles = kRows / kMmaRows;
  static constexpr int kQueryRows = kWarps * kRows;
  // Rows of K' and V' whose scores are in registers at a time. Shared memory holds a multiple of them, which the plan
  // chooses.
  static constexpr int kKeys = kRowTiles == 2 ? 64
                               : kDim >= 256  ? (kWide ? 16 : 32)
                               : kDim >= 96   ? (kWide ? 32 : 64)
                                              : (kWide ? 64 : 128);
  static constexpr int kStaged = staged_columns(kDim, kWide ? 64 : 128);
  static constexpr int kBuffers = kDim == kStaged ? 2 : 1;    // at most: the rows of a tile, and of the next
  static constexpr int kStagePitch = pitch_along(kStaged);
  static constexpr int kKeyPitch = pitch_along(kDim);
  static constexpr int kValuePitch = pitch_across(kType, kDim);
  static constexpr int kStagedBytes = kBytes<kType> * kQueryRows * kStagePitch;    // of one buffer
  static constexpr int kKeyBytes = kBytes<kType> * (kKeyPitch + kValuePitch);      // of one row of K' and V'
  static constexpr int kSharedBytes =
      larger(Project::kSharedBytes, kStagedBytes + kKeys * (kKeyBytes + 4));    // at the least; 4: a bias
};

template <DType kType_, int kDim_>
struct Backward {
  static constexpr DType kType = kType_;
  static constexpr int kDim = kDim_;
  static constexpr bool kWide = kType == DType::kFloat32;

  // Tiles of query rows: statistics of the softmax and dQ.
  static constexpr int kRows = kMmaRows;    // of a warp
  static constexpr int kQueryRows = kWarps * kRows;
  static constexpr int kKeys = kDim >= 256 ? 16 : kDim >= 96 ? (kWide ? 16 : 32) : (kWide ? 32 : kDim == 32 ? 64 : 128);
  static constexpr int kStaged = staged_columns(kDim, kWide ? 32 : 64);
  static constexpr int kStagePitch = pitch_along(kStaged);
  static constexpr int kPitch = pitch_along(kDim);
  static constexpr int kStagedBytes = kBytes<kType> * 2 * kQueryRows * kStagePitch;
  static constexpr int kKeyBytes = kBytes<kType> * 2 * kPitch;                // of one row of K' and V'
  static constexpr int kRowBytes = kStagedBytes + kKeys * (kKeyBytes + 4);    // at the least; 4: a bias

  // Tiles of rows of K' and V': dK' and dV'.
  static constexpr int kColumnRows = kDim >= 256 ? (kWide ? 16 : 64) : kWide && kDim >= 96 ? 64 : 128;
  static constexpr int kQueries = kDim >= 128 || kWide ? 16 : 32;
  static constexpr int kOut = smaller(kDim, 128);    // columns of dK' and dV' in registers
  static constexpr int kParts = kDim / kOut;
  static constexpr bool kHeld = !kWide && kDim <= 64;    // rows of K' and V' stay in registers, as operands
  static constexpr int kStages = kDim >= 256 || (kWide && kDim >= 96) ? 1 : 2;
  static constexpr int kQueryBytes = kBytes<kType> * 2 * kQueries * kPitch + 16 * kQueries;
  static constexpr int kColumnBytes = kBytes<kType> * 2 * kColumnRows * kPitch + kStages * kQueryBytes +
                                      4 * kColumnRows + 16 * kColumnRows;    // the bias, and sums of its gradient

  static constexpr int kSharedBytes = larger(kRowBytes, kColumnBytes);    // at the least
};

template <DType kType_>
struct ProjectBackward {
  static constexpr DType kType = kType_;
  static constexpr int kRows = 128;                                 // of the sequence, and of K
  using Input = Gemm<kType, kRows, kTileColumns, true, true>;       // dX = E^T dX'
  using Matrix = Gemm<kType, kRows, kTileColumns, false, false>;    // dE = dX' X^T
  static constexpr int kSharedBytes = larger(Input::kSharedBytes, Matrix::kSharedBytes);
};

// Pooling: rows of K' or V' of a warp, and keys that it loads at a time.
constexpr int kPoolRows = 4;
constexpr int kPoolAhead = 4;
constexpr int kPoolKeys = 32;    // of a warp in the backward

}    // namespace linformer::cuda
