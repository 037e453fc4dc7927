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
  double (*peak_gflops)(DType type);    // fastest multiply-add rate of one thread, operands in registers
  double (*probe_gflops)();             // the same at this moment, in some 40 us: tells when the machine is slow
  const KernelTable* without_tiles;     // where tiles are slower, or a result is not finite; else null
};

// The table for this machine, or for the instruction set named by LINFORMER_CPU_CAPABILITY, or by use_capability. Asked
// on the thread that makes the plan.
const KernelTable& kernel_table();

// This thread's calls run on that build from now on, where the machine can run it; "": on the process's again. For
// bench, which times builds side by side.
void use_capability(const char* name);

// The table for a problem: that one, or, where nobody named it, the one without tiles if they would be slower. Pooling
// has no products, and none of tiles.
const KernelTable& kernel_table_for(const Problem& problem, unsigned stages);

// Why the system does not let this process use the AMX that the processor has; empty where it does, or was not asked.
std::string amx_refusal();

// What is wrong with LINFORMER_CPU_CAPABILITY, for a person to read; null if nothing is.
const char* capability_problem();

}    // namespace linformer::cpu
