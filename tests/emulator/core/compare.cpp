// Comparisons, selection, and logic of predicates.
#include "lanewise.h"

namespace emulator {
namespace {

enum class Comparison : u8 {
  kEqual,
  kNotEqual,
  kLess,
  kLessEqual,
  kGreater,
  kGreaterEqual,
  kEqualOrNan,
  kNotEqualOrNan,
  kLessOrNan,
  kLessEqualOrNan,
  kGreaterOrNan,
  kGreaterEqualOrNan,
  kNumbers,
  kNan,
};

template <Comparison comparison, class T>
bool compare(T a, T b) {
  const bool unordered = a != a || b != b;
  switch (comparison) {
    case Comparison::kEqual: return !unordered && a == b;
    case Comparison::kNotEqual: return !unordered && a != b;
    case Comparison::kLess: return a < b;
    case Comparison::kLessEqual: return a <= b;
    case Comparison::kGreater: return a > b;
    case Comparison::kGreaterEqual: return a >= b;
    case Comparison::kEqualOrNan: return unordered || a == b;
    case Comparison::kNotEqualOrNan: return unordered || a != b;
    case Comparison::kLessOrNan: return unordered || a < b;
    case Comparison::kLessEqualOrNan: return unordered || a <= b;
    case Comparison::kGreaterOrNan: return unordered || a > b;
    case Comparison::kGreaterEqualOrNan: return unordered || a >= b;
    case Comparison::kNumbers: return !unordered;
    default: return unordered;
  }
}

template <class T>
constexpr bool kIsPair = std::is_same_v<T, HalfPair> || std::is_same_v<T, BfloatPair>;

// Lanes for which the comparison holds; of pairs, of the low or the high half.
template <class T, Comparison comparison>
u32 compare_lanes(Warp& warp, const Instruction& instruction, bool high) {
  using Slot = typename Type<T>::Slot;
  const Slot* a = warp.slots<Slot>(instruction.reg[1]);
  const Slot* b = warp.slots<Slot>(instruction.reg[2]);
  u32 lanes = 0;
  for (u32 lane = 0; lane < 32; lane++) {
    const auto x = Type<T>::load(a[lane]);
    const auto y = Type<T>::load(b[lane]);
    bool holds;
    if constexpr (kIsPair<T>) {
      holds = high ? compare<comparison>(x.high, y.high) : compare<comparison>(x.low, y.low);
    } else {
      holds = compare<comparison>(x, y);
    }
    lanes |= static_cast<u32>(holds) << lane;
  }
  return lanes;
}

// modifier, flags of setp.
constexpr u8 kNegatedInput = 1, kSecondResult = 2, kSecondIsHighHalf = 4;

// setp p|q, a, b, c: variant 1, 2, 3 combines with c by and, or, xor; immediate: the register of q.
template <class T, Comparison comparison>
void set_predicate(Warp& warp, const Instruction& instruction) {
  u32 input = instruction.variant ? warp.predicate(instruction.reg[3]) : 0;
  if (instruction.modifier & kNegatedInput) input = ~input;
  const auto combine = [&](u32 lanes) {
    switch (instruction.variant) {
      case 1: return lanes & input;
      case 2: return lanes | input;
      case 3: return lanes ^ input;
      default: return lanes;
    }
  };
  const u32 holds = compare_lanes<T, comparison>(warp, instruction, false);
  warp.set_predicate(instruction.reg[0], combine(holds));
  if (instruction.modifier & kSecondResult) {
    const bool high_half = instruction.modifier & kSecondIsHighHalf;
    const u32 second = high_half ? compare_lanes<T, comparison>(warp, instruction, true) : ~holds;
    warp.set_predicate(static_cast<u32>(instruction.immediate), combine(second));
  }
}

// set: the result is a register; immediate: what it holds where the comparison is true.
template <class T, Comparison comparison>
void set_value(Warp& warp, const Instruction& instruction) {
  const u32 low = compare_lanes<T, comparison>(warp, instruction, false);
  const u32 high = kIsPair<T> ? compare_lanes<T, comparison>(warp, instruction, true) : low;
  const u32 truth = static_cast<u32>(instruction.immediate);
  u32* out = warp.slots<u32>(instruction.reg[0]);
  for_lanes(warp.active, [&](u32 lane) {
    out[lane] = (low >> lane & 1 ? truth & 0xffffu : 0) | (high >> lane & 1 ? truth & 0xffff0000u : 0);
  });
}

template <class T, Comparison comparison>
Handler comparing(bool is_set) {
  return is_set ? set_value<T, comparison> : set_predicate<T, comparison>;
}

template <class T>
Handler by_comparison(const string& name, bool is_set) {
  if (name == "eq") return comparing<T, Comparison::kEqual>(is_set);
  if (name == "ne") return comparing<T, Comparison::kNotEqual>(is_set);
  if (name == "lt" || name == "lo") return comparing<T, Comparison::kLess>(is_set);
  if (name == "le" || name == "ls") return comparing<T, Comparison::kLessEqual>(is_set);
  if (name == "gt" || name == "hi") return comparing<T, Comparison::kGreater>(is_set);
  if (name == "ge" || name == "hs") return comparing<T, Comparison::kGreaterEqual>(is_set);
  if constexpr (!std::is_integral_v<T>) {
    if (name == "equ") return comparing<T, Comparison::kEqualOrNan>(is_set);
    if (name == "neu") return comparing<T, Comparison::kNotEqualOrNan>(is_set);
    if (name == "ltu") return comparing<T, Comparison::kLessOrNan>(is_set);
    if (name == "leu") return comparing<T, Comparison::kLessEqualOrNan>(is_set);
    if (name == "gtu") return comparing<T, Comparison::kGreaterOrNan>(is_set);
    if (name == "geu") return comparing<T, Comparison::kGreaterEqualOrNan>(is_set);
    if (name == "num") return comparing<T, Comparison::kNumbers>(is_set);
    if (name == "nan") return comparing<T, Comparison::kNan>(is_set);
  }
  return nullptr;
}

Handler comparison_handler(const string& name, const string& type, bool flush, bool is_set) {
  if (type == "u16" || type == "b16") return by_comparison<u16>(name, is_set);
  if (type == "s16") return by_comparison<i16>(name, is_set);
  if (type == "u32" || type == "b32") return by_comparison<u32>(name, is_set);
  if (type == "s32") return by_comparison<i32>(name, is_set);
  if (type == "u64" || type == "b64") return by_comparison<u64>(name, is_set);
  if (type == "s64") return by_comparison<i64>(name, is_set);
  if (type == "f32") return flush ? by_comparison<FlushedFloat>(name, is_set) : by_comparison<float>(name, is_set);
  if (type == "f64") return by_comparison<double>(name, is_set);
  if (type == "f16") return by_comparison<Half>(name, is_set);
  if (type == "bf16") return by_comparison<Bfloat>(name, is_set);
  if (type == "f16x2") return by_comparison<HalfPair>(name, is_set);
  if (type == "bf16x2") return by_comparison<BfloatPair>(name, is_set);
  return nullptr;
}

u32 truth_of(const string& type) {
  static const std::map<string, u32> truths = {
      {"f32", 0x3f800000u}, {"f16", 0x3c00u}, {"bf16", 0x3f80u}, {"f16x2", 0x3c003c00u}, {"bf16x2", 0x3f803f80u}};
  const auto found = truths.find(type);
  return found != truths.end() ? found->second : type_bytes(type) == 2 ? 0xffffu : 0xffffffffu;
}

Handler decode_comparison(Kernel& kernel, Instruction& instruction) {
  const bool is_set = instruction.opcode() == "set";
  const string& type = instruction.type();
  const Handler handler = comparison_handler(instruction.words.at(1), type, instruction.flush, is_set);
  if (!handler) return nullptr;
  if (instruction.has("and")) instruction.variant = 1;
  if (instruction.has("or")) instruction.variant = 2;
  if (instruction.has("xor")) instruction.variant = 3;
  set_register(kernel, instruction, 1, type);
  set_register(kernel, instruction, 2, type);
  if (is_set) {
    if (instruction.variant) return nullptr;
    set_register(kernel, instruction, 0, instruction.type(1));
    instruction.immediate = truth_of(instruction.type(1));
    return handler;
  }
  set_register(kernel, instruction, 0, "pred");
  const Operand& result = instruction.operands[0];
  if (!result.parts.empty()) {
    instruction.modifier |= kSecondResult;
    if (type == "f16x2" || type == "bf16x2") instruction.modifier |= kSecondIsHighHalf;
    instruction.immediate = slot_of(kernel, instruction, result.parts[0], "pred");
  }
  if (instruction.variant) {
    set_register(kernel, instruction, 3, "pred");
    if (instruction.operands[3].negated) instruction.modifier |= kNegatedInput;
  }
  return handler;
}

// variant: 1 when the predicate is negated.
template <class Slot>
void select(Warp& warp, const Instruction& instruction) {
  Slot* out = warp.slots<Slot>(instruction.reg[0]);
  const Slot* a = warp.slots<Slot>(instruction.reg[1]);
  const Slot* b = warp.slots<Slot>(instruction.reg[2]);
  u32 chooses_a = warp.predicate(instruction.reg[3]);
  if (instruction.variant) chooses_a = ~chooses_a;
  for_lanes(warp.active, [&](u32 lane) { out[lane] = chooses_a >> lane & 1 ? a[lane] : b[lane]; });
}

// variant: which class of numbers, in the order of `kClasses`.
const char* const kClasses[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
template <class T>
void test_class(Warp& warp, const Instruction& instruction) {
  const T* values = warp.slots<T>(instruction.reg[1]);
  u32 lanes = 0;
  for (u32 lane = 0; lane < 32; lane++) {
    const T value = values[lane];
    bool holds = false;
    switch (instruction.variant) {
      case 0: holds = std::isfinite(value); break;
      case 1: holds = std::isinf(value); break;
      case 2: holds = value == value; break;
      case 3: holds = value != value; break;
      case 4: holds = std::fpclassify(value) == FP_NORMAL; break;
      default: holds = std::fpclassify(value) == FP_SUBNORMAL;
    }
    lanes |= static_cast<u32>(holds) << lane;
  }
  warp.set_predicate(instruction.reg[0], lanes);
}

// Logic of predicates; variant: and, or, xor, not, mov. modifier: bit i is set when source i is negated.
enum : u8 { kAnd, kOr, kXor, kNot, kMove };
void predicate_logic(Warp& warp, const Instruction& instruction) {
  u32 a = warp.predicate(instruction.reg[1]);
  u32 b = instruction.variant < kNot ? warp.predicate(instruction.reg[2]) : 0;
  if (instruction.modifier & 1) a = ~a;
  if (instruction.modifier & 2) b = ~b;
  u32 result = a;
  switch (instruction.variant) {
    case kAnd: result = a & b; break;
    case kOr: result = a | b; break;
    case kXor: result = a ^ b; break;
    case kNot: result = ~a; break;
    default: break;
  }
  warp.set_predicate(instruction.reg[0], result);
}

}    // namespace

Handler decode_compare(Kernel& kernel, Instruction& instruction) {
  const string& opcode = instruction.opcode();
  const string& type = instruction.type();
  if (opcode == "setp" || opcode == "set") return decode_comparison(kernel, instruction);
  if (opcode == "selp") {
    set_registers(kernel, instruction, type, 3);
    set_register(kernel, instruction, 3, "pred");
    instruction.variant = instruction.operands[3].negated;
    return type_bytes(type) == 8 ? select<u64> : select<u32>;
  }
  if (opcode == "testp") {
    for (u8 i = 0; i < 6; i++) {
      if (instruction.has(kClasses[i])) instruction.variant = i;
    }
    set_register(kernel, instruction, 0, "pred");
    set_register(kernel, instruction, 1, type);
    return type == "f64" ? test_class<double> : test_class<float>;
  }
  if (type == "pred") {
    static const char* names[] = {"and", "or", "xor", "not", "mov"};
    for (u8 i = 0; i < 5; i++) {
      if (opcode != names[i]) continue;
      instruction.variant = i;
      const size_t sources = i < kNot ? 2 : 1;
      set_registers(kernel, instruction, "pred", 1 + sources);
      for (size_t j = 0; j < sources; j++) {
        if (instruction.operands[j + 1].negated) instruction.modifier |= static_cast<u8>(1u << j);
      }
      return predicate_logic;
    }
  }
  return nullptr;
}

}    // namespace emulator
