#!/usr/bin/env bash
# vdpbf16ps, two products of bf16 in each lane, does fewer multiply-adds a second on Intel's processors than fp32 does.
#
# Where: x86 processors of Intel with AVX-512 and its bf16 (seen: a Xeon of the fifth generation, model 207 stepping 2,
# Linux 6, as a guest of KVM). Compiled by clang 18 of the package ziglang 0.13.0.
#
# What one would guess: twice the multiply-adds in one instruction is twice the rate, as on AMD's Zen 4; so libraries take
# bf16 in pairs wherever the processor says that it has avx512_bf16.
#
# What happens: the instruction starts on one port of two, every other cycle, and vfmadd231ps on both in every cycle. With
# 12 sums that do not wait for each other bf16 has half the multiply-adds of fp32. What is fast for bf16 there is AMX
# alone; where that is missing or a virtual machine hides it, converting to fp32 pays.
#
# Output seen:
#   GenuineIntel: fp32 88 multiply-adds a nanosecond, bf16 in pairs 44, 0.50 of it
#
# Exits 0 where that is so, 1 where pairs are no slower, 2 where it cannot be seen (no avx512_bf16, or another vendor).
set -euo pipefail
grep -q avx512_bf16 /proc/cpuinfo || { echo 'no avx512_bf16 here'; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" ziglang==0.13.0
cat > "$folder/rate.c" <<'C'
#include <immintrin.h>
#include <stdio.h>
#include <time.h>

enum { kSums = 12, kSteps = 2000000 };
static double now(void) {    // of this thread: a neighbor's time does not count
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return 1e9 * t.tv_sec + t.tv_nsec;
}
static __m512 kept;
static double rate(int pairs) {    // multiply-adds a nanosecond
  __m512 sum[kSums], one = _mm512_set1_ps(1.0f);
  for (int i = 0; i < kSums; ++i) sum[i] = _mm512_setzero_ps();
  __asm__ volatile("" : "+v"(one));
  const double begin = now();
  for (int step = 0; step < kSteps; ++step) {
#pragma clang loop unroll(full)
    for (int i = 0; i < kSums; ++i) {
      if (pairs) {
        __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(sum[i]) : "v"(one));
      } else {
        __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(sum[i]) : "v"(one));
      }
    }
  }
  const double time = now() - begin;
  for (int i = 0; i < kSums; ++i) kept += sum[i];
  return (pairs ? 32.0 : 16.0) * kSums * kSteps / time;
}
int main(void) {
  double floats = 0, pairs = 0;
  for (int run = 0; run < 15; ++run) {    // the best of each, in turn
    double one = rate(0);
    floats = one > floats ? one : floats;
    one = rate(1);
    pairs = one > pairs ? one : pairs;
  }
  printf("fp32 %.0f multiply-adds a nanosecond, bf16 in pairs %.0f, %.2f of it\n", floats, pairs, pairs / floats);
  return pairs < 0.9 * floats ? 0 : 1;
}
C
PYTHONPATH="$folder" python3 -m ziglang cc -O2 -target x86_64-linux-gnu -mcpu=x86_64_v4+avx512bf16 "$folder/rate.c" -o "$folder/rate"
vendor=$(sed -n 's/^vendor_id\s*: //p' /proc/cpuinfo | head -1)
printf '%s: ' "$vendor"
code=0
"$folder/rate" || code=$?
[ "$vendor" = GenuineIntel ] || exit 2
exit $code
