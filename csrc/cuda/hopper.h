// What the kernels for compute capability 9.0 get and how large their tiles are: read by the kernels, by their plan and
// by what launches them.
#pragma once

#include "arguments.h"

namespace linformer::cuda {

// A tiled copy between shared and global memory, for the tensor memory accelerator: sizes, strides in bytes of all
// dimensions but the first, and the box of one copy, innermost first. launch.cu has the driver make its own 128 bytes
// of these; the tests' emulator takes them as they are.
struct alignas(128) TensorMap {
  const void* address = nullptr;
  uint32_t sizes[5] = {1, 1, 1, 1, 1};
  uint8_t rank_minus_1 = 0;
  uint8_t type = 0;    // this and the next three as PTX numbers them in tensormap.replace
  uint8_t interleave = 0;
  uint8_t swizzle = 0;
  uint8_t fill = 0;
  uint8_t unused[3] = {};
  uint64_t strides[4] = {};
  uint16_t box[5] = {1, 1, 1, 1, 1};
  uint16_t element_strides[5] = {1, 1, 1, 1, 1};
  uint8_t rest[32] = {};
};
static_assert(sizeof(TensorMap) == 128, "as large as what the driver makes of it");

constexpr uint8_t kTensorMapFloat16 = 6, kTensorMapBFloat16 = 10, kTensorMapSwizzle128 = 3;

// Of the projection: E, F, key, value; of attention: query, K', V', out.
enum HopperMap { kMapProjKey, kMapProjValue, kMapKey, kMapValue };
enum HopperAttendMap { kMapQuery, kMapKeyProj, kMapValueProj, kMapOut };

struct HopperArguments {
  TensorMap maps[4];
  Arguments a;
};

// Rows of 64 elements are 128 bytes, the span of a swizzle in which no reader meets a bank twice.
constexpr int kHopperColumns = 64;    // of a piece of a head
constexpr int kHopperRowBytes = 128;
constexpr int kHopperThreads =
    384;    // two warpgroups that multiply, one that copies: registers are shared by warpgroups
constexpr int kHopperCluster = 2;
constexpr int kHopperStep = 64;    // summed values of a stage

// kKeys: rows of K' and V', to which K is filled up. kPieces: of a CTA, of one head or two.
template <int kKeys, int kPieces>
struct HopperProject {
  static constexpr int kStages = kKeys == 256 ? (kPieces == 2 ? 4 : 5) : kPieces == 2 ? 6 : 8;
  static constexpr int kMatrixBytes = kKeys * kHopperRowBytes;    // of E
  static constexpr int kPieceBytes = kHopperStep * kHopperRowBytes;
  static constexpr int kStageBytes = kMatrixBytes + kPieces * kPieceBytes;
  static constexpr int kSharedBytes = 1024 + kStages * (kStageBytes + 2 * 8);    // 1024: to align the stages
};

constexpr int kHopperRows = 128;    // of a tile of queries, 64 for each warpgroup

// kPieces: of a head.
template <int kKeys, int kPieces>
struct HopperAttend {
  static constexpr int kBlock = kPieces == 1 ? kKeys : 128;    // rows of K' whose scores are in registers at a time
  static constexpr int kStages = kPieces == 2 ? 2 : kKeys == 128 ? 4 : 3;
  static constexpr int kKeyStages = kPieces == 2 && kKeys == 256 ? 1 : 2;
  static constexpr int kPieceBytes = kKeys * kHopperRowBytes;    // of K', of V'
  static constexpr int kKeyBytes = kPieces * kPieceBytes;
  static constexpr int kHalfBytes = kHopperRows / 2 * kHopperRowBytes;    // of a piece of a warpgroup's rows
  static constexpr int kRowsBytes = kPieces * 2 * kHalfBytes;
  static constexpr int kSharedBytes =
      1024 + kKeyStages * (2 * kKeyBytes + 2 * 8) + kStages * (kRowsBytes + 2 * 8) + kRowsBytes;
};

// X(name, type, kKeys, kPieces)
#define LINFORMER_HOPPER_PROJECT_OF(X, tag, type)             \
  X(linformer_hopper_project_##tag##_n64_k128, type, 128, 1)  \
  X(linformer_hopper_project_##tag##_n64_k256, type, 256, 1)  \
  X(linformer_hopper_project_##tag##_n128_k128, type, 128, 2) \
  X(linformer_hopper_project_##tag##_n128_k256, type, 256, 2)
#define LINFORMER_HOPPER_ATTEND_OF(X, tag, type)             \
  X(linformer_hopper_attend_##tag##_d64_k128, type, 128, 1)  \
  X(linformer_hopper_attend_##tag##_d64_k256, type, 256, 1)  \
  X(linformer_hopper_attend_##tag##_d128_k128, type, 128, 2) \
  X(linformer_hopper_attend_##tag##_d128_k256, type, 256, 2)
#define LINFORMER_HOPPER_PROJECT_fp16(X) LINFORMER_HOPPER_PROJECT_OF(X, fp16, kFloat16)
#define LINFORMER_HOPPER_PROJECT_bf16(X) LINFORMER_HOPPER_PROJECT_OF(X, bf16, kBFloat16)
#define LINFORMER_HOPPER_PROJECT_KERNELS(X) LINFORMER_HOPPER_PROJECT_fp16(X) LINFORMER_HOPPER_PROJECT_bf16(X)
#define LINFORMER_HOPPER_ATTEND_fp16(X) LINFORMER_HOPPER_ATTEND_OF(X, fp16, kFloat16)
#define LINFORMER_HOPPER_ATTEND_bf16(X) LINFORMER_HOPPER_ATTEND_OF(X, bf16, kBFloat16)
#define LINFORMER_HOPPER_ATTEND_KERNELS(X) LINFORMER_HOPPER_ATTEND_fp16(X) LINFORMER_HOPPER_ATTEND_bf16(X)

}    // namespace linformer::cuda
