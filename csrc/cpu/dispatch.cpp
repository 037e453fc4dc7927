// Chooses the kernel build for this machine. LINFORMER_CPU_CAPABILITY names another one, for tests and for comparison:
// a build that the machine cannot run is never chosen.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#ifdef LINFORMER_CPU_X86
#include <cpuid.h>
#endif

namespace linformer::cpu {

extern const KernelTable kGeneric;
extern const KernelTable kEmulatedAvx512Bf16;    // the pairwise bf16 algorithm in portable code
#ifdef LINFORMER_CPU_X86
extern const KernelTable kAvx2;
extern const KernelTable kAvx512;
extern const KernelTable kAvx512Bf16;
#endif

namespace {

#ifdef LINFORMER_CPU_X86
// The one processor with AMX that was measured, a Xeon, has half the multiply-adds a second on pairs of bf16 that it
// has on fp32: forward at N = 4096, K = 128 in bf16 27.4 ms by pairs, 16.0 ms in fp32 (one thread, medians of 5).
bool pairs_are_slow() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);    // AMX-BF16
}
#endif

// The build of that name, or the best that this machine can run.
const KernelTable& choose(const char* wanted) {
  const KernelTable* found[4];    // what this machine can run, best first
  int count = 0;
#ifdef LINFORMER_CPU_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16"), slow = pairs && pairs_are_slow();
  if (pairs && !slow) found[count++] = &kAvx512Bf16;
  if (avx512) found[count++] = &kAvx512;
  if (slow) found[count++] = &kAvx512Bf16;
  if (avx2) found[count++] = &kAvx2;
#endif
  found[count++] = &kGeneric;

  if (wanted == nullptr) return *found[0];
  if (std::strcmp(wanted, kEmulatedAvx512Bf16.name) == 0) return kEmulatedAvx512Bf16;
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(wanted, found[i]->name) == 0) return *found[i];
  }
  return *found[0];
}

thread_local const KernelTable* chosen_by_thread = nullptr;

}    // namespace

const KernelTable& kernel_table() {
  static const KernelTable& table = choose(std::getenv("LINFORMER_CPU_CAPABILITY"));
  return chosen_by_thread ? *chosen_by_thread : table;
}

void use_capability(const char* name) { chosen_by_thread = *name ? &choose(name) : nullptr; }

}    // namespace linformer::cpu
