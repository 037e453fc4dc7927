// Runs a Problem where its tensors are: on the CPU's threads, on a GPU, or in the tests' emulator of one.
#pragma once

#include "tensors.h"

namespace linformer {

// Whether the CUDA kernels take such a tensor.
bool on_gpu(const Tensor& tensor);

// Raises where this processor cannot do what was asked of it.
void check_capability();

// `stages`: of problem.h; `like`: a tensor of the problem.
void run(const Problem& problem, unsigned stages, const Tensor& like);

}    // namespace linformer
