// atom and red, scalar and vector, on global and shared memory.
#include <algorithm>

#include "machine.h"
#include "numbers.h"

namespace emulator {
namespace {

enum Operation : u8 { kAdd, kMinimum, kMaximum, kAnd, kOr, kXor, kExchange, kCompareSwap, kIncrement, kDecrement };
const char* const kOperationNames[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};

template <class T>
T combine(Operation operation, T a, T b) {
  switch (operation) {
    case kAdd: return static_cast<T>(a + b);
    case kMinimum: return std::min(a, b);
    default: return std::max(a, b);
  }
}

template <>
float combine(Operation operation, float a, float b) {
  switch (operation) {
    case kAdd: return a + b;
    case kMinimum: return std::fmin(a, b);
    default: return std::fmax(a, b);
  }
}

u16 combine_halves(Operation operation, u64 a, u64 b, bool is_bfloat) {
  const u16 x = static_cast<u16>(a);
  const u16 y = static_cast<u16>(b);
  if (is_bfloat) return float_to_bfloat(combine(operation, bfloat_to_float(x), bfloat_to_float(y)));
  return float_to_half(combine(operation, half_to_float(x), half_to_float(y)));
}

// What memory holds afterwards.
u64 apply(Operation operation, const string& type, u64 old, u64 value, u64 swapped) {
  switch (operation) {
    case kAnd: return old & value;
    case kOr: return old | value;
    case kXor: return old ^ value;
    case kExchange: return value;
    case kCompareSwap: return old == value ? swapped : old;
    case kIncrement: return old >= value ? 0 : old + 1;
    case kDecrement: return old == 0 || old > value ? value : old - 1;
    default: break;
  }
  if (type == "f32") {
    const float a = bit_cast<float>(static_cast<u32>(old));
    return bit_cast<u32>(combine(operation, a, bit_cast<float>(static_cast<u32>(value))));
  }
  if (type == "f64") return bit_cast<u64>(bit_cast<double>(old) + bit_cast<double>(value));
  if (type == "f16" || type == "bf16") return combine_halves(operation, old, value, type == "bf16");
  if (type == "f16x2" || type == "bf16x2") {
    const bool is_bfloat = type == "bf16x2";
    const u64 high = combine_halves(operation, old >> 16, value >> 16, is_bfloat);
    return high << 16 | combine_halves(operation, old, value, is_bfloat);
  }
  if (type == "s32") return static_cast<u32>(combine(operation, static_cast<i32>(old), static_cast<i32>(value)));
  if (type == "s64") return static_cast<u64>(combine(operation, static_cast<i64>(old), static_cast<i64>(value)));
  if (type_bytes(type) == 4) return combine(operation, static_cast<u32>(old), static_cast<u32>(value));
  return combine(operation, old, value);
}

const Operand& element_of(const Operand& operand, u32 element) {
  return operand.is_vector() ? operand.parts[element] : operand;
}

u64 element_value(Warp& warp, const Instruction& instruction, const Operand& operand, u32 element, u32 lane) {
  const u32 offset = element_of(operand, element).offset;
  if (instruction.element_bytes == 8) return warp.slots<u64>(offset)[lane];
  return warp.slots<u32>(offset)[lane] & (instruction.element_bytes == 2 ? 0xffffu : 0xffffffffu);
}

// atom d, [a], b {, c} or red [a], b; variant: the operation.
void atomic(Warp& warp, const Instruction& instruction) {
  u64 addresses[32];
  u32 shared_offsets[32];
  u32 in_global = 0, in_shared = 0;
  bool changed = false;
  u64 hash = 0;
  const u32 bytes = instruction.access_bytes();
  const Operation operation = static_cast<Operation>(instruction.variant);
  const size_t source = instruction.has_result ? 2 : 1;
  const vector<Operand>& operands = instruction.operands;
  addresses_of(warp, instruction, addresses);
  for_lanes(warp.active, [&](u32 lane) {
    u8* memory;
    check_alignment(warp, instruction, lane, addresses[lane], bytes);
    if (space_of(instruction, addresses[lane]) == Space::kShared) {
      u32 offset;
      Cta* owner = nullptr;
      memory = shared_pointer(warp, instruction, lane, addresses[lane], bytes, offset,
                              instruction.in_cluster ? &owner : nullptr);
      if (memory) {
        note_shared_read(warp, instruction, lane, offset, bytes, Access::kAtomic, owner);
        note_shared_write(warp, instruction, lane, offset, bytes, nullptr, Access::kAtomic, owner);
        shared_offsets[lane] = offset;
        in_shared |= 1u << lane;
      }
    } else {
      memory = global_pointer(warp, instruction, lane, addresses[lane], bytes, true);
      if (memory) {
        in_global |= 1u << lane;
        note_global_write(warp, instruction, lane, addresses[lane], bytes, Proxy::kGeneric);
      }
    }
    for (u32 element = 0; element < instruction.vector_length; element++) {
      u64 old = 0;
      u8* place = memory + static_cast<size_t>(element) * instruction.element_bytes;
      if (memory) memcpy(&old, place, instruction.element_bytes);
      const u64 value = element_value(warp, instruction, operands[source], element, lane);
      const u64 swapped =
          operation == kCompareSwap ? element_value(warp, instruction, operands[source + 1], element, lane) : 0;
      const u64 result = apply(operation, instruction.type(), old, value, swapped);
      if (memory && memcmp(&old, &result, instruction.element_bytes)) {
        memcpy(place, &result, instruction.element_bytes);
        changed = true;
      }
      hash = hash * 31 + old;
      const Operand& destination = element_of(operands[0], element);
      if (!instruction.has_result || !destination.is_register()) continue;
      if (instruction.element_bytes == 8) {
        warp.slots<u64>(destination.offset)[lane] = old;
      } else {
        warp.slots<u32>(destination.offset)[lane] = static_cast<u32>(old);
      }
    }
  });
  if (in_global) {
    count_sectors(warp, instruction, addresses, in_global, bytes, true);
    for_lanes(in_global, [&](u32 lane) { mark_sector(warp, instruction, addresses[lane] >> 5, false); });
  }
  if (in_shared) count_wavefronts(warp, instruction, shared_offsets, in_shared, bytes);
  if (changed) {
    warp.progressed = true;
    warp.polled_pc = kNone;
  } else {
    note_poll(warp, instruction, hash);
  }
}

}    // namespace

Handler decode_atomic(Kernel& kernel, Instruction& instruction) {
  const string& opcode = instruction.opcode();
  if ((opcode != "atom" && opcode != "red") || instruction.has("async")) return nullptr;
  const string& type = instruction.type();
  const int bytes = type_bytes(type);
  if (bytes < 2) return nullptr;
  instruction.element_bytes = static_cast<u8>(bytes);
  instruction.strong = true;
  instruction.has_result = opcode == "atom";
  bool known = false;
  for (const string& word : instruction.words) {
    if (word == "global") instruction.space = Space::kGlobal;
    if (word.rfind("shared", 0) == 0) instruction.space = Space::kShared;
    if (word == "shared::cluster") instruction.in_cluster = true;
    if (word == "v2") instruction.vector_length = 2;
    if (word == "v4") instruction.vector_length = 4;
    if (word == "v8") instruction.vector_length = 8;
    for (u8 i = 0; i < 10; i++) {
      if (word != kOperationNames[i]) continue;
      instruction.variant = i;
      known = true;
    }
  }
  if (instruction.space == Space::kGeneric) instruction.in_cluster = true;
  if (!known || (type == "f64" && instruction.variant != kAdd)) return nullptr;
  const size_t source = instruction.has_result ? 2 : 1;
  decode_address(instruction, source - 1);
  const size_t sources = instruction.variant == kCompareSwap ? 2 : 1;    // a cache policy may follow
  for (size_t i = source; i < source + sources; i++) {
    Operand& operand = instruction.operands.at(i);
    vector<Operand*> elements = {&operand};
    if (operand.is_vector()) {
      elements.clear();
      for (Operand& part : operand.parts) elements.push_back(&part);
    }
    if (elements.size() != instruction.vector_length) return nullptr;
    for (Operand* element : elements) {
      element->offset = slot_of(kernel, instruction, *element, type);
      element->kind = OperandKind::kRegister;
    }
  }
  return atomic;
}

}    // namespace emulator
