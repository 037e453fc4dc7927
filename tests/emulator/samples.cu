// Small kernels that test_emulator.py runs in the emulator: right ones first, then ones with a planted bug each.
#include <cassert>
#include <cstdint>

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

extern "C" __global__ void saxpy(const float* x, float* y, float a, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + y[i];
}

// Sums within a warp by shuffles, within the block through shared memory, over the grid by an atomic.
extern "C" __global__ void sum(const float* x, float* total, int n) {
  __shared__ float partial[32];
  float value = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) value += x[i];
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < blockDim.x / 32; i++) value += partial[i];
    atomicAdd(total, value);
  }
}

// C = A B in bf16 with fp32 sums: tiles of 64 x 64, steps of 32, double-buffered by cp.async; 4 warps of 32 x 32 each.
constexpr int kTile = 64, kStep = 32, kThreads = 128;
constexpr int kStrideA = kStep + 8, kStrideB = kTile + 8;    // 16 bytes of padding

__device__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

template <bool kWaits, bool kSyncs>
__device__ void matmul(const uint16_t* a, const uint16_t* b, float* c, int n, int k) {
  __shared__ alignas(16) uint16_t a_tile[2][kTile * kStrideA];
  __shared__ alignas(16) uint16_t b_tile[2][kStep * kStrideB];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = blockIdx.y * kTile, column = blockIdx.x * kTile;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  float sums[2][4][4] = {};

  auto fetch = [&](int step) {
    if (step * kStep < k) {
      for (int i = threadIdx.x; i < kTile * kStep / 8; i += kThreads) {
        const int r = i / (kStep / 8), piece = i % (kStep / 8) * 8;
        copy16(&a_tile[step % 2][r * kStrideA + piece], a + static_cast<size_t>(row + r) * k + step * kStep + piece);
      }
      for (int i = threadIdx.x; i < kTile * kStep / 8; i += kThreads) {
        const int r = i / (kTile / 8), piece = i % (kTile / 8) * 8;
        copy16(&b_tile[step % 2][r * kStrideB + piece], b + static_cast<size_t>(step * kStep + r) * n + column + piece);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  fetch(0);
  for (int step = 0; step * kStep < k; step++) {
    fetch(step + 1);
    if (kWaits) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (kSyncs) __syncthreads();
    for (int inner = 0; inner < kStep; inner += 16) {
      uint32_t a_fragment[2][4], b_fragment[4][2];
      for (int i = 0; i < 2; i++) {
        const int at = (warp_row + 16 * i + lane % 16) * kStrideA + inner + lane / 16 * 8;
        uint32_t* f = a_fragment[i];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                     : "r"(shared_address(&a_tile[step % 2][at])));
      }
      for (int j = 0; j < 4; j++) {
        const int at = (inner + lane % 16) * kStrideB + warp_column + 8 * j;
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(b_fragment[j][0]), "=r"(b_fragment[j][1])
                     : "r"(shared_address(&b_tile[step % 2][at])));
      }
      for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) {
          float* s = sums[i][j];
          const uint32_t *f = a_fragment[i], *g = b_fragment[j];
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
              "{%0, %1, %2, %3};"
              : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
              : "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]), "r"(g[0]), "r"(g[1]));
        }
      }
    }
    if (kSyncs) __syncthreads();    // before the next copies overwrite what was just read
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 4; j++) {
      for (int half = 0; half < 2; half++) {
        const int r = row + warp_row + 16 * i + lane / 4 + 8 * half;
        const int q = column + warp_column + 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(&c[static_cast<size_t>(r) * n + q]) =
            make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
      }
    }
  }
}

extern "C" __global__ void matmul_bf16(const uint16_t* a, const uint16_t* b, float* c, int n, int k) {
  matmul<true, true>(a, b, c, n, k);
}

// C (16 x 8) = A (16 x K) B (K x 8) in tf32, one warp.
extern "C" __global__ void matmul_tf32(const float* a, const float* b, float* c, int k) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  float sums[4] = {};
  auto tf32 = [](float x) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return rounded;
  };
  for (int at = 0; at < k; at += 8) {
    const uint32_t a0 = tf32(a[row * k + at + column]), a1 = tf32(a[(row + 8) * k + at + column]);
    const uint32_t a2 = tf32(a[row * k + at + column + 4]), a3 = tf32(a[(row + 8) * k + at + column + 4]);
    const uint32_t b0 = tf32(b[(at + column) * 8 + row]), b1 = tf32(b[(at + column + 4) * 8 + row]);
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * 8 + column * 2 + i % 2] = sums[i];
}

// Prefix sums over the grid: blocks draw tickets, and each waits for the sum of the one before it.
extern "C" __global__ void scan(const int* x, int* out, int* ticket, int* sums, int* ready) {
  __shared__ int mine, before;
  if (threadIdx.x == 0) mine = atomicAdd(ticket, 1);
  __syncthreads();
  const int i = mine * blockDim.x + threadIdx.x;
  int value = x[i];
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffff, value, step);
    if (threadIdx.x >= step) value += other;
  }
  if (threadIdx.x == 31) {
    int done = mine == 0;
    while (!done) asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(done) : "l"(ready + mine - 1) : "memory");
    before = mine == 0 ? 0 : sums[mine - 1];
    sums[mine] = before + value;
    asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(ready + mine) : "memory");
  }
  __syncthreads();
  out[i] = before + value;
}

// Float to f16, to nearest and toward zero, and back.
extern "C" __global__ void to_half(const float* x, uint16_t* nearest, uint16_t* toward_zero, float* back, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x[i]));
  nearest[i] = h;
  asm("cvt.f32.f16 %0, %1;" : "=f"(back[i]) : "h"(h));
  asm("cvt.rz.f16.f32 %0, %1;" : "=h"(toward_zero[i]) : "f"(x[i]));
}

// What an ordinary program is made of: calls, switches, local arrays, 64-bit and floating division, bit tricks.
__device__ __noinline__ uint64_t gcd(uint64_t a, uint64_t b) {
  while (b) {
    const uint64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

extern "C" __global__ void mixed(const uint64_t* a, const uint64_t* b, const double* d, uint64_t* integers,
                                 double* reals) {
  const int i = threadIdx.x;
  uint64_t bits = 0;
  switch (a[i] % 7) {
    case 0: bits = __popcll(b[i]); break;
    case 1: bits = __clzll(b[i]); break;
    case 2: bits = __brevll(b[i]); break;
    case 3: bits = __umul64hi(a[i], b[i]); break;
    case 4: bits = __ffsll(b[i]); break;
    case 5: bits = static_cast<uint64_t>(static_cast<int64_t>(b[i]) >> (a[i] % 64)); break;
    default: bits = __byte_perm(static_cast<uint32_t>(a[i]), static_cast<uint32_t>(b[i]), 0x6240);
  }
  uint64_t local[8];
  for (int j = 0; j < 8; j++) local[j] = a[i] * j + b[i];
  integers[4 * i] = gcd(a[i], b[i]);
  integers[4 * i + 1] = bits;
  integers[4 * i + 2] = local[a[i] % 8];
  integers[4 * i + 3] = a[i] / (b[i] | 1);
  reals[2 * i] = sqrt(fabs(d[i])) / (1 + d[i] * d[i]);
  reals[2 * i + 1] = fma(d[i], d[i], 1 / d[i]);
}

extern "C" __global__ void read_strided(const float* x, float* out, int stride) {
  out[threadIdx.x] = x[threadIdx.x * stride];
}

// Reads a column of a tile of 32 x 32 whose rows are `width` floats apart.
extern "C" __global__ void read_column(const float* x, float* out, int width) {
  extern __shared__ float tile[];
  for (int row = 0; row < 32; row++) tile[row * width + threadIdx.x] = x[row * 32 + threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x * width + 5];
}

// Pointers in a struct by value.
struct Problem {
  const float* x;
  float* y;
  int n;
  float a;
};
extern "C" __global__ void scale(const Problem problem) {
  for (int i = threadIdx.x; i < problem.n; i += blockDim.x) problem.y[i] = problem.a * problem.x[i];
}

// Threads beyond n return before the barrier, the others reach it after loops of different lengths.
extern "C" __global__ void return_early(const float* x, float* y, int n) {
  __shared__ float tile[64];
  const int i = threadIdx.x;
  if (i >= n) return;
  float value = x[i];
  for (int k = 0; k < i % 7; k++) value = value * x[k] + 1;
  tile[i] = value;
  __syncthreads();
  y[i] = tile[n - 1 - i];
}

// ---- planted bugs

extern "C" __global__ void read_beyond(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }

extern "C" __global__ void write_beyond(const float* x, float* y) { y[threadIdx.x + 1] = x[threadIdx.x]; }

extern "C" __global__ void read_misaligned(const float* x, float4* y) {
  y[threadIdx.x] = *reinterpret_cast<const float4*>(x + 1 + 4 * threadIdx.x);
}

extern "C" __global__ void reverse_without_sync(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

extern "C" __global__ void read_unwritten(const float* x, float* y) {
  __shared__ float tile[64];
  if (threadIdx.x < 63) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

extern "C" __global__ void sync_in_branch(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

// One warp waits for a flag that the other would set after the barrier.
extern "C" __global__ void wait_forever(volatile int* flag, float* y) {
  if (threadIdx.x < 32) {
    while (*flag == 0) {
    }
  }
  __syncthreads();
  *flag = 1;
  y[threadIdx.x] = 1;
}

extern "C" __global__ void count_forever(unsigned* y) {
  for (unsigned i = 0; *static_cast<volatile unsigned*>(y) != 1; i++) y[1 + i % 2] = i;
}

extern "C" __global__ void fail_assertion(const float* x) { assert(x[threadIdx.x] > 0); }

extern "C" __global__ void fail_trap(const float* x) {
  if (x[threadIdx.x] <= 0) __trap();
}

extern "C" __global__ void matmul_without_wait(const uint16_t* a, const uint16_t* b, float* c, int n, int k) {
  matmul<false, true>(a, b, c, n, k);
}

extern "C" __global__ void matmul_without_sync(const uint16_t* a, const uint16_t* b, float* c, int n, int k) {
  matmul<true, false>(a, b, c, n, k);
}
