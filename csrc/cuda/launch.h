// The one place that launches plans on a stream.
#pragma once

#include <cstdint>
#include <string>

#include "plan.h"

namespace linformer::cuda {

// What the current process's GPU `index` is; `error` says why it cannot be used.
Device device_of(int index, std::string* error);

// Why this machine's driver cannot run the CUDA runtime inside the library, else an empty string; with `ptx`, for a GPU
// that the library has only PTX for.
std::string driver_problem(bool ptx);

// Clears the counters and launches, in order, on `stream` of GPU `index`, which is the current one and has
// `shared_bytes` for a kernel (of its Device). Returns an empty string, or what CUDA says.
std::string launch(const Plan& plan, std::byte* workspace, int index, int shared_bytes, void* stream);

}    // namespace linformer::cuda
