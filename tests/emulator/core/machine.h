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
struct Cluster;
struct Launch;

// A vector clock: for every thread of the cluster, then every asynchronous agent, the last time known to lie before
// now.
struct Clock {
  vector<u32> time;
};
using ClockPtr = std::shared_ptr<Clock>;

constexpr u32 kAgents = 192;              // asynchronous agents for each block; further ones share the last
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

// A bulk store to global memory that has been issued and not waited for: first its source is read, then it lands.
struct BulkStore {
  const Instruction* instruction;
  std::function<void()> read, write;
  u32 group, agent, time;
  bool was_read = false;
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
  u32 bulk_agents[32] = {};      // agent + 1
  u32 at_cluster_barrier = 0;    // lanes that have arrived and not waited yet
  u32 cluster_phase[32] = {};    // in which they arrived
  u32 register_count = 0;        // of a lane, what setmaxnreg changes

  ClockPtr clocks[32];    // null when the race detector is off
  u32 time[32];
  bool unordered = false;    // something happened since the lanes of the warp last shared one clock
  u32 fence_time[32];        // last fence.proxy.async of each lane
  ClockPtr fence_clock[32];
  u64 global_fence[32] = {};    // tick of its last fence.proxy.async that holds for global memory

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
  Cluster* cluster = nullptr;
  u32 id[3];
  u32 number = 0;
  u32 rank = 0;       // in the cluster
  u32 threads = 0;    // of whole warps
  u32 alive = 0;
  u32 free_registers = 0;
  bool progressed = false;
  // What has to be known to its threads when they exit: accesses of other blocks to its shared memory, and copies into
  // it; by thread or agent the last time, and where.
  std::unordered_map<u32, std::pair<u32, const Instruction*>> before_exit;
  Clock at_exit;
  vector<std::unique_ptr<Warp>> warps;
  vector<u8> shared;
  vector<Shadow> shadow;    // of every granule of shared memory; empty when the race detector is off
  u32 granule_shift = 2;
  BarrierState barriers[16];
  std::unordered_map<u32, Mbarrier> mbarriers;
  std::unordered_map<u32, std::pair<u32, u32>> mbarrier_agents;    // agent + 1 and the time it has reached, by address

  bool done() const { return alive == 0; }
  void check_exit();
  void check_barrier(u32 barrier);
  bool deliver_copies();
  u64 run(u64 budget, bool& stalled);
};

// Blocks that run at the same time and reach each other's shared memory. Without clusters, each block is one.
struct Cluster {
  Launch* launch = nullptr;
  u32 id[3];
  u32 threads = 0;    // of all its blocks
  u32 agents = 0;
  vector<std::unique_ptr<Cta>> ctas;
  BarrierState barrier;
  u32 phase = 0;    // of the barrier
  ClockPtr completed;

  bool done() const { return alive() == 0; }
  u32 alive() const {
    u32 count = 0;
    for (const auto& cta : ctas) count += cta->alive;
    return count;
  }
  Warp& warp_of(u32 thread) const { return *ctas[thread / ctas[0]->threads]->warps[thread % ctas[0]->threads / 32]; }
  void check_barrier();
  u64 run(u64 budget, bool& stalled);
};

struct Options {
  bool races = true, proxy_fences = true, cooperative = false;
  u64 seed = 0, max_steps = 0;
  u32 max_resident = 4096;
  u32 shared_limit = 227 * 1024;
  u32 cluster[3] = {0, 0, 0};    // 0: what the kernel wants, or none
};

struct Issue {
  string kind, message;
  u64 count = 1;
};

struct Launch {
  Kernel* kernel = nullptr;
  u32 grid[3], block[3], cluster[3];
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
  bool abort = false, ended = false;
  vector<u32> grid_workspace;                   // of a cooperative launch
  vector<std::function<void()>> late_writes;    // of stores that nobody waited for to the end
  u64 proxy_tick = 0;                           // counts writes to global memory and fences
  std::unordered_map<u64, u64> proxy_fences;    // last tick of a thread's fence for global memory

  void run();
  Buffer* find(u64 address);
  void report(const char* kind, const Instruction& instruction, const string& where, const string& message);
  void report_deadlock(const std::deque<std::unique_ptr<Cluster>>& resident);
  bool follows_proxies() const { return options.races && options.proxy_fences && kernel->has_bulk_copies; }
  u32 cluster_size() const { return cluster[0] * cluster[1] * cluster[2]; }
  Counter& counter(const Instruction& instruction) { return counters[instruction.pc]; }
  string source_position(const Instruction& instruction) const;
};

string where(const Warp& warp, u32 lane);
void run_grid(Launch& launch);
std::unique_ptr<Cluster> make_cluster(Launch& launch, u32 number);

// memory.cpp: addresses to host pointers. A bad access is reported, and the result is nullptr.
u8* global_pointer(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes, bool write);
// `owner` gets the block whose memory it is; without it, that of another block is a bad address.
u8* shared_pointer(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes, u32& offset,
                   Cta** owner = nullptr);
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
// Of this block's shared memory, or of that of `owner`.
void note_shared_read(Warp& warp, const Instruction& instruction, u32 lane, u32 offset, u32 bytes, Access access,
                      Cta* owner = nullptr);
// `value`: the bytes about to be written, nullptr when not known yet. Writing what is there already is no race of two
// writes.
void note_shared_write(Warp& warp, const Instruction& instruction, u32 lane, u32 offset, u32 bytes, const u8* value,
                       Access access, Cta* owner = nullptr);
void note_agent_access(Warp& warp, const Instruction& instruction, u32 lane, u32 offset, u32 bytes, bool write,
                       u32 agent, u32 time, Cta* owner = nullptr);
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

// proxies.cpp
enum class Proxy : u8 { kNone, kGeneric, kAsync, kAsyncInFlight };
void note_global_read(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u64 bytes, Proxy by);
void note_global_write(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u64 bytes, Proxy by);

// async_copy.cpp, tensor_copy.cpp, wgmma.cpp: what the scheduler has to tell them
void land_async_copies(Warp& warp, u32 lanes, u32 groups_left, bool all);
void leave_bulk_stores(Warp& warp, u32 lane);
void check_wgmma_hazard(Warp& warp, const Instruction& instruction);
Mbarrier* find_mbarrier(Warp& warp, const Instruction& instruction, u32 lane, u64 address, Cta** owner = nullptr);
void complete_phase(Mbarrier& barrier);

}    // namespace emulator
