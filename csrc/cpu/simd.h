// Vectors of LINFORMER_CPU_WIDTH floats in GCC/Clang vector extensions, the 16-bit types, and exp2.
//
// Everything here and in the files that include it has internal linkage: the same sources are compiled once for each
// instruction set, and a shared inline symbol would let the linker hand AVX-512 code to a machine without it. For the
// same reason these files use no function templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif LINFORMER_CPU_NEON
#include <arm_neon.h>
#endif

#define LINFORMER_INLINE inline __attribute__((always_inline))

namespace linformer::cpu {
namespace {

constexpr int kWidth = LINFORMER_CPU_WIDTH;

typedef float VecF __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecI __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecU __attribute__((vector_size(kWidth * 4)));
typedef uint16_t VecH __attribute__((vector_size(kWidth * 2)));
typedef uint64_t VecW __attribute__((vector_size(kWidth * 4)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <class V, class P>
LINFORMER_INLINE V load_raw(const P* source) {
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}

template <class V, class P>
LINFORMER_INLINE void store_raw(P* target, V value) {
  std::memcpy(target, &value, sizeof(V));
}

LINFORMER_INLINE VecF splat(float value) { return VecF{} + value; }

LINFORMER_INLINE VecF select(VecI condition, VecF yes, VecF no) {
  return (VecF)(((VecI)yes & condition) | ((VecI)no & ~condition));
}

LINFORMER_INLINE VecF half_to_float(VecH bits) {
#if defined(__AVX512F__) && LINFORMER_CPU_WIDTH == 16
  return (VecF)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__) && LINFORMER_CPU_WIDTH == 8
  return (VecF)_mm256_cvtph_ps((__m128i)bits);
#elif LINFORMER_CPU_NEON
  return (VecF)vcvt_f32_f16((float16x4_t)bits);
#else
  const VecU wide = __builtin_convertvector(bits, VecU);
  const VecU magnitude = (wide & 0x7fffu) << 13;
  // Reading the bits as fp32 leaves the exponent 112 too small; the product mends subnormals as well.
  const VecF finite = (VecF)magnitude * 0x1p112f;
  const VecI special = (VecI)((wide & 0x7c00u) == 0x7c00u);
  const VecF value = select(special, (VecF)(magnitude | 0x7f800000u), finite);
  return (VecF)((VecU)value | ((wide & 0x8000u) << 16));
#endif
}

LINFORMER_INLINE VecH float_to_half(VecF value) {
#if defined(__AVX512F__) && LINFORMER_CPU_WIDTH == 16
  return (VecH)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && LINFORMER_CPU_WIDTH == 8
  return (VecH)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#elif LINFORMER_CPU_NEON
  return (VecH)vcvt_f16_f32((float32x4_t)value);
#else
  const VecU bits = (VecU)value;
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  // Below 2^-14 the sum with 0.5 rounds to the half's subnormal step, 2^-24, by itself.
  const VecU subnormal = (VecU)((VecF)magnitude + splat(0.5f)) - 0x3f000000u;
  const VecU infinite = (VecU)(magnitude >= 0x477ff000u);
  const VecU nan = (VecU)(magnitude > 0x7f800000u);
  const VecU small = (VecU)(magnitude < 0x38800000u);
  VecU result = (subnormal & small) | (normal & ~small);
  result = (0x7c00u & infinite) | (result & ~infinite);
  result |= 0x200u & nan;
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), VecH);
#endif
}

// The bits of the nearest bf16 (ties to even, NaN stays NaN), in the upper half of each lane.
LINFORMER_INLINE VecU round_to_bfloat16(VecF value) {
  const VecU bits = (VecU)value;
  const VecU rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const VecU nan = (VecU)((bits & 0x7fffffffu) > 0x7f800000u);
  return ((bits | 0x400000u) & nan) | (rounded & ~nan);
}

LINFORMER_INLINE VecF load(const float* source) { return load_raw<VecF>(source); }
LINFORMER_INLINE VecF load(const BFloat16* source) {
  return (VecF)(__builtin_convertvector(load_raw<VecH>(source), VecU) << 16);
}
LINFORMER_INLINE VecF load(const Half* source) { return half_to_float(load_raw<VecH>(source)); }

LINFORMER_INLINE void store(float* target, VecF value) { store_raw(target, value); }
LINFORMER_INLINE void store(BFloat16* target, VecF value) {
#if defined(__AVX512BF16__) && LINFORMER_CPU_WIDTH == 16
  store_raw(target, _mm512_cvtneps_pbh((__m512)value));
#elif LINFORMER_CPU_NEON && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  store_raw(target, vcvt_bf16_f32((float32x4_t)value));
#else
  store_raw(target, __builtin_convertvector(round_to_bfloat16(value) >> 16, VecH));
#endif
}
LINFORMER_INLINE void store(Half* target, VecF value) { store_raw(target, float_to_half(value)); }

// Past the caches, for what nobody reads soon: no line is read in order to be written. Aligned to the vector; whole
// lines are to be written one after the other, and end_streams() comes before another thread may read.
template <class T>
LINFORMER_INLINE void stream(T* target, VecF value) {
#if defined(__AVX512F__) && LINFORMER_CPU_WIDTH == 16
  if constexpr (sizeof(T) == 4) {
    _mm512_stream_ps(reinterpret_cast<float*>(target), (__m512)value);
  } else {
    alignas(32) T rounded[kWidth];
    store(rounded, value);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target), load_raw<__m256i>(rounded));
  }
#elif defined(__AVX2__) && LINFORMER_CPU_WIDTH == 8
  if constexpr (sizeof(T) == 4) {
    _mm256_stream_ps(reinterpret_cast<float*>(target), (__m256)value);
  } else {
    alignas(16) T rounded[kWidth];
    store(rounded, value);
    _mm_stream_si128(reinterpret_cast<__m128i*>(target), load_raw<__m128i>(rounded));
  }
#else
  store(target, value);
#endif
}
LINFORMER_INLINE void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first `count` < kWidth values; the other lanes are zero.
template <class T>
LINFORMER_INLINE VecF load_part(const T* source, int64_t count) {
  T buffer[kWidth] = {};
  std::memcpy(buffer, source, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}

template <class T>
LINFORMER_INLINE void store_part(T* target, VecF value, int64_t count) {
  T buffer[kWidth];
  store(buffer, value);
  std::memcpy(target, buffer, static_cast<size_t>(count) * sizeof(T));
}

// a > b ? a : b in each lane: where either is NaN the result is b. One instruction on x86, four if left to the
// compiler.
LINFORMER_INLINE VecF lanes_max(VecF a, VecF b) {
#if defined(__AVX512F__) && LINFORMER_CPU_WIDTH == 16
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && LINFORMER_CPU_WIDTH == 8
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select((VecI)(a > b), a, b);
#endif
}

LINFORMER_INLINE float sum_of_lanes(VecF value) {
#if defined(__AVX512F__) && LINFORMER_CPU_WIDTH == 16
  return _mm512_reduce_add_ps((__m512)value);
#elif LINFORMER_CPU_NEON
  return vaddvq_f32((float32x4_t)value);
#else
  float lane[kWidth];
  store_raw(lane, value);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
#endif
}

// Of a NaN in a lane nothing is promised: the exponential of that lane is one.
LINFORMER_INLINE float max_of_lanes(VecF value) {
#if defined(__AVX512F__) && LINFORMER_CPU_WIDTH == 16
  return _mm512_reduce_max_ps((__m512)value);
#elif LINFORMER_CPU_NEON
  return vmaxnmvq_f32((float32x4_t)value);
#else
  float lane[kWidth];
  store_raw(lane, value);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  }
  return lane[0];
#endif
}

// Rows to columns: lane j of row i becomes lane i of row j.
LINFORMER_INLINE void transpose(VecF (&row)[kWidth]) {
#if defined(__AVX512F__) && LINFORMER_CPU_WIDTH == 16
  __m512 half[16], quarter[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_ps((__m512)row[i], (__m512)row[i + 1]);
    half[i + 1] = _mm512_unpackhi_ps((__m512)row[i], (__m512)row[i + 1]);
  }
  // Vector i + c of these holds columns c, 4 + c, 8 + c and 12 + c of the rows i to i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const __m512d a = (__m512d)half[i + c], b = (__m512d)half[i + c + 2];
      quarter[i + 2 * c] = (__m512)_mm512_unpacklo_pd(a, b);
      quarter[i + 2 * c + 1] = (__m512)_mm512_unpackhi_pd(a, b);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even0 = _mm512_shuffle_f32x4(quarter[c], quarter[4 + c], 0x88);
    const __m512 even1 = _mm512_shuffle_f32x4(quarter[8 + c], quarter[12 + c], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(quarter[c], quarter[4 + c], 0xdd);
    const __m512 odd1 = _mm512_shuffle_f32x4(quarter[8 + c], quarter[12 + c], 0xdd);
    row[c] = (VecF)_mm512_shuffle_f32x4(even0, even1, 0x88);
    row[4 + c] = (VecF)_mm512_shuffle_f32x4(odd0, odd1, 0x88);
    row[8 + c] = (VecF)_mm512_shuffle_f32x4(even0, even1, 0xdd);
    row[12 + c] = (VecF)_mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
#elif defined(__AVX2__) && LINFORMER_CPU_WIDTH == 8
  __m256 half[8], quarter[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    half[i] = _mm256_unpacklo_ps((__m256)row[i], (__m256)row[i + 1]);
    half[i + 1] = _mm256_unpackhi_ps((__m256)row[i], (__m256)row[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const __m256d a = (__m256d)half[i + c], b = (__m256d)half[i + c + 2];
      quarter[i + 2 * c] = (__m256)_mm256_unpacklo_pd(a, b);
      quarter[i + 2 * c + 1] = (__m256)_mm256_unpackhi_pd(a, b);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    row[c] = (VecF)_mm256_permute2f128_ps(quarter[c], quarter[4 + c], 0x20);
    row[4 + c] = (VecF)_mm256_permute2f128_ps(quarter[c], quarter[4 + c], 0x31);
  }
#elif LINFORMER_CPU_NEON
  const float64x2_t even0 = (float64x2_t)vtrn1q_f32((float32x4_t)row[0], (float32x4_t)row[1]);
  const float64x2_t odd0 = (float64x2_t)vtrn2q_f32((float32x4_t)row[0], (float32x4_t)row[1]);
  const float64x2_t even1 = (float64x2_t)vtrn1q_f32((float32x4_t)row[2], (float32x4_t)row[3]);
  const float64x2_t odd1 = (float64x2_t)vtrn2q_f32((float32x4_t)row[2], (float32x4_t)row[3]);
  row[0] = (VecF)vtrn1q_f64(even0, even1);
  row[1] = (VecF)vtrn1q_f64(odd0, odd1);
  row[2] = (VecF)vtrn2q_f64(even0, even1);
  row[3] = (VecF)vtrn2q_f64(odd0, odd1);
#else
  float columns[kWidth][kWidth];
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) columns[j][i] = row[i][j];
  }
  for (int i = 0; i < kWidth; ++i) row[i] = load(columns[i]);
#endif
}

// 2^f for |f| <= 1/2: 1 + f q, with q by numpy.polynomial.chebyshev.chebinterpolate of degree 5 for (2^f - 1) / f;
// relative error 5e-9, 9.5e-8 after rounding. One vector at a time, in Horner's order: several interleaved ones, and
// Estrin's order, were no faster.
LINFORMER_INLINE VecF exp2_of_fraction(VecF f) {
  VecF p = splat(0x1.44138ap-13f);
  p = p * f + splat(0x1.5f0890p-10f);
  p = p * f + splat(0x1.3b2a54p-7f);
  p = p * f + splat(0x1.c6af6cp-5f);
  p = p * f + splat(0x1.ebfbe0p-3f);
  p = p * f + splat(0x1.62e430p-1f);
  return p * f + splat(1.0f);
}

// 2^(x - down) for x <= 0 (a rounding error above is harmless) and a whole number `down` of 0 to 63; where that is
// below 2^-126 the result is 0 or a denormal number. A NaN stays NaN. x = n + f with |f| <= 1/2: 2^f times
// 2^(n - down).
LINFORMER_INLINE VecF exp2_nonpositive(VecF x, float down) {
#if defined(__AVX512F__) && LINFORMER_CPU_WIDTH == 16
  // f of minus infinity is 0, so that the result is 0.
  const VecF f = (VecF)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (VecF)_mm512_scalef_ps((__m512)exp2_of_fraction(f), (__m512)(x - f - down));
#else
  const VecF magic = splat(0x1.8p23f + 127.0f - down);
  const VecF power = x + magic;    // rounds, and leaves the exponent, n - down + 127, in the low bits
  const VecF e =
      exp2_of_fraction(x - (power - magic)) * (VecF)((VecU)power << 23);    // a product: no payload of a NaN hides it
  // Not 2^-126, which times the largest number is 4: a row far below the others takes no part, whatever it holds.
  return select((VecI)(x < splat(down - 126.0f)), VecF{}, e);
#endif
}

}    // namespace
}    // namespace linformer::cpu
