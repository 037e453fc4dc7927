// Chooses the kernel build for this machine. LINFORMER_CPU_CAPABILITY names another one, for tests and for comparison:
// a build that the machine cannot run is never chosen.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace linformer::cpu {

extern const KernelTable kGeneric;
extern const KernelTable kEmulatedAvx512Bf16;    // the pairwise bf16 algorithm in portable code
#ifdef LINFORMER_CPU_X86
extern const KernelTable kAvx2;
extern const KernelTable kAvx512;
extern const KernelTable kAvx512Bf16;
#endif

namespace {

const KernelTable& choose() {
  const char* wanted = std::getenv("LINFORMER_CPU_CAPABILITY");
  const auto allowed = [wanted](const KernelTable& table) {
    return wanted == nullptr || *wanted == 0 || std::strcmp(wanted, table.name) == 0;
  };
  if (wanted != nullptr && std::strcmp(wanted, kEmulatedAvx512Bf16.name) == 0) return kEmulatedAvx512Bf16;
#ifdef LINFORMER_CPU_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && allowed(kAvx512Bf16)) return kAvx512Bf16;
  if (avx512 && allowed(kAvx512)) return kAvx512;
  if (avx2 && allowed(kAvx2)) return kAvx2;
#endif
  return kGeneric;
}

}    // namespace

const KernelTable& kernel_table() {
  static const KernelTable& table = choose();
  return table;
}

}    // namespace linformer::cpu
