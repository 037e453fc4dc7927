// From a problem to its launches: which kernel, how many CTAs, which arguments, where in the workspace. Pure functions,
// so that what is tested without a GPU is what is launched on one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "hopper.h"

namespace linformer::cuda {

struct Device {
  int multiprocessors = 1;
  int shared_bytes = 0;    // of one CTA, at most
  bool hopper = false;     // of compute capability 9.0, for which the library has kernels of their own
};

struct Launch {
  const char* kernel = nullptr;
  uint32_t grid = 0;
  uint32_t block = 0;
  uint32_t shared_bytes = 0;
  Arguments arguments;
  std::vector<TensorMap> maps = {};    // of a kernel that takes HopperArguments: four
  bool overlaps = false;               // it waits itself for what the launch before it has written
};

struct Plan {
  std::vector<Launch> launches;    // one after the other
  int64_t counter_bytes = 0;       // at the start of the workspace, to be zero before the first launch
  int64_t workspace_bytes = 0;
  const char* refusal = nullptr;    // why there is no plan
};

// `workspace` is where the pointers in the arguments go; with nullptr the plan tells how large it has to be. It must be
// aligned to 256 bytes.
Plan make_plan(const Problem& problem, unsigned stages, const Device& device, std::byte* workspace);

// Adds the launches of the kernels for compute capability 9.0, or returns false where they do not take the problem.
bool plan_hopper(Plan& plan, const Arguments& arguments, unsigned stages, const Device& device);

// What such a kernel takes.
HopperArguments joined(const Launch& launch);

// The memory that a launch may touch, its workspace left out. Nothing on a GPU needs to know; the tests' emulator does.
struct Region {
  const char* name = nullptr;
  const void* data = nullptr;
  int64_t bytes = 0;
};
std::vector<Region> regions_of(const Problem& problem);

}    // namespace linformer::cuda
