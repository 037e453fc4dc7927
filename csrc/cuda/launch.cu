#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "kernels.h"
#include "launch.h"

namespace linformer::cuda {

#define LINFORMER_DECLARE(name, ...) extern "C" __global__ void name(const __grid_constant__ Arguments a);
LINFORMER_FORWARD_KERNELS(LINFORMER_DECLARE)
LINFORMER_BACKWARD_KERNELS(LINFORMER_DECLARE)
LINFORMER_PROJECT_BACKWARD_KERNELS(LINFORMER_DECLARE)
LINFORMER_POOL_KERNELS(LINFORMER_DECLARE)
LINFORMER_POOL_BACKWARD_KERNELS(LINFORMER_DECLARE)

namespace {

const void* kernel_named(const char* wanted) {
#define LINFORMER_FIND(name, ...) \
  if (std::strcmp(wanted, #name) == 0) return reinterpret_cast<const void*>(&name);
  LINFORMER_FORWARD_KERNELS(LINFORMER_FIND)
  LINFORMER_BACKWARD_KERNELS(LINFORMER_FIND)
  LINFORMER_PROJECT_BACKWARD_KERNELS(LINFORMER_FIND)
  LINFORMER_POOL_KERNELS(LINFORMER_FIND)
  LINFORMER_POOL_BACKWARD_KERNELS(LINFORMER_FIND)
  return nullptr;
}

// Allows a kernel all the shared memory that the GPU `index` has for one. That is a state of the kernel on the GPU, so
// it is set once and never to less: a thread whose launch needs little must not take it from one whose launch needs
// much.
cudaError_t allow_shared(const void* kernel, int index, int bytes) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({index, kernel})) return cudaSuccess;
  // This loads the kernel. Where a first call is captured in a graph, only a thread that asks for it may.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (status == cudaSuccess) allowed.insert({index, kernel});
  return status;
}

}    // namespace

Device device_of(int index, std::string* error) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  Device device;
  cudaError_t status = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  if (status != cudaSuccess) {
    *error = cudaGetErrorString(status);
    return device;
  }
  device.shared_bytes -= 64;    // the kernels' own variables
  known[index] = device;
  return device;
}

std::string driver_problem(bool ptx) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  // A driver runs every runtime of its own major version and of older ones, but compiles no PTX newer than itself.
  if (driver >= CUDART_VERSION || (!ptx && driver / 1000 == CUDART_VERSION / 1000)) return "";
  const auto name = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  return "the native library was built with CUDA " + name(CUDART_VERSION) + ", and this driver is for CUDA " +
         name(driver) + (ptx ? " and would have to compile newer PTX for this GPU" : "") +
         ": install a newer driver, or build with an nvcc of that version";
}

std::string launch(const Plan& plan, std::byte* workspace, int index, int shared_bytes, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t status = cudaSuccess;
  if (plan.counter_bytes) status = cudaMemsetAsync(workspace, 0, plan.counter_bytes, on);
  for (const Launch& one : plan.launches) {
    const void* kernel = kernel_named(one.kernel);
    Arguments arguments = one.arguments;
    void* pointers[] = {&arguments};
    if (status == cudaSuccess) status = allow_shared(kernel, index, shared_bytes);
    if (status == cudaSuccess) status = cudaLaunchKernel(kernel, one.grid, one.block, pointers, one.shared_bytes, on);
  }
  return status == cudaSuccess ? std::string() : std::string(cudaGetErrorString(status));
}

}    // namespace linformer::cuda
