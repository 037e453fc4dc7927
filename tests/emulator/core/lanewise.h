// Operations that treat every lane alike: how a register slot is read as a value of a type, computed on and written
// back.
#pragma once

#include <type_traits>

#include "machine.h"
#include "numbers.h"

namespace emulator {

// Types that are not C++ types of their own.
struct Half {};
struct Bfloat {};
struct FlushedFloat {};    // f32 with .ftz
struct HalfPair {};
struct BfloatPair {};
struct I16Pair {};
struct U16Pair {};

template <class T>
struct Pair {
  T low, high;
};

template <class T, class Function>
inline auto map_pair(Pair<T> a, Function function) {
  return Pair<T>{static_cast<T>(function(a.low)), static_cast<T>(function(a.high))};
}
template <class T, class Function>
inline auto map_pair(Pair<T> a, Pair<T> b, Function function) {
  return Pair<T>{static_cast<T>(function(a.low, b.low)), static_cast<T>(function(a.high, b.high))};
}

// Slot: what a lane's register holds; Value: what is computed with.
template <class T>
struct Type {
  using Slot = std::conditional_t<sizeof(T) <= 4, u32, u64>;
  using Value = T;
  static Value load(Slot slot) { return static_cast<T>(slot); }
  static Slot store(Value value) { return static_cast<Slot>(static_cast<std::make_unsigned_t<T>>(value)); }
};
template <>
struct Type<float> {
  using Slot = u32;
  using Value = float;
  static Value load(Slot slot) { return bit_cast<float>(slot); }
  static Slot store(Value value) { return bit_cast<u32>(value); }
};
template <>
struct Type<FlushedFloat> {
  using Slot = u32;
  using Value = float;
  static Value load(Slot slot) { return flush_subnormal(bit_cast<float>(slot)); }
  static Slot store(Value value) { return bit_cast<u32>(flush_subnormal(value)); }
};
template <>
struct Type<double> {
  using Slot = u64;
  using Value = double;
  static Value load(Slot slot) { return bit_cast<double>(slot); }
  static Slot store(Value value) { return bit_cast<u64>(value); }
};
// 16-bit floats are computed on as doubles and rounded once.
template <>
struct Type<Half> {
  using Slot = u32;
  using Value = double;
  static Value load(Slot slot) { return half_to_float(static_cast<u16>(slot)); }
  static Slot store(Value value) { return double_to_half(value); }
};
template <>
struct Type<Bfloat> {
  using Slot = u32;
  using Value = double;
  static Value load(Slot slot) { return bfloat_to_float(static_cast<u16>(slot)); }
  static Slot store(Value value) { return double_to_bfloat(value); }
};
template <class Element, class T>
struct PairType {
  using Slot = u32;
  using Value = Pair<T>;
  static Value load(Slot slot) { return {Type<Element>::load(slot & 0xffffu), Type<Element>::load(slot >> 16)}; }
  static Slot store(Value value) {
    return (Type<Element>::store(value.low) & 0xffffu) | Type<Element>::store(value.high) << 16;
  }
};
template <>
struct Type<HalfPair> : PairType<Half, double> {};
template <>
struct Type<BfloatPair> : PairType<Bfloat, double> {};
template <>
struct Type<I16Pair> : PairType<i16, i16> {};
template <>
struct Type<U16Pair> : PairType<u16, u16> {};

// Handlers with one, two and three sources of one type; Operation::apply computes.
template <class T, class Operation>
void unary(Warp& warp, const Instruction& instruction) {
  using Slot = typename Type<T>::Slot;
  Slot* out = warp.slots<Slot>(instruction.reg[0]);
  const Slot* a = warp.slots<Slot>(instruction.reg[1]);
  for_lanes(warp.active, [&](u32 lane) { out[lane] = Type<T>::store(Operation::apply(Type<T>::load(a[lane]))); });
}

template <class T, class Operation>
void binary(Warp& warp, const Instruction& instruction) {
  using Slot = typename Type<T>::Slot;
  Slot* out = warp.slots<Slot>(instruction.reg[0]);
  const Slot* a = warp.slots<Slot>(instruction.reg[1]);
  const Slot* b = warp.slots<Slot>(instruction.reg[2]);
  for_lanes(warp.active, [&](u32 lane) {
    out[lane] = Type<T>::store(Operation::apply(Type<T>::load(a[lane]), Type<T>::load(b[lane])));
  });
}

template <class T, class Operation>
void ternary(Warp& warp, const Instruction& instruction) {
  using Slot = typename Type<T>::Slot;
  Slot* out = warp.slots<Slot>(instruction.reg[0]);
  const Slot* a = warp.slots<Slot>(instruction.reg[1]);
  const Slot* b = warp.slots<Slot>(instruction.reg[2]);
  const Slot* c = warp.slots<Slot>(instruction.reg[3]);
  for_lanes(warp.active, [&](u32 lane) {
    out[lane] =
        Type<T>::store(Operation::apply(Type<T>::load(a[lane]), Type<T>::load(b[lane]), Type<T>::load(c[lane])));
  });
}

// Fills reg[0..] from the operands, all read as one type.
inline void set_registers(Kernel& kernel, Instruction& instruction, const string& type, size_t count) {
  for (size_t i = 0; i < count; i++) {
    instruction.reg[i] = slot_of(kernel, instruction, instruction.operands.at(i), type);
  }
}
inline void set_register(Kernel& kernel, Instruction& instruction, size_t index, const string& type) {
  instruction.reg[index] = slot_of(kernel, instruction, instruction.operands.at(index), type);
}

}    // namespace emulator
