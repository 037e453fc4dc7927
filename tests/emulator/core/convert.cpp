// mov (also packing and unpacking) and cvt.
#include <algorithm>
#include <cfenv>

#include "lanewise.h"

namespace emulator {
namespace {

// ---- mov

template <class Slot>
void move(Warp& warp, const Instruction& instruction) {
  Slot* out = warp.slots<Slot>(instruction.reg[0]);
  const Slot* a = warp.slots<Slot>(instruction.reg[1]);
  for_lanes(warp.active, [&](u32 lane) { out[lane] = a[lane]; });
}

u64 read_slot(Warp& warp, u32 offset, u32 lane, u32 bytes) {
  return bytes == 8 ? warp.slots<u64>(offset)[lane] : warp.slots<u32>(offset)[lane];
}

void write_slot(Warp& warp, u32 offset, u32 lane, u32 bytes, u64 value) {
  if (bytes == 8) {
    warp.slots<u64>(offset)[lane] = value;
  } else {
    warp.slots<u32>(offset)[lane] = static_cast<u32>(value);
  }
}

// A vector of registers into one; immediate: bits of an element; element_bytes: of the whole.
void pack(Warp& warp, const Instruction& instruction) {
  const u32 bits = static_cast<u32>(instruction.immediate);
  for_lanes(warp.active, [&](u32 lane) {
    u64 packed = 0;
    u32 at = 0;
    for (const Operand& part : instruction.operands[1].parts) {
      packed |= (read_slot(warp, part.offset, lane, 4) & ((1ull << bits) - 1)) << at;
      at += bits;
    }
    write_slot(warp, instruction.reg[0], lane, instruction.element_bytes, packed);
  });
}

void unpack(Warp& warp, const Instruction& instruction) {
  const u32 bits = static_cast<u32>(instruction.immediate);
  for_lanes(warp.active, [&](u32 lane) {
    u64 packed = read_slot(warp, instruction.reg[1], lane, instruction.element_bytes);
    for (const Operand& part : instruction.operands[0].parts) {
      if (part.is_register()) write_slot(warp, part.offset, lane, 4, packed & ((1ull << bits) - 1));
      packed >>= bits;
    }
  });
}

// A made-up clock that always advances.
void read_clock(Warp& warp, const Instruction& instruction) {
  const u64 now = warp.launch->clock + warp.steps;
  for_lanes(warp.active, [&](u32 lane) { write_slot(warp, instruction.reg[0], lane, instruction.element_bytes, now); });
}

// ---- cvt

enum class Number : u8 {
  kU8,
  kS8,
  kU16,
  kS16,
  kU32,
  kS32,
  kU64,
  kS64,
  kHalf,
  kBfloat,
  kFloat,
  kDouble,
  kTf32,
  kHalfPair,
  kBfloatPair,
  kOther
};

Number number_named(const string& type) {
  static const std::map<string, Number> names = {
      {"u8", Number::kU8},      {"b8", Number::kU8},          {"s8", Number::kS8},
      {"u16", Number::kU16},    {"b16", Number::kU16},        {"s16", Number::kS16},
      {"u32", Number::kU32},    {"b32", Number::kU32},        {"s32", Number::kS32},
      {"u64", Number::kU64},    {"b64", Number::kU64},        {"s64", Number::kS64},
      {"f16", Number::kHalf},   {"bf16", Number::kBfloat},    {"f32", Number::kFloat},
      {"f64", Number::kDouble}, {"f16x2", Number::kHalfPair}, {"bf16x2", Number::kBfloatPair},
      {"tf32", Number::kTf32}};
  const auto found = names.find(type);
  return found == names.end() ? Number::kOther : found->second;
}

bool is_integer(Number number) { return number <= Number::kS64; }

template <class T>
struct Limits {
  T low, high;
};
// Of the integer types, in the order of Number. As doubles, the upper ones of 64 bits are one too large.
constexpr Limits<i64> kIntegerLimits[] = {{0, 255},        {-128, 127},           {0, 65535},
                                          {-32768, 32767}, {0, 4294967295},       {INT32_MIN, INT32_MAX},
                                          {0, INT64_MAX},  {INT64_MIN, INT64_MAX}};
constexpr Limits<double> kDoubleLimits[] = {{0, 255},        {-128, 127},       {0, 65535},
                                            {-32768, 32767}, {0, 4294967295.0}, {-0x1p31, 2147483647.0},
                                            {0, 0x1p64},     {-0x1p63, 0x1p63}};

double round_to_integer(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::kNearest:
    case Rounding::kIntNearest: return std::nearbyint(value);
    case Rounding::kDown:
    case Rounding::kIntDown: return std::floor(value);
    case Rounding::kUp:
    case Rounding::kIntUp: return std::ceil(value);
    default: return std::trunc(value);
  }
}

i64 to_integer(double value, Number to) {
  const Limits<double>& limits = kDoubleLimits[static_cast<int>(to)];
  if (value != value) return 0;
  if (value <= limits.low) return to == Number::kS64 ? INT64_MIN : static_cast<i64>(limits.low);
  if (value >= limits.high) {
    if (to == Number::kU64) return -1;
    return to == Number::kS64 ? INT64_MAX : static_cast<i64>(limits.high);
  }
  return to == Number::kU64 ? static_cast<i64>(static_cast<u64>(value)) : static_cast<i64>(value);
}

u16 to_16_bits(const Instruction& instruction, float single, bool is_bfloat) {
  if (instruction.relu && single < 0) single = 0;
  if (instruction.rounding == Rounding::kZero) {
    if (!is_bfloat) return float_to_half_toward_zero(single);
    return single != single ? kHalfNan : static_cast<u16>(bit_cast<u32>(single) >> 16);
  }
  return is_bfloat ? float_to_bfloat(single) : float_to_half(single);
}

u32 to_tf32(const Instruction& instruction, float value) {
  if (instruction.relu && value < 0) value = 0;
  const u32 word = bit_cast<u32>(value);
  if ((word & 0x7f800000u) == 0x7f800000u) return word;
  switch (instruction.rounding) {
    case Rounding::kZero: return word & 0xffffe000u;
    case Rounding::kNearestAway: return (word + 0x1000u) & 0xffffe000u;
    default: return (word + 0xfffu + (word >> 13 & 1u)) & 0xffffe000u;
  }
}

// What a conversion works on: the sources as integers or as doubles, both exact.
struct Sources {
  i64 integers[32];
  double doubles[32];
};

void load_sources(Warp& warp, const Instruction& instruction, Number from, Sources& sources) {
  const u32* words = warp.slots<u32>(instruction.reg[1]);
  const u64* longs = warp.slots<u64>(instruction.reg[1]);
  u32 lower_halves[32];
  if (instruction.operands[1].is_register() && instruction.operands[1].bytes == 8 && from < Number::kU64) {
    for (u32 lane = 0; lane < 32; lane++) lower_halves[lane] = static_cast<u32>(longs[lane]);
    words = lower_halves;
  }
  i64* integers = sources.integers;
  double* doubles = sources.doubles;
  const u32 lanes = warp.active;
  switch (from) {
    case Number::kU8: for_lanes(lanes, [&](u32 lane) { integers[lane] = static_cast<u8>(words[lane]); }); break;
    case Number::kS8: for_lanes(lanes, [&](u32 lane) { integers[lane] = static_cast<i8>(words[lane]); }); break;
    case Number::kU16: for_lanes(lanes, [&](u32 lane) { integers[lane] = static_cast<u16>(words[lane]); }); break;
    case Number::kS16: for_lanes(lanes, [&](u32 lane) { integers[lane] = static_cast<i16>(words[lane]); }); break;
    case Number::kU32: for_lanes(lanes, [&](u32 lane) { integers[lane] = words[lane]; }); break;
    case Number::kS32: for_lanes(lanes, [&](u32 lane) { integers[lane] = static_cast<i32>(words[lane]); }); break;
    case Number::kU64:
    case Number::kS64: for_lanes(lanes, [&](u32 lane) { integers[lane] = static_cast<i64>(longs[lane]); }); break;
    case Number::kHalf:
      for_lanes(lanes, [&](u32 lane) { doubles[lane] = half_to_float(static_cast<u16>(words[lane])); });
      break;
    case Number::kBfloat:
      for_lanes(lanes, [&](u32 lane) { doubles[lane] = bfloat_to_float(static_cast<u16>(words[lane])); });
      break;
    case Number::kFloat:
      for_lanes(lanes, [&](u32 lane) {
        const float value = bit_cast<float>(words[lane]);
        doubles[lane] = instruction.flush ? flush_subnormal(value) : value;
      });
      break;
    default: for_lanes(lanes, [&](u32 lane) { doubles[lane] = bit_cast<double>(longs[lane]); });
  }
}

// element_bytes: width of the destination register.
void store_integers(Warp& warp, const Instruction& instruction, Number to, const i64* integers) {
  const auto store = [&](auto narrow) {
    for_lanes(warp.active, [&](u32 lane) {
      write_slot(warp, instruction.reg[0], lane, instruction.element_bytes, static_cast<u64>(narrow(integers[lane])));
    });
  };
  switch (to) {
    case Number::kU8: store([](i64 value) { return static_cast<u8>(value); }); break;
    case Number::kS8: store([](i64 value) { return static_cast<i64>(static_cast<i8>(value)); }); break;
    case Number::kU16: store([](i64 value) { return static_cast<u16>(value); }); break;
    case Number::kS16: store([](i64 value) { return static_cast<i64>(static_cast<i16>(value)); }); break;
    case Number::kU32: store([](i64 value) { return static_cast<u32>(value); }); break;
    case Number::kS32: store([](i64 value) { return static_cast<i64>(static_cast<i32>(value)); }); break;
    default: store([](i64 value) { return value; });
  }
}

void store_floats(Warp& warp, const Instruction& instruction, Number to, const double* doubles) {
  u32* words = warp.slots<u32>(instruction.reg[0]);
  const u32 lanes = warp.active;
  switch (to) {
    case Number::kFloat:
      for_lanes(lanes, [&](u32 lane) {
        const float value = static_cast<float>(doubles[lane]);
        words[lane] = bit_cast<u32>(instruction.flush ? flush_subnormal(value) : value);
      });
      break;
    case Number::kDouble: {
      double* out = warp.slots<double>(instruction.reg[0]);
      for_lanes(lanes, [&](u32 lane) { out[lane] = doubles[lane]; });
      break;
    }
    case Number::kTf32:
      for_lanes(lanes, [&](u32 lane) { words[lane] = to_tf32(instruction, static_cast<float>(doubles[lane])); });
      break;
    default:
      for_lanes(lanes, [&](u32 lane) {
        words[lane] = to_16_bits(instruction, round_to_odd(doubles[lane]), to == Number::kBfloat);
      });
  }
}

// variant: Number of the destination; modifier: of the source.
void convert(Warp& warp, const Instruction& instruction) {
  const Number to = static_cast<Number>(instruction.variant);
  const Number from = static_cast<Number>(instruction.modifier);
  Sources sources;
  load_sources(warp, instruction, from, sources);
  i64* integers = sources.integers;
  double* doubles = sources.doubles;
  const u32 lanes = warp.active;

  if (is_integer(to)) {
    const Limits<i64>& limits = kIntegerLimits[static_cast<int>(to)];
    if (!is_integer(from)) {
      for_lanes(lanes, [&](u32 lane) {
        integers[lane] = to_integer(round_to_integer(doubles[lane], instruction.rounding), to);
      });
    } else if (instruction.saturate) {
      for_lanes(lanes, [&](u32 lane) {
        const bool above_signed = from == Number::kU64 && integers[lane] < 0;
        if (above_signed && to == Number::kU64) return;
        integers[lane] = above_signed ? limits.high : std::clamp(integers[lane], limits.low, limits.high);
      });
    }
    return store_integers(warp, instruction, to, integers);
  }
  if (is_integer(from)) {    // to f32 in one rounding
    const bool to_float = to == Number::kFloat;
    const bool is_unsigned = from == Number::kU64;
    for_lanes(lanes, [&](u32 lane) {
      const i64 value = integers[lane];
      const u64 magnitude = static_cast<u64>(value);
      if (is_unsigned) {
        doubles[lane] = to_float ? static_cast<float>(magnitude) : static_cast<double>(magnitude);
      } else {
        doubles[lane] = to_float ? static_cast<float>(value) : static_cast<double>(value);
      }
    });
  } else {
    const bool to_whole = instruction.rounding >= Rounding::kIntNearest && instruction.rounding <= Rounding::kIntUp;
    if (to_whole) {
      for_lanes(lanes, [&](u32 lane) { doubles[lane] = round_to_integer(doubles[lane], instruction.rounding); });
    }
    if (instruction.saturate) {
      for_lanes(lanes, [&](u32 lane) {
        const double value = doubles[lane];
        doubles[lane] = value > 0 ? (value < 1 ? value : 1) : 0;
      });
    }
  }
  store_floats(warp, instruction, to, doubles);
}

// Two f32 to a pair of 16-bit floats, the first one in the upper half.
void convert_to_pair(Warp& warp, const Instruction& instruction) {
  const bool is_bfloat = static_cast<Number>(instruction.variant) == Number::kBfloatPair;
  u32* out = warp.slots<u32>(instruction.reg[0]);
  const float* high = warp.slots<float>(instruction.reg[1]);
  const float* low = warp.slots<float>(instruction.reg[2]);
  for_lanes(warp.active, [&](u32 lane) {
    const u32 upper = to_16_bits(instruction, high[lane], is_bfloat);
    out[lane] = upper << 16 | to_16_bits(instruction, low[lane], is_bfloat);
  });
}

void convert_rounded(Warp& warp, const Instruction& instruction) {
  static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  fesetround(modes[static_cast<int>(instruction.rounding)]);
  convert(warp, instruction);
  fesetround(FE_TONEAREST);
}

Handler decode_cvt(Kernel& kernel, Instruction& instruction) {
  if (instruction.words.size() < 3 || instruction.has("satfinite") || instruction.has("pack")) return nullptr;
  const string& to_type = instruction.type(1);
  const string& from_type = instruction.type();
  const Number to = number_named(to_type);
  const Number from = number_named(from_type);
  if (to == Number::kOther || from >= Number::kTf32) return nullptr;
  const Rounding stated = rounding_of(instruction);
  instruction.rounding = stated != Rounding::kUnstated         ? stated
                         : !is_integer(from) && is_integer(to) ? Rounding::kIntZero
                                                               : Rounding::kNearest;
  instruction.variant = static_cast<u8>(to);
  instruction.modifier = static_cast<u8>(from);
  // A register may be wider than the type that is read or written.
  const auto set = [&](size_t i, const string& type) {
    const Operand& operand = instruction.operands.at(i);
    const bool both_narrow = type_bytes(type) <= 4 && operand.bytes <= 4 && operand.bytes;
    instruction.reg[i] =
        operand.is_register() && both_narrow ? operand.offset : slot_of(kernel, instruction, operand, type);
  };
  if (instruction.operands.at(0).is_register() && instruction.operands[0].bytes == 8 && type_bytes(to_type) < 8) {
    instruction.reg[0] = instruction.operands[0].offset;
  } else {
    set(0, to_type);
  }
  if (instruction.operands.at(1).is_register() && instruction.operands[1].bytes == 8 && type_bytes(from_type) < 8) {
    if (!is_integer(from)) return nullptr;
    instruction.reg[1] = instruction.operands[1].offset;
  } else {
    set(1, from_type);
  }
  instruction.element_bytes = instruction.operands[0].bytes;
  if (to == Number::kHalfPair || to == Number::kBfloatPair) {
    if (from != Number::kFloat || instruction.operands.size() != 3) return nullptr;
    set(2, from_type);
    return convert_to_pair;
  }
  const bool is_directed = instruction.rounding >= Rounding::kZero && instruction.rounding <= Rounding::kUp;
  return is_directed && (to == Number::kFloat || to == Number::kDouble) ? convert_rounded : convert;
}

}    // namespace

Handler decode_convert(Kernel& kernel, Instruction& instruction) {
  return instruction.opcode() == "cvt" ? decode_cvt(kernel, instruction) : nullptr;
}

Handler decode_move(Kernel& kernel, Instruction& instruction) {
  if (instruction.opcode() != "mov") return nullptr;
  const string& type = instruction.type();
  const int bytes = type_bytes(type);
  Operand& to = instruction.operands.at(0);
  Operand& from = instruction.operands.at(1);
  if (bytes <= 0) return nullptr;
  instruction.element_bytes = static_cast<u8>(bytes);
  if (from.symbol == "%clock" || from.symbol == "%clock64" || from.symbol == "%globaltimer") {
    set_register(kernel, instruction, 0, type);
    return read_clock;
  }
  if (to.is_vector() || from.is_vector()) {
    const bool packs = from.is_vector();
    vector<Operand>& parts = packs ? from.parts : to.parts;
    const int part_bytes = bytes / static_cast<int>(parts.size());
    instruction.immediate = 8 * part_bytes;
    for (Operand& part : parts) {
      if (part.kind == OperandKind::kSink) continue;
      part.offset = slot_of(kernel, instruction, part, part_bytes == 4 ? "b32" : part_bytes == 2 ? "b16" : "b8");
      part.kind = OperandKind::kRegister;
    }
    const size_t whole = packs ? 0 : 1;
    set_register(kernel, instruction, whole, type);
    return packs ? pack : unpack;
  }
  set_registers(kernel, instruction, type, 2);
  return bytes == 8 ? move<u64> : move<u32>;
}

}    // namespace emulator
