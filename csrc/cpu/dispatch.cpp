// Chooses the kernel build for this machine. LINFORMER_CPU_CAPABILITY names another one, for tests and for comparison:
// a build that the machine cannot run is never chosen.
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

#ifdef LINFORMER_CPU_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(LINFORMER_CPU_AARCH64) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace linformer::cpu {

extern const KernelTable kGeneric;
extern const KernelTable kEmulatedNeonBf16;    // the algorithm for quads of bf16 in portable code
#ifndef LINFORMER_CPU_BARE
extern const KernelTable kEmulatedAvx512Bf16;    // for pairs
extern const KernelTable kEmulatedAmx;           // and the tiles'
#endif
#ifdef LINFORMER_CPU_X86
extern const KernelTable kAvx2;
extern const KernelTable kAvx512;
extern const KernelTable kAvx512Bf16;
extern const KernelTable kAmx;
#endif
#ifdef LINFORMER_CPU_AARCH64
extern const KernelTable kNeon;
extern const KernelTable kNeonBf16;
#endif

namespace {

#ifdef LINFORMER_CPU_X86
// __builtin_cpu_supports does not know F16C in clang 14. The system keeps its registers where it keeps those of AVX2.
bool converts_halves() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);    // AMX-BF16, AMX-TILE
}

// Linux gives a process the use of tiles when it asks; before that their first instruction ends it. One request serves
// all threads, older ones too, and forked children. An old kernel or a filter of system calls may refuse: the error, or
// zero.
int request_amx() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;    // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}
#endif

#ifdef LINFORMER_CPU_AARCH64
// BFMMLA and the other instructions of FEAT_BF16; every system says so in its own way, and only Linux is asked.
bool has_neon_bf16() {
#ifdef __linux__
  constexpr unsigned long kBf16 = 1ul << 14;    // HWCAP2_BF16, which older headers do not have
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
  return false;
#endif
}
#endif

// The special instructions of a processor written out, which runs anywhere and is never chosen unasked.
const KernelTable* const kEmulated[] = {
    &kEmulatedNeonBf16,
#ifndef LINFORMER_CPU_BARE
    &kEmulatedAvx512Bf16,
    &kEmulatedAmx,
#endif
};

// Every other build, whether this machine can run it or not.
const KernelTable* const kBuilds[] = {
    &kGeneric,
#ifdef LINFORMER_CPU_X86
    &kAvx2,    &kAvx512,   &kAvx512Bf16, &kAmx,
#endif
#ifdef LINFORMER_CPU_AARCH64
    &kNeon,    &kNeonBf16,
#endif
};

// The build that was asked for; nullptr: none.
const char* wanted_build() {
  const char* wanted = std::getenv("LINFORMER_CPU_CAPABILITY");
  return wanted && *wanted ? wanted : nullptr;
}

struct Choice {
  const KernelTable* table = nullptr;
  int amx_error = 0;    // of a request that was refused

  // Nothing is asked for a build that is not about to be taken.
  bool take(const KernelTable& wanted) {
#ifdef LINFORMER_CPU_X86
    if (&wanted == &kAmx && (amx_error = request_amx()) != 0) return false;
#endif
    table = &wanted;
    return true;
  }
};

// The build of that name, or the best that this machine can run.
Choice choose(const char* wanted) {
  const KernelTable* found[5];    // what this processor can run, best first
  int count = 0;
#ifdef LINFORMER_CPU_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_halves();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // Intel's have half the multiply-adds a second on pairs of bf16 that they have on fp32, with AMX and where a virtual
  // machine hides it: forward at N = 4096, K = 128 in bf16 28.1 ms by pairs, 15.8 ms in fp32 (one thread of a Xeon of
  // the fifth generation, the least of 10; findings/pairs-of-bf16-are-slower-than-floats.sh). AMD's have twice as many.
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16"), amx = pairs && has_amx();
  const bool fast_pairs = pairs && !amx && !__builtin_cpu_is("intel");
  if (amx) found[count++] = &kAmx;
  if (fast_pairs) found[count++] = &kAvx512Bf16;
  if (avx512) found[count++] = &kAvx512;
  if (pairs && !fast_pairs) found[count++] = &kAvx512Bf16;
  if (avx2) found[count++] = &kAvx2;
#endif
#ifdef LINFORMER_CPU_AARCH64
  if (has_neon_bf16()) found[count++] = &kNeonBf16;
  found[count++] = &kNeon;    // every aarch64 has it
#endif
  found[count++] = &kGeneric;

  const auto named = [wanted](const KernelTable& table) { return wanted && std::strcmp(wanted, table.name) == 0; };
  Choice choice;
  for (const KernelTable* table : kEmulated) {
    if (named(*table) && choice.take(*table)) return choice;
  }
  for (int i = 0; i < count; ++i) {
    if (named(*found[i]) && choice.take(*found[i])) return choice;
  }
  for (int i = 0; i < count; ++i) {
    if (choice.take(*found[i])) return choice;
  }
  return choice;
}

// Of the process.
const Choice& chosen() {
  static const Choice choice = choose(wanted_build());
  return choice;
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

const KernelTable& kernel_table() { return chosen_by_thread ? *chosen_by_thread : *chosen().table; }

void use_capability(const char* name) { chosen_by_thread = *name ? choose(name).table : nullptr; }

const KernelTable& kernel_table_for(const Problem& problem, unsigned stages) {
  static const bool demanded = wanted_build() != nullptr;
  const KernelTable& table = kernel_table();
  if (table.without_tiles && (stages & (kPool | kPoolBackward))) return *table.without_tiles;
  const bool named = demanded || chosen_by_thread;    // a build that is named computes everything
  return table.without_tiles && !named && !tiles_pay(problem) ? *table.without_tiles : table;
}

std::string amx_refusal() { return chosen().amx_error ? std::strerror(chosen().amx_error) : ""; }

const char* capability_problem() {
  static const std::string problem = [] {
    const char* wanted = wanted_build();
    std::string names;
    const auto known = [&](const KernelTable& build) {
      names += (names.empty() ? "\"" : ", \"") + std::string(build.name) + "\"";
      return wanted == nullptr || std::strcmp(wanted, build.name) == 0;
    };
    for (const KernelTable* build : kBuilds) {
      if (known(*build)) return std::string();
    }
    for (const KernelTable* build : kEmulated) {
      if (known(*build)) return std::string();
    }
    return "environment variable LINFORMER_CPU_CAPABILITY is '" + std::string(wanted) + "'; wanted: one of " + names +
           ", or none, for what suits this machine";
  }();
  return problem.empty() ? nullptr : problem.c_str();
}

}    // namespace linformer::cpu
