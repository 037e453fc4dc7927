// Small kernels of sm_90 that test_emulator.py runs in the emulator: clusters, TMA to several blocks at once, the two
// proxies of global memory, registers that move between warps. Each template is one right kernel, and one for each part
// that a planted bug leaves out.
#include <cstdint>

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ uint32_t rank_of_block() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ uint32_t blocks_of_cluster() {
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

__device__ uint32_t in_block(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

__device__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ void init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ void expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ void arrive_in(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(in_block(shared_address(barrier), rank))
      : "memory");
}
__device__ void wait(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// A tensor map as the emulator and the GPU's driver make it.
struct alignas(64) Map {
  uint8_t bytes[128];
};

__device__ void load(void* to, const Map& map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
__device__ void load_to_all(void* to, const Map& map, int column, int row, uint64_t* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// y = x, each block's part through the shared memory of its neighbour in the cluster.
template <bool kArrives, bool kStays>
__device__ void turn(const float* x, float* y) {
  __shared__ float part[64];
  const uint32_t rank = rank_of_block(), blocks = blocks_of_cluster();
  part[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  if (kArrives) sync_cluster();
  const uint32_t next = (rank + 1) % blocks;
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];"
               : "=f"(value)
               : "r"(in_block(shared_address(&part[threadIdx.x]), next))
               : "memory");
  y[(blockIdx.x - rank + next) * 64 + threadIdx.x] = value;
  if (kStays) sync_cluster();
}
extern "C" __global__ void turn_right(const float* x, float* y) { turn<true, true>(x, y); }
extern "C" __global__ void __cluster_dims__(2) turn_right_by_two(const float* x, float* y) { turn<true, true>(x, y); }
extern "C" __global__ void turn_without_sync(const float* x, float* y) { turn<false, true>(x, y); }
extern "C" __global__ void turn_and_leave(const float* x, float* y) { turn<true, false>(x, y); }

// Block 0 writes into block 1, then arrives at an mbarrier there; block 1 waits and copies.
template <bool kSyncs, bool kWaits>
__device__ void send(const float* x, float* y) {
  __shared__ float part[32];
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) init(&barrier, 32);
  if (kSyncs) sync_cluster();
  if (rank_of_block() == 0) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(in_block(shared_address(&part[threadIdx.x]), 1)),
                 "f"(x[threadIdx.x])
                 : "memory");
    arrive_in(&barrier, 1);
  } else {
    if (kWaits) wait(&barrier, 0);
    y[threadIdx.x] = part[31 - threadIdx.x];
  }
}
extern "C" __global__ void __cluster_dims__(2) send_right(const float* x, float* y) { send<true, true>(x, y); }
extern "C" __global__ void __cluster_dims__(2) send_without_sync(const float* x, float* y) { send<false, true>(x, y); }
extern "C" __global__ void __cluster_dims__(2) send_without_wait(const float* x, float* y) { send<true, false>(x, y); }

extern "C" __global__ void __cluster_dims__(2) arrive_twice(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;");
}

// An address of another block, used as if it were one's own.
extern "C" __global__ void __cluster_dims__(2) read_as_own(float* y) {
  __shared__ float part[32];
  part[threadIdx.x] = 1;
  sync_cluster();
  float value;
  asm volatile("ld.shared.f32 %0, [%1];"
               : "=f"(value)
               : "r"(in_block(shared_address(&part[threadIdx.x]), 1))
               : "memory");
  y[threadIdx.x] = value;
  sync_cluster();
}

// Column sums of x (rows x 32), in every block of the cluster: tiles of 16 rows, of which each block fetches a half for
// both. `full` counts bytes, `empty` the warps of both blocks that have done with the tile.
template <bool kBoth, bool kAll>
__device__ void sum_columns(const Map& map, float* sums, int rows) {
  __shared__ alignas(128) float tile[16][32];
  __shared__ uint64_t full, empty;
  const uint32_t rank = rank_of_block();
  if (threadIdx.x == 0) {
    init(&full, 1);
    init(&empty, kBoth ? 2 : 1);
  }
  sync_cluster();
  float sum = 0;
  for (int step = 0; step < rows / 16; step++) {
    if (threadIdx.x == 0) {
      if (step) wait(&empty, (step - 1) & 1);
      expect(&full, kAll ? sizeof tile : sizeof tile / 2);
      load_to_all(tile[8 * rank], map, 0, 16 * step + 8 * rank, &full, 3);
    }
    __syncwarp();
    wait(&full, step & 1);
    for (int i = 0; i < 16; i++) sum += tile[i][threadIdx.x];
    __syncwarp();
    if (threadIdx.x == 0) {
      for (uint32_t block = 0; block < 2; block++) {
        if (kBoth || block == rank) arrive_in(&empty, block);
      }
    }
  }
  sync_cluster();
  sums[blockIdx.x * 32 + threadIdx.x] = sum;
}
extern "C" __global__ void __cluster_dims__(2)
    sum_columns_right(const __grid_constant__ Map map, float* sums, int rows) {
  sum_columns<true, true>(map, sums, rows);
}
extern "C" __global__ void __cluster_dims__(2)
    sum_columns_of_own(const __grid_constant__ Map map, float* sums, int rows) {
  sum_columns<false, true>(map, sums, rows);
}
extern "C" __global__ void __cluster_dims__(2)
    sum_columns_of_half(const __grid_constant__ Map map, float* sums, int rows) {
  sum_columns<true, false>(map, sums, rows);
}

// Block 0 writes x + 1 to `between`, 8 x 32, by its threads or by TMA, and sets a flag; block 1 fetches that by TMA and
// writes y.
enum Wait { kWaitRead, kWaitAll };
template <bool kByTma, Wait kWait, bool kWriterFences, bool kReaderFences>
__device__ void pass_on(const float* x, const Map& map, float* between, int* flag, float* y) {
  __shared__ alignas(128) float tile[8][32];
  __shared__ uint64_t full;
  if (blockIdx.x == 0) {
    for (int i = 0; i < 8; i++) {
      (kByTma ? tile[i] : between + 32 * i)[threadIdx.x] = x[32 * i + threadIdx.x] + 1;
    }
    if (kByTma) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (kWriterFences) asm volatile("fence.proxy.async.global;" ::: "memory");
    __syncwarp();
    if (threadIdx.x == 0) {
      if (kByTma) {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %1}], [%2];" ::"l"(&map),
                     "r"(0), "r"(shared_address(tile))
                     : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        if (kWait == kWaitRead) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        if (kWait == kWaitAll) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
      }
      asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(flag) : "memory");
    }
  } else {
    if (threadIdx.x == 0) {
      init(&full, 1);
      int done = 0;
      while (!done) asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(done) : "l"(flag) : "memory");
      if (kReaderFences) asm volatile("fence.proxy.async;" ::: "memory");
      expect(&full, sizeof tile);
      load(tile, map, 0, 0, &full);
    }
    __syncwarp();
    wait(&full, 0);
    for (int i = 0; i < 8; i++) y[32 * i + threadIdx.x] = tile[i][threadIdx.x];
  }
}
#define PASS_ON(name, ...)                                                                                    \
  extern "C" __global__ void name(const float* x, const __grid_constant__ Map map, float* between, int* flag, \
                                  float* y) {                                                                 \
    pass_on<__VA_ARGS__>(x, map, between, flag, y);                                                           \
  }
PASS_ON(pass_on_fenced_by_reader, false, kWaitAll, false, true)
PASS_ON(pass_on_fenced_by_writer, false, kWaitAll, true, false)
PASS_ON(pass_on_unfenced, false, kWaitAll, false, false)
PASS_ON(pass_on_by_tma, true, kWaitAll, false, true)
PASS_ON(pass_on_tma_unfenced, true, kWaitAll, false, false)
PASS_ON(pass_on_tma_half_waited, true, kWaitRead, false, true)

// Three warpgroups: the first gives registers, the others take them; then each counts.
template <int kGiven, int kTaken>
__device__ void share_registers(int* y) {
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kGiven));
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kTaken));
  }
  y[threadIdx.x] = threadIdx.x;
}
extern "C" __global__ void __launch_bounds__(384, 1) share_registers_right(int* y) { share_registers<24, 240>(y); }
extern "C" __global__ void __launch_bounds__(384, 1) share_too_many(int* y) { share_registers<32, 240>(y); }
extern "C" __global__ void __launch_bounds__(384, 1) share_downwards(int* y) { share_registers<24, 160>(y); }
extern "C" __global__ void __launch_bounds__(384, 1) share_in_one_warp(int* y) {
  if (threadIdx.x < 32) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
  y[threadIdx.x] = threadIdx.x;
}
