// Warp collectives: shfl, vote, match, redux, elect, activemask. The scheduler has gathered the lanes of the member
// mask.
#include <algorithm>

#include "machine.h"

namespace emulator {
namespace {

enum Shuffle : u8 { kUp, kDown, kButterfly, kIndex };

// shfl d|p, a, b, c, mask; variant: Shuffle; immediate: the register of c.
void shuffle(Warp& warp, const Instruction& instruction) {
  u32 values[32];
  memcpy(values, warp.slots<u32>(instruction.reg[1]), sizeof values);
  const u32* amounts = warp.slots<u32>(instruction.reg[2]);
  const u32* clamps = warp.slots<u32>(static_cast<u32>(instruction.immediate));
  u32* out = warp.slots<u32>(instruction.reg[0]);
  u32 in_range_lanes = 0;
  for_lanes(warp.active, [&](u32 lane) {
    const i32 amount = static_cast<i32>(amounts[lane] & 31);
    const i32 clamp = static_cast<i32>(clamps[lane] & 31);
    const i32 segment = static_cast<i32>(clamps[lane] >> 8 & 31);
    const i32 self = static_cast<i32>(lane);
    const i32 first = self & segment;
    const i32 limit = first | (clamp & ~segment);
    i32 source;
    switch (instruction.variant) {
      case kUp: source = self - amount; break;
      case kDown: source = self + amount; break;
      case kButterfly: source = self ^ amount; break;
      default: source = first | (amount & ~segment);
    }
    const bool in_range = instruction.variant == kUp ? source >= limit : source <= limit;
    if (!in_range) source = self;
    if (!(warp.active >> source & 1)) {
      warp.launch->report("shfl-inactive", instruction, where(warp, lane),
                          format("reads lane %d, which does not take part", source));
    }
    out[lane] = values[source];
    in_range_lanes |= static_cast<u32>(in_range) << lane;
  });
  const vector<Operand>& second = instruction.operands[0].parts;
  if (!second.empty()) warp.set_predicate(second[0].offset, in_range_lanes);
}

enum Vote : u8 { kAll, kAny, kUniform, kBallot };

// variant: Vote; modifier: 1 when the predicate is negated.
void vote(Warp& warp, const Instruction& instruction) {
  u32 votes = warp.predicate(instruction.reg[1]);
  if (instruction.modifier) votes = ~votes;
  const u32* masks = warp.slots<u32>(instruction.reg[3]);
  u32 holds = 0;
  for_lanes(warp.active, [&](u32 lane) {
    const u32 group = masks[lane] & warp.active;
    const u32 mine = votes & group;
    bool result = false;
    switch (instruction.variant) {
      case kAll: result = mine == group; break;
      case kAny: result = mine != 0; break;
      case kUniform: result = mine == group || mine == 0; break;
      default: warp.slots<u32>(instruction.reg[0])[lane] = mine;
    }
    holds |= static_cast<u32>(result) << lane;
  });
  if (instruction.variant != kBallot) warp.set_predicate(instruction.reg[0], holds);
}

// variant: 1 for match.all.
void match(Warp& warp, const Instruction& instruction) {
  const u32* masks = warp.slots<u32>(instruction.reg[3]);
  const auto value = [&](u32 lane) -> u64 {
    if (instruction.element_bytes == 8) return warp.slots<u64>(instruction.reg[1])[lane];
    return warp.slots<u32>(instruction.reg[1])[lane];
  };
  u32 results[32];
  u32 all_equal = 0;
  for_lanes(warp.active, [&](u32 lane) {
    const u32 group = masks[lane] & warp.active;
    u32 equal = 0;
    for_lanes(group, [&](u32 other) { equal |= static_cast<u32>(value(other) == value(lane)) << other; });
    results[lane] = instruction.variant && equal != group ? 0 : equal;
    all_equal |= static_cast<u32>(equal == group) << lane;
  });
  for_lanes(warp.active, [&](u32 lane) { warp.slots<u32>(instruction.reg[0])[lane] = results[lane]; });
  const vector<Operand>& second = instruction.operands[0].parts;
  if (!second.empty()) warp.set_predicate(second[0].offset, all_equal);
}

const char* const kReductions[] = {"add", "and", "or", "xor", "min", "max"};

// variant: which of kReductions; modifier: 1 for signed values.
void reduce(Warp& warp, const Instruction& instruction) {
  const u32* masks = warp.slots<u32>(instruction.reg[3]);
  u32 values[32];
  memcpy(values, warp.slots<u32>(instruction.reg[1]), sizeof values);
  const auto combine = [&](u32 a, u32 b) {
    const bool a_is_less = instruction.modifier ? static_cast<i32>(a) < static_cast<i32>(b) : a < b;
    switch (instruction.variant) {
      case 0: return a + b;
      case 1: return a & b;
      case 2: return a | b;
      case 3: return a ^ b;
      case 4: return a_is_less ? a : b;
      default: return a_is_less ? b : a;
    }
  };
  for_lanes(warp.active, [&](u32 lane) {
    const u32 group = masks[lane] & warp.active;
    if (!group) return;
    u32 result = values[lowest_lane(group)];
    for_lanes(group & (group - 1), [&](u32 other) { result = combine(result, values[other]); });
    warp.slots<u32>(instruction.reg[0])[lane] = result;
  });
}

void active_mask(Warp& warp, const Instruction& instruction) {
  for_lanes(warp.active, [&](u32 lane) { warp.slots<u32>(instruction.reg[0])[lane] = warp.active; });
}

void elect(Warp& warp, const Instruction& instruction) {
  const u32* masks = warp.slots<u32>(instruction.reg[3]);
  const Operand& result = instruction.operands[0];
  u32 elected = 0;
  for_lanes(warp.active, [&](u32 lane) {
    const u32 group = masks[lane] & warp.active;
    const u32 leader = group ? lowest_lane(group) : lane;
    if (result.is_register()) warp.slots<u32>(result.offset)[lane] = leader;
    elected |= static_cast<u32>(leader == lane) << lane;
  });
  if (!result.parts.empty()) warp.set_predicate(result.parts[0].offset, elected);
}

}    // namespace

Handler decode_collective(Kernel& kernel, Instruction& instruction) {
  const string& opcode = instruction.opcode();
  const auto set = [&](size_t at, size_t operand, const char* type) {
    instruction.reg[at] = slot_of(kernel, instruction, instruction.operands.at(operand), type);
  };
  if (opcode == "activemask") {
    set(0, 0, "b32");
    return active_mask;
  }
  if (opcode != "shfl" && opcode != "vote" && opcode != "match" && opcode != "redux" && opcode != "elect")
    return nullptr;
  if (!instruction.has("sync")) return nullptr;
  instruction.control = Control::kCollective;
  instruction.has_mask = true;
  set(3, instruction.operands.size() - 1, "b32");
  if (opcode == "elect") return elect;
  if (opcode == "shfl") {
    set(0, 0, "b32");
    set(1, 1, "b32");
    set(2, 2, "b32");
    instruction.immediate = slot_of(kernel, instruction, instruction.operands.at(3), "b32");
    instruction.variant = instruction.has("up")     ? kUp
                          : instruction.has("down") ? kDown
                          : instruction.has("bfly") ? kButterfly
                                                    : kIndex;
    return shuffle;
  }
  if (opcode == "vote") {
    instruction.variant = instruction.has("all")   ? kAll
                          : instruction.has("any") ? kAny
                          : instruction.has("uni") ? kUniform
                                                   : kBallot;
    set(0, 0, instruction.variant == kBallot ? "b32" : "pred");
    set(1, 1, "pred");
    instruction.modifier = instruction.operands[1].negated;
    return vote;
  }
  if (opcode == "match") {
    instruction.element_bytes = instruction.type() == "b64" ? 8 : 4;
    instruction.variant = instruction.has("all");
    set(0, 0, "b32");
    set(1, 1, instruction.type().c_str());
    return match;
  }
  if (instruction.type() == "f32") return nullptr;    // sm_100
  for (u8 i = 0; i < 6; i++) {
    if (instruction.has(kReductions[i])) instruction.variant = i;
  }
  instruction.modifier = instruction.type() == "s32";
  set(0, 0, "b32");
  set(1, 1, "b32");
  return reduce;
}

}    // namespace emulator
