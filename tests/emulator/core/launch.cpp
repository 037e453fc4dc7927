// A launch: checks its dimensions, makes blocks with their special registers, and collects what went wrong.
#include <algorithm>

#include "machine.h"

namespace emulator {

constexpr u32 kProcessors = 132;    // as many as an H100 has, for %smid

string where(const Warp& warp, u32 lane) {
  const u32 thread = warp.index * 32 + lane;
  const u32* block = warp.launch->block;
  const u32* id = warp.cta->id;
  return format("block (%u,%u,%u) thread (%u,%u,%u)", id[0], id[1], id[2], thread % block[0],
                thread / block[0] % block[1], thread / block[0] / block[1]);
}

string Launch::source_position(const Instruction& instruction) const {
  const auto file = kernel->module->files.find(instruction.source_file);
  if (!instruction.source_line || file == kernel->module->files.end()) return "";
  return format(" (%s:%u)", file->second.c_str(), instruction.source_line);
}

// The same kind at the same instruction is one issue that is counted; races also by the other access.
void Launch::report(const char* kind, const Instruction& instruction, const string& at, const string& message) {
  string key = format("%s@%u", kind, instruction.pc);
  const size_t other = strncmp(kind, "race", 4) ? string::npos : message.find(" at line ");
  if (other != string::npos) key += message.substr(other);
  const auto [found, is_new] = issue_index.insert({key, issues.size()});
  if (!is_new) {
    issues[found->second].count++;
    return;
  }
  issues.push_back({kind, format("%s: kernel %.80s, PTX line %u%s: %.300s | %s: %.2500s", kind,
                                 kernel->function->name.c_str(), instruction.line, source_position(instruction).c_str(),
                                 instruction.text.c_str(), at.c_str(), message.c_str())});
}

namespace {

// The value of a special register in each lane.
void fill_special_register(Warp& warp, const string& name, u32 offset) {
  const Launch& launch = *warp.launch;
  const Cta& cta = *warp.cta;
  const u32* block = launch.block;
  const bool has_dimension = name.size() > 2 && name[name.size() - 2] == '.';
  const string base = has_dimension ? name.substr(0, name.size() - 2) : name;
  const u32 dimension = has_dimension ? static_cast<u32>(name.back() - 'x') : 0;
  const auto set = [&](auto value_of_lane) {
    for (u32 lane = 0; lane < 32; lane++) warp.slots<u32>(offset)[lane] = value_of_lane(lane);
  };
  const auto set_all = [&](u64 value) { set([&](u32) { return static_cast<u32>(value); }); };
  const u64 workspace = reinterpret_cast<u64>(launch.grid_workspace.data());
  if (base == "%tid" && dimension < 3) {
    set([&](u32 lane) {
      const u32 thread = warp.index * 32 + lane;
      return dimension == 0   ? thread % block[0]
             : dimension == 1 ? thread / block[0] % block[1]
                              : thread / block[0] / block[1];
    });
  } else if (base == "%ntid") {
    set_all(dimension < 3 ? block[dimension] : 0);
  } else if (base == "%ctaid") {
    set_all(dimension < 3 ? cta.id[dimension] : 0);
  } else if (base == "%nctaid") {
    set_all(dimension < 3 ? launch.grid[dimension] : 0);
  } else if (base == "%clusterid") {
    set_all(dimension < 3 ? cta.cluster->id[dimension] : 0);
  } else if (base == "%nclusterid") {
    set_all(dimension < 3 ? launch.grid[dimension] / launch.cluster[dimension] : 0);
  } else if (base == "%cluster_ctaid") {
    set_all(dimension < 3 ? cta.id[dimension] % launch.cluster[dimension] : 0);
  } else if (base == "%cluster_nctaid") {
    set_all(dimension < 3 ? launch.cluster[dimension] : 0);
  } else if (base == "%cluster_ctarank") {
    set_all(cta.rank);
  } else if (base == "%cluster_nctarank") {
    set_all(launch.cluster_size());
  } else if (base == "%laneid") {
    set([](u32 lane) { return lane; });
  } else if (base == "%warpid") {
    set_all(warp.index);
  } else if (base == "%smid") {
    set_all(cta.number % kProcessors);
  } else if (base == "%nsmid") {
    set_all(kProcessors);
  } else if (base == "%lanemask_eq") {
    set([](u32 lane) { return 1u << lane; });
  } else if (base == "%lanemask_lt") {
    set([](u32 lane) { return (1u << lane) - 1; });
  } else if (base == "%lanemask_le") {
    set([](u32 lane) { return (2u << lane) - 1; });
  } else if (base == "%lanemask_gt") {
    set([](u32 lane) { return ~((2u << lane) - 1); });
  } else if (base == "%lanemask_ge") {
    set([](u32 lane) { return ~((1u << lane) - 1); });
  } else if (base == "%dynamic_smem_size") {
    set_all(launch.dynamic_shared);
  } else if (base == "%total_smem_size") {
    set_all(launch.shared_bytes);
  } else if (base == "%envreg1") {    // cooperative groups find the workspace of the grid here
    set_all(workspace >> 32);
  } else if (base == "%envreg2") {
    set_all(workspace);
  } else if (base != "%clock" && base != "%clock64" && base != "%globaltimer" && base != "%tid") {
    fail("special register %s is not supported", name.c_str());
  }
}

// What ptxas gives a kernel that uses setmaxnreg: all that its blocks can have, in steps of 8, with whole warpgroups.
u32 registers_of_thread(const Launch& launch) {
  const Function& function = *launch.kernel->function;
  if (function.max_registers) return function.max_registers;
  const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
  const u32 room = (std::max(threads, function.max_threads) + 127) / 128 * 128 * function.min_blocks;
  return std::min(255u, 65536 / room) / 8 * 8;
}

std::unique_ptr<Warp> make_warp(Launch& launch, Cta& cta, u32 index, u32 lanes, const ClockPtr& clock) {
  const Kernel& kernel = *launch.kernel;
  auto warp = std::make_unique<Warp>();
  warp->cta = &cta;
  warp->launch = &launch;
  warp->index = index;
  warp->first_thread = cta.rank * cta.threads + index * 32;
  warp->alive = warp->started = lanes == 32 ? kAllLanes : (1u << lanes) - 1;
  warp->register_storage.resize(kernel.register_bytes + 64);
  const u64 storage = reinterpret_cast<u64>(warp->register_storage.data());
  warp->registers = reinterpret_cast<u8*>((storage + 63) / 64 * 64);
  std::copy(kernel.register_image.begin(), kernel.register_image.end(), warp->registers);
  warp->local_bytes = (kernel.local_bytes + 15) / 16 * 16;
  warp->local.resize(static_cast<size_t>(warp->local_bytes) * 32 + 16);
  Fragment fragment;
  fragment.lanes = warp->alive;
  fragment.pc = kernel.entry_points[0];
  warp->fragments.push_back(fragment);
  for (u32 lane = 0; lane < 32; lane++) {
    warp->clocks[lane] = clock;
    warp->time[lane] = 1;
    warp->fence_time[lane] = 0;
  }
  warp->register_count = registers_of_thread(launch);
  for (const auto& [name, offset] : kernel.special_registers) fill_special_register(*warp, name, offset);
  return warp;
}

void check_dimensions(const Launch& launch) {
  const Function& function = *launch.kernel->function;
  const u32* block = launch.block;
  const u64 threads = static_cast<u64>(block[0]) * block[1] * block[2];
  const u64 ctas = static_cast<u64>(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  if (!threads || !ctas) fail("a dimension of the grid or block is 0");
  if (threads > 1024) fail("more than 1024 threads a block");
  if (launch.grid[1] > 65535 || launch.grid[2] > 65535) fail("grid larger than 65535 in y or z");
  if (ctas >= kNone) fail("more than 2^32 blocks");
  const u32* cluster = launch.cluster;
  const u32* fixed = function.required_cluster;
  if (fixed[0] && !std::equal(fixed, fixed + 3, cluster)) {
    fail("the kernel wants clusters of (%u,%u,%u)", fixed[0], fixed[1], fixed[2]);
  }
  if (launch.cluster_size() > 8) fail("clusters of more than 8 blocks, which not every GPU has");
  for (u32 i = 0; i < 3; i++) {
    if (launch.grid[i] % cluster[i])
      fail("a grid of %u blocks is no multiple of clusters of %u", launch.grid[i], cluster[i]);
  }
  const u32* required = function.required_block;
  if (required[0] && !std::equal(required, required + 3, block)) {
    fail("the kernel wants a block of (%u,%u,%u)", required[0], required[1], required[2]);
  }
  if (function.max_threads && threads > function.max_threads) {
    fail("block of %llu threads, the kernel is compiled for at most %u", static_cast<unsigned long long>(threads),
         function.max_threads);
  }
  if (launch.shared_bytes > launch.options.shared_limit) {
    fail("%u bytes of shared memory, the limit is %u", launch.shared_bytes, launch.options.shared_limit);
  }
  if (launch.parameters.size() != launch.kernel->param_bytes) {
    fail("%zu bytes of parameters, the kernel takes %u", launch.parameters.size(), launch.kernel->param_bytes);
  }
}

void add_internal(Launch& launch, u64 begin, u64 bytes, const string& name, bool read_only) {
  if (!bytes) return;
  Buffer buffer;
  buffer.begin = begin;
  buffer.end = begin + bytes;
  buffer.name = name;
  buffer.read_only = read_only;
  buffer.internal = true;
  launch.buffers.push_back(buffer);
}

}    // namespace

namespace {

std::unique_ptr<Cta> make_cta(Launch& launch, Cluster& cluster, u32 rank, const ClockPtr& clock) {
  auto cta = std::make_unique<Cta>();
  const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
  const u32 warps = (threads + 31) / 32;
  cta->launch = &launch;
  cta->cluster = &cluster;
  cta->rank = rank;
  const u32* dims = launch.cluster;
  const u32 in_cluster[] = {rank % dims[0], rank / dims[0] % dims[1], rank / dims[0] / dims[1]};
  for (u32 i = 0; i < 3; i++) cta->id[i] = cluster.id[i] * dims[i] + in_cluster[i];
  cta->number = cta->id[0] + launch.grid[0] * (cta->id[1] + launch.grid[1] * cta->id[2]);
  cta->threads = warps * 32;
  cta->alive = threads;
  cta->granule_shift = launch.kernel->granule_shift;
  cta->shared.assign(kSharedReserved + launch.shared_bytes, 0xff);    // NaN in every float type
  if (launch.options.races && launch.shared_bytes) {
    cta->shadow.resize((cta->shared.size() >> cta->granule_shift) + 1);
  }
  for (u32 i = 0; i < warps; i++) {
    cta->warps.push_back(make_warp(launch, *cta, i, std::min(32u, threads - i * 32), clock));
  }
  return cta;
}

}    // namespace

std::unique_ptr<Cluster> make_cluster(Launch& launch, u32 number) {
  auto cluster = std::make_unique<Cluster>();
  cluster->launch = &launch;
  const u32 along[] = {launch.grid[0] / launch.cluster[0], launch.grid[1] / launch.cluster[1]};
  cluster->id[0] = number % along[0];
  cluster->id[1] = number / along[0] % along[1];
  cluster->id[2] = number / along[0] / along[1];
  const u32 size = launch.cluster_size();
  cluster->threads = (launch.block[0] * launch.block[1] * launch.block[2] + 31) / 32 * 32 * size;
  ClockPtr clock;
  if (launch.options.races) {
    clock = std::make_shared<Clock>();
    clock->time.assign(cluster->threads + kAgents * size, 0);
  }
  for (u32 rank = 0; rank < size; rank++) cluster->ctas.push_back(make_cta(launch, *cluster, rank, clock));
  return cluster;
}

void Launch::run() {
  shared_bytes = kernel->static_shared + dynamic_shared;
  for (u32 i = 0; i < 3; i++) {
    const u32 wanted = options.cluster[0] ? options.cluster[i] : kernel->function->required_cluster[i];
    cluster[i] = std::max(1u, wanted);
  }
  check_dimensions(*this);
  std::copy(parameters.begin(), parameters.end(), kernel->param_memory);
  counters.assign(kernel->code.size(), Counter());
  random = options.seed;
  for (const Instruction& instruction : kernel->code) instruction.last_buffer = nullptr;
  if (options.cooperative) {
    grid_workspace.assign(64, 0);
    add_internal(*this, reinterpret_cast<u64>(grid_workspace.data()), 256, "workspace of the grid", false);
  }
  add_internal(*this, reinterpret_cast<u64>(kernel->param_memory), kernel->param_bytes, "kernel parameters", true);
  for (const auto& [name, variable] : kernel->module->variables) {
    const bool is_constant = variable.space == Space::kConst;
    if (is_constant || variable.space == Space::kGlobal) {
      add_internal(*this, variable.address, variable.bytes, name, is_constant);
    }
  }
  std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) { return a.begin < b.begin; });
  for (Buffer& buffer : buffers) {
    const size_t words = ((buffer.end + 31) / 32 - buffer.begin / 32) / 64 + 1;
    buffer.read.assign(words, 0);
    buffer.written.assign(words, 0);
  }
  run_grid(*this);
  ended = true;
  for (const auto& write : late_writes) write();
}

}    // namespace emulator
