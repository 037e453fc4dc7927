// Conversions between float and the 16-bit formats, portable and exact.
#pragma once

#include <cmath>

#include "common.h"

namespace emulator {

constexpr u16 kHalfNan = 0x7fff;    // what the hardware writes for every NaN, in f16 and in bf16

inline float half_to_float(u16 half) {
  // Shifted into place, the exponent is 112 too small; the product is exact, for subnormal halves too.
  const u32 magnitude = half & 0x7fffu;
  u32 result = bit_cast<u32>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  result |= magnitude >= 0x7c00 ? 0x7f800000u : 0u;
  return bit_cast<float>(result | static_cast<u32>(half & 0x8000u) << 16);
}

// Round to nearest, ties to even. The rounding mode of the CPU must be the default one.
inline u16 float_to_half(float value) {
  const u32 word = bit_cast<u32>(value);
  const u32 magnitude = word & 0x7fffffffu;
  const u16 sign = static_cast<u16>(word >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return kHalfNan;
  if (magnitude >= 0x47800000u) return static_cast<u16>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {    // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits
    return static_cast<u16>(sign | (bit_cast<u32>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<u16>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

inline u16 float_to_half_toward_zero(float value) {
  const u32 word = bit_cast<u32>(value);
  const u32 magnitude = word & 0x7fffffffu;
  const u16 sign = static_cast<u16>(word >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return kHalfNan;
  if (magnitude == 0x7f800000u) return static_cast<u16>(sign | 0x7c00u);
  if (magnitude >= 0x47800000u) return static_cast<u16>(sign | 0x7bffu);
  if (magnitude < 0x38800000u) {
    return static_cast<u16>(sign | static_cast<u16>(bit_cast<float>(magnitude) * 0x1p24f));
  }
  return static_cast<u16>(sign | (magnitude - 0x38000000u) >> 13);
}

inline float bfloat_to_float(u16 bfloat) { return bit_cast<float>(static_cast<u32>(bfloat) << 16); }

inline u16 float_to_bfloat(float value) {
  const u32 word = bit_cast<u32>(value);
  if (value != value) return kHalfNan;
  return static_cast<u16>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

// A double as a float, rounded to odd: rounding that float once more to 16 bits gives what one rounding would have
// given.
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || value != value || std::isinf(nearest)) return nearest;
  u32 word = bit_cast<u32>(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) word--;
  return bit_cast<float>(word | 1u);
}

inline u16 double_to_half(double value) { return float_to_half(round_to_odd(value)); }
inline u16 double_to_bfloat(double value) { return float_to_bfloat(round_to_odd(value)); }

inline float flush_subnormal(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

// Tensor cores read the upper 19 bits of a tf32 operand.
inline float truncate_to_tf32(u32 word) { return bit_cast<float>(word & 0xffffe000u); }

}    // namespace emulator
