// The race detector: vector clocks of threads, and for every few bytes of shared memory who last wrote and who read
// since.
//
// Two accesses to a byte, one of them a write, are a race when no barrier (or mbarrier, or warp collective) orders
// them. Lanes of one warp count as threads of their own. Asynchronous copies and wgmma are agents with clocks of their
// own.
#include <algorithm>

#include "machine.h"

namespace emulator {
namespace {

string name_thread(const Cluster& cluster, u32 thread) {
  if (thread >= cluster.threads) return format("asynchronous agent %u", thread - cluster.threads);
  const u32 threads = cluster.ctas[0]->threads;
  if (cluster.ctas.size() == 1) return format("thread %u", thread);
  return format("thread %u of block %u of the cluster", thread % threads, thread / threads);
}

bool happened_before(const Warp& warp, u32 lane, u32 thread, u32 time) {
  if (time == kInFlight) return false;
  return thread == warp.thread(lane) || warp.clocks[lane]->time[thread] >= time;
}

bool all_happened_before(const Warp& warp, u32 lane, const Readers& readers) {
  for (u32 lanes = readers.lanes; lanes; lanes &= lanes - 1) {
    if (!happened_before(warp, lane, readers.first_thread + lowest_lane(lanes), readers.time)) return false;
  }
  return true;
}

void report_race(Warp& warp, const Instruction& instruction, u32 lane, u32 byte, const char* kind, u32 other_thread,
                 u32 other_pc, bool in_flight) {
  const Instruction& other = warp.launch->kernel->code[other_pc];
  const char* note = in_flight ? " (the other access is an asynchronous one still in flight)" : "";
  warp.launch->report(in_flight ? "race-async" : "race", instruction, where(warp, lane),
                      format("%s conflict on shared byte %u%s with %s at line %u:%s %s", kind, byte - kSharedReserved,
                             note, name_thread(*warp.cta->cluster, other_thread).c_str(), other.line,
                             warp.launch->source_position(other).c_str(), other.text.c_str()));
}

void forget_readers(Shadow& shadow) {
  shadow.readers.lanes = 0;
  if (shadow.more_readers) shadow.more_readers->clear();
}

void add_reader(Shadow& shadow, const Warp& warp, u32 lane, const Readers& reader) {
  Readers& known = shadow.readers;
  const bool is_only = !shadow.more_readers || shadow.more_readers->empty();
  if (!known.lanes) {
    known = reader;
  } else if (known.first_thread == reader.first_thread && known.time == reader.time) {
    known.lanes |= reader.lanes;
  } else if (is_only && all_happened_before(warp, lane, known)) {
    known = reader;    // what comes after this reader comes after those
  } else {
    if (!shadow.more_readers) shadow.more_readers = std::make_unique<vector<Readers>>();
    for (Readers& other : *shadow.more_readers) {
      if (other.first_thread != reader.first_thread || other.time != reader.time) continue;
      other.lanes |= reader.lanes;
      return;
    }
    shadow.more_readers->push_back(reader);
  }
}

void check_readers(const Shadow& shadow, Warp& warp, const Instruction& instruction, u32 lane, u32 byte) {
  const auto check = [&](const Readers& readers) {
    for (u32 lanes = readers.lanes; lanes; lanes &= lanes - 1) {
      const u32 thread = readers.first_thread + lowest_lane(lanes);
      if (happened_before(warp, lane, thread, readers.time)) continue;
      report_race(warp, instruction, lane, byte, "read/write", thread, readers.pc,
                  thread >= warp.cta->cluster->threads);
      return;
    }
  };
  if (shadow.readers.lanes) check(shadow.readers);
  if (!shadow.more_readers) return;
  for (const Readers& readers : *shadow.more_readers) check(readers);
}

void report_unwritten(Warp& warp, const Instruction& instruction, u32 lane, u32 byte) {
  warp.launch->report("uninit-shared", instruction, where(warp, lane),
                      format("reads shared byte %u, which nobody has written", byte - kSharedReserved));
}

ClockPtr joined(const Clock& a, const Clock& b) {
  auto result = std::make_shared<Clock>(a);
  const size_t size = std::min(a.time.size(), b.time.size());
  for (size_t i = 0; i < size; i++) result->time[i] = std::max(result->time[i], b.time[i]);
  return result;
}

}    // namespace

void note_shared_read(Warp& warp, const Instruction& instruction, u32 lane, u32 offset, u32 bytes, Access access,
                      Cta* owner) {
  Cta& cta = owner ? *owner : *warp.cta;
  if (cta.shadow.empty()) return;
  const u32 shift = warp.cta->granule_shift;
  const bool atomic = access == Access::kAtomic;
  warp.unordered = true;
  if (&cta != warp.cta) cta.before_exit[warp.thread(lane)] = {warp.time[lane], &instruction};
  for (u32 i = offset >> shift; i <= (offset + bytes - 1) >> shift; i++) {
    Shadow& shadow = cta.shadow[i];
    if (shadow.writer == kNone) {
      report_unwritten(warp, instruction, lane, i << shift);
    } else if (!(atomic && shadow.atomic) && !happened_before(warp, lane, shadow.writer, shadow.write_time)) {
      const bool in_flight = shadow.write_time == kInFlight || shadow.writer >= cta.cluster->threads;
      report_race(warp, instruction, lane, i << shift, "write/read", shadow.writer, shadow.write_pc, in_flight);
    }
    if (!atomic) add_reader(shadow, warp, lane, {warp.first_thread, 1u << lane, warp.time[lane], instruction.pc});
  }
}

void note_shared_write(Warp& warp, const Instruction& instruction, u32 lane, u32 offset, u32 bytes, const u8* value,
                       Access access, Cta* owner) {
  Cta& cta = owner ? *owner : *warp.cta;
  if (cta.shadow.empty()) return;
  const u32 shift = warp.cta->granule_shift;
  const bool atomic = access == Access::kAtomic;
  warp.unordered = true;
  if (&cta != warp.cta) cta.before_exit[warp.thread(lane)] = {warp.time[lane], &instruction};
  for (u32 i = offset >> shift; i <= (offset + bytes - 1) >> shift; i++) {
    Shadow& shadow = cta.shadow[i];
    const u32 byte = i << shift;
    const bool both_atomic = atomic && shadow.atomic;
    if (shadow.writer != kNone && !both_atomic && !happened_before(warp, lane, shadow.writer, shadow.write_time)) {
      const u32 begin = std::max(byte, offset);
      const u32 end = std::min(byte + (1u << shift), offset + bytes);
      const bool pending = shadow.write_time == kInFlight;
      if (pending || !value || memcmp(&cta.shared[begin], value + (begin - offset), end - begin)) {
        const bool in_flight = pending || shadow.writer >= cta.cluster->threads;
        report_race(warp, instruction, lane, byte, "write/write", shadow.writer, shadow.write_pc, in_flight);
      }
    }
    check_readers(shadow, warp, instruction, lane, byte);
    shadow.writer = warp.thread(lane);
    shadow.write_time = access == Access::kCopyInFlight ? kInFlight : warp.time[lane];
    shadow.write_pc = instruction.pc;
    shadow.atomic = atomic;
    shadow.by_thread = true;
    forget_readers(shadow);
  }
}

// Bytes that a thread wrote need a fence.proxy.async of that thread, or one ordered after it, before an agent uses
// them.
static bool is_fenced(const Warp& warp, u32 lane, const Shadow& shadow) {
  const Warp& writer = warp.cta->cluster->warp_of(shadow.writer);
  if (writer.fence_time[shadow.writer % 32] > shadow.write_time) return true;
  return warp.fence_clock[lane] && warp.fence_clock[lane]->time[shadow.writer] >= shadow.write_time;
}

// An access of the agent, issued by `lane`, that will be complete at the agent's `time`.
void note_agent_access(Warp& warp, const Instruction& instruction, u32 lane, u32 offset, u32 bytes, bool write,
                       u32 agent, u32 time, Cta* owner) {
  Cta& cta = owner ? *owner : *warp.cta;
  if (cta.shadow.empty() || !bytes) return;
  const u32 shift = warp.cta->granule_shift;
  const u32 threads = cta.cluster->threads;
  if (write) cta.before_exit[threads + agent] = {time, &instruction};
  for (u32 i = offset >> shift; i <= (offset + bytes - 1) >> shift; i++) {
    Shadow& shadow = cta.shadow[i];
    const u32 byte = i << shift;
    if (shadow.writer == kNone) {
      if (!write) report_unwritten(warp, instruction, lane, byte);
    } else {
      const bool own = shadow.writer == threads + agent && shadow.write_time <= time;
      if (!own && !happened_before(warp, lane, shadow.writer, shadow.write_time)) {
        report_race(warp, instruction, lane, byte, write ? "write/write" : "write/read", shadow.writer, shadow.write_pc,
                    shadow.write_time == kInFlight || shadow.writer >= threads);
      } else if (warp.launch->options.proxy_fences && shadow.by_thread && shadow.writer < threads &&
                 !is_fenced(warp, lane, shadow)) {
        const Instruction& other = warp.launch->kernel->code[shadow.write_pc];
        warp.launch->report(
            "proxy-fence", instruction, where(warp, lane),
            format("shared byte %u was written by a thread (line %u: %s) and no fence.proxy.async stands "
                   "between that and this asynchronous access",
                   byte - kSharedReserved, other.line, other.text.c_str()));
      }
    }
    if (!write) {
      add_reader(shadow, warp, lane, {threads + agent, 1, time, instruction.pc});
      continue;
    }
    check_readers(shadow, warp, instruction, lane, byte);
    shadow.writer = threads + agent;
    shadow.write_time = time;
    shadow.write_pc = instruction.pc;
    shadow.atomic = shadow.by_thread = false;
    forget_readers(shadow);
  }
}

void note_copy_landed(Warp& warp, const AsyncCopy& copy) {
  vector<Shadow>& shadows = warp.cta->shadow;
  if (shadows.empty()) return;
  const u32 shift = warp.cta->granule_shift;
  for (u32 i = copy.destination >> shift; i <= (copy.destination + copy.bytes - 1) >> shift; i++) {
    Shadow& shadow = shadows[i];
    if (shadow.writer != warp.thread(copy.lane)) continue;
    shadow.write_time = warp.time[copy.lane];
    shadow.by_thread = true;
  }
  warp.unordered = true;
}

// Plain accesses of different blocks to one word of global memory. Only reported, not raised: the blocks may well be
// ordered by flags that the detector does not follow.
void note_global_access(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes, const u8* value) {
  Buffer& buffer = *instruction.last_buffer;
  if (buffer.internal || !warp.launch->options.races || instruction.polls) return;
  if (buffer.writer_of_word.empty()) {
    if (!value) return;
    buffer.writer_of_word.assign((buffer.end - buffer.begin + 3) / 4, 0);
  }
  const u32 self = warp.cta->number + 1;
  for (u64 i = (address - buffer.begin) / 4; i <= (address + bytes - 1 - buffer.begin) / 4; i++) {
    u32& writer = buffer.writer_of_word[i];
    const u64 begin = std::max(address, buffer.begin + i * 4);
    const u64 end = std::min(address + bytes, buffer.begin + i * 4 + 4);
    const auto differs = [&] { return !value || memcmp(reinterpret_cast<u8*>(begin), value + (begin - address), 4); };
    if (writer && writer != self && end - begin == 4 && differs()) {    // narrower ones may be neighbours in a word
      warp.launch->report(
          "global-conflict", instruction, where(warp, lane),
          format("%s byte %llu of '%s', written by block %u in this launch", value ? "overwrites" : "reads",
                 static_cast<unsigned long long>(i * 4), buffer.name.c_str(), writer - 1));
    }
    if (value) writer = self;
  }
}

u32 new_agent(Warp& warp) {
  Cluster& cluster = *warp.cta->cluster;
  const u32 most = kAgents * static_cast<u32>(cluster.ctas.size());
  return cluster.agents < most ? cluster.agents++ : most - 1;
}

// A collective of these lanes: what any of them did before it lies before what any of them does after it.
void order_lanes(Warp& warp, u32 lanes) {
  if (!warp.unordered || !warp.clocks[0]) return;
  ClockPtr common;
  const Clock* seen[32];
  u32 different = 0;
  for_lanes(lanes, [&](u32 lane) {
    const Clock* clock = warp.clocks[lane].get();
    if (std::find(seen, seen + different, clock) != seen + different) return;
    seen[different++] = clock;
    common = common ? joined(*common, *clock) : std::make_shared<Clock>(*clock);
  });
  if (!common) return;
  for_lanes(lanes, [&](u32 lane) { common->time[warp.thread(lane)] = warp.time[lane]++; });
  for_lanes(lanes, [&](u32 lane) { warp.clocks[lane] = common; });
  if ((lanes & warp.alive) == warp.alive) warp.unordered = false;
}

void raise_time(Clock& clock, u32 index, u32 time) {
  if (clock.time.size() <= index) clock.time.resize(index + 1);
  clock.time[index] = std::max(clock.time[index], time);
}

void release_clock(Warp& warp, u32 lane, Clock& into) {
  if (!warp.clocks[lane]) return;
  const vector<u32>& from = warp.clocks[lane]->time;
  if (into.time.size() < from.size()) into.time.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) into.time[i] = std::max(into.time[i], from[i]);
  raise_time(into, warp.thread(lane), warp.time[lane]++);
  warp.unordered = true;
}

void acquire_clock(Warp& warp, u32 lane, const ClockPtr& from, LastJoin& last) {
  ClockPtr& clock = warp.clocks[lane];
  if (!clock || !from || from->time.empty()) return;
  if (last.clock != clock || last.from != from) last = {clock, from, joined(*clock, *from)};
  clock = last.result;
  warp.unordered = true;
}

void acquire_agent(Warp& warp, u32 lanes, u32 agent, u32 time) {
  if (!warp.clocks[0]) return;
  const Clock* last_clock = nullptr;
  ClockPtr result;
  for_lanes(lanes, [&](u32 lane) {
    if (warp.clocks[lane].get() != last_clock) {    // lanes mostly share one clock: copy it once
      last_clock = warp.clocks[lane].get();
      result = std::make_shared<Clock>(*last_clock);
      raise_time(*result, warp.cta->cluster->threads + agent, time);
    }
    warp.clocks[lane] = result;
  });
  warp.unordered = true;
}

void arrive_clocks(Warp& warp, BarrierState& barrier, u32 lanes) {
  if (!warp.clocks[0]) return;
  for_lanes(lanes, [&](u32 lane) {
    if (barrier.clocks.empty() || barrier.clocks.back() != warp.clocks[lane])
      barrier.clocks.push_back(warp.clocks[lane]);
    barrier.thread_times.push_back({warp.thread(lane), warp.time[lane]++});
  });
}

ClockPtr join_clocks(BarrierState& barrier) {
  vector<ClockPtr>& clocks = barrier.clocks;
  if (clocks.empty()) return nullptr;
  std::sort(clocks.begin(), clocks.end());
  clocks.erase(std::unique(clocks.begin(), clocks.end()), clocks.end());
  auto result = std::make_shared<Clock>(*clocks[0]);
  for (const ClockPtr& clock : clocks) {
    for (size_t i = 0; i < result->time.size(); i++) result->time[i] = std::max(result->time[i], clock->time[i]);
  }
  for (const auto& [thread, time] : barrier.thread_times) {
    result->time[thread] = std::max(result->time[thread], time);
  }
  clocks.clear();
  barrier.thread_times.clear();
  return result;
}

// fence.proxy.async; variant: 1 for shared memory, 2 for global memory, 3 for both.
void proxy_fence(Warp& warp, const Instruction& instruction) {
  if (!warp.clocks[0]) return;
  Launch& launch = *warp.launch;
  if (instruction.variant & 2) {
    launch.proxy_tick++;
    for_lanes(warp.active, [&](u32 lane) {
      warp.global_fence[lane] = launch.proxy_tick;
      launch.proxy_fences[static_cast<u64>(warp.cta->number) << 32 | (warp.index * 32 + lane)] = launch.proxy_tick;
    });
  }
  if (!(instruction.variant & 1)) return;
  for_lanes(warp.active, [&](u32 lane) {
    warp.fence_time[lane] = ++warp.time[lane];
    warp.fence_clock[lane] = warp.clocks[lane];
  });
  warp.unordered = true;
}

// A block must not exit while another uses its shared memory, or a copy is on its way there: its threads have to know
// that this is over.
void Cta::check_exit() {
  for (const auto& [who, last] : before_exit) {
    const auto& [time, instruction] = last;
    if (who < at_exit.time.size() && at_exit.time[who] >= time) continue;
    launch->report("early-exit", *instruction, format("block (%u,%u,%u)", id[0], id[1], id[2]),
                   format("the block exits, and nothing tells it that the access of %s to its shared memory is over",
                          name_thread(*cluster, who).c_str()));
  }
  for (const auto& warp : warps) {
    const u32 others = warps[warp->index & ~3u]->register_count;
    if (warp->register_count == others) continue;
    launch->report("setmaxnreg", launch->kernel->code[0], where(*warp, 0),
                   format("warps of one warpgroup have %u and %u registers", others, warp->register_count));
  }
}

}    // namespace emulator
