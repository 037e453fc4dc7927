// Instructions of compute capability 9.0 that CUDA C++ has no words for: mbarriers, tiled copies, clusters, and
// products of warpgroups.
//
// A warpgroup is four warps; a product has 64 rows, of which warp w has 16 w to 16 w + 15, in the fragments of C that
// device.cuh describes. B comes from shared memory, A too or from registers. Both lie in rows of 128 bytes, whose
// 16-byte pieces are exchanged by the row's place among eight (the 128-byte swizzle), in blocks aligned to 1024 bytes.
#pragma once

#include "device.cuh"
#include "hopper.h"

namespace linformer::cuda {

LINFORMER_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster; what they wrote to shared memory before is seen behind it.
LINFORMER_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Threads of one warpgroup.
LINFORMER_DEVICE void sync_warpgroup(int barrier) { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }

LINFORMER_DEVICE void init_barrier(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
LINFORMER_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

LINFORMER_DEVICE void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
LINFORMER_DEVICE void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
LINFORMER_DEVICE void arrive_in(uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Until the phase of this parity is over. Arrivals may have come from the other CTA of a cluster.
LINFORMER_DEVICE void wait_barrier(uint32_t barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// A box of the map, which begins at these places, innermost first; the barrier counts its bytes. What lies outside the
// tensor is zero.
LINFORMER_DEVICE void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int at, int row, int head, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(&map), "r"(at), "r"(row), "r"(head), "r"(b), "r"(barrier)
      : "memory");
}
// The same into both CTAs of the cluster, to the same place, and for the barrier at the same place.
LINFORMER_DEVICE void load_box_for_both(uint32_t to, const TensorMap& map, uint32_t barrier, int at, int row,
                                        int head) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(&map), "r"(at), "r"(row), "r"(head), "r"(0), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}
// What lies outside the tensor is not written.
LINFORMER_DEVICE void store_box(const TensorMap& map, uint32_t from, int at, int row, int head, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(at), "r"(row), "r"(head), "r"(b), "r"(from)
      : "memory");
}
// Until the stores of this thread have read shared memory.
LINFORMER_DEVICE void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Between writes of threads and what tensor cores or copies read.
LINFORMER_DEVICE void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

template <int kRegisters>
LINFORMER_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
LINFORMER_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Of the launch behind this one, and of the launch before it, if they may overlap.
LINFORMER_DEVICE void let_next_launch_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
LINFORMER_DEVICE void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

LINFORMER_DEVICE void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// The operand in shared memory that begins at `address`. Groups of eight rows are adjacent; `apart`: bytes between
// blocks of 64 columns, where the columns are those of C.
LINFORMER_DEVICE uint64_t operand_at(uint32_t address, uint32_t apart = 16) {
  constexpr uint64_t kGroup = 8 * kHopperRowBytes;
  return static_cast<uint64_t>(1) << 62 | kGroup >> 4 << 32 | static_cast<uint64_t>(apart >> 4) << 16 |
         (address & 0x3ffff) >> 4;
}

LINFORMER_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LINFORMER_DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
LINFORMER_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define LINFORMER_SUMS_32                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LINFORMER_SUMS_64                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LINFORMER_SUMS_128                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// The sums as operands: read and written, or only written, which spares clearing them.
#define LINFORMER_C1(mode, i) mode(c[i][0]), mode(c[i][1]), mode(c[i][2]), mode(c[i][3])
#define LINFORMER_C4(mode, i) \
  LINFORMER_C1(mode, i), LINFORMER_C1(mode, i + 1), LINFORMER_C1(mode, i + 2), LINFORMER_C1(mode, i + 3)
#define LINFORMER_C8(mode) LINFORMER_C4(mode, 0), LINFORMER_C4(mode, 4)
#define LINFORMER_C16(mode) LINFORMER_C8(mode), LINFORMER_C4(mode, 8), LINFORMER_C4(mode, 12)
#define LINFORMER_C32(mode) \
  LINFORMER_C16(mode), LINFORMER_C4(mode, 16), LINFORMER_C4(mode, 20), LINFORMER_C4(mode, 24), LINFORMER_C4(mode, 28)

// `turned` is 1 where B has the columns of C adjacent, 0 where it has the summed values.
#define LINFORMER_WGMMA_AS(type, adds, mode, columns, tiles, sums, a, b, turns, ...)                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
               "k16.f32." type "." type " {" sums "}, " a ", " b ", p, 1, 1, " turns ";\n}"               \
               : tiles(mode)                                                                              \
               : __VA_ARGS__)
#define LINFORMER_WGMMA(added, ...)                       \
  if constexpr (kType == DType::kFloat16 && kAdds) {      \
    LINFORMER_WGMMA_AS("f16", added, "+f", __VA_ARGS__);  \
  } else if constexpr (kType == DType::kFloat16) {        \
    LINFORMER_WGMMA_AS("f16", "0", "=f", __VA_ARGS__);    \
  } else if constexpr (kAdds) {                           \
    LINFORMER_WGMMA_AS("bf16", added, "+f", __VA_ARGS__); \
  } else {                                                \
    LINFORMER_WGMMA_AS("bf16", "0", "=f", __VA_ARGS__);   \
  }

// C (64 x 64 or 128) = A (64 x 16) B, or C += A B where it `adds`; B has the columns of C adjacent.
template <DType kType>
LINFORMER_DEVICE void multiply_turned(float (&c)[8][4], uint64_t left, uint64_t right, int adds) {
  constexpr bool kAdds = true;
  LINFORMER_WGMMA("%34", "64", LINFORMER_C8, LINFORMER_SUMS_32, "%32", "%33", "0, 1", "l"(left), "l"(right), "r"(adds));
}
template <DType kType>
LINFORMER_DEVICE void multiply_turned(float (&c)[16][4], uint64_t left, uint64_t right, int adds) {
  constexpr bool kAdds = true;
  LINFORMER_WGMMA("%66", "128", LINFORMER_C16, LINFORMER_SUMS_64, "%64", "%65", "0, 1", "l"(left), "l"(right),
                  "r"(adds));
}

// C (64 x 128 or 256) += A (64 x 16) B; B has the summed values adjacent. Without kAdds C = A B, here and below.
template <DType kType, bool kAdds>
LINFORMER_DEVICE void multiply_along(float (&c)[16][4], uint64_t left, uint64_t right) {
  LINFORMER_WGMMA("1", "128", LINFORMER_C16, LINFORMER_SUMS_64, "%64", "%65", "0, 0", "l"(left), "l"(right));
}
template <DType kType, bool kAdds>
LINFORMER_DEVICE void multiply_along(float (&c)[32][4], uint64_t left, uint64_t right) {
  LINFORMER_WGMMA("1", "256", LINFORMER_C32, LINFORMER_SUMS_128, "%128", "%129", "0, 0", "l"(left), "l"(right));
}

// C (64 x 64 or 128) += A (64 x 16, in registers) B; B has the columns of C adjacent.
template <DType kType, bool kAdds>
LINFORMER_DEVICE void multiply_turned(float (&c)[8][4], const uint32_t (&left)[4], uint64_t right) {
  LINFORMER_WGMMA("1", "64", LINFORMER_C8, LINFORMER_SUMS_32, "{%32, %33, %34, %35}", "%36", "1", "r"(left[0]),
                  "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right));
}

template <DType kType, bool kAdds>
LINFORMER_DEVICE void multiply_turned(float (&c)[16][4], const uint32_t (&left)[4], uint64_t right) {
  LINFORMER_WGMMA("1", "128", LINFORMER_C16, LINFORMER_SUMS_64, "{%64, %65, %66, %67}", "%68", "1", "r"(left[0]),
                  "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right));
}

}    // namespace linformer::cuda
