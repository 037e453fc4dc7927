// What mma.sync and wgmma share: element types, and how fragments lie in registers.
//
// Products are exact and sums are taken in double, then rounded once to the accumulator's type: results do not depend
// on an order of summation. Real tensor cores keep fewer bits; compare with a tolerance.
#pragma once

#include <cstdio>
#include <type_traits>

#include "machine.h"
#include "numbers.h"

namespace emulator {

enum class Element : u8 { kHalf, kBfloat, kTf32, kFloat, kOther };

inline Element element_named(const string& type) {
  if (type == "f16") return Element::kHalf;
  if (type == "bf16") return Element::kBfloat;
  if (type == "tf32") return Element::kTf32;
  return type == "f32" ? Element::kFloat : Element::kOther;
}

constexpr u32 kFloatNan = 0x7fffffff;    // what the tensor cores write for every NaN

constexpr u32 element_bytes(Element type) { return type == Element::kTf32 ? 4 : 2; }

template <Element type>
inline float to_float(u32 bits) {
  if constexpr (type == Element::kHalf) return half_to_float(static_cast<u16>(bits));
  if constexpr (type == Element::kBfloat) return bfloat_to_float(static_cast<u16>(bits));
  return truncate_to_tf32(bits);
}

// A register of an operand fragment, over the 32 lanes, is a block of 8 rows in row-major order: 8 columns of 16-bit
// values, two packed into each lane, or 4 columns of 32-bit values.
template <Element type>
constexpr u32 kBlockColumns = 16 / element_bytes(type);

template <Element type>
inline void unpack_block(Warp& warp, const Operand& reg, double* block) {
  using Packed = std::conditional_t<element_bytes(type) == 4, u32, u16>;
  Packed packed[8 * kBlockColumns<type>];
  memcpy(packed, warp.slots<u32>(reg.offset), sizeof packed);
  for (u32 i = 0; i < 8 * kBlockColumns<type>; i++) block[i] = to_float<type>(packed[i]);
}

// A: 16 rows of K columns, row-major. Its registers are the blocks of rows 0 to 7 and 8 to 15, then the next columns.
template <Element type, u32 K>
inline void unpack_a(Warp& warp, const vector<Operand>& registers, double* a) {
  constexpr u32 kColumns = kBlockColumns<type>;
  for (u32 i = 0; i < registers.size(); i++) {
    double block[8 * kColumns];
    unpack_block<type>(warp, registers[i], block);
    for (u32 row = 0; row < 8; row++) {
      memcpy(a + (row + i % 2 * 8) * K + i / 2 * kColumns, block + row * kColumns, kColumns * sizeof(double));
    }
  }
}

// The 16 x `columns` sums of a warp, row-major, in blocks of 8 x 8: rows 0 to 7 and 8 to 15, then the next columns. A
// lane has two neighbours of a block, in two f32 registers or packed into one of f16.
inline double* block_row(double* sums, u32 columns, u32 block, u32 row) {
  return sums + (row + block % 2 * 8) * columns + block / 2 * 8;
}

template <bool is_half>
inline void load_sums(Warp& warp, const vector<Operand>& registers, u32 columns, double* sums) {
  for (u32 block = 0; block < columns / 4; block++) {
    const u32* low = warp.slots<u32>(registers[is_half ? block : 2 * block].offset);
    const u32* high = is_half ? low : warp.slots<u32>(registers[2 * block + 1].offset);
    for (u32 row = 0; row < 8; row++) {
      double* out = block_row(sums, columns, block, row);
      for (u32 i = 0; i < 4; i++) {
        const u32 lane = 4 * row + i;
        out[2 * i] = is_half ? half_to_float(static_cast<u16>(low[lane])) : bit_cast<float>(low[lane]);
        out[2 * i + 1] = is_half ? half_to_float(static_cast<u16>(low[lane] >> 16)) : bit_cast<float>(high[lane]);
      }
    }
  }
}

template <bool is_half>
inline void store_sums(Warp& warp, const vector<Operand>& registers, u32 columns, double* sums) {
  for (u32 block = 0; block < columns / 4; block++) {
    u32* low = warp.slots<u32>(registers[is_half ? block : 2 * block].offset);
    u32* high = is_half ? low : warp.slots<u32>(registers[2 * block + 1].offset);
    for (u32 row = 0; row < 8; row++) {
      const double* in = block_row(sums, columns, block, row);
      u32 words[8];
      for (u32 i = 0; i < 8; i++) {
        const float sum = static_cast<float>(in[i]);
        words[i] = is_half ? double_to_half(in[i]) : sum == sum ? bit_cast<u32>(sum) : kFloatNan;
      }
      for (u32 i = 0; i < 4; i++) {
        low[4 * row + i] = is_half ? words[2 * i] | words[2 * i + 1] << 16 : words[2 * i];
        if (!is_half) high[4 * row + i] = words[2 * i + 1];
      }
    }
  }
}

inline void load_sums(Warp& warp, const vector<Operand>& registers, bool is_half, u32 columns, double* sums) {
  is_half ? load_sums<true>(warp, registers, columns, sums) : load_sums<false>(warp, registers, columns, sums);
}

inline void store_sums(Warp& warp, const vector<Operand>& registers, bool is_half, u32 columns, double* sums) {
  is_half ? store_sums<true>(warp, registers, columns, sums) : store_sums<false>(warp, registers, columns, sums);
}

struct MmaShape {
  u32 m = 0, n = 0, k = 0;
};

inline MmaShape mma_shape(const Instruction& instruction) {
  MmaShape shape;
  for (const string& word : instruction.words) {
    if (sscanf(word.c_str(), "m%un%uk%u", &shape.m, &shape.n, &shape.k) == 3) return shape;
  }
  return {};
}

}    // namespace emulator
