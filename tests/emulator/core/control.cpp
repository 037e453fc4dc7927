// Control flow of a warp: branches, calls, barriers, and waiting for the lanes of a collective.
#include <algorithm>

#include "machine.h"

namespace emulator {

// barrier.cluster.arrive: it is a barrier of threads, each of which arrives, then waits.
static void arrive_at_cluster(Warp& warp, const Instruction& instruction) {
  Cluster& cluster = *warp.cta->cluster;
  if (const u32 again = warp.at_cluster_barrier & warp.active) {
    warp.launch->report("barrier", instruction, where(warp, lowest_lane(again)),
                        "arrives at the barrier of the cluster a second time before it has waited");
  }
  for_lanes(warp.active, [&](u32 lane) { warp.cluster_phase[lane] = cluster.phase; });
  warp.at_cluster_barrier |= warp.active;
  cluster.barrier.arrived += count_lanes(warp.active);
  arrive_clocks(warp, cluster.barrier, warp.active);
  warp.unordered = warp.progressed = true;
  cluster.check_barrier();
}

bool decode_control(Kernel& kernel, Instruction& instruction) {
  const string& opcode = instruction.opcode();
  const vector<Operand>& operands = instruction.operands;
  const auto set = [&](size_t at, size_t operand, const char* type) {
    instruction.reg[at] = slot_of(kernel, instruction, operands.at(operand), type);
  };
  if (opcode == "exit") {
    instruction.control = Control::kExit;
  } else if (opcode == "trap" || opcode == "brkpt") {
    instruction.control = Control::kTrap;
  } else if (opcode == "nanosleep") {
    instruction.control = Control::kYield;
  } else if ((opcode == "bar" || opcode == "barrier") && instruction.has("warp")) {
    instruction.control = Control::kWarpBarrier;
    set(3, 0, "b32");
  } else if (opcode == "barrier" && instruction.has("cluster")) {
    instruction.aligned = instruction.has("aligned");
    if (instruction.has("relaxed")) return false;
    if (instruction.has("wait")) {
      instruction.control = Control::kClusterWait;
    } else {
      instruction.handler = arrive_at_cluster;
      instruction.control = instruction.aligned ? Control::kCollective : Control::kNone;
    }
  } else if (opcode == "setmaxnreg") {
    instruction.control = Control::kSetRegisters;
    instruction.variant = instruction.has("inc");
    instruction.immediate = static_cast<i64>(operands.at(0).bits);
  } else if (opcode == "bar" || opcode == "barrier") {
    // variant: 0 sync, 1 arrive, 2 red; reg[1]: the barrier, reg[2]: the count, reg[3]: the predicate of red.
    instruction.control = Control::kBarrier;
    instruction.aligned = opcode == "bar" || instruction.has("aligned");
    instruction.variant = instruction.has("arrive") ? 1 : instruction.has("red") ? 2 : 0;
    const size_t first = instruction.variant == 2 ? 1 : 0;
    set(1, first, "u32");
    if (instruction.variant == 2) {
      const size_t last = operands.size() - 1;
      set(0, 0, instruction.has("popc") ? "u32" : "pred");
      set(3, last, "pred");
      instruction.modifier = operands[last].negated;
      if (last > first + 1) set(2, first + 1, "u32");
    } else if (operands.size() > 1) {
      set(2, 1, "u32");
    }
  } else {
    // These need the whole warp, and have handlers of their own.
    static const char* whole_warp[] = {"mma", "wgmma", "ldmatrix", "stmatrix", "movmatrix"};
    for (const char* name : whole_warp) {
      if (opcode == name) instruction.control = Control::kCollective;
    }
    if (opcode == "wgmma" && instruction.has("wait_group")) instruction.control = Control::kWgmmaWait;
    return false;
  }
  return true;
}

namespace {

// Copies arguments into the callee's parameters, or results back out, all in local memory.
enum class Direction { kIn, kOut };
void copy_arguments(Warp& warp, const vector<Parameter>& parameters, const vector<u64>& callee,
                    const vector<Operand>& caller, u32 lanes, Direction direction) {
  const size_t count = std::min(parameters.size(), caller.size());
  for (size_t i = 0; i < count; i++) {
    const u64 outside = caller[i].bits & ~kLocalWindow;
    for_lanes(lanes, [&](u32 lane) {
      u8* local = &warp.local[static_cast<u64>(lane) * warp.local_bytes];
      u8* from = local + (direction == Direction::kIn ? outside : callee[i]);
      u8* to = local + (direction == Direction::kIn ? callee[i] : outside);
      memcpy(to, from, parameters[i].bytes);
    });
  }
}

string read_string(Launch& launch, u64 address) {
  string result;
  const Buffer* buffer = launch.find(address);
  for (; buffer && address < buffer->end; address++) {
    const char c = *reinterpret_cast<const char*>(address);
    if (!c) break;
    result += c;
  }
  return result;
}

// A call of a function that the module only declares: assert is the one we know.
void call_builtin(Warp& warp, const Instruction& instruction, const string& name, u32 lanes) {
  if (name != "__assertfail") fail("PTX line %u: call of undefined function %s", instruction.line, name.c_str());
  const u32 lane = lowest_lane(lanes);
  const auto argument = [&](size_t i, size_t bytes) {
    u64 value = 0;
    const u64 at = instruction.operands[1].parts.at(i).bits & ~kLocalWindow;
    memcpy(&value, &warp.local[static_cast<u64>(lane) * warp.local_bytes + at], bytes);
    return value;
  };
  Launch& launch = *warp.launch;
  launch.report("assert", instruction, where(warp, lane),
                format("%s:%u: %s", read_string(launch, argument(1, 8)).c_str(), static_cast<u32>(argument(2, 4)),
                       read_string(launch, argument(0, 8)).c_str()));
  launch.abort = true;
}

void branch_to_table(Warp& warp, const Instruction& instruction, u32 lanes) {
  const u32* indices = warp.slots<u32>(instruction.reg[1]);
  while (lanes) {
    u32 index = indices[lowest_lane(lanes)];
    u32 same = 0;
    for_lanes(lanes, [&](u32 lane) { same |= static_cast<u32>(indices[lane] == index) << lane; });
    if (index >= instruction.operands.size()) {
      warp.launch->report("brx", instruction, where(warp, lowest_lane(lanes)), "index out of range");
      index = 0;
    }
    const u32 target = static_cast<u32>(instruction.operands[index].bits);
    lanes &= ~same;
    if (lanes) {
      warp.split(same, target);
    } else {
      warp.fragments[warp.current].pc = target;
    }
  }
}

bool call(Warp& warp, const Instruction& instruction, u32 lanes) {
  Kernel& kernel = *warp.launch->kernel;
  Fragment& fragment = warp.fragments[warp.current];
  const u32 target = instruction.target;
  const string& name = kernel.function_names[target];
  if (kernel.entry_points[target] == kNone) {
    call_builtin(warp, instruction, name, lanes);
    fragment.pc++;
    return !warp.launch->abort;
  }
  for (u32 address : fragment.stack) {
    if (kernel.code[address - 1].target != target) continue;
    fail("PTX line %u: recursive call of %s is not supported", instruction.line, name.c_str());
  }
  copy_arguments(warp, kernel.module->functions[name].parameters, kernel.argument_addresses[target],
                 instruction.operands[1].parts, lanes, Direction::kIn);
  fragment.stack.push_back(fragment.pc + 1);
  fragment.pc = kernel.entry_points[target];
  return true;
}

void return_from_call(Warp& warp, const Instruction& instruction, u32 lanes) {
  Kernel& kernel = *warp.launch->kernel;
  Fragment& fragment = warp.fragments[warp.current];
  const u32 address = fragment.stack.back();
  fragment.stack.pop_back();
  const string& name = kernel.function_names[instruction.function];
  copy_arguments(warp, kernel.module->functions[name].results, kernel.result_addresses[instruction.function],
                 kernel.code[address - 1].operands[0].parts, lanes, Direction::kOut);
  fragment.pc = address;
}

// The lanes a collective has to wait for.
u32 members(Warp& warp, const Instruction& instruction, u32 lanes) {
  if (!instruction.has_mask) return warp.alive;
  const u32* masks = warp.slots<u32>(instruction.reg[3]);
  u32 wanted = 0;
  for_lanes(lanes, [&](u32 lane) {
    wanted |= masks[lane];
    if (masks[lane] >> lane & 1) return;
    warp.launch->report("membermask", instruction, where(warp, lane), "a lane executes it that its mask does not name");
  });
  const u32 exited = wanted & ~warp.alive & warp.started;
  if (exited) {
    warp.launch->report("exited-lane", instruction, where(warp, lowest_lane(lanes)),
                        format("mask 0x%08x names lanes 0x%08x, which have exited", wanted, exited));
  }
  return wanted & warp.alive;
}

void collective(Warp& warp, const Instruction& instruction, u32 lanes) {
  const u32 wanted = members(warp, instruction, lanes);
  const bool complete = (lanes & wanted) == wanted;
  if (!complete && !warp.stop_waiting) {
    warp.fragments[warp.current].state = FragmentState::kAtCollective;
    Counter& counter = warp.launch->counter(instruction);    // not executed yet
    counter.warps--;
    counter.threads -= count_lanes(lanes);
    return;
  }
  if (!complete) {
    warp.launch->report("divergent-collective", instruction, where(warp, lowest_lane(lanes)),
                        format("lanes 0x%08x never arrive", wanted & ~lanes));
  }
  warp.stop_waiting = false;
  order_lanes(warp, lanes);
  warp.active = lanes;
  if (!warp.wgmma_pending.empty()) check_wgmma_hazard(warp, instruction);
  instruction.handler(warp, instruction);
  warp.fragments[warp.current].pc++;
  warp.progressed = true;
}

// wgmma completes for a whole warpgroup: its four warps must have issued the groups that are waited for.
void wait_for_wgmma(Warp& warp, const Instruction& instruction, u32 lanes) {
  const vector<std::unique_ptr<Warp>>& warps = warp.cta->warps;
  const u32 first = warp.index & ~3u;
  for (u32 i = first; i < std::min<size_t>(first + 4, warps.size()); i++) {
    const bool is_behind = warps[i]->wgmma_groups + static_cast<u32>(instruction.immediate) < warp.wgmma_groups;
    if (!is_behind || warps[i]->done()) continue;
    warp.yielded = true;
    return;
  }
  warp.active = lanes;
  instruction.handler(warp, instruction);
  warp.fragments[warp.current].pc++;
  warp.progressed = true;
}

// True when the whole warp is here, or nobody else comes.
bool is_gathered(Warp& warp, const Instruction& instruction, u32 lanes) {
  const bool complete = (lanes & warp.alive) == warp.alive || !instruction.aligned;
  if (!complete && !warp.stop_waiting) {
    warp.fragments[warp.current].state = FragmentState::kAtCollective;
    return false;
  }
  if (!complete) {
    warp.launch->report("divergent-collective", instruction, where(warp, lowest_lane(lanes)),
                        format("lanes 0x%08x never arrive", warp.alive & ~lanes));
  }
  warp.stop_waiting = false;
  return true;
}

void wait_for_cluster(Warp& warp, const Instruction& instruction, u32 lanes) {
  if (!is_gathered(warp, instruction, lanes)) return;
  const Cluster& cluster = *warp.cta->cluster;
  if (const u32 absent = lanes & ~warp.at_cluster_barrier) {
    warp.launch->report("barrier", instruction, where(warp, lowest_lane(absent)),
                        "waits at the barrier of the cluster and has not arrived");
    lanes &= ~absent;
  }
  u32 early = 0;
  for_lanes(lanes, [&](u32 lane) { early |= static_cast<u32>(warp.cluster_phase[lane] == cluster.phase) << lane; });
  if (early) {
    warp.yielded = true;
    return;
  }
  LastJoin last;
  for_lanes(lanes, [&](u32 lane) { acquire_clock(warp, lane, cluster.completed, last); });
  warp.at_cluster_barrier &= ~lanes;
  warp.fragments[warp.current].pc++;
  warp.progressed = true;
}

// setmaxnreg: registers go back to the pool of the block, or are awaited from it.
void set_registers(Warp& warp, const Instruction& instruction, u32 lanes) {
  const u32 wanted = static_cast<u32>(instruction.immediate);
  const u32 threads = count_lanes(warp.alive);
  const auto complain = [&](const string& what) {
    warp.launch->report("setmaxnreg", instruction, where(warp, lowest_lane(lanes)), what);
  };
  const bool more = instruction.variant;
  if (wanted % 8 || wanted < 24 || wanted > 256) complain("the count is no multiple of 8 from 24 to 256");
  if (lanes != warp.alive) complain("executed by a part of a warp");
  if (more ? wanted < warp.register_count : wanted > warp.register_count) {
    complain(format("%s to %u a thread, which has %u", more ? "up" : "down", wanted, warp.register_count));
  } else if (more) {
    const u32 added = (wanted - warp.register_count) * threads;
    if (warp.cta->free_registers < added) {
      warp.yielded = true;
      return;
    }
    warp.cta->free_registers -= added;
  } else {
    warp.cta->free_registers += (warp.register_count - wanted) * threads;
  }
  warp.register_count = wanted;
  warp.fragments[warp.current].pc++;
  warp.progressed = true;
}

void barrier(Warp& warp, const Instruction& instruction, u32 lanes) {
  Cta& cta = *warp.cta;
  Fragment& fragment = warp.fragments[warp.current];
  const u32 lane = lowest_lane(lanes);
  const auto report = [&](const char* kind, const string& message) {
    warp.launch->report(kind, instruction, where(warp, lane), message);
  };
  u32 number = warp.slots<u32>(instruction.reg[1])[lane];
  const u32 count = instruction.reg[2] == kNone ? 0 : warp.slots<u32>(instruction.reg[2])[lane];
  if (number >= 16) {
    report("barrier", format("there is no barrier %u", number));
    number %= 16;
  }
  BarrierState& state = cta.barriers[number];
  if (instruction.aligned && lanes != warp.alive && !warp.nobody_else_comes) {
    for (const Fragment& other : warp.fragments) {
      const bool comes =
          other.state == FragmentState::kRunning || (other.state == FragmentState::kMeeting && other.pc == fragment.pc);
      if (&other == &fragment || !comes) continue;
      fragment.state = FragmentState::kMeeting;
      warp.meeting_pc = std::min(warp.meeting_pc, fragment.pc);
      return;
    }
  }
  warp.nobody_else_comes = false;
  // Lanes that have returned early need not come; lanes that skipped the barrier and went on should have.
  const u32 missing = (warp.alive | warp.went_past) & ~lanes;
  if (instruction.aligned && missing) {
    report("divergent-barrier", format("reached by lanes 0x%08x, not by 0x%08x", lanes, missing));
  }
  warp.meeting_pc = kNone;
  warp.went_past = 0;
  if (count && state.expected && state.expected != count) {
    report("barrier", format("barrier %u used with counts %u and %u", number, state.expected, count));
  }
  if (count) state.expected = count;
  // With a count, a partly filled warp counts as a whole one.
  state.arrived += count && lanes == warp.alive ? 32 : count_lanes(lanes);
  arrive_clocks(warp, state, lanes);
  warp.unordered = warp.progressed = true;
  if (instruction.variant == 2) {
    u32 votes = warp.predicate(instruction.reg[3]);
    if (instruction.modifier) votes = ~votes;
    votes &= lanes;
    state.votes += count_lanes(votes);
    state.all &= votes == lanes;
    state.any |= votes != 0;
  }
  if (instruction.variant == 1) {
    fragment.pc++;
  } else {
    fragment.state = FragmentState::kAtBarrier;
    fragment.waits_for = number;
  }
  cta.check_barrier(number);
}

}    // namespace

void Warp::split(u32 lanes, u32 pc) {
  Fragment rest;
  rest.lanes = lanes;
  rest.pc = pc;
  rest.stack = fragments[current].stack;
  rest.last_run = steps;
  fragments[current].lanes &= ~lanes;
  fragments.push_back(std::move(rest));
}

// Executes an instruction that the scheduler is part of; `lanes` have a true guard. False ends the warp's turn for
// good.
bool Warp::control(const Instruction& instruction, u32 lanes) {
  if (instruction.control == Control::kBranch) {
    const u32 not_taken = fragments[current].lanes & ~lanes;
    const u32 next = fragments[current].pc + 1;
    if (not_taken && lanes) split(not_taken, next);
    fragments[current].pc = lanes ? instruction.target : next;
    return true;
  }
  if (!lanes) {
    fragments[current].pc++;
    return true;
  }
  if (lanes != fragments[current].lanes) split(fragments[current].lanes & ~lanes, fragments[current].pc + 1);
  switch (instruction.control) {
    case Control::kBranchTable: branch_to_table(*this, instruction, lanes); return true;
    case Control::kExit:
      fragments.erase(fragments.begin() + current);
      current = 0;
      finish_lanes(lanes);
      return true;
    case Control::kCall: return call(*this, instruction, lanes);
    case Control::kReturn: return_from_call(*this, instruction, lanes); return true;
    case Control::kCollective: collective(*this, instruction, lanes); return true;
    case Control::kWgmmaWait: wait_for_wgmma(*this, instruction, lanes); return true;
    case Control::kClusterWait: wait_for_cluster(*this, instruction, lanes); return true;
    case Control::kSetRegisters: set_registers(*this, instruction, lanes); return true;
    case Control::kBarrier: barrier(*this, instruction, lanes); return true;
    case Control::kWarpBarrier:
      fragments[current].state = FragmentState::kAtWarpBarrier;
      fragments[current].waits_for = slots<u32>(instruction.reg[3])[lowest_lane(lanes)];
      progressed = true;
      wake_fragments();
      return true;
    case Control::kYield:
      fragments[current].pc++;
      yielded = true;
      return true;
    default:
      launch->report("trap", instruction, where(*this, lowest_lane(lanes)), "trap executed");
      launch->abort = true;
      return false;
  }
}

}    // namespace emulator
