// The kernel builds: one table of task functions for each instruction set that kernels.cpp was compiled for.
#pragma once

#include <cstddef>
#include <string>

#include "plan.h"

namespace linformer::cpu {

using TaskFunction = void (*)(const Plan& plan, int64_t task, std::byte* scratch);

struct KernelTable {
  const char* name;
  Shape shape;
  TaskFunction tasks[3][kTaskKinds];    // by DType
  double (*peak_gflops)(bool bf16);     // fastest multiply-add rate of one thread, operands in registers
  const KernelTable* without_tiles;     // where tiles are not worth it, or made a NaN of an infinity; else null
};

// The table for this machine, or for the instruction set named by LINFORMER_CPU_CAPABILITY.
const KernelTable& kernel_table();

// The table for a problem: that one, or the one without tiles where they would be slower.
const KernelTable& kernel_table_for(const Problem& problem);

// Why the system does not let this process use the AMX that the processor has; empty where it does, or was not asked.
std::string amx_refusal();

}    // namespace linformer::cpu
