// Instructions that CUDA C++ has no words for, and what this project needs to know of the types: fragments of the
// tensor cores, asynchronous copies, and the acquire and release of counters between CTAs.
//
// Fragments. In one step of the summed dimension a thread holds, with g = lane / 4 and t = lane % 4,
//   16 bits, m16n8k16: A rows g, g + 8 and summed 2t, 2t + 1, 2t + 8, 2t + 9; B the same summed ones of column g
//   fp32, m16n8k8: A rows g, g + 8 and summed 2t, 2t + 1; B the same of column g. The instruction names them t and t +
//   4:
//     a sum may take its terms in any order, and neighbours are one 64-bit load.
//   C: rows g, g + 8 and columns 2t, 2t + 1
// So in both a thread's part of C, rounded to the type, is its part of A of a following product.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../problem.h"
#include "traits.h"

namespace linformer::cuda {

#define LINFORMER_DEVICE __device__ __forceinline__

// How fp32 is multiplied where TF32 is allowed: a type of products, which no tensor has. Loops of products have a copy
// for it, chosen by a branch before the loop, not in it.
constexpr DType kTf32{3};
template <DType kType>
constexpr bool kWide = kType == DType::kFloat32 || kType == kTf32;

template <DType kType>
struct ElementOf {
  using type = std::conditional_t<kWide<kType>, float, uint16_t>;
};
template <DType kType>
using Element = typename ElementOf<kType>::type;
template <DType kType>
using BitsOf = std::conditional_t<kWide<kType>, uint32_t, uint16_t>;

// x, but the compiler does not know: what depends on it is computed again, and was not held in registers that the code
// before needed.
LINFORMER_DEVICE int again(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class T>
LINFORMER_DEVICE T* again(T* x) {
  asm volatile("" : "+l"(x));
  return x;
}

LINFORMER_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// body(0), ..., body(kCount - 1), whose arguments are constants of the compiler: offsets that become part of an
// instruction.
template <int kValue>
struct Constant {
  LINFORMER_DEVICE constexpr operator int() const { return kValue; }
};
template <class Body, int... kAt>
LINFORMER_DEVICE void repeat(const Body& body, std::integer_sequence<int, kAt...>) {
  (body(Constant<kAt>()), ...);
}
template <int kCount, class Body>
LINFORMER_DEVICE void repeat(const Body& body) {
  repeat(body, std::make_integer_sequence<int, kCount>());
}

// 16 bytes to kOffset bytes behind `shared`; of the second one the first `bytes` are read and the others are zero.
template <int kOffset>
LINFORMER_DEVICE void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1], 16;" ::"r"(shared), "l"(global), "n"(kOffset) : "memory");
}
template <int kOffset>
LINFORMER_DEVICE void copy_async(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1], 16, %3;" ::"r"(shared), "l"(global), "n"(kOffset), "r"(bytes)
               : "memory");
}
template <int kOffset>
LINFORMER_DEVICE void store_shared(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(shared), "n"(kOffset), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
LINFORMER_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
LINFORMER_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

LINFORMER_DEVICE uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

LINFORMER_DEVICE uint32_t add_acquire_release(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

LINFORMER_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <DType kType>
LINFORMER_DEVICE uint32_t pack(float low, float high) {
  if constexpr (kType == DType::kFloat16) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

template <DType kType>
LINFORMER_DEVICE Element<kType> rounded(float value) {
  if constexpr (kType == DType::kFloat32) {
    return value;
  } else {
    return static_cast<uint16_t>(pack<kType>(value, 0.0f));
  }
}

LINFORMER_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Registers of an operand. fp32 is split in two TF32 numbers, which keep 22 of its 24 bits together, or rounded to one.
template <DType kType, int kRegisters>
struct Fragment {
  uint32_t high[kRegisters];
};
template <int kRegisters>
struct Fragment<DType::kFloat32, kRegisters> {
  uint32_t high[kRegisters], low[kRegisters];

  LINFORMER_DEVICE void set(int i, float value) {
    high[i] = to_tf32(value);
    const float rest = value - __uint_as_float(high[i]);
    low[i] = to_tf32(rest);
  }
};
template <int kRegisters>
struct Fragment<kTf32, kRegisters> {
  uint32_t high[kRegisters];

  LINFORMER_DEVICE void set(int i, float value) { high[i] = to_tf32(value); }
};
template <DType kType>
using FragmentA = Fragment<kType, 4>;
template <DType kType>
using FragmentB = Fragment<kType, 4>;    // two tiles of 8 columns

template <DType kType>
struct Step {
  static constexpr int kSummed = kWide<kType> ? 8 : 16;
};

// From kOffset bytes behind `address`.
template <int kOffset>
LINFORMER_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address), "n"(kOffset)
               : "memory");
}
template <int kOffset>
LINFORMER_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address), "n"(kOffset)
               : "memory");
}

LINFORMER_DEVICE int lane_id() { return threadIdx.x % 32; }
LINFORMER_DEVICE int warp_id() { return threadIdx.x / 32; }

// A in shared memory as a lane sees it: whatever it reads stands at a constant distance from one address.
// (row, summed) is at row * kPitch + summed, or kAcross at summed * kPitch + row.
template <DType kType, bool kAcross, int kPitch>
struct OperandA {
  const Element<kType>* at;

  LINFORMER_DEVICE explicit OperandA(const Element<kType>* tile) {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    if constexpr (kWide<kType>) {
      at = tile + (kAcross ? 2 * t * kPitch + g : g * kPitch + 2 * t);
    } else {
      at = tile +
           (kAcross ? (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8 : lane % 16 * kPitch + lane / 16 * 8);
    }
  }

  // 16 rows from kRow, one step from kSummed.
  template <int kRow, int kSummed>
  LINFORMER_DEVICE void load(FragmentA<kType>& a) const {
    constexpr int kFrom = kAcross ? kSummed * kPitch + kRow : kRow * kPitch + kSummed;
    if constexpr (kWide<kType> && kAcross) {
      a.set(0, at[kFrom]);
      a.set(1, at[kFrom + 8]);
      a.set(2, at[kFrom + kPitch]);
      a.set(3, at[kFrom + kPitch + 8]);
    } else if constexpr (kWide<kType>) {
      const float2 upper = *reinterpret_cast<const float2*>(at + kFrom);
      const float2 lower = *reinterpret_cast<const float2*>(at + kFrom + 8 * kPitch);
      a.set(0, upper.x);
      a.set(1, lower.x);
      a.set(2, upper.y);
      a.set(3, lower.y);
    } else if constexpr (kAcross) {
      load_matrices_transposed<2 * kFrom>(a.high, shared_address(at));
    } else {
      load_matrices<2 * kFrom>(a.high, shared_address(at));
    }
  }
};

// The same of B: (summed, column) is at column * kPitch + summed, or kAcross at summed * kPitch + column.
template <DType kType, bool kAcross, int kPitch>
struct OperandB {
  const Element<kType>* at;

  LINFORMER_DEVICE explicit OperandB(const Element<kType>* tile) {
    // Wide heads leave no registers to hold what depends on the lane.
    const int lane = kPitch > 256 ? again(lane_id()) : lane_id(), g = lane / 4, t = lane % 4;
    if constexpr (kWide<kType>) {
      at = tile + (kAcross ? 2 * t * kPitch + g : g * kPitch + 2 * t);
    } else {
      at = tile +
           (kAcross ? lane % 16 * kPitch + lane / 16 * 8 : (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8);
    }
  }

  // 16 columns from kColumn, one step from kSummed.
  template <int kColumn, int kSummed>
  LINFORMER_DEVICE void load(FragmentB<kType>& b) const {
    constexpr int kFrom = kAcross ? kSummed * kPitch + kColumn : kColumn * kPitch + kSummed;
    if constexpr (kWide<kType>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kAcross) {
          b.set(2 * i, at[kFrom + 8 * i]);
          b.set(2 * i + 1, at[kFrom + kPitch + 8 * i]);
        } else {
          const float2 pair = *reinterpret_cast<const float2*>(at + kFrom + 8 * i * kPitch);
          b.set(2 * i, pair.x);
          b.set(2 * i + 1, pair.y);
        }
      }
    } else if constexpr (kAcross) {
      load_matrices_transposed<2 * kFrom>(b.high, shared_address(at));
    } else {
      load_matrices<2 * kFrom>(b.high, shared_address(at));
    }
  }
};

// c += a b, or with kFresh c = a b.
template <bool kFresh>
LINFORMER_DEVICE void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const float from[4] = {kFresh ? 0.0f : c[0], kFresh ? 0.0f : c[1], kFresh ? 0.0f : c[2], kFresh ? 0.0f : c[3]};
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
      "%12, %13};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(from[0]), "f"(from[1]), "f"(from[2]),
        "f"(from[3]));
}

// c += a b for tile `i` of the two in b, or with kFresh c = a b. kTurned: in the order that gives the bits of b^T a^T.
template <DType kType, bool kTurned = false, bool kFresh = false>
LINFORMER_DEVICE void multiply(float (&c)[4], const FragmentA<kType>& a, const FragmentB<kType>& b, int i) {
  if constexpr (kWide<kType>) {
    if constexpr (kType == DType::kFloat32) {
      if constexpr (kTurned) multiply_tf32<kFresh>(c, a.high, b.low[2 * i], b.low[2 * i + 1]);
      multiply_tf32<kFresh && !kTurned>(c, a.low, b.high[2 * i], b.high[2 * i + 1]);
      if constexpr (!kTurned) multiply_tf32<false>(c, a.high, b.low[2 * i], b.low[2 * i + 1]);
      multiply_tf32<false>(c, a.high, b.high[2 * i], b.high[2 * i + 1]);
    } else {
      multiply_tf32<kFresh>(c, a.high, b.high[2 * i], b.high[2 * i + 1]);
    }
  } else {
    const float from[4] = {kFresh ? 0.0f : c[0], kFresh ? 0.0f : c[1], kFresh ? 0.0f : c[2], kFresh ? 0.0f : c[3]};
#define LINFORMER_MULTIPLY(type)                                                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                        \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                                    \
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                                                              \
      : "r"(a.high[0]), "r"(a.high[1]), "r"(a.high[2]), "r"(a.high[3]), "r"(b.high[2 * i]), "r"(b.high[2 * i + 1]), \
        "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]))
    if constexpr (kType == DType::kFloat16) {
      LINFORMER_MULTIPLY("f16");
    } else {
      LINFORMER_MULTIPLY("bf16");
    }
#undef LINFORMER_MULTIPLY
  }
}

// Step `s` of A from neighbouring tiles of C, rounded to the type.
template <DType kType, int kTiles>
LINFORMER_DEVICE void as_a(FragmentA<kType>& a, const float (&c)[kTiles][4], int s) {
  if constexpr (kWide<kType>) {
    a.set(0, c[s][0]);
    a.set(1, c[s][2]);
    a.set(2, c[s][1]);
    a.set(3, c[s][3]);
  } else {
    a.high[0] = pack<kType>(c[2 * s][0], c[2 * s][1]);
    a.high[1] = pack<kType>(c[2 * s][2], c[2 * s][3]);
    a.high[2] = pack<kType>(c[2 * s + 1][0], c[2 * s + 1][1]);
    a.high[3] = pack<kType>(c[2 * s + 1][2], c[2 * s + 1][3]);
  }
}

template <int kTiles>
LINFORMER_DEVICE void clear(float (&c)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[i][e] = 0.0f;
  }
}

}    // namespace linformer::cuda
