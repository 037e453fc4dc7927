// Every kernel of the library by name, with its tile sizes: X(name, type, width of a head, and of the forward ones the
// rows of a projection tile and the query rows of a warp, of the backward ones whether there is a bias). The files with
// kernels are compiled once for each type, to fill all cores of the builder: LINFORMER_CUDA_TYPE is fp16, bf16 or fp32
// there.
#pragma once

#include "traits.h"

namespace linformer::cuda {

#define LINFORMER_FORWARD_OF(X, tag, type, rows)             \
  X(linformer_forward_##tag##_d32_r128, type, 32, 128, rows) \
  X(linformer_forward_##tag##_d64_r128, type, 64, 128, rows) \
  X(linformer_forward_##tag##_d96_r128, type, 96, 128, 16)   \
  X(linformer_forward_##tag##_d128_r128, type, 128, 128, 16) \
  X(linformer_forward_##tag##_d256_r128, type, 256, 128, 16)
// Taller projection tiles for K over 128. Width 96 has none: it would spill. And one that goes with less shared memory.
#define LINFORMER_FORWARD_MORE_OF(X, tag, type)              \
  X(linformer_forward_##tag##_d32_r256, type, 32, 256, 32)   \
  X(linformer_forward_##tag##_d64_r256, type, 64, 256, 32)   \
  X(linformer_forward_##tag##_d128_r256, type, 128, 256, 16) \
  X(linformer_forward_##tag##_d256_r256, type, 256, 256, 16) \
  X(linformer_forward_##tag##_d64_r128_w16, type, 64, 128, 16)
#define LINFORMER_FORWARD_fp16(X) \
  LINFORMER_FORWARD_OF(X, fp16, kFloat16, 32) LINFORMER_FORWARD_MORE_OF(X, fp16, kFloat16)
#define LINFORMER_FORWARD_bf16(X) \
  LINFORMER_FORWARD_OF(X, bf16, kBFloat16, 32) LINFORMER_FORWARD_MORE_OF(X, bf16, kBFloat16)
#define LINFORMER_FORWARD_fp32(X) LINFORMER_FORWARD_OF(X, fp32, kFloat32, 16)
#define LINFORMER_FORWARD_KERNELS(X) LINFORMER_FORWARD_fp16(X) LINFORMER_FORWARD_bf16(X) LINFORMER_FORWARD_fp32(X)

// Without and with a bias: where there is none, its branches would cost registers that are all taken.
#define LINFORMER_BACKWARD_OF(X, tag, type)                \
  X(linformer_backward_##tag##_d32, type, 32, false)       \
  X(linformer_backward_##tag##_d64, type, 64, false)       \
  X(linformer_backward_##tag##_d96, type, 96, false)       \
  X(linformer_backward_##tag##_d128, type, 128, false)     \
  X(linformer_backward_##tag##_d256, type, 256, false)     \
  X(linformer_backward_##tag##_d32_bias, type, 32, true)   \
  X(linformer_backward_##tag##_d64_bias, type, 64, true)   \
  X(linformer_backward_##tag##_d96_bias, type, 96, true)   \
  X(linformer_backward_##tag##_d128_bias, type, 128, true) \
  X(linformer_backward_##tag##_d256_bias, type, 256, true)
#define LINFORMER_BACKWARD_fp16(X) LINFORMER_BACKWARD_OF(X, fp16, kFloat16)
#define LINFORMER_BACKWARD_bf16(X) LINFORMER_BACKWARD_OF(X, bf16, kBFloat16)
#define LINFORMER_BACKWARD_fp32(X) LINFORMER_BACKWARD_OF(X, fp32, kFloat32)
#define LINFORMER_BACKWARD_KERNELS(X) LINFORMER_BACKWARD_fp16(X) LINFORMER_BACKWARD_bf16(X) LINFORMER_BACKWARD_fp32(X)

#define LINFORMER_PROJECT_BACKWARD_fp16(X) X(linformer_project_backward_fp16, kFloat16)
#define LINFORMER_PROJECT_BACKWARD_bf16(X) X(linformer_project_backward_bf16, kBFloat16)
#define LINFORMER_PROJECT_BACKWARD_fp32(X) X(linformer_project_backward_fp32, kFloat32)
#define LINFORMER_PROJECT_BACKWARD_KERNELS(X) \
  LINFORMER_PROJECT_BACKWARD_fp16(X) LINFORMER_PROJECT_BACKWARD_bf16(X) LINFORMER_PROJECT_BACKWARD_fp32(X)

#define LINFORMER_POOL_fp16(X) X(linformer_pool_fp16, kFloat16)
#define LINFORMER_POOL_bf16(X) X(linformer_pool_bf16, kBFloat16)
#define LINFORMER_POOL_fp32(X) X(linformer_pool_fp32, kFloat32)
#define LINFORMER_POOL_KERNELS(X) LINFORMER_POOL_fp16(X) LINFORMER_POOL_bf16(X) LINFORMER_POOL_fp32(X)

#define LINFORMER_POOL_BACKWARD_fp16(X) X(linformer_pool_backward_fp16, kFloat16)
#define LINFORMER_POOL_BACKWARD_bf16(X) X(linformer_pool_backward_bf16, kBFloat16)
#define LINFORMER_POOL_BACKWARD_fp32(X) X(linformer_pool_backward_fp32, kFloat32)
#define LINFORMER_POOL_BACKWARD_KERNELS(X) \
  LINFORMER_POOL_BACKWARD_fp16(X) LINFORMER_POOL_BACKWARD_bf16(X) LINFORMER_POOL_BACKWARD_fp32(X)

// LINFORMER_KERNELS_OF_TYPE(LINFORMER_FORWARD_, X): those of LINFORMER_CUDA_TYPE.
#define LINFORMER_PASTE(list, type) list##type
#define LINFORMER_PASTE_VALUE(list, type) LINFORMER_PASTE(list, type)
#define LINFORMER_KERNELS_OF_TYPE(list, X) LINFORMER_PASTE_VALUE(list, LINFORMER_CUDA_TYPE)(X)

}    // namespace linformer::cuda
