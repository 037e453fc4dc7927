#include <cuda_runtime.h>
#ifdef LINFORMER_WITH_HOPPER
#include <cuda.h>
#include <cudaTypedefs.h>
#endif

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
#ifdef LINFORMER_WITH_HOPPER
#define LINFORMER_DECLARE_HOPPER(name, ...) \
  extern "C" __global__ void name(const __grid_constant__ HopperArguments all);
LINFORMER_HOPPER_PROJECT_KERNELS(LINFORMER_DECLARE_HOPPER)
LINFORMER_HOPPER_ATTEND_KERNELS(LINFORMER_DECLARE_HOPPER)
#endif

namespace {

const void* kernel_named(const char* wanted) {
#define LINFORMER_FIND(name, ...) \
  if (std::strcmp(wanted, #name) == 0) return reinterpret_cast<const void*>(&name);
  LINFORMER_FORWARD_KERNELS(LINFORMER_FIND)
  LINFORMER_BACKWARD_KERNELS(LINFORMER_FIND)
  LINFORMER_PROJECT_BACKWARD_KERNELS(LINFORMER_FIND)
  LINFORMER_POOL_KERNELS(LINFORMER_FIND)
  LINFORMER_POOL_BACKWARD_KERNELS(LINFORMER_FIND)
#ifdef LINFORMER_WITH_HOPPER
  LINFORMER_HOPPER_PROJECT_KERNELS(LINFORMER_FIND)
  LINFORMER_HOPPER_ATTEND_KERNELS(LINFORMER_FIND)
#endif
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

#ifdef LINFORMER_WITH_HOPPER
// The driver's function that makes tensor maps, which the library does not link; nullptr where it has none.
PFN_cuTensorMapEncodeTiled_v12000 encode_tiled() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)
                                                 : nullptr;
  }();
  return found;
}

// Its own 128 bytes in the place of ours.
CUresult encode(TensorMap& map) {
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap) && alignof(CUtensorMap) <= alignof(TensorMap));
  const TensorMap ours = map;
  const cuuint32_t rank = ours.rank_minus_1 + 1u;
  cuuint64_t sizes[5];
  cuuint32_t box[5], steps[5];
  for (cuuint32_t i = 0; i < rank; ++i) {
    sizes[i] = ours.sizes[i];
    box[i] = ours.box[i];
    steps[i] = ours.element_strides[i];
  }
  cuuint64_t strides[4];
  for (cuuint32_t i = 0; i + 1 < rank; ++i) strides[i] = ours.strides[i];
  const auto type = ours.type == kTensorMapFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode_tiled()(reinterpret_cast<CUtensorMap*>(&map), type, rank, const_cast<void*>(ours.address), sizes,
                        strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// A launch whose kernel takes tensor maps.
cudaError_t launch_with_maps(const Launch& one, const void* kernel, cudaStream_t stream) {
  HopperArguments arguments = joined(one);
  for (TensorMap& map : arguments.maps) {
    if (encode(map) != CUDA_SUCCESS) return cudaErrorInvalidValue;
  }
  void* pointers[] = {&arguments};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = one.grid;
  config.blockDim = one.block;
  config.dynamicSmemBytes = one.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  static const bool captures = [] {    // older drivers refuse such a launch in a graph
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030;
  }();
  config.numAttrs = one.overlaps && captures ? 1 : 0;
  return cudaLaunchKernelExC(&config, kernel, pointers);
}
#else
cudaError_t launch_with_maps(const Launch&, const void*, cudaStream_t) { return cudaErrorInvalidDeviceFunction; }
#endif

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
#ifdef LINFORMER_WITH_HOPPER
  int major = 0, minor = 0;
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  device.hopper = major == 9 && minor == 0 && encode_tiled();
#endif
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
    if (status == cudaSuccess && !one.maps.empty()) {
      status = launch_with_maps(one, kernel, on);
    } else if (status == cudaSuccess) {
      status = cudaLaunchKernel(kernel, one.grid, one.block, pointers, one.shared_bytes, on);
    }
  }
  return status == cudaSuccess ? std::string() : std::string(cudaGetErrorString(status));
}

}    // namespace linformer::cuda
