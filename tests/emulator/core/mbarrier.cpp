// mbarrier: barriers in shared memory that count arrivals of threads and bytes of asynchronous copies.
#include <algorithm>

#include "machine.h"

namespace emulator {

// Copies land only when somebody polls for them, so that a missing wait shows in the results.
bool Mbarrier::deliver() {
  const auto due = std::move(deliveries);
  deliveries.clear();
  for (const auto& delivery : due) delivery();
  return !due.empty();
}

Mbarrier* find_mbarrier(Warp& warp, const Instruction& instruction, u32 lane, u64 address, Cta** owner) {
  u32 offset;
  if (!shared_pointer(warp, instruction, lane, address, 8, offset, owner)) return nullptr;
  Cta& cta = owner ? **owner : *warp.cta;
  const auto found = cta.mbarriers.find(offset);
  if (found == cta.mbarriers.end()) {
    warp.launch->report("mbarrier", instruction, where(warp, lane),
                        format("mbarrier at shared offset %u is not initialised", offset - kSharedReserved));
    return nullptr;
  }
  note_shared_read(warp, instruction, lane, offset, 8, Access::kAtomic, &cta);
  return &found->second;
}

void complete_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes_pending != 0) return;
  barrier.phase++;
  barrier.pending = barrier.expected;
  auto completed = std::make_shared<Clock>(barrier.arrivals);
  if (barrier.completed) {
    for (u32 i = 0; i < barrier.completed->time.size(); i++) raise_time(*completed, i, barrier.completed->time[i]);
  }
  barrier.completed = completed;
}

namespace {

enum Operation : u8 { kInit, kInvalidate, kExpect, kArrive, kArriveExpect, kPoll };

void initialise(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 count) {
  u32 offset;
  if (!shared_pointer(warp, instruction, lane, address, 8, offset)) return;
  check_alignment(warp, instruction, lane, address, 8);
  note_shared_write(warp, instruction, lane, offset, 8, nullptr, Access::kPlain);
  Mbarrier& barrier = warp.cta->mbarriers[offset];
  auto& [agent, reached] = warp.cta->mbarrier_agents[offset];
  if (!agent) agent = new_agent(warp) + 1;
  reached += barrier.phase + 1;    // the agent's time goes on when the barrier is made anew
  barrier = Mbarrier();
  barrier.agent = agent - 1;
  barrier.first_time = reached;
  barrier.expected = count;
  barrier.pending = count;
  warp.progressed = true;
}

void invalidate(Warp& warp, const Instruction& instruction, u32 lane, u64 address) {
  u32 offset;
  if (!shared_pointer(warp, instruction, lane, address, 8, offset)) return;
  note_shared_write(warp, instruction, lane, offset, 8, nullptr, Access::kPlain);
  const auto found = warp.cta->mbarriers.find(offset);
  if (found == warp.cta->mbarriers.end()) return;
  if (!found->second.deliveries.empty()) {
    warp.launch->report("mbarrier", instruction, where(warp, lane), "invalidated with copies in flight");
  }
  warp.cta->mbarrier_agents[offset].second += found->second.phase + 1;
  warp.cta->mbarriers.erase(found);
}

void arrive(Warp& warp, const Instruction& instruction, u32 lane, Mbarrier& barrier, u32 count) {
  const u32 phase = barrier.phase;
  release_clock(warp, lane, barrier.arrivals);
  barrier.pending -= count;
  if (barrier.pending < 0) {
    warp.launch->report("mbarrier", instruction, where(warp, lane), "more arrivals than the expected count");
    barrier.pending = 0;
  }
  complete_phase(barrier);
  const Operand& state = instruction.operands[0];
  if (instruction.immediate && state.is_register()) warp.slots<u64>(state.offset)[lane] = phase;
}

// test_wait and try_wait; modifier: 1 for the form with a parity.
void poll(Warp& warp, const Instruction& instruction, u32 lane, Mbarrier& barrier, u32 awaited, LastJoin& last) {
  const auto is_over = [&] {
    return instruction.modifier ? (barrier.phase & 1) != (awaited & 1) : barrier.phase > awaited;
  };
  if (!is_over() && barrier.deliver()) warp.progressed = true;
  const bool over = is_over();
  u32& result = warp.predicate(instruction.operands[0].offset);
  result = (result & ~(1u << lane)) | static_cast<u32>(over) << lane;
  if (over) {
    acquire_clock(warp, lane, barrier.completed, last);
  } else {
    warp.yielded = true;
  }
}

// variant: the operation; immediate: which operand is the address.
void mbarrier(Warp& warp, const Instruction& instruction) {
  const Operation operation = static_cast<Operation>(instruction.variant);
  const vector<Operand>& operands = instruction.operands;
  const size_t address_at = static_cast<size_t>(instruction.immediate);
  LastJoin last;
  for_lanes(warp.active, [&](u32 lane) {
    const u64 address = operand_address(warp, operands[address_at], lane);
    const bool has_value = address_at + 1 < operands.size();
    const u32 value = has_value ? static_cast<u32>(operand_value(warp, operands[address_at + 1], lane)) : 1;
    if (operation == kInit) return initialise(warp, instruction, lane, address, value);
    if (operation == kInvalidate) return invalidate(warp, instruction, lane, address);
    Cta* owner = nullptr;
    Mbarrier* barrier = find_mbarrier(warp, instruction, lane, address, instruction.in_cluster ? &owner : nullptr);
    if (!barrier) return;
    if (operation == kPoll) return poll(warp, instruction, lane, *barrier, value, last);
    warp.progressed = true;
    if (operation == kExpect || operation == kArriveExpect) barrier->bytes_pending += value;
    if (operation != kExpect) arrive(warp, instruction, lane, *barrier, operation == kArrive ? value : 1);
  });
}

}    // namespace

Handler decode_mbarrier(Kernel&, Instruction& instruction) {
  if (instruction.opcode() != "mbarrier") return nullptr;
  const string& name = instruction.words.at(1);
  if (name == "init") {
    instruction.variant = kInit;
  } else if (name == "inval") {
    instruction.variant = kInvalidate;
  } else if (name == "expect_tx") {
    instruction.variant = kExpect;
  } else if (name == "arrive") {
    instruction.variant = instruction.has("expect_tx") ? kArriveExpect : kArrive;
  } else if (name == "test_wait" || name == "try_wait") {
    instruction.variant = kPoll;
    instruction.modifier = instruction.has("parity");
  } else {
    return nullptr;
  }
  // Another block may only be told of an arrival or of bytes: it has no state to give back, and nobody else waits on
  // it.
  const bool tells =
      instruction.variant == kArrive || instruction.variant == kArriveExpect || instruction.variant == kExpect;
  const bool is_own = instruction.has("shared") || instruction.has("shared::cta");
  instruction.in_cluster = tells && !is_own;
  instruction.immediate = instruction.operands.at(0).kind == OperandKind::kAddress ? 0 : 1;
  if (instruction.operands.at(static_cast<size_t>(instruction.immediate)).kind != OperandKind::kAddress) return nullptr;
  return mbarrier;
}

}    // namespace emulator
