// Every kernel of the library by name, with its tile sizes: X(name, type, width of a head, and of the forward ones the
// rows of a projection tile). The files with kernels are compiled once for each type, to fill all cores of the builder:
// LINFORMER_CUDA_TYPE is fp16, bf16 or fp32 there.
#pragma once

#include "traits.h"

namespace linformer::cuda {

#define LINFORMER_FORWARD_OF(X, tag, type, rows)             \
  X(linformer_forward_##tag##_d32_r##rows, type, 32, rows)   \
  X(linformer_forward_##tag##_d64_r##rows, type, 64, rows)   \
  X(linformer_forward_##tag##_d96_r##rows, type, 96, rows)   \
  X(linformer_forward_##tag##_d128_r##rows, type, 128, rows) \
  X(linformer_forward_##tag##_d256_r##rows, type, 256, rows)
#define LINFORMER_FORWARD_fp16(X) \
  LINFORMER_FORWARD_OF(X, fp16, kFloat16, 128) LINFORMER_FORWARD_OF(X, fp16, kFloat16, 256)
#define LINFORMER_FORWARD_bf16(X) \
  LINFORMER_FORWARD_OF(X, bf16, kBFloat16, 128) LINFORMER_FORWARD_OF(X, bf16, kBFloat16, 256)
#define LINFORMER_FORWARD_fp32(X) LINFORMER_FORWARD_OF(X, fp32, kFloat32, 128)
#define LINFORMER_FORWARD_KERNELS(X) LINFORMER_FORWARD_fp16(X) LINFORMER_FORWARD_bf16(X) LINFORMER_FORWARD_fp32(X)

#define LINFORMER_BACKWARD_OF(X, tag, type)     \
  X(linformer_backward_##tag##_d32, type, 32)   \
  X(linformer_backward_##tag##_d64, type, 64)   \
  X(linformer_backward_##tag##_d96, type, 96)   \
  X(linformer_backward_##tag##_d128, type, 128) \
  X(linformer_backward_##tag##_d256, type, 256)
#define LINFORMER_BACKWARD_fp16(X) LINFORMER_BACKWARD_OF(X, fp16, kFloat16)
#define LINFORMER_BACKWARD_bf16(X) LINFORMER_BACKWARD_OF(X, bf16, kBFloat16)
#define LINFORMER_BACKWARD_fp32(X) LINFORMER_BACKWARD_OF(X, fp32, kFloat32)
#define LINFORMER_BACKWARD_KERNELS(X) LINFORMER_BACKWARD_fp16(X) LINFORMER_BACKWARD_bf16(X) LINFORMER_BACKWARD_fp32(X)

#define LINFORMER_PROJECT_BACKWARD_fp16(X) X(linformer_project_backward_fp16, kFloat16)
#define LINFORMER_PROJECT_BACKWARD_bf16(X) X(linformer_project_backward_bf16, kBFloat16)
#define LINFORMER_PROJECT_BACKWARD_fp32(X) X(linformer_project_backward_fp32, kFloat32)
#define LINFORMER_PROJECT_BACKWARD_KERNELS(X) \
  LINFORMER_PROJECT_BACKWARD_fp16(X) LINFORMER_PROJECT_BACKWARD_bf16(X) LINFORMER_PROJECT_BACKWARD_fp32(X)

// LINFORMER_KERNELS_OF_TYPE(LINFORMER_FORWARD_, X): those of LINFORMER_CUDA_TYPE.
#define LINFORMER_PASTE(list, type) list##type
#define LINFORMER_PASTE_VALUE(list, type) LINFORMER_PASTE(list, type)
#define LINFORMER_KERNELS_OF_TYPE(list, X) LINFORMER_PASTE_VALUE(list, LINFORMER_CUDA_TYPE)(X)

}    // namespace linformer::cuda
