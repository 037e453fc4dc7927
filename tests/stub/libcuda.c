// A CUDA driver without a GPU, for Triton's launcher: launches go to a function of the tests, all else answers as if it
// had been done. Only what the launchers of Triton 3.6 to 3.9 call is here; everything succeeds.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// The part of CUlaunchConfig that says where and how large; attributes follow.
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
} LaunchConfig;

typedef void (*Launched)(uintptr_t function, const unsigned* grid, const unsigned* block, unsigned shared_bytes,
                         uintptr_t stream, void** parameters);

static struct {
  Launched launched;
  int capability, multiprocessors, shared_bytes;
  uintptr_t functions;    // handed out so far
} gpu = {NULL, 80, 1, 0, 0};

void stub_be(int capability, int multiprocessors, int shared_bytes) {
  gpu.capability = capability;
  gpu.multiprocessors = multiprocessors;
  gpu.shared_bytes = shared_bytes;
}

// NULL: launches go nowhere.
void stub_on_launch(Launched launched) { gpu.launched = launched; }

// cuLaunchKernelEx is called by one thread at a time here.
int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  (void)extra;
  if (gpu.launched) {
    gpu.launched((uintptr_t)function, config->grid, config->block, config->shared_bytes, (uintptr_t)config->stream,
                 parameters);
  }
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 10: *value = 32; break;       // lanes of a warp
    case 12: *value = 65536; break;    // registers of a block
    case 16: *value = gpu.multiprocessors; break;
    case 75: *value = gpu.capability / 10; break;
    case 76: *value = gpu.capability % 10; break;
    case 81: *value = gpu.shared_bytes + 1024; break;    // of a multiprocessor
    case 97: *value = gpu.shared_bytes; break;           // of a block that opts in
    default: *value = 1;
  }
  return 0;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
  (void)function;
  *value = attribute == 0 ? 1024 : 0;    // threads of a block; no static shared memory, no registers, nothing spilled
  return 0;
}

// Every tensor is one of the GPU's.
int cuPointerGetAttribute(void* value, int attribute, uintptr_t pointer) {
  (void)attribute;
  memcpy(value, &pointer, sizeof pointer);
  return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module, (void)name;
  *function = (void*)++gpu.functions;
  return 0;
}

int cuGetErrorString(int error, const char** text) {
  (void)error;
  *text = "the stub has no errors";
  return 0;
}

// Handles that are never looked at, but must not be null.
#define HANDLE(name)        \
  int name(void** handle) { \
    *handle = (void*)1;     \
    return 0;               \
  }
HANDLE(cuCtxGetCurrent)
HANDLE(cuDevicePrimaryCtxRetain)
HANDLE(cuModuleLoadData)

#define ZERO(name)       \
  int name(int* value) { \
    *value = 0;          \
    return 0;            \
  }
ZERO(cuCtxGetDevice)
ZERO(cuDeviceGet)

int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

#define NOTHING(name) \
  int name(void) { return 0; }
NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuPointerGetAttributes)
NOTHING(cuStreamIsCapturing)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)
