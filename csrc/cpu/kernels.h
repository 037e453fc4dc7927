// The kernel builds: one table of task functions for each instruction set that kernels.cpp was compiled for.
#pragma once

#include <cstddef>

#include "plan.h"

namespace linformer::cpu {

using TaskFunction = void (*)(const Plan& plan, int64_t task, std::byte* scratch);

struct KernelTable {
  const char* name;
  Shape shape;
  TaskFunction tasks[3][kTaskKinds];    // by DType
  double (*peak_gflops)(bool bf16);     // fastest multiply-add rate of one thread, operands in registers
};

// The table for this machine, or for the instruction set named by LINFORMER_CPU_CAPABILITY.
const KernelTable& kernel_table();

// What is wrong with LINFORMER_CPU_CAPABILITY, for a person to read; null if nothing is.
const char* capability_problem();

}    // namespace linformer::cpu
