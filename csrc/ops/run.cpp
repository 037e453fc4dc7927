// The way from a Problem to a device: plan, workspace, stream or threads.
#include "run.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <functional>
#include <string>

#include "../cpu/kernels.h"
#include "../cpu/plan.h"
#ifdef LINFORMER_WITH_CUDA
#include <dlfcn.h>

#include <cstring>
#include <vector>

#include "../cuda/launch.h"
#endif

namespace linformer {

#ifdef LINFORMER_WITH_CUDA
namespace {

// Takes the launches of the CUDA plans instead of a GPU; the tests' emulator is one. CPU tensors then stand for a
// GPU's.
using Emulator = void (*)(const char* kernel, uint32_t grid, uint32_t block, uint32_t shared_bytes,
                          const void* arguments, uint64_t argument_bytes, const cuda::Region* regions, uint64_t count);
struct Emulation {
  Emulator launch = nullptr;
  cuda::Device device;
};
Emulation emulation;

// The stable ABI of torch 2.10 has no current stream. The function lies in a library that a CPU torch does not have.
void* current_stream(int index) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(function && function(index, &stream) == 0,
                  "linformer_kernels: this torch does not tell its current CUDA stream");
  return stream;
}

void run_cuda(const Problem& problem, unsigned stages, const Tensor& like) {
  const int index = emulation.launch ? 0 : static_cast<int>(like.get_device_index());
  std::string error;
  const cuda::Device device = emulation.launch ? emulation.device : cuda::device_of(index, &error);
  STD_TORCH_CHECK(error.empty(), "linformer_kernels: CUDA: ", error);
  const cuda::Plan size = cuda::make_plan(problem, stages, device, nullptr);
  STD_TORCH_CHECK(!size.refusal, "linformer_kernels: ", size.refusal ? size.refusal : "");
  if (size.launches.empty()) return;
  constexpr int64_t kAlign = 256;
  std::byte* start = nullptr;
  const Tensor workspace = workspace_of(size.workspace_bytes, kAlign, like, &start);
  const cuda::Plan plan = cuda::make_plan(problem, stages, device, start);
  if (!emulation.launch) {
    // Torch's own guard: on the way back it does not wake a GPU that was current and never used.
    const torch::stable::accelerator::DeviceGuard guard(index);
    error = cuda::launch(plan, start, index, device.shared_bytes, current_stream(index));
    STD_TORCH_CHECK(error.empty(), "linformer_kernels: CUDA: ", error);
    return;
  }
  std::memset(start, 0, static_cast<size_t>(plan.counter_bytes));
  std::vector<cuda::Region> regions = cuda::regions_of(problem);
  regions.push_back({"workspace", start, plan.workspace_bytes});
  for (const cuda::Launch& one : plan.launches) {
    const cuda::HopperArguments all = cuda::joined(one);
    const bool mapped = !one.maps.empty();
    emulation.launch(one.kernel, one.grid, one.block, one.shared_bytes,
                     mapped ? &all : static_cast<const void*>(&all.a), mapped ? sizeof(all) : sizeof(all.a),
                     regions.data(), regions.size());
  }
}

}    // namespace

bool on_gpu(const Tensor& tensor) { return tensor.is_cuda() || emulation.launch; }
#else
bool on_gpu(const Tensor&) { return false; }
#endif

void check_capability() {
  if (const char* problem = cpu::capability_problem()) refuse(problem);
}

void run(const Problem& problem, unsigned stages, const Tensor& like) {
#ifdef LINFORMER_WITH_CUDA
  if (on_gpu(like)) return run_cuda(problem, stages, like);
#endif
  check_capability();
  const int threads = cpu::threads_for(problem, stages, static_cast<int>(torch::stable::get_num_threads()));
  const auto run_on = [&](const cpu::KernelTable& table) {
    cpu::Plan plan = cpu::make_plan(problem, stages, table, threads);
    const Tensor workspace = workspace_of(plan.workspace_bytes, 64, like, &plan.workspace);
    return cpu::run_plan(plan, threads, [](int64_t count, const std::function<void(int64_t)>& body) {
      torch::stable::parallel_for(0, count, 1, [&body](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i);
      });
    });
  };
  const cpu::KernelTable& table = cpu::kernel_table_for(problem, stages);
  if (!run_on(table)) run_on(*table.without_tiles);
}

}    // namespace linformer

#ifdef LINFORMER_WITH_CUDA
// For tests: launches go to `emulator`, or to the GPU again with nullptr.
extern "C" __attribute__((visibility("default"))) void linformer_emulate(linformer::Emulator emulator,
                                                                         int32_t multiprocessors, int32_t shared_bytes,
                                                                         bool hopper) {
  linformer::emulation = {emulator, {multiprocessors, shared_bytes, hopper}};
}
#endif
