// The machine at run time: warps, blocks (CTAs), the launch, and the records of the race detector.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <unordered_map>

#include "counters.h"
#include "ptx.h"

namespace emulator {

struct Cta;
struct Launch;

// A vector clock: for every thread of the block, then every asynchronous agent, the last time known to lie before now.
struct Clock {
  vector<u32> time;
};
using ClockPtr = std::shared_ptr<Clock>;

constexpr u32 kAgents = 192;              // asynchronous agents a block may use; further ones share the last
constexpr u32 kInFlight = 0xffffffffu;    // write time of bytes that a cp.async has not yet been waited for

// Lanes of one warp that read a piece of shared memory at the same time of theirs.
struct Readers {
  u32 first_thread = 0, lanes = 0, time = 0, pc = 0;
};

// What the race detector knows of a few bytes of shared memory.
struct Shadow {
  u32 writer = kNone, write_time = 0, write_pc = 0;
  bool atomic = false;       // the last write was
  bool by_thread = false;    // the last write came from a thread (the generic proxy), not from an asynchronous agent
  Readers readers;           // since the last write
  std::unique_ptr<vector<Readers>> more_readers;
};

// kMeeting: at an aligned barrier, which the other lanes of the warp may still be on their way to.
enum class FragmentState : u8 { kRunning, kAtCollective, kAtWarpBarrier, kAtBarrier, kMeeting };

// Lanes of a warp that are at the same place.
struct Fragment {
  u32 lanes = 0, pc = 0;
  FragmentState state = FragmentState::kRunning;
  u32 waits_for = 0;    // member mask or barrier number
  u64 last_run = 0;
  vector<u32> stack;    // return addresses
};

// A cp.async that has been issued. Its bytes land in shared memory only when they are waited for.
struct AsyncCopy {
  u32 lane, destination, bytes, group, pc;
  u8 data[16];
};

// A bulk store to global memory that has been issued and not waited for.
struct BulkStore {
  const Instruction* instruction;
  std::function<void()> run;
  u32 group, agent, time;
};

struct Warp {
  u8* registers = nullptr;
  vector<u8> register_storage;
  u32 active = 0;    // lanes that execute the current instruction
  Cta* cta = nullptr;
  Launch* launch = nullptr;
  u32 index = 0, first_thread = 0;
  u32 alive = 0, started = 0;
  u32 carry = 0;    // the carry flag of every lane
  vector<u8> local;
  u32 local_bytes = 0;    // of one lane

  vector<Fragment> fragments;
  u32 current = 0;
  u32 hold = 0;                      // instructions for which the current fragment is kept
  bool prefer_oldest = false;        // run the fragment that has waited longest next
  bool nobody_else_comes = false;    // a fragment at an aligned barrier need not wait for the rest of the warp
  u32 meeting_pc = kNone;            // where a fragment waits at an aligned barrier for the rest of the warp
  u32 went_past = 0;                 // lanes that meanwhile did something beyond that place
  bool stop_waiting = false;         // a collective goes on without lanes that will never come
  bool yielded = false, progressed = false;
  u64 steps = 0;
  u64 polled_value = 0;
  u32 polled_pc = kNone, polled_times = 0;

  vector<AsyncCopy> async_copies;
  std::array<u32, 32> async_groups{};
  vector<std::pair<u32, u32>> wgmma_pending;    // accumulator register, group in flight that writes it
  u32 wgmma_groups = 0, wgmma_agent = kNone;
  vector<BulkStore> bulk_stores[32];
  u32 bulk_groups[32] = {};
  u32 bulk_agents[32] = {};    // agent + 1

  ClockPtr clocks[32];    // null when the race detector is off
  u32 time[32];
  bool unordered = false;    // something happened since the lanes of the warp last shared one clock
  u32 fence_time[32];        // last fence.proxy.async of each lane
  ClockPtr fence_clock[32];

  template <class Slot>
  Slot* slots(u32 offset) {
    return reinterpret_cast<Slot*>(registers + offset);
  }
  u32& predicate(u32 offset) { return *reinterpret_cast<u32*>(registers + offset); }
  void set_predicate(u32 offset, u32 lanes) {
    u32& mask = predicate(offset);
    mask = (mask & ~active) | (lanes & active);
  }
  u32 thread(u32 lane) const { return first_thread + lane; }
  bool done() const { return fragments.empty(); }

  u64 run(u64 budget);
  bool control(const Instruction& instruction, u32 lanes);
  void pick_fragment();
  void wake_fragments();
  void finish_lanes(u32 lanes);
  void split(u32 lanes, u32 pc);
};

struct Mbarrier {
  u32 expected = 0;
  i64 pending = 0, bytes_pending = 0;
  u32 phase = 0;
  u32 agent = 0, first_time = 0;               // in the race detector, the agent that fills shared memory on its behalf
  Clock arrivals;                              // joined clocks of those who arrived in this phase
  ClockPtr completed;                          // of the last finished phase
  vector<std::function<void()>> deliveries;    // copies that will land when somebody polls

  bool deliver();    // false when nothing was on its way
};

struct BarrierState {
  u32 arrived = 0, expected = 0;
  u32 votes = 0;    // of bar.red
  bool all = true, any = false;
  vector<ClockPtr> clocks;
  vector<std::pair<u32, u32>> thread_times;
};

struct Cta {
  Launch* launch = nullptr;
  u32 id[3];
  u32 number = 0;
  u32 threads = 0;    // of whole warps
  u32 alive = 0;
  u32 agents = 0;
  vector<std::unique_ptr<Warp>> warps;
  vector<u8> shared;
  vector<Shadow> shadow;    // of every granule of shared memory; empty when the race detector is off
  u32 granule_shift = 2;
  BarrierState barriers[16];
  std::unordered_map<u32, Mbarrier> mbarriers;
  std::unordered_map<u32, std::pair<u32, u32>> mbarrier_agents;    // agent + 1 and the time it has reached, by address

  bool done() const { return alive == 0; }
  void check_barrier(u32 barrier);
  bool deliver_copies();
  u64 run(u64 budget, bool& stalled);
};

struct Options {
  bool races = true, proxy_fences = true, cooperative = false;
  u64 seed = 0, max_steps = 0;
  u32 max_resident = 4096;
  u32 shared_limit = 227 * 1024;
};

struct Issue {
  string kind, message;
  u64 count = 1;
};

struct Launch {
  Kernel* kernel = nullptr;
  u32 grid[3], block[3];
  u32 dynamic_shared = 0, shared_bytes = 0;
  Options options;
  vector<u8> parameters;
  vector<Buffer> buffers;
  std::function<void()> interrupt_check;    // called now and then; throws to end the launch

  vector<Counter> counters;
  vector<Issue> issues;
  std::unordered_map<string, size_t> issue_index;
  u64 total_steps = 0, most_resident = 0, clock = 0;
  u64 random = 0;
  // The next of the shuffle's random numbers, below `limit`.
  u64 draw(u64 limit) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return (random >> 33) % limit;
  }
  bool abort = false;
  vector<u32> grid_workspace;    // of a cooperative launch

  void run();
  Buffer* find(u64 address);
  void report(const char* kind, const Instruction& instruction, const string& where, const string& message);
  void report_deadlock(const std::deque<std::unique_ptr<Cta>>& resident);
  Counter& counter(const Instruction& instruction) { return counters[instruction.pc]; }
  string source_position(const Instruction& instruction) const;
};

string where(const Warp& warp, u32 lane);
void run_grid(Launch& launch);
std::unique_ptr<Cta> make_cta(Launch& launch, u32 number);

// memory.cpp: addresses to host pointers. A bad access is reported, and the result is nullptr.
u8* global_pointer(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes, bool write);
u8* shared_pointer(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes, u32& offset);
u8* local_pointer(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes);
void check_alignment(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes);
void addresses_of(Warp& warp, const Instruction& instruction, u64* addresses);
Space space_of(const Instruction& instruction, u64 address);
u64 operand_address(Warp& warp, const Operand& operand, u32 lane);
u64 operand_value(Warp& warp, const Operand& operand, u32 lane);
void decode_address(Instruction& instruction, size_t operand);
void note_poll(Warp& warp, const Instruction& instruction, u64 value);

// counting.cpp
void mark_sector(Warp& warp, const Instruction& instruction, u64 sector, bool write);
void count_sectors(Warp& warp, const Instruction& instruction, const u64* addresses, u32 lanes, u32 bytes, bool write);
void count_row(Warp& warp, const Instruction& instruction, u64 address, u64 bytes, bool write);
void count_wavefronts(Warp& warp, const Instruction& instruction, const u32* offsets, u32 lanes, u32 bytes);

// races.cpp
enum class Access : u8 { kPlain, kAtomic, kCopyInFlight };
void note_shared_read(Warp& warp, const Instruction& instruction, u32 lane, u32 offset, u32 bytes, Access access);
// `value`: the bytes about to be written, nullptr when not known yet. Writing what is there already is no race of two
// writes.
void note_shared_write(Warp& warp, const Instruction& instruction, u32 lane, u32 offset, u32 bytes, const u8* value,
                       Access access);
void note_agent_access(Warp& warp, const Instruction& instruction, u32 lane, u32 offset, u32 bytes, bool write,
                       u32 agent, u32 time);
void note_copy_landed(Warp& warp, const AsyncCopy& copy);
void note_global_access(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes, const u8* value);
struct LastJoin {    // lanes of a warp mostly share one clock: what the join of the previous lane gave
  ClockPtr clock, from, result;
};
u32 new_agent(Warp& warp);
void order_lanes(Warp& warp, u32 lanes);
void release_clock(Warp& warp, u32 lane, Clock& into);
void acquire_clock(Warp& warp, u32 lane, const ClockPtr& from, LastJoin& last);
void acquire_agent(Warp& warp, u32 lanes, u32 agent, u32 time);
void raise_time(Clock& clock, u32 index, u32 time);
void arrive_clocks(Warp& warp, BarrierState& barrier, u32 lanes);
ClockPtr join_clocks(BarrierState& barrier);
void proxy_fence(Warp& warp, const Instruction& instruction);

// async_copy.cpp, tensor_copy.cpp, wgmma.cpp: what the scheduler has to tell them
void land_async_copies(Warp& warp, u32 lanes, u32 groups_left, bool all);
void finish_bulk_stores(Warp& warp, u32 lane, u32 groups_left, bool all);
void check_wgmma_hazard(Warp& warp, const Instruction& instruction);
Mbarrier* find_mbarrier(Warp& warp, const Instruction& instruction, u32 lane, u64 address);
void complete_phase(Mbarrier& barrier);

}    // namespace emulator
