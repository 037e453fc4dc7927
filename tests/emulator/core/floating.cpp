// Floating-point arithmetic: f32, f64, f16, bf16 and pairs of the 16-bit types.
//
// Approximate functions (ex2, rcp, tanh...) are computed accurately.
#include <algorithm>
#include <cfenv>

#include "lanewise.h"

namespace emulator {
namespace {

// Each operation is written once, for numbers; pairs apply it to both halves.
#define EMULATOR_UNARY(name, expression)                      \
  struct name {                                               \
    template <class T>                                        \
    static T apply(T a) {                                     \
      return expression;                                      \
    }                                                         \
    template <class T>                                        \
    static Pair<T> apply(Pair<T> a) {                         \
      return map_pair(a, [](T x) { return name::apply(x); }); \
    }                                                         \
  };
#define EMULATOR_BINARY(name, expression)                                \
  struct name {                                                          \
    template <class T>                                                   \
    static T apply(T a, T b) {                                           \
      return expression;                                                 \
    }                                                                    \
    template <class T>                                                   \
    static Pair<T> apply(Pair<T> a, Pair<T> b) {                         \
      return map_pair(a, b, [](T x, T y) { return name::apply(x, y); }); \
    }                                                                    \
  };

EMULATOR_UNARY(Absolute, std::fabs(a))
EMULATOR_UNARY(Negate, -a)
EMULATOR_UNARY(Exp2, std::exp2(a))
EMULATOR_UNARY(Log2, std::log2(a))
EMULATOR_UNARY(Tanh, std::tanh(a))
EMULATOR_UNARY(Sine, std::sin(a))
EMULATOR_UNARY(Cosine, std::cos(a))
EMULATOR_UNARY(Reciprocal, 1 / a)
EMULATOR_UNARY(ReciprocalRoot, 1 / std::sqrt(a))
EMULATOR_UNARY(SquareRoot, std::sqrt(a))
EMULATOR_BINARY(Add, a + b)
EMULATOR_BINARY(Subtract, a - b)
EMULATOR_BINARY(Multiply, a* b)
EMULATOR_BINARY(Divide, a / b)
EMULATOR_BINARY(CopySign, std::copysign(b, a))
// Of a number and a NaN the number, and -0 is less than +0; the NaN forms give NaN instead.
EMULATOR_BINARY(Minimum, a != a ? b : b != b ? a : a < b ? a : b < a ? b : std::signbit(a) ? a : b)
EMULATOR_BINARY(Maximum, a != a ? b : b != b ? a : a > b ? a : b > a ? b : std::signbit(a) ? b : a)
EMULATOR_BINARY(MinimumNan, a != a || b != b ? static_cast<T>(NAN) : Minimum::apply(a, b))
EMULATOR_BINARY(MaximumNan, a != a || b != b ? static_cast<T>(NAN) : Maximum::apply(a, b))

#undef EMULATOR_UNARY
#undef EMULATOR_BINARY

// .xorsign.abs: of the magnitudes, with the sign of the product.
template <class Operation>
struct OfMagnitudes {
  template <class T>
  static T apply(T a, T b) {
    const T result = Operation::apply(std::fabs(a), std::fabs(b));
    return std::signbit(a) != std::signbit(b) ? -result : result;
  }
  template <class T>
  static Pair<T> apply(Pair<T> a, Pair<T> b) {
    return map_pair(a, b, [](T x, T y) { return OfMagnitudes::apply(x, y); });
  }
};

struct FusedMultiplyAdd {
  template <class T>
  static T apply(T a, T b, T c) {
    return std::fma(a, b, c);
  }
  template <class T>
  static Pair<T> apply(Pair<T> a, Pair<T> b, Pair<T> c) {
    return {std::fma(a.low, b.low, c.low), std::fma(a.high, b.high, c.high)};
  }
};

// Wrappers around another handler: directed rounding, saturation to [0, 1], relu of 16-bit results.
void with_rounding(Warp& warp, const Instruction& instruction) {
  static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  fesetround(modes[static_cast<int>(instruction.rounding)]);
  instruction.inner(warp, instruction);
  fesetround(FE_TONEAREST);
}

template <class T>
void with_saturation(Warp& warp, const Instruction& instruction) {
  instruction.inner(warp, instruction);
  T* out = warp.slots<T>(instruction.reg[0]);
  for_lanes(warp.active, [&](u32 lane) {
    const T value = out[lane];
    out[lane] = value > 0 ? (value < 1 ? value : 1) : 0;    // NaN becomes 0
  });
}

void with_relu(Warp& warp, const Instruction& instruction) {
  instruction.inner(warp, instruction);
  u32* out = warp.slots<u32>(instruction.reg[0]);
  for_lanes(warp.active, [&](u32 lane) {
    for (u32 half : {0u, 16u}) {
      if (out[lane] >> half & 0x8000u) out[lane] &= ~(0xffffu << half);
    }
  });
}

template <template <class, class> class Shape, class Operation>
Handler by_type(const string& type, bool flush) {
  if (type == "f32") return flush ? Shape<FlushedFloat, Operation>::run : Shape<float, Operation>::run;
  if (type == "f64") return Shape<double, Operation>::run;
  if (type == "f16") return Shape<Half, Operation>::run;
  if (type == "bf16") return Shape<Bfloat, Operation>::run;
  if (type == "f16x2") return Shape<HalfPair, Operation>::run;
  if (type == "bf16x2") return Shape<BfloatPair, Operation>::run;
  return nullptr;
}
template <class T, class Operation>
struct Unary {
  static constexpr Handler run = unary<T, Operation>;
};
template <class T, class Operation>
struct Binary {
  static constexpr Handler run = binary<T, Operation>;
};
template <class T, class Operation>
struct Ternary {
  static constexpr Handler run = ternary<T, Operation>;
};

template <class Operation>
Handler one(Kernel& kernel, Instruction& instruction) {
  set_registers(kernel, instruction, instruction.type(), 2);
  return by_type<Unary, Operation>(instruction.type(), instruction.flush);
}
template <class Operation>
Handler two(Kernel& kernel, Instruction& instruction) {
  if (instruction.operands.size() != 3) return nullptr;
  set_registers(kernel, instruction, instruction.type(), 3);
  return by_type<Binary, Operation>(instruction.type(), instruction.flush);
}
template <class Operation>
Handler extremum(Kernel& kernel, Instruction& instruction) {
  return instruction.has("xorsign") ? two<OfMagnitudes<Operation>>(kernel, instruction)
                                    : two<Operation>(kernel, instruction);
}
template <class Operation>
Handler three(Kernel& kernel, Instruction& instruction) {
  set_registers(kernel, instruction, instruction.type(), 4);
  return by_type<Ternary, Operation>(instruction.type(), instruction.flush);
}

using Decoder = Handler (*)(Kernel&, Instruction&);
const std::map<string, Decoder>& decoders() {
  static const std::map<string, Decoder> table = {
      {"add", two<Add>},
      {"sub", two<Subtract>},
      {"mul", two<Multiply>},
      {"div", two<Divide>},
      {"copysign", two<CopySign>},
      {"fma", three<FusedMultiplyAdd>},
      {"mad", three<FusedMultiplyAdd>},
      {"abs", one<Absolute>},
      {"neg", one<Negate>},
      {"ex2", one<Exp2>},
      {"lg2", one<Log2>},
      {"tanh", one<Tanh>},
      {"sin", one<Sine>},
      {"cos", one<Cosine>},
      {"rcp", one<Reciprocal>},
      {"rsqrt", one<ReciprocalRoot>},
      {"sqrt", one<SquareRoot>},
  };
  return table;
}

}    // namespace

Handler decode_float(Kernel& kernel, Instruction& instruction) {
  const string& opcode = instruction.opcode();
  const string& type = instruction.type();
  if (!is_float_type(type)) return nullptr;
  if (opcode == "min" || opcode == "max") {
    const bool nan = instruction.has("NaN");
    if (opcode == "min")
      return nan ? extremum<MinimumNan>(kernel, instruction) : extremum<Minimum>(kernel, instruction);
    return nan ? extremum<MaximumNan>(kernel, instruction) : extremum<Maximum>(kernel, instruction);
  }
  const auto found = decoders().find(opcode);
  if (found == decoders().end()) return nullptr;
  const Handler handler = found->second(kernel, instruction);
  if (!handler) return nullptr;

  const Rounding rounding = rounding_of(instruction);
  const bool is_directed = rounding == Rounding::kZero || rounding == Rounding::kDown || rounding == Rounding::kUp;
  if ((is_directed || instruction.saturate) && type != "f32" && type != "f64") return nullptr;
  if (is_directed + instruction.saturate + instruction.relu > 1) return nullptr;    // no two wrappers at once
  instruction.inner = handler;
  if (is_directed) {
    instruction.rounding = rounding;
    return with_rounding;
  }
  if (instruction.saturate) return type == "f64" ? with_saturation<double> : with_saturation<float>;
  if (instruction.relu) return with_relu;
  return handler;
}

}    // namespace emulator
