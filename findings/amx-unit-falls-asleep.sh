#!/usr/bin/env bash
# The unit that multiplies AMX tiles falls asleep after a third of a microsecond without a product.
#
# Where: x86 processors with AMX (seen: a Xeon of the fifth generation, model 207 stepping 2, Linux 6, as a guest of KVM).
# Compiled by clang 18 of the package ziglang 0.13.0.
#
# What one would guess: tdpbf16ps takes 16 cycles and follows on other code without delay, as vector instructions do; what
# slows code that mixes tiles and vectors is the clock or the ports that both use.
#
# What happens: 16 products that follow on other products, or on up to some 240 ns of other code, take the time that they
# should. After 600 ns without a product, whether of 512-bit vectors or of scalar code, the first one waits: the same 16
# take about 290 ns more. One product without a purpose every 100 ns removes the wait. Attention does tens of vectors of
# exp2 between two products of tiles, which is such a gap, and each tile of queries has two.
#
# Output seen:
#   16 products after products 179 ns, after 600 ns of scalar code 473 ns, of vectors 468 ns, of vectors with a product
#   every 100 ns 177 ns
#
# Exits 0 where the wait is there, 1 where it is not, 2 where it cannot be seen (no AMX, or a machine that is too busy).
set -euo pipefail
grep -q amx_bf16 /proc/cpuinfo || { echo 'no AMX here'; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" ziglang==0.13.0
cat > "$folder/sleep.c" <<'C'
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef float Vector __attribute__((vector_size(64)));
static struct { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } __attribute__((aligned(64))) tiles;
static Vector sink[8];

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e9 * t.tv_sec + t.tv_nsec;
}
static void products(int count) {
  for (int i = 0; i < count; i += 4) {
    __asm__ volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
                     "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::);
  }
}
static void vectors(double until, int awake) {
  double next = now() + 100;
  while (now() < until) {
    for (int i = 0; i < 8; ++i) sink[i] = sink[i] * sink[i] + sink[i];
    if (awake && now() > next) { __asm__ volatile("tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::); next += 100; }
  }
}
static void scalars(double until) { while (now() < until) {} }
static int by_size(const void *a, const void *b) { return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b); }

static double best(int kind) {    // the lower quartile of many
  enum { kRuns = 20001 };
  static double time[kRuns];
  char store[1024] __attribute__((aligned(64)));
  for (int i = 0; i < kRuns; ++i) {
    products(16);
    const double until = now() + 600;
    if (kind == 1) scalars(until);
    if (kind == 2) vectors(until, 0);
    if (kind == 3) vectors(until, 1);
    const double start = now();
    products(16);
    __asm__ volatile("tilestored %%tmm3, (%0,%1,1)" : : "r"(store), "r"(64l) : "memory");    // waits for them
    time[i] = now() - start;
  }
  qsort(time, kRuns, sizeof *time, by_size);
  return time[kRuns / 4];
}

int main(void) {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) { puts("the system refuses AMX"); return 2; }
  tiles.palette = 1;
  for (int i = 0; i < 8; ++i) { tiles.bytes[i] = 64; tiles.rows[i] = 16; }
  __asm__ volatile("ldtilecfg %0" : : "m"(tiles));
  for (int i = 0; i < 8; ++i) sink[i] += 0.5f;
  const double warm = best(0), scalar = best(1), vector = best(2), awake = best(3);
  __asm__ volatile("tilerelease" ::);
  printf("16 products after products %.0f ns, after 600 ns of scalar code %.0f ns, of vectors %.0f ns, of vectors with a "
         "product every 100 ns %.0f ns\n", warm, scalar, vector, awake);
  if (warm > 600) { puts("too busy to tell"); return 2; }
  return scalar > warm + 150 && vector > warm + 150 && awake < warm + 75 ? 0 : 1;
}
C
PYTHONPATH="$folder" python3 -m ziglang cc -target x86_64-linux-gnu -mcpu=sapphirerapids -O2 -o "$folder/sleep" "$folder/sleep.c"
"$folder/sleep"
