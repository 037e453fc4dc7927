// Chooses the kernel build for this machine. LINFORMER_CPU_CAPABILITY names another one, for tests and for comparison:
// a build that the machine cannot run is never chosen.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#ifdef LINFORMER_CPU_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace linformer::cpu {

extern const KernelTable kGeneric;
extern const KernelTable kEmulatedAvx512Bf16;    // the pairwise bf16 algorithm in portable code
extern const KernelTable kEmulatedAmx;           // the tiles' algorithm in portable code
#ifdef LINFORMER_CPU_X86
extern const KernelTable kAvx2;
extern const KernelTable kAvx512;
extern const KernelTable kAvx512Bf16;
extern const KernelTable kAmx;
#endif

namespace {

#ifdef LINFORMER_CPU_X86
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);    // AMX-BF16, AMX-TILE
}

// Linux gives a process the use of tiles when it asks; before that their first instruction ends it. One request serves
// all threads, older ones too, and forked children. An old kernel or a filter of system calls may refuse.
bool may_use_amx() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;    // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The build of that name, or the best that this machine can run.
const KernelTable& choose(const char* wanted) {
  const KernelTable* found[5];    // what this machine can run, best first
  int count = 0;
#ifdef LINFORMER_CPU_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // The one processor with AMX that was measured, a Xeon, has half the multiply-adds a second on pairs of bf16 that it
  // has on fp32: forward at N = 4096, K = 128 in bf16 27.4 ms by pairs, 16.0 ms in fp32 (one thread, medians of 5).
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16"), slow = pairs && has_amx();
  if (slow && may_use_amx()) found[count++] = &kAmx;
  if (pairs && !slow) found[count++] = &kAvx512Bf16;
  if (avx512) found[count++] = &kAvx512;
  if (slow) found[count++] = &kAvx512Bf16;
  if (avx2) found[count++] = &kAvx2;
#endif
  found[count++] = &kGeneric;

  if (wanted == nullptr) return *found[0];
  if (std::strcmp(wanted, kEmulatedAvx512Bf16.name) == 0) return kEmulatedAvx512Bf16;
  if (std::strcmp(wanted, kEmulatedAmx.name) == 0) return kEmulatedAmx;
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(wanted, found[i]->name) == 0) return *found[i];
  }
  return *found[0];
}

thread_local const KernelTable* chosen_by_thread = nullptr;

// Where tiles are faster than vectors of the same machine: by time of both, N = 64 to 1,024, D = 8 to 80, K = 4 to 192.
// A tile is 32 x 16 and padded with zeros, and each term has to be made.
bool tiles_pay(const Problem& p) {
  if (p.dtype == DType::kBFloat16) return p.proj_dim >= 16;
  if (p.proj_dim < 64) return false;
  if (p.dtype == DType::kFloat16) return true;
  const auto padded = [](int64_t size) { return static_cast<double>((size + 31) / 32 * 32); };
  const int64_t width = p.head_dim + p.value_dim;
  const double used =
      static_cast<double>(p.proj_dim * width) / (padded(p.proj_dim) * (padded(p.head_dim) + padded(p.value_dim)));
  return used >= 0.75 && width >= 64 && p.len_q + p.len_k >= 512;
}

}    // namespace

const KernelTable& kernel_table() {
  static const KernelTable& table = choose(std::getenv("LINFORMER_CPU_CAPABILITY"));
  return chosen_by_thread ? *chosen_by_thread : table;
}

void use_capability(const char* name) { chosen_by_thread = *name ? &choose(name) : nullptr; }

const KernelTable& kernel_table_for(const Problem& problem) {
  static const bool demanded = std::getenv("LINFORMER_CPU_CAPABILITY") != nullptr;
  const KernelTable& table = kernel_table();
  const bool chosen = demanded || chosen_by_thread;    // a build that is named computes everything
  return table.without_tiles && !chosen && !tiles_pay(problem) ? *table.without_tiles : table;
}

}    // namespace linformer::cpu
