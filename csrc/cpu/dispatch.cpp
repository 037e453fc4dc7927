// Chooses the kernel build for this machine. LINFORMER_CPU_CAPABILITY names another one, for tests and for comparison:
// a build that the machine cannot run is never chosen.
#include <cstdlib>
#include <cstring>
#include <string>

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

// __builtin_cpu_supports does not know F16C in clang 14. The system keeps its registers where it keeps those of AVX2.
bool converts_halves() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

// Every build, whether this machine can run it or not.
const KernelTable* const kBuilds[] = {
    &kGeneric,
#ifdef LINFORMER_CPU_X86
    &kAvx2,
    &kAvx512,
    &kAvx512Bf16,
#endif
    &kEmulatedAvx512Bf16,
};

// The build that was asked for; nullptr: none.
const char* wanted_build() {
  const char* wanted = std::getenv("LINFORMER_CPU_CAPABILITY");
  return wanted && *wanted ? wanted : nullptr;
}

// What this machine can run, best first.
const KernelTable& choose() {
  const KernelTable* found[4];
  int count = 0;
#ifdef LINFORMER_CPU_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_halves();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16"), slow = pairs && pairs_are_slow();
  if (pairs && !slow) found[count++] = &kAvx512Bf16;
  if (avx512) found[count++] = &kAvx512;
  if (slow) found[count++] = &kAvx512Bf16;
  if (avx2) found[count++] = &kAvx2;
#endif
  found[count++] = &kGeneric;

  const char* wanted = wanted_build();
  if (wanted == nullptr) return *found[0];
  if (std::strcmp(wanted, kEmulatedAvx512Bf16.name) == 0) return kEmulatedAvx512Bf16;
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(wanted, found[i]->name) == 0) return *found[i];
  }
  return *found[0];
}

}    // namespace

const KernelTable& kernel_table() {
  static const KernelTable& table = choose();
  return table;
}

const char* capability_problem() {
  static const std::string problem = [] {
    const char* wanted = wanted_build();
    std::string names;
    for (const KernelTable* build : kBuilds) {
      if (wanted == nullptr || std::strcmp(wanted, build->name) == 0) return std::string();
      names += (names.empty() ? "\"" : ", \"") + std::string(build->name) + "\"";
    }
    return "environment variable LINFORMER_CPU_CAPABILITY is '" + std::string(wanted) + "'; wanted: one of " + names +
           ", or none, for what suits this machine";
  }();
  return problem.empty() ? nullptr : problem.c_str();
}

}    // namespace linformer::cpu
