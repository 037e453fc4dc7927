// Integer arithmetic, logic, shifts and bit fields.
#include <algorithm>

#include "lanewise.h"

namespace emulator {
namespace {

using i128 = __int128;
using u128 = unsigned __int128;

template <class T>
constexpr u32 kBits = 8 * sizeof(T);

template <class T>
using Wider = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, i32, u32>,
                                 std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, i64, u64>,
                                                    std::conditional_t<std::is_signed_v<T>, i128, u128>>>;

// Products of 16-bit values would overflow int; the build wraps signed arithmetic (-fwrapv).
struct Add {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a + b);
  }
  template <class T>
  static Pair<T> apply(Pair<T> a, Pair<T> b) {
    return map_pair(a, b, [](T x, T y) { return x + y; });
  }
};
struct Subtract {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a - b);
  }
};
struct MultiplyLow {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a * b);
  }
};
struct MultiplyHigh {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>((static_cast<Wider<T>>(a) * static_cast<Wider<T>>(b)) >> kBits<T>);
  }
};
template <class Multiply>
struct MultiplyAdd {
  template <class T>
  static T apply(T a, T b, T c) {
    return static_cast<T>(Multiply::apply(a, b) + c);
  }
};
struct AddSaturated {
  static i32 apply(i32 a, i32 b) {
    return static_cast<i32>(std::clamp<i64>(static_cast<i64>(a) + b, INT32_MIN, INT32_MAX));
  }
};
struct SubtractSaturated {
  static i32 apply(i32 a, i32 b) {
    return static_cast<i32>(std::clamp<i64>(static_cast<i64>(a) - b, INT32_MIN, INT32_MAX));
  }
};
struct Divide {    // by zero: all ones, as on hardware
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return static_cast<T>(~static_cast<T>(0));
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(-a);
    return static_cast<T>(a / b);
  }
};
struct Remainder {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Minimum {
  template <class T>
  static T apply(T a, T b) {
    return std::min(a, b);
  }
  template <class T>
  static Pair<T> apply(Pair<T> a, Pair<T> b) {
    return map_pair(a, b, [](T x, T y) { return std::min(x, y); });
  }
};
struct Maximum {
  template <class T>
  static T apply(T a, T b) {
    return std::max(a, b);
  }
  template <class T>
  static Pair<T> apply(Pair<T> a, Pair<T> b) {
    return map_pair(a, b, [](T x, T y) { return std::max(x, y); });
  }
};
struct Absolute {
  template <class T>
  static T apply(T a) {
    return a < 0 ? static_cast<T>(-a) : a;
  }
};
struct Negate {
  template <class T>
  static T apply(T a) {
    return static_cast<T>(-a);
  }
};
struct And {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <class T>
  static T apply(T a) {
    return static_cast<T>(~a);
  }
};
struct ReverseBits {
  template <class T>
  static T apply(T a) {
    T reversed = 0;
    for (u32 i = 0; i < kBits<T>; i++) reversed |= static_cast<T>((a >> i & 1) << (kBits<T> - 1 - i));
    return reversed;
  }
};

// Shifts: the amount is a u32 whatever the type; from the width on, everything is shifted out.
struct ShiftLeft {
  template <class T>
  static T apply(T a, u32 amount) {
    return amount >= kBits<T> ? 0 : static_cast<T>(a << amount);
  }
};
struct ShiftRight {
  template <class T>
  static T apply(T a, u32 amount) {
    if (amount < kBits<T>) return static_cast<T>(a >> amount);
    return std::is_signed_v<T> && a < 0 ? static_cast<T>(-1) : 0;
  }
};
template <class T, class Operation>
void shift(Warp& warp, const Instruction& instruction) {
  using Slot = typename Type<T>::Slot;
  Slot* out = warp.slots<Slot>(instruction.reg[0]);
  const Slot* a = warp.slots<Slot>(instruction.reg[1]);
  const u32* amount = warp.slots<u32>(instruction.reg[2]);
  for_lanes(warp.active,
            [&](u32 lane) { out[lane] = Type<T>::store(Operation::apply(Type<T>::load(a[lane]), amount[lane])); });
}

// Counts: the result is a u32 whatever the type.
struct CountOnes {
  template <class T>
  static u32 apply(T a) {
    return static_cast<u32>(__builtin_popcountll(a));
  }
};
struct CountLeadingZeros {
  template <class T>
  static u32 apply(T a) {
    return a == 0 ? kBits<T> : static_cast<u32>(__builtin_clzll(a)) - (64 - kBits<T>);
  }
};
struct HighestBit {    // that differs from the sign
  template <class T>
  static u32 apply(T a) {
    using Unsigned = std::make_unsigned_t<T>;
    const Unsigned value = static_cast<Unsigned>(std::is_signed_v<T> && a < 0 ? ~a : a);
    return value == 0 ? kNone : kBits<T> - 1 - CountLeadingZeros::apply(value);
  }
};
struct ShiftToHighestBit {
  template <class T>
  static u32 apply(T a) {
    const u32 bit = HighestBit::apply(a);
    return bit == kNone ? kNone : kBits<T> - 1 - bit;
  }
};
template <class T, class Operation>
void count(Warp& warp, const Instruction& instruction) {
  using Slot = typename Type<T>::Slot;
  u32* out = warp.slots<u32>(instruction.reg[0]);
  const Slot* a = warp.slots<Slot>(instruction.reg[1]);
  for_lanes(warp.active, [&](u32 lane) { out[lane] = Operation::apply(Type<T>::load(a[lane])); });
}

// mul.wide and mad.wide; variant: 1 for mad.
template <class T>
void multiply_wide(Warp& warp, const Instruction& instruction) {
  using Slot = typename Type<T>::Slot;
  using Wide = Wider<T>;
  using WideSlot = typename Type<Wide>::Slot;
  WideSlot* out = warp.slots<WideSlot>(instruction.reg[0]);
  const Slot* a = warp.slots<Slot>(instruction.reg[1]);
  const Slot* b = warp.slots<Slot>(instruction.reg[2]);
  const auto product = [&](u32 lane) {
    return static_cast<Wide>(static_cast<T>(a[lane])) * static_cast<Wide>(static_cast<T>(b[lane]));
  };
  if (instruction.variant) {
    const WideSlot* c = warp.slots<WideSlot>(instruction.reg[3]);
    for_lanes(warp.active, [&](u32 lane) {
      out[lane] = Type<Wide>::store(static_cast<Wide>(product(lane) + static_cast<Wide>(c[lane])));
    });
  } else {
    for_lanes(warp.active, [&](u32 lane) { out[lane] = Type<Wide>::store(product(lane)); });
  }
}

// add, sub, mad.lo, mad.hi (variant 0 to 3) with carry; modifier: 1 reads the carry flag, 2 writes it.
template <class T>
void with_carry(Warp& warp, const Instruction& instruction) {
  using Slot = typename Type<T>::Slot;
  using Unsigned = std::make_unsigned_t<T>;
  Slot* out = warp.slots<Slot>(instruction.reg[0]);
  const Slot* a = warp.slots<Slot>(instruction.reg[1]);
  const Slot* b = warp.slots<Slot>(instruction.reg[2]);
  for_lanes(warp.active, [&](u32 lane) {
    const u32 carry = instruction.modifier & 1 ? warp.carry >> lane & 1 : 0;
    const Unsigned x = static_cast<Unsigned>(a[lane]);
    const Unsigned y = static_cast<Unsigned>(b[lane]);
    u128 result;
    switch (instruction.variant) {
      case 0: result = static_cast<u128>(x) + y + carry; break;
      case 1: result = static_cast<u128>(x) - y - carry; break;
      default: {
        const T product = instruction.variant == 2 ? MultiplyLow::apply(static_cast<T>(x), static_cast<T>(y))
                                                   : MultiplyHigh::apply(static_cast<T>(x), static_cast<T>(y));
        const Unsigned addend = static_cast<Unsigned>(warp.slots<Slot>(instruction.reg[3])[lane]);
        result = static_cast<u128>(static_cast<Unsigned>(product)) + addend + carry;
      }
    }
    out[lane] = static_cast<Unsigned>(result);
    if (instruction.modifier & 2) {
      const u32 carry_out = static_cast<u32>(result >> kBits<T>) & 1;
      warp.carry = (warp.carry & ~(1u << lane)) | carry_out << lane;
    }
  });
}

template <class T>
void extract_field(Warp& warp, const Instruction& instruction) {
  using Slot = typename Type<T>::Slot;
  using Unsigned = std::make_unsigned_t<T>;
  Slot* out = warp.slots<Slot>(instruction.reg[0]);
  const Slot* source = warp.slots<Slot>(instruction.reg[1]);
  const u32* positions = warp.slots<u32>(instruction.reg[2]);
  const u32* lengths = warp.slots<u32>(instruction.reg[3]);
  for_lanes(warp.active, [&](u32 lane) {
    const Unsigned value = static_cast<Unsigned>(source[lane]);
    const u32 position = positions[lane] & 0xff;
    const u32 length = lengths[lane] & 0xff;
    Unsigned field = 0;
    if (length) {
      const u32 top = std::min(position + length - 1, kBits<T> - 1);
      const bool negative = std::is_signed_v<T> && (value >> top & 1);
      const u32 kept = position < kBits<T> ? top - position + 1 : 0;
      const Unsigned mask =
          kept == kBits<T> ? static_cast<Unsigned>(-1) : static_cast<Unsigned>((static_cast<Unsigned>(1) << kept) - 1);
      field = kept ? static_cast<Unsigned>(value >> position & mask) : 0;
      if (negative) field |= static_cast<Unsigned>(~mask);
    }
    out[lane] = static_cast<Slot>(field);
  });
}

// bfi d, a, b, position, length: immediate is the register of the length.
template <class T>
void insert_field(Warp& warp, const Instruction& instruction) {
  T* out = warp.slots<T>(instruction.reg[0]);
  const T* inserted = warp.slots<T>(instruction.reg[1]);
  const T* into = warp.slots<T>(instruction.reg[2]);
  const u32* positions = warp.slots<u32>(instruction.reg[3]);
  const u32* lengths = warp.slots<u32>(static_cast<u32>(instruction.immediate));
  for_lanes(warp.active, [&](u32 lane) {
    const u32 position = positions[lane] & 0xff;
    const u32 length = lengths[lane] & 0xff;
    T mask = 0;
    if (length && position < kBits<T>) {
      const T ones = length >= kBits<T> ? ~static_cast<T>(0) : static_cast<T>((static_cast<T>(1) << length) - 1);
      mask = static_cast<T>(ones << position);
    }
    const T shifted = mask ? static_cast<T>(inserted[lane] << position) : 0;
    out[lane] = (into[lane] & ~mask) | (shifted & mask);
  });
}

// immediate: the truth table, one bit for each combination of a, b, c.
void logic3(Warp& warp, const Instruction& instruction) {
  u32 result[32] = {};
  const u32* a = warp.slots<u32>(instruction.reg[1]);
  const u32* b = warp.slots<u32>(instruction.reg[2]);
  const u32* c = warp.slots<u32>(instruction.reg[3]);
  for (u32 row = 0; row < 8; row++) {
    if (!(instruction.immediate >> row & 1)) continue;
    const u32 flip_a = row & 4 ? 0 : kAllLanes;
    const u32 flip_b = row & 2 ? 0 : kAllLanes;
    const u32 flip_c = row & 1 ? 0 : kAllLanes;
    for (u32 lane = 0; lane < 32; lane++) result[lane] |= (a[lane] ^ flip_a) & (b[lane] ^ flip_b) & (c[lane] ^ flip_c);
  }
  u32* out = warp.slots<u32>(instruction.reg[0]);
  for_lanes(warp.active, [&](u32 lane) { out[lane] = result[lane]; });
}

// variant: 0 takes the selector from c; f4e, b4e, rc8, ecl, ecr, rc16 (1 to 6) derive it from c's last two bits.
void permute_bytes(Warp& warp, const Instruction& instruction) {
  static const u16 selectors[6][4] = {{0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123},
                                      {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
                                      {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};
  u32* out = warp.slots<u32>(instruction.reg[0]);
  const u32* a = warp.slots<u32>(instruction.reg[1]);
  const u32* b = warp.slots<u32>(instruction.reg[2]);
  const u32* c = warp.slots<u32>(instruction.reg[3]);
  for_lanes(warp.active, [&](u32 lane) {
    const u64 bytes = static_cast<u64>(b[lane]) << 32 | a[lane];
    const u32 selector = instruction.variant ? selectors[instruction.variant - 1][c[lane] & 3] : c[lane];
    u32 result = 0;
    for (u32 i = 0; i < 4; i++) {
      const u32 choice = selector >> 4 * i & 15;
      u32 byte = static_cast<u32>(bytes >> 8 * (choice & 7)) & 0xff;
      if (choice & 8) byte = byte & 0x80 ? 0xff : 0;    // its sign, spread
      result |= byte << 8 * i;
    }
    out[lane] = result;
  });
}

// shf; variant: 1 left; modifier: 1 clamps the amount, 0 wraps it.
void funnel_shift(Warp& warp, const Instruction& instruction) {
  u32* out = warp.slots<u32>(instruction.reg[0]);
  const u32* low = warp.slots<u32>(instruction.reg[1]);
  const u32* high = warp.slots<u32>(instruction.reg[2]);
  const u32* amounts = warp.slots<u32>(instruction.reg[3]);
  for_lanes(warp.active, [&](u32 lane) {
    const u64 value = static_cast<u64>(high[lane]) << 32 | low[lane];
    const u32 amount = instruction.modifier ? std::min(amounts[lane], 32u) : amounts[lane] & 31;
    out[lane] = static_cast<u32>(instruction.variant ? value << amount >> 32 : value >> amount);
  });
}

// The handler for an integer type, signed or not, or one of the same width whatever the sign.
template <template <class, class> class Shape, class Operation>
Handler by_type(const string& type) {
  if (type == "u32" || type == "b32") return Shape<u32, Operation>::run;
  if (type == "s32") return Shape<i32, Operation>::run;
  if (type == "u64" || type == "b64") return Shape<u64, Operation>::run;
  if (type == "s64") return Shape<i64, Operation>::run;
  if (type == "u16" || type == "b16") return Shape<u16, Operation>::run;
  if (type == "s16") return Shape<i16, Operation>::run;
  return nullptr;
}
template <template <class, class> class Shape, class Operation>
Handler by_width(const string& type) {
  switch (type_bytes(type)) {
    case 2: return Shape<u16, Operation>::run;
    case 4: return Shape<u32, Operation>::run;
    case 8: return Shape<u64, Operation>::run;
    default: return nullptr;
  }
}
#define EMULATOR_SHAPE(name, function)                     \
  template <class T, class Operation>                      \
  struct name {                                            \
    static constexpr Handler run = function<T, Operation>; \
  };
EMULATOR_SHAPE(Unary, unary)
EMULATOR_SHAPE(Binary, binary)
EMULATOR_SHAPE(Ternary, ternary)
EMULATOR_SHAPE(Shift, shift)
EMULATOR_SHAPE(Count, count)
#undef EMULATOR_SHAPE

Handler decode_bits(Kernel& kernel, Instruction& instruction) {
  const string& opcode = instruction.opcode();
  const string& type = instruction.type();
  if (opcode == "shl" || opcode == "shr") {
    set_registers(kernel, instruction, type, 2);
    set_register(kernel, instruction, 2, "u32");
    return opcode == "shl" ? by_width<Shift, ShiftLeft>(type) : by_type<Shift, ShiftRight>(type);
  }
  if (opcode == "shf") {
    set_registers(kernel, instruction, "b32", 4);
    instruction.variant = instruction.has("l");
    instruction.modifier = instruction.has("clamp");
    return funnel_shift;
  }
  if (opcode == "lop3") {
    if (instruction.operands.size() != 5 || type != "b32") return nullptr;
    set_registers(kernel, instruction, "b32", 4);
    instruction.immediate = static_cast<i64>(instruction.operands[4].bits);
    return logic3;
  }
  if (opcode == "prmt") {
    static const char* modes[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
    for (u8 i = 0; i < 6; i++) {
      if (instruction.has(modes[i])) instruction.variant = static_cast<u8>(i + 1);
    }
    set_registers(kernel, instruction, "b32", 4);
    return permute_bytes;
  }
  if (opcode == "bfe") {
    set_registers(kernel, instruction, type, 2);
    set_register(kernel, instruction, 2, "u32");
    set_register(kernel, instruction, 3, "u32");
    if (type[0] == 's') return type == "s32" ? extract_field<i32> : extract_field<i64>;
    return type == "u32" ? extract_field<u32> : extract_field<u64>;
  }
  if (opcode == "bfi") {
    set_registers(kernel, instruction, type, 3);
    set_register(kernel, instruction, 3, "u32");
    instruction.immediate = slot_of(kernel, instruction, instruction.operands.at(4), "u32");
    return type == "b32" ? insert_field<u32> : insert_field<u64>;
  }
  if (opcode == "popc" || opcode == "clz" || opcode == "bfind") {
    set_register(kernel, instruction, 0, "u32");
    set_register(kernel, instruction, 1, type);
    if (opcode == "popc") return type == "b64" ? count<u64, CountOnes> : count<u32, CountOnes>;
    if (opcode == "clz") return type == "b64" ? count<u64, CountLeadingZeros> : count<u32, CountLeadingZeros>;
    return instruction.has("shiftamt") ? by_type<Count, ShiftToHighestBit>(type) : by_type<Count, HighestBit>(type);
  }
  if (opcode == "brev") {
    set_registers(kernel, instruction, type, 2);
    return by_width<Unary, ReverseBits>(type);
  }
  return nullptr;
}

Handler decode_logic(Kernel& kernel, Instruction& instruction) {
  const string& opcode = instruction.opcode();
  const string& type = instruction.type();
  if (type == "pred") return nullptr;
  if (opcode == "not") {
    set_registers(kernel, instruction, type, 2);
    return by_width<Unary, Not>(type);
  }
  if (opcode != "and" && opcode != "or" && opcode != "xor") return nullptr;
  set_registers(kernel, instruction, type, 3);
  return opcode == "and"  ? by_width<Binary, And>(type)
         : opcode == "or" ? by_width<Binary, Or>(type)
                          : by_width<Binary, Xor>(type);
}

Handler decode_carry(Kernel& kernel, Instruction& instruction, bool reads_carry) {
  const string& type = instruction.type();
  const char letter = instruction.opcode()[0];
  set_registers(kernel, instruction, type, letter == 'm' ? 4 : 3);
  instruction.variant = letter == 'a' ? 0 : letter == 's' ? 1 : instruction.has("hi") ? 3 : 2;
  instruction.modifier = static_cast<u8>((reads_carry ? 1 : 0) | (instruction.has("cc") ? 2 : 0));
  if (type == "s32") return with_carry<i32>;
  if (type == "s64") return with_carry<i64>;
  return type_bytes(type) == 4 ? with_carry<u32> : with_carry<u64>;
}

Handler decode_wide(Kernel& kernel, Instruction& instruction) {
  const string& type = instruction.type();
  const string wide = type[0] + string(type_bytes(type) == 4 ? "64" : "32");
  instruction.variant = instruction.opcode() == "mad";
  set_register(kernel, instruction, 0, wide);
  set_register(kernel, instruction, 1, type);
  set_register(kernel, instruction, 2, type);
  if (instruction.variant) set_register(kernel, instruction, 3, wide);
  if (type[0] == 's') return type == "s32" ? multiply_wide<i32> : multiply_wide<i16>;
  return type == "u32" ? multiply_wide<u32> : multiply_wide<u16>;
}

}    // namespace

Handler decode_integer(Kernel& kernel, Instruction& instruction) {
  const string& opcode = instruction.opcode();
  const string& type = instruction.type();
  if (Handler handler = decode_bits(kernel, instruction)) return handler;
  if (is_float_type(type)) return nullptr;
  if (Handler handler = decode_logic(kernel, instruction)) return handler;
  const bool reads_carry = opcode == "addc" || opcode == "subc" || opcode == "madc";
  const bool is_arithmetic = opcode == "add" || opcode == "sub" || opcode == "mul" || opcode == "mad";
  if (reads_carry || (is_arithmetic && instruction.has("cc"))) return decode_carry(kernel, instruction, reads_carry);
  if (is_arithmetic && instruction.has("wide")) return decode_wide(kernel, instruction);
  if (opcode == "abs" || opcode == "neg") {
    set_registers(kernel, instruction, type, 2);
    return opcode == "abs" ? by_type<Unary, Absolute>(type) : by_type<Unary, Negate>(type);
  }
  if (opcode == "mad") {
    if (instruction.saturate) return nullptr;
    set_registers(kernel, instruction, type, 4);
    return instruction.has("hi") ? by_type<Ternary, MultiplyAdd<MultiplyHigh>>(type)
                                 : by_type<Ternary, MultiplyAdd<MultiplyLow>>(type);
  }
  if (!is_arithmetic && opcode != "div" && opcode != "rem" && opcode != "min" && opcode != "max") return nullptr;
  set_registers(kernel, instruction, type, 3);
  const bool saturate = instruction.saturate;
  if (type == "s16x2" || type == "u16x2") {
    const bool is_signed = type[0] == 's';
    if (saturate || instruction.relu) return nullptr;
    if (opcode == "add") return binary<U16Pair, Add>;
    if (opcode == "min") return is_signed ? binary<I16Pair, Minimum> : binary<U16Pair, Minimum>;
    if (opcode == "max") return is_signed ? binary<I16Pair, Maximum> : binary<U16Pair, Maximum>;
    return nullptr;
  }
  if (instruction.relu) return nullptr;
  if (opcode == "add") return saturate ? binary<i32, AddSaturated> : by_type<Binary, Add>(type);
  if (opcode == "sub") return saturate ? binary<i32, SubtractSaturated> : by_type<Binary, Subtract>(type);
  if (opcode == "mul") {
    return instruction.has("hi") ? by_type<Binary, MultiplyHigh>(type) : by_type<Binary, MultiplyLow>(type);
  }
  if (opcode == "div") return by_type<Binary, Divide>(type);
  if (opcode == "rem") return by_type<Binary, Remainder>(type);
  return opcode == "min" ? by_type<Binary, Minimum>(type) : by_type<Binary, Maximum>(type);
}

}    // namespace emulator
