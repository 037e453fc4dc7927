// The tensor memory accelerator: tiled copies described by a tensor map, and the instructions that make such maps.
//
// A load is complete when its mbarrier says so, a store when its bulk group has been waited for. A multicast load lands
// at the same place of several blocks of the cluster, and tells the mbarrier at the same place there. The 128 bytes of
// a tensor map are opaque in PTX: the layout below is the emulator's own, and arguments.py writes the same.
#include <algorithm>
#include <array>

#include "machine.h"

namespace emulator {
namespace {

struct TensorMap {
  u64 address;
  u32 sizes[5];    // innermost first
  u8 rank_minus_1;
  u8 type;
  u8 interleave;
  u8 swizzle;    // 0 none, 1, 2, 3: 32, 64, 128 bytes
  u8 fill;
  u8 unused[3];
  u64 strides[4];    // bytes, of all dimensions but the innermost
  u16 box[5];
  u16 element_strides[5];
  u8 rest[36];

  u32 rank() const { return rank_minus_1 + 1u; }
  u32 element_bytes() const {
    static const u8 bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
    return bytes[std::min<u32>(type, 12)];
  }
  u64 row_bytes() const { return static_cast<u64>(box[0]) * element_bytes(); }
  u64 rows() const {
    u64 count = 1;
    for (u32 i = 1; i < rank(); i++) count *= box[i];
    return count;
  }
  u64 box_bytes() const { return rows() * row_bytes(); }
  // Where a byte of the box lies: 16-byte pieces are exchanged according to the address bits above them.
  u32 swizzled(u32 offset) const {
    switch (swizzle) {
      case 1: return offset ^ (offset >> 7 & 1) << 4;
      case 2: return offset ^ (offset >> 7 & 3) << 4;
      case 3: return offset ^ (offset >> 7 & 7) << 4;
      default: return offset;
    }
  }
};
static_assert(sizeof(TensorMap) == 128, "a tensor map has 128 bytes");

using Coordinates = std::array<i32, 5>;

u8* map_pointer(Warp& warp, const Instruction& instruction, u32 lane, u64 address, bool in_shared, bool write) {
  if (in_shared) {
    u32 offset;
    u8* memory = shared_pointer(warp, instruction, lane, address, 128, offset);
    if (!memory) return nullptr;
    if (write) {
      note_shared_write(warp, instruction, lane, offset, 128, nullptr, Access::kPlain);
    } else {
      note_shared_read(warp, instruction, lane, offset, 128, Access::kPlain);
    }
    return memory;
  }
  return global_pointer(warp, instruction, lane, address, 128, write);
}

void complain_about_map(Warp& warp, const Instruction& instruction, u32 lane, const TensorMap& map) {
  const auto complain = [&](const string& what) {
    warp.launch->report("tensor-map", instruction, where(warp, lane), what);
  };
  const u64 row_bytes = map.row_bytes();
  if (map.interleave) complain("interleaved maps are not supported");
  if (map.type > 12) complain(format("unknown element type %u", map.type));
  if (row_bytes & 15) complain(format("inner box of %llu bytes", static_cast<unsigned long long>(row_bytes)));
  if (map.address & 15) complain("global address is no multiple of 16 bytes");
  for (u32 i = 0; i + 1 < map.rank(); i++) {
    if (map.strides[i] & 15) complain("global stride is no multiple of 16 bytes");
  }
  for (u32 i = 0; i < map.rank(); i++) {
    if (map.element_strides[i] != 1) complain("element strides are not supported");
  }
  if (map.swizzle && row_bytes > (16u << map.swizzle)) complain("inner box larger than the span of the swizzle");
}

bool read_map(Warp& warp, const Instruction& instruction, u32 lane, const Operand& operand, TensorMap& map,
              Coordinates& coordinates) {
  const u8* memory = map_pointer(warp, instruction, lane, operand_address(warp, operand, lane), false, false);
  if (!memory) return false;
  memcpy(&map, memory, sizeof map);
  const vector<Operand>& values = operand.parts.at(0).parts;
  if (map.rank() > 5 || values.size() != map.rank()) {
    warp.launch->report("tensor-map", instruction, where(warp, lane),
                        format("map of rank %u used with %zu coordinates", map.rank(), values.size()));
    return false;
  }
  coordinates = {};
  for (size_t i = 0; i < values.size(); i++) coordinates[i] = static_cast<i32>(operand_value(warp, values[i], lane));
  complain_about_map(warp, instruction, lane, map);
  return true;
}

// For every row of the box that lies in the tensor at least partly: visit(byte in the box, global address, bytes).
template <class Visit>
void for_rows(const TensorMap& map, const Coordinates& coordinates, Visit visit) {
  const u32 element_bytes = map.element_bytes();
  const i64 first = coordinates[0];
  const i64 begin = std::max<i64>(0, first);
  const i64 end = std::min<i64>(map.sizes[0], first + map.box[0]);
  if (begin >= end) return;
  for (u64 row = 0; row < map.rows(); row++) {
    u64 rest = row;
    u64 address = map.address + static_cast<u64>(begin) * element_bytes;
    bool inside = true;
    for (u32 i = 1; i < map.rank(); i++) {
      const i64 at = coordinates[i] + static_cast<i64>(rest % map.box[i]);
      rest /= map.box[i];
      inside &= at >= 0 && at < static_cast<i64>(map.sizes[i]);
      address += static_cast<u64>(at * static_cast<i64>(map.strides[i - 1]));
    }
    const u64 in_box = row * map.row_bytes() + static_cast<u64>(begin - first) * element_bytes;
    if (inside) visit(in_box, address, static_cast<u64>(end - begin) * element_bytes);
  }
}

void load_tile(Warp& warp, const Instruction& instruction, u32 lane) {
  TensorMap map;
  Coordinates coordinates;
  if (!read_map(warp, instruction, lane, instruction.operands[1], map, coordinates)) return;
  const u64 destination = operand_address(warp, instruction.operands[0], lane);
  const u64 barrier_address = operand_address(warp, instruction.operands[2], lane);
  const u32 bytes = static_cast<u32>(map.box_bytes());
  u32 offset, barrier_offset;
  Cta *owner = nullptr, *told = nullptr;
  check_alignment(warp, instruction, lane, destination, 128);
  if (!shared_pointer(warp, instruction, lane, destination, bytes, offset, &owner)) return;
  if (!shared_pointer(warp, instruction, lane, barrier_address, 8, barrier_offset, &told)) return;
  if (owner != told) {
    warp.launch->report("mbarrier", instruction, where(warp, lane), "copy and mbarrier are in different blocks");
    return;
  }
  vector<Cta*> owners = {owner};
  if (instruction.variant) {
    const u64 ranks = operand_value(warp, instruction.operands[3], lane) & 0xffff;
    const auto& ctas = warp.cta->cluster->ctas;
    if (!ranks || ranks >> ctas.size()) {
      warp.launch->report("oob-shared", instruction, where(warp, lane),
                          format("multicast to blocks 0x%x of a cluster of %zu", static_cast<u32>(ranks), ctas.size()));
      return;
    }
    owners.clear();
    for (size_t i = 0; i < ctas.size(); i++) {
      if (ranks >> i & 1) owners.push_back(ctas[i].get());
    }
  }

  // The source is read now; what lies outside the tensor is zero.
  auto tile = std::make_shared<vector<u8>>(bytes);
  for_rows(map, coordinates, [&](u64 in_box, u64 address, u64 row_bytes) {
    if (!global_pointer(warp, instruction, lane, address, static_cast<u32>(row_bytes), false)) return;
    note_global_read(warp, instruction, lane, address, row_bytes, Proxy::kAsync);
    memcpy(&(*tile)[in_box], reinterpret_cast<const u8*>(address), row_bytes);
    count_row(warp, instruction, address, row_bytes, false);
  });
  warp.launch->counter(instruction).requests++;

  for (Cta* cta : owners) {
    const auto found = cta->mbarriers.find(barrier_offset);
    if (cta->done() || found == cta->mbarriers.end()) {
      warp.launch->report(cta->done() ? "early-exit" : "mbarrier", instruction, where(warp, lane),
                          format("copy signals block %u of the cluster, %s", cta->rank,
                                 cta->done() ? "which has exited" : "whose mbarrier is not initialised"));
      continue;
    }
    Mbarrier* barrier = &found->second;
    const u32 agent = barrier->agent;
    const u32 time = barrier->first_time + barrier->phase + 1;
    note_agent_access(warp, instruction, lane, offset, bytes, true, agent, time, cta);
    if (cta != warp.cta) note_shared_read(warp, instruction, lane, barrier_offset, 8, Access::kAtomic, cta);
    barrier->deliveries.push_back([=] {
      for (u32 i = 0; i < bytes; i += 16) {
        memcpy(&cta->shared[map.swizzled(offset + i)], &(*tile)[i], std::min(16u, bytes - i));
      }
      barrier->bytes_pending -= bytes;
      raise_time(barrier->arrivals, cta->cluster->threads + agent, time);
      complete_phase(*barrier);
    });
  }
}

void store_tile(Warp& warp, const Instruction& instruction, u32 lane) {
  TensorMap map;
  Coordinates coordinates;
  if (!read_map(warp, instruction, lane, instruction.operands[0], map, coordinates)) return;
  const u64 source = operand_address(warp, instruction.operands[1], lane);
  const u32 bytes = static_cast<u32>(map.box_bytes());
  u32 offset;
  check_alignment(warp, instruction, lane, source, 128);
  if (!shared_pointer(warp, instruction, lane, source, bytes, offset)) return;
  if (!warp.bulk_agents[lane]) warp.bulk_agents[lane] = new_agent(warp) + 1;
  BulkStore pending;
  pending.instruction = &instruction;
  pending.group = warp.bulk_groups[lane];
  pending.agent = warp.bulk_agents[lane] - 1;
  pending.time = pending.group + 1;
  note_agent_access(warp, instruction, lane, offset, bytes, false, pending.agent, pending.time);
  for_rows(map, coordinates, [&](u64, u64 address, u64 row_bytes) {
    if (!global_pointer(warp, instruction, lane, address, static_cast<u32>(row_bytes), true)) return;
    note_global_read(warp, instruction, lane, address, row_bytes, Proxy::kAsync);
    note_global_write(warp, instruction, lane, address, row_bytes, Proxy::kAsyncInFlight);
    count_row(warp, instruction, address, row_bytes, true);
  });
  // The source is read, and the destination written, as late as may be, so that a missing wait shows in the results.
  auto tile = std::make_shared<vector<u8>>(bytes);
  const Cta* cta = warp.cta;
  pending.read = [=] {
    for (u32 i = 0; i < bytes; i += 16) {
      memcpy(&(*tile)[i], &cta->shared[map.swizzled(offset + i)], std::min(16u, bytes - i));
    }
  };
  Warp* issuer = &warp;
  const Instruction* issued = &instruction;
  Launch* launch = warp.launch;
  pending.write = [=] {
    for_rows(map, coordinates, [&](u64 in_box, u64 address, u64 row_bytes) {
      issued->last_buffer = launch->find(address);
      if (!issued->last_buffer || address + row_bytes > issued->last_buffer->end) return;
      memcpy(reinterpret_cast<u8*>(address), &(*tile)[in_box], row_bytes);
      if (!launch->ended) note_global_write(*issuer, *issued, lane, address, row_bytes, Proxy::kAsync);
    });
  };
  warp.launch->counter(instruction).requests++;
  warp.bulk_stores[lane].push_back(pending);
}

void copy_tile(Warp& warp, const Instruction& instruction) {
  warp.progressed = true;
  for_lanes(warp.active, [&](u32 lane) {
    instruction.is_store ? store_tile(warp, instruction, lane) : load_tile(warp, instruction, lane);
  });
}

void commit_stores(Warp& warp, const Instruction&) {
  for_lanes(warp.active, [&](u32 lane) { warp.bulk_groups[lane]++; });
}

void read_source(Warp& warp, u32 lane, BulkStore& store) {
  if (store.was_read) return;
  store.read();
  store.was_read = true;
  acquire_agent(warp, 1u << lane, store.agent, store.time);
}

// immediate: groups that may stay in flight; variant: 1 for .read, after which only the source may be used again.
void wait_stores(Warp& warp, const Instruction& instruction) {
  for_lanes(warp.active, [&](u32 lane) {
    vector<BulkStore> kept;
    for (BulkStore& store : warp.bulk_stores[lane]) {
      const bool is_due = store.group + static_cast<u32>(instruction.immediate) < warp.bulk_groups[lane];
      if (is_due) read_source(warp, lane, store);
      if (is_due && !instruction.variant) {
        store.write();
      } else {
        kept.push_back(std::move(store));
      }
    }
    warp.bulk_stores[lane] = std::move(kept);
  });
  warp.progressed = true;
}

// tensormap.replace.tile.FIELD [map] {, dimension}, value; variant: 1 when the map is in shared memory.
void replace_field(Warp& warp, const Instruction& instruction) {
  const string& field = instruction.words[3];
  const bool has_dimension = instruction.operands.size() > 2;
  const u64 dimension = has_dimension ? instruction.operands[1].bits : 0;
  for_lanes(warp.active, [&](u32 lane) {
    const u64 address = operand_address(warp, instruction.operands[0], lane);
    const u64 value = operand_value(warp, instruction.operands[has_dimension ? 2 : 1], lane);
    const bool in_shared = instruction.variant || (address & kSharedWindow);
    u8* memory = map_pointer(warp, instruction, lane, address, in_shared, true);
    if (!memory) return;
    TensorMap map;
    memcpy(&map, memory, sizeof map);
    if (field == "global_address") map.address = value;
    if (field == "rank") map.rank_minus_1 = static_cast<u8>(value);
    if (field == "box_dim") map.box[dimension] = static_cast<u16>(value);
    if (field == "global_dim") map.sizes[dimension] = static_cast<u32>(value);
    if (field == "global_stride" && dimension < 4) map.strides[dimension] = value;
    if (field == "element_stride") map.element_strides[dimension] = static_cast<u16>(value);
    if (field == "elemtype") map.type = static_cast<u8>(value);
    if (field == "interleave_layout") map.interleave = static_cast<u8>(value);
    if (field == "swizzle_mode") map.swizzle = static_cast<u8>(value);
    if (field == "fill_mode") map.fill = static_cast<u8>(value);
    memcpy(memory, &map, sizeof map);
  });
}

// tensormap.cp_fenceproxy [global], [shared], 128: one copy a warp.
void copy_map(Warp& warp, const Instruction& instruction) {
  const u32 lane = lowest_lane(warp.active);
  const u64 to = operand_address(warp, instruction.operands[0], lane);
  const u64 from = operand_address(warp, instruction.operands[1], lane);
  const u8* source = map_pointer(warp, instruction, lane, from, true, false);
  u8* destination = map_pointer(warp, instruction, lane, to, false, true);
  if (source && destination) memcpy(destination, source, 128);
}

}    // namespace

// The thread exits. Its shared memory must have been read; the stores themselves end with the launch at the latest.
void leave_bulk_stores(Warp& warp, u32 lane) {
  for (BulkStore& store : warp.bulk_stores[lane]) {
    if (!store.was_read) {
      warp.launch->report("bulk-unwaited", *store.instruction, where(warp, lane),
                          "store still in flight when its thread exits");
      read_source(warp, lane, store);
    }
    warp.launch->late_writes.push_back(std::move(store.write));
  }
  warp.bulk_stores[lane].clear();
}

Handler decode_tensor_copy(Kernel& kernel, Instruction& instruction) {
  const string& opcode = instruction.opcode();
  if (opcode == "tensormap") {
    if (instruction.has("cp_fenceproxy")) return copy_map;
    if (instruction.words.size() < 4 || instruction.words[1] != "replace") return nullptr;
    if (instruction.operands.size() > 2 && instruction.operands[1].bits > 4) return nullptr;
    instruction.variant = instruction.has("shared::cta");
    return replace_field;
  }
  if (opcode != "cp" || !instruction.has("bulk")) return nullptr;
  if (instruction.has("commit_group")) return commit_stores;
  if (instruction.has("wait_group")) {
    instruction.immediate = static_cast<i64>(instruction.operands.at(0).bits);
    instruction.variant = instruction.has("read");
    return wait_stores;
  }
  const bool is_tiled_copy = instruction.has("tensor") && instruction.words[1] == "async";
  if (!is_tiled_copy || instruction.has("prefetch")) return nullptr;
  for (const string& word : instruction.words) {
    if (word.rfind("im2col", 0) == 0 || word.rfind("tile::", 0) == 0) return nullptr;
    if (word.rfind("cta_group", 0) == 0) return nullptr;
  }
  // words: cp.async.bulk.tensor.Nd.DESTINATION.SOURCE...
  instruction.is_store = instruction.words.at(5) == "global";
  instruction.variant = instruction.has("multicast::cluster");
  const size_t fewest = instruction.is_store ? 2 : 3;
  if (instruction.operands.size() < fewest + instruction.variant) return nullptr;
  if (instruction.variant) {
    Operand& ranks = instruction.operands[3];
    ranks.offset = slot_of(kernel, instruction, ranks, "b16");
    ranks.kind = OperandKind::kRegister;
    ranks.bytes = 4;
  }
  kernel.has_bulk_copies = true;
  return copy_tile;
}

}    // namespace emulator
