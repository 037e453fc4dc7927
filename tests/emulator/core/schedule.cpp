// Who runs next: fragments within a warp, warps within a block, blocks of the grid.
//
// Divergent lanes are fragments with a place and a call stack of their own. The one with the lowest place runs first,
// so that they meet again; the one that has waited longest gets a turn now and then, so that a lock within a warp is
// released. Blocks run one at a time until they end or only poll: then another is brought in, so that grids whose
// blocks wait for each other work, and others stay cheap.
#include <algorithm>
#include <deque>

#include "machine.h"

namespace emulator {

constexpr u64 kFairEvery = 1024;     // instructions
constexpr u32 kFairTurn = 64;        // instructions of a fragment that got its turn by waiting
constexpr u64 kWarpTurn = 8192;      // instructions of a warp before the next one
constexpr u64 kShuffledTurn = 64;    // the same with a seed, at most; the order is then random, too
constexpr u64 kCtaTurn = 1ull << 24;
constexpr u64 kShuffledCtaTurn = 2048;    // at most
constexpr u64 kShuffledCtas = 16;         // at once

void Warp::pick_fragment() {
  const bool fair = prefer_oldest || steps % kFairEvery == 0;
  prefer_oldest = false;
  const auto comes_first = [&](const Fragment& a, const Fragment& b) {
    if (fair) return a.last_run < b.last_run;
    return a.stack.size() != b.stack.size() ? a.stack.size() > b.stack.size() : a.pc < b.pc;
  };
  u32 best = kNone;
  for (u32 i = 0; i < fragments.size(); i++) {
    if (fragments[i].state != FragmentState::kRunning) continue;
    if (best == kNone || comes_first(fragments[i], fragments[best])) best = i;
  }
  if (best == kNone) {    // those that wait for the rest of their warp at a barrier go on without it
    for (u32 i = 0; i < fragments.size(); i++) {
      if (fragments[i].state != FragmentState::kMeeting) continue;
      fragments[i].state = FragmentState::kRunning;
      if (best == kNone) best = i;
      nobody_else_comes = true;
    }
  }
  current = best;
  if (best == kNone) return;

  // Merge those that stand at the same place.
  for (u32 i = 0; i < fragments.size();) {
    const Fragment& other = fragments[i];
    const bool can_merge = other.state == FragmentState::kRunning || other.state == FragmentState::kAtCollective ||
                           other.state == FragmentState::kMeeting;
    if (i == current || !can_merge || other.pc != fragments[current].pc || other.stack != fragments[current].stack) {
      i++;
      continue;
    }
    fragments[current].lanes |= other.lanes;
    fragments.erase(fragments.begin() + i);
    if (current > i) current--;
  }
  fragments[current].last_run = steps;
  hold = fair && fragments.size() > 1 ? kFairTurn : 0;
}

// Lets collectives look again who is there, and opens the warp barriers that are complete.
void Warp::wake_fragments() {
  for (Fragment& fragment : fragments) {
    if (fragment.state == FragmentState::kAtCollective) fragment.state = FragmentState::kRunning;
  }
  for (const Fragment& fragment : fragments) {
    if (fragment.state != FragmentState::kAtWarpBarrier) continue;
    const u32 members = fragment.waits_for;
    u32 arrived = 0;
    for (const Fragment& other : fragments) {
      if (other.state == FragmentState::kAtWarpBarrier && other.waits_for == members) arrived |= other.lanes;
    }
    if ((members & alive) & ~arrived) continue;
    order_lanes(*this, arrived);
    for (Fragment& other : fragments) {
      if (other.state != FragmentState::kAtWarpBarrier || other.waits_for != members) continue;
      other.state = FragmentState::kRunning;
      other.pc++;
    }
    return;
  }
}

void Warp::finish_lanes(u32 lanes) {
  for_lanes(lanes, [&](u32 lane) {
    leave_bulk_stores(*this, lane);
    if (launch->kernel->has_bulk_copies || cta->cluster->ctas.size() > 1) release_clock(*this, lane, cta->at_exit);
  });
  if (!async_copies.empty()) land_async_copies(*this, lanes, 0, true);
  alive &= ~lanes;
  cta->alive -= count_lanes(lanes);
  progressed = true;
  if (cta->done()) cta->check_exit();
  if (cta->cluster->barrier.arrived) cta->cluster->check_barrier();
  for (u32 i = 0; i < 16; i++) {
    if (cta->barriers[i].arrived) cta->check_barrier(i);
  }
  wake_fragments();
}

u64 Warp::run(u64 budget) {
  const u64 begin = steps;
  const Instruction* code = launch->kernel->code.data();
  Counter* counters = launch->counters.data();
  yielded = false;
  while (steps - begin < budget && !fragments.empty()) {
    const bool is_running = current < fragments.size() && fragments[current].state == FragmentState::kRunning;
    if (fragments.size() > 1 && hold && is_running) {
      hold--;
    } else if (fragments.size() > 1 || !is_running) {
      pick_fragment();
      if (current == kNone) {
        const auto at_collective = [](const Fragment& f) { return f.state == FragmentState::kAtCollective; };
        if (!std::all_of(fragments.begin(), fragments.end(), at_collective)) break;
        stop_waiting = true;    // nobody else is left who could come
        fragments[0].state = FragmentState::kRunning;
        continue;
      }
    }
    const Fragment& fragment = fragments[current];
    const Instruction& instruction = code[fragment.pc];
    u32 lanes = fragment.lanes;
    if (instruction.guard != kNone) {
      const u32 guard = predicate(instruction.guard);
      lanes &= instruction.guard_negated ? ~guard : guard;
    }
    Counter& counter = counters[fragment.pc];
    counter.warps++;
    counter.threads += count_lanes(lanes);
    steps++;
    if (instruction.control != Control::kNone) {
      if (!control(instruction, lanes)) break;
    } else {
      if (lanes) {
        active = lanes;
        if (__builtin_expect(!wgmma_pending.empty(), 0)) check_wgmma_hazard(*this, instruction);
        instruction.handler(*this, instruction);
        if (fragment.pc > meeting_pc) went_past |= lanes;
      }
      fragments[current].pc++;
    }
    if (__builtin_expect(yielded, 0)) {
      prefer_oldest = true;
      hold = 0;
      if (current < fragments.size()) fragments[current].last_run = steps + 1;
      break;
    }
  }
  return steps - begin;
}

void Cta::check_barrier(u32 number) {
  BarrierState& state = barriers[number];
  const u32 needed = state.expected ? state.expected : alive;
  if (state.arrived < needed) return;
  const bool for_some = state.expected && state.expected < alive;
  const ClockPtr clock = join_clocks(state);
  for (const auto& warp : warps) {
    for (Fragment& fragment : warp->fragments) {
      if (fragment.state != FragmentState::kAtBarrier || fragment.waits_for != number) continue;
      const Instruction& instruction = launch->kernel->code[fragment.pc];
      if (instruction.variant == 2 && instruction.has("popc")) {
        u32* out = warp->slots<u32>(instruction.reg[0]);
        for_lanes(fragment.lanes, [&](u32 lane) { out[lane] = state.votes; });
      } else if (instruction.variant == 2) {
        u32& result = warp->predicate(instruction.reg[0]);
        const bool holds = instruction.has("and") ? state.all : state.any;
        result = (result & ~fragment.lanes) | (holds ? fragment.lanes : 0);
      }
      fragment.state = FragmentState::kRunning;
      fragment.pc++;
      warp->progressed = true;
      if (!clock) continue;
      for_lanes(fragment.lanes, [&](u32 lane) { warp->clocks[lane] = clock; });
      warp->unordered = for_some || fragment.lanes != warp->alive;
    }
  }
  if (state.arrived > needed) {
    launch->report("barrier", launch->kernel->code[0], "",
                   format("barrier %u: %u arrivals for a count of %u", number, state.arrived, needed));
  }
  state.arrived = state.expected = state.votes = 0;
  state.all = true;
  state.any = false;
}

// The barrier of the cluster: for all threads that have not exited.
void Cluster::check_barrier() {
  if (!barrier.arrived || barrier.arrived < alive()) return;
  completed = join_clocks(barrier);
  barrier.arrived = 0;
  phase++;
}

bool Cta::deliver_copies() {
  bool any = false;
  for (auto& [address, barrier] : mbarriers) any |= barrier.deliver();
  return any;
}

// Runs the warps in turn; stalled: none of them can go on for now.
u64 Cta::run(u64 budget, bool& stalled) {
  const bool shuffle = launch->options.seed != 0;
  u64 total = 0;
  stalled = progressed = false;
  vector<Warp*> order;
  for (const auto& warp : warps) order.push_back(warp.get());
  while (total < budget && !done() && !launch->abort) {
    for (size_t i = order.size(); shuffle && i > 1; i--) {
      std::swap(order[i - 1], order[launch->draw(i)]);
    }
    bool progress = false;
    for (Warp* warp : order) {
      if (warp->done()) continue;
      warp->progressed = false;
      const u64 turn = shuffle ? 1 + launch->draw(kShuffledTurn) : kWarpTurn;
      const u64 ran = warp->run(turn);
      total += ran;
      progress |= warp->progressed || (ran == turn && !warp->yielded);
      if (launch->abort) break;
    }
    launch->clock += 1000;
    // Perhaps all that everybody waits for is a copy.
    if (!progress && !done() && !deliver_copies()) {
      stalled = true;
      break;
    }
    progressed = true;
  }
  return total;
}

// The same for the blocks of a cluster.
u64 Cluster::run(u64 budget, bool& stalled) {
  if (ctas.size() == 1) return ctas[0]->run(budget, stalled);
  const bool shuffle = launch->options.seed != 0;
  u64 total = 0;
  stalled = false;
  vector<Cta*> order;
  for (const auto& cta : ctas) order.push_back(cta.get());
  while (total < budget && !done() && !launch->abort) {
    for (size_t i = order.size(); shuffle && i > 1; i--) std::swap(order[i - 1], order[launch->draw(i)]);
    bool progress = false;
    for (Cta* cta : order) {
      if (cta->done()) continue;
      bool waits;
      total += cta->run(shuffle ? 1 + launch->draw(kShuffledCtaTurn) : kCtaTurn, waits);
      progress |= cta->progressed;
    }
    if (!progress && !done()) {
      stalled = true;
      break;
    }
  }
  return total;
}

void Launch::report_deadlock(const std::deque<std::unique_ptr<Cluster>>& resident) {
  static const char* const states[] = {"polls", "waits for lanes", "waits at a warp barrier", "waits at a barrier",
                                       "waits for the rest of its warp"};
  constexpr int kLines = 12;
  string message;
  int lines = 0;
  const auto describe = [&](const Warp& warp) {
    const u32* id = warp.cta->id;
    for (const Fragment& fragment : warp.fragments) {
      if (lines++ >= kLines) continue;
      const Instruction& at = kernel->code[fragment.pc];
      message += format("\n  block (%u,%u,%u) warp %u lanes 0x%08x %s at line %u: %s", id[0], id[1], id[2], warp.index,
                        fragment.lanes, states[static_cast<int>(fragment.state)], at.line, at.text.c_str());
    }
  };
  for (const auto& cluster : resident) {
    for (const auto& cta : cluster->ctas) {
      for (const auto& warp : cta->warps) describe(*warp);
    }
  }
  if (lines > kLines) message += format("\n  and %d more", lines - kLines);
  report("deadlock", kernel->code[0], "", message);
}

void run_grid(Launch& launch) {
  const u64 size = launch.cluster_size();
  const u64 clusters = static_cast<u64>(launch.grid[0]) * launch.grid[1] * launch.grid[2] / size;
  const u64 most = std::max<u64>(1, launch.options.max_resident / size);
  std::deque<std::unique_ptr<Cluster>> resident;
  u64 started = 0;
  u64 stalls = 0;    // in a row
  const bool shuffle = launch.options.seed != 0;
  while ((started < clusters || !resident.empty()) && !launch.abort) {
    if (launch.interrupt_check) launch.interrupt_check();
    // Shuffled, several run at once in short turns, so that one which does not wait for another is found out.
    const u64 at_once = shuffle ? std::min<u64>(std::max<u64>(1, kShuffledCtas / size), most) : 1;
    while (started < clusters && resident.size() < at_once) {
      resident.push_back(make_cluster(launch, static_cast<u32>(started++)));
    }
    if (shuffle) {
      std::swap(resident.front(), resident[launch.draw(resident.size())]);
    }
    std::unique_ptr<Cluster> cluster = std::move(resident.front());
    resident.pop_front();
    launch.most_resident = std::max<u64>(launch.most_resident, (resident.size() + 1) * size);
    bool stalled;
    const u64 ran = cluster->run(shuffle ? 1 + launch.draw(kShuffledCtaTurn) : kCtaTurn, stalled);
    launch.total_steps += ran;
    if (launch.options.max_steps && launch.total_steps > launch.options.max_steps) {
      launch.report("step-limit", launch.kernel->code[0], "", "the launch takes more steps than max_steps");
      return;
    }
    if (cluster->done()) {
      stalls = 0;
      continue;
    }
    const bool only_polled = stalled && ran <= 4096 * size;
    stalls = only_polled ? stalls + 1 : 0;
    resident.push_back(std::move(cluster));
    if (stalled && started < clusters && resident.size() < most) {
      resident.push_front(make_cluster(launch, static_cast<u32>(started++)));
      stalls = 0;
    } else if (stalls > (shuffle ? 64 : 8) * resident.size() + 64) {
      launch.report_deadlock(resident);
      return;
    }
  }
}

}    // namespace emulator
