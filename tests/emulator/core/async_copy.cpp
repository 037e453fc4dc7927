// cp.async: the source is read at once, the bytes land in shared memory only when somebody waits for them.
//
// So a missing wait shows in the results as well as in the race detector.
#include <algorithm>

#include "machine.h"

namespace emulator {
namespace {

// modifier of cp.async: what the fourth operand is.
enum : u8 { kNoFourth, kSourceBytes, kIgnoreSource };

u32 bytes_to_take(Warp& warp, const Instruction& instruction, u32 lane) {
  const u32 bytes = instruction.element_bytes;
  switch (instruction.modifier) {
    case kSourceBytes: return std::min(bytes, warp.slots<u32>(instruction.reg[3])[lane]);
    case kIgnoreSource: return warp.predicate(instruction.reg[3]) >> lane & 1 ? 0 : bytes;
    default: return bytes;
  }
}

void copy_async(Warp& warp, const Instruction& instruction) {
  u32 from_global = 0, into_shared = 0;
  u32 offsets[32];
  u64 sources[32];
  const u32 bytes = instruction.element_bytes;
  for_lanes(warp.active, [&](u32 lane) {
    const u64 destination = operand_address(warp, instruction.operands[0], lane);
    sources[lane] = operand_address(warp, instruction.operands[1], lane);
    const u32 taken = bytes_to_take(warp, instruction, lane);    // the rest is filled with zeros
    check_alignment(warp, instruction, lane, destination, bytes);
    if (taken) check_alignment(warp, instruction, lane, sources[lane], bytes);
    AsyncCopy copy{};
    copy.lane = lane;
    copy.bytes = bytes;
    copy.pc = instruction.pc;
    copy.group = warp.async_groups[lane];
    if (!shared_pointer(warp, instruction, lane, destination, bytes, copy.destination)) return;
    const u8* source = taken ? global_pointer(warp, instruction, lane, sources[lane], taken, false) : nullptr;
    if (source) {
      memcpy(copy.data, source, taken);
      note_global_read(warp, instruction, lane, sources[lane], taken, Proxy::kGeneric);
      from_global |= 1u << lane;
    }
    note_shared_write(warp, instruction, lane, copy.destination, bytes, nullptr, Access::kCopyInFlight);
    offsets[lane] = copy.destination;
    into_shared |= 1u << lane;
    warp.async_copies.push_back(copy);
  });
  Counter& counter = warp.launch->counter(instruction);
  if (into_shared) {
    const Counter before = counter;    // one request, counted with its global side
    count_wavefronts(warp, instruction, offsets, into_shared, bytes);
    counter.bytes = before.bytes;
    counter.requests = before.requests;
  }
  if (from_global) count_sectors(warp, instruction, sources, from_global, bytes, false);
}

void commit_group(Warp& warp, const Instruction&) {
  for_lanes(warp.active, [&](u32 lane) { warp.async_groups[lane]++; });
}

// immediate: groups that may stay in flight; variant: 1 for wait_all.
void wait_group(Warp& warp, const Instruction& instruction) {
  if (!warp.async_copies.empty()) {
    land_async_copies(warp, warp.active, static_cast<u32>(instruction.immediate), instruction.variant);
  }
  warp.progressed = true;
}

// cp.async.mbarrier.arrive: as if the copies were complete now. variant: 1 for noinc.
void arrive_on_mbarrier(Warp& warp, const Instruction& instruction) {
  for_lanes(warp.active, [&](u32 lane) {
    Mbarrier* barrier = find_mbarrier(warp, instruction, lane, operand_address(warp, instruction.operands[0], lane));
    if (!barrier) return;
    land_async_copies(warp, 1u << lane, 0, true);
    release_clock(warp, lane, barrier->arrivals);
    if (instruction.variant) barrier->pending--;    // otherwise one more arrival was expected, and it has come
    complete_phase(*barrier);
    warp.progressed = true;
  });
}

}    // namespace

void land_async_copies(Warp& warp, u32 lanes, u32 groups_left, bool all) {
  size_t kept = 0;
  for (AsyncCopy& copy : warp.async_copies) {
    const bool is_due = all || copy.group + groups_left < warp.async_groups[copy.lane];
    if (!(lanes >> copy.lane & 1) || !is_due) {
      warp.async_copies[kept++] = copy;
      continue;
    }
    memcpy(&warp.cta->shared[copy.destination], copy.data, copy.bytes);
    note_copy_landed(warp, copy);
  }
  warp.async_copies.resize(kept);
}

Handler decode_async_copy(Kernel& kernel, Instruction& instruction) {
  if (instruction.words.size() < 2 || instruction.opcode() != "cp" || instruction.words[1] != "async") return nullptr;
  if (instruction.has("bulk")) return nullptr;
  const vector<Operand>& operands = instruction.operands;
  if (instruction.has("commit_group")) return commit_group;
  if (instruction.has("wait_group") || instruction.has("wait_all")) {
    instruction.variant = instruction.has("wait_all");
    instruction.immediate = instruction.variant ? 0 : static_cast<i64>(operands.at(0).bits);
    return wait_group;
  }
  if (instruction.has("mbarrier")) {
    instruction.variant = instruction.has("noinc");
    return arrive_on_mbarrier;
  }
  const u64 bytes = operands.at(2).bits;
  if (bytes != 4 && bytes != 8 && bytes != 16) return nullptr;
  instruction.element_bytes = static_cast<u8>(bytes);
  const size_t without_fourth = instruction.has("L2::cache_hint") ? 4 : 3;
  if (operands.size() > without_fourth) {
    const bool is_predicate = operands[3].is_register() && operands[3].bytes == 0;
    instruction.modifier = is_predicate ? kIgnoreSource : kSourceBytes;
    instruction.reg[3] = slot_of(kernel, instruction, operands[3], is_predicate ? "pred" : "u32");
  }
  return copy_async;
}

}    // namespace emulator
