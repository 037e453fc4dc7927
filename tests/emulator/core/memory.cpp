// Addresses to host pointers with bounds and alignment checked; loads, stores, address conversions, fences.
#include <algorithm>

#include "machine.h"

namespace emulator {

Buffer* Launch::find(u64 address) {
  const auto after = std::upper_bound(buffers.begin(), buffers.end(), address,
                                      [](u64 wanted, const Buffer& buffer) { return wanted < buffer.begin; });
  if (after == buffers.begin()) return nullptr;
  Buffer& buffer = *(after - 1);
  return address < buffer.end ? &buffer : nullptr;
}

static string describe_address(const Launch& launch, u64 address) {
  string description = "no buffer is known";
  u64 least = ~0ull;
  for (const Buffer& buffer : launch.buffers) {
    const bool before = address < buffer.begin;
    const bool after = address >= buffer.end;
    if (buffer.internal && (before || after)) continue;
    const u64 distance = before ? buffer.begin - address : after ? address - buffer.end : 0;
    if (distance >= least) continue;
    least = distance;
    const char* name = buffer.name.c_str();
    const auto size = static_cast<unsigned long long>(buffer.end - buffer.begin);
    if (before) description = format("%llu bytes before '%s'", static_cast<unsigned long long>(distance), name);
    if (after) {
      description =
          format("%llu bytes past the end of '%s' (size %llu)", static_cast<unsigned long long>(distance), name, size);
    }
    if (!before && !after) {
      const auto at = static_cast<unsigned long long>(address - buffer.begin);
      description = format("at byte %llu of '%s' (size %llu)", at, name, size);
    }
  }
  return description;
}

u8* global_pointer(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes, bool write) {
  Buffer* buffer = instruction.last_buffer;
  if (!buffer || address < buffer->begin || address + bytes > buffer->end) {
    buffer = warp.launch->find(address);
    if (!buffer || address + bytes > buffer->end) {
      warp.launch->report(
          "oob-global", instruction, where(warp, lane),
          format("%s of %u bytes at 0x%llx: %s", write ? "write" : "read", bytes,
                 static_cast<unsigned long long>(address), describe_address(*warp.launch, address).c_str()));
      return nullptr;
    }
    instruction.last_buffer = buffer;
  }
  if (write && buffer->read_only) {
    warp.launch->report("write-readonly", instruction, where(warp, lane), buffer->name);
    return nullptr;
  }
  return reinterpret_cast<u8*>(address);
}

u8* shared_pointer(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes, u32& offset,
                   Cta** owner) {
  const u64 tag = address & ~0xffffffffull;
  offset = static_cast<u32>(address) & ((1u << kRankShift) - 1);
  if (tag != 0 && tag != kSharedWindow) {
    warp.launch->report("oob-shared", instruction, where(warp, lane),
                        format("0x%llx is no address of shared memory", static_cast<unsigned long long>(address)));
    return nullptr;
  }
  Cta* cta = warp.cta;
  if (const u32 block = static_cast<u32>(address) >> kRankShift) {
    const auto& ctas = warp.cta->cluster->ctas;
    if (!owner || block > ctas.size()) {
      warp.launch->report("oob-shared", instruction, where(warp, lane),
                          format("an address in block %u of the cluster, which has %zu, in an access to %s", block - 1,
                                 ctas.size(), owner ? "shared::cluster" : "shared::cta"));
      return nullptr;
    }
    cta = ctas[block - 1].get();
    if (cta->done()) {
      warp.launch->report("early-exit", instruction, where(warp, lane),
                          format("the shared memory of block %u of the cluster, which has exited", block - 1));
      return nullptr;
    }
  }
  if (owner) *owner = cta;
  vector<u8>& shared = cta->shared;
  if (offset < kSharedReserved || static_cast<u64>(offset) + bytes > shared.size()) {
    warp.launch->report("oob-shared", instruction, where(warp, lane),
                        format("%u bytes at shared offset %d; the block has %zu bytes", bytes,
                               static_cast<i32>(offset - kSharedReserved), shared.size() - kSharedReserved));
    return nullptr;
  }
  return &shared[offset];
}

u8* local_pointer(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes) {
  const u64 offset = address & ~kLocalWindow;
  if (offset + bytes > warp.local_bytes) {
    warp.launch->report("oob-local", instruction, where(warp, lane),
                        format("local offset %lld of %u bytes", static_cast<long long>(offset), warp.local_bytes));
    return nullptr;
  }
  return &warp.local[static_cast<u64>(lane) * warp.local_bytes + offset];
}

void check_alignment(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u32 bytes) {
  if (__builtin_expect((address & (bytes - 1)) == 0, 1)) return;
  warp.launch->report(
      "misaligned", instruction, where(warp, lane),
      format("address 0x%llx for an access of %u bytes", static_cast<unsigned long long>(address), bytes));
}

void addresses_of(Warp& warp, const Instruction& instruction, u64* addresses) {
  const u64 displacement = static_cast<u64>(instruction.displacement);
  if (instruction.base == kNone) {
    std::fill_n(addresses, 32, displacement);
  } else if (instruction.base_bytes == 8) {
    const u64* base = warp.slots<u64>(instruction.base);
    for (u32 lane = 0; lane < 32; lane++) addresses[lane] = base[lane] + displacement;
  } else {
    const u32* base = warp.slots<u32>(instruction.base);
    for (u32 lane = 0; lane < 32; lane++) addresses[lane] = base[lane] + static_cast<u32>(displacement);
  }
}

u64 operand_address(Warp& warp, const Operand& operand, u32 lane) {
  if (operand.offset == kNone) return operand.bits;
  if (operand.bytes == 8) return warp.slots<u64>(operand.offset)[lane] + operand.bits;
  return warp.slots<u32>(operand.offset)[lane] + static_cast<u32>(operand.bits);
}

u64 operand_value(Warp& warp, const Operand& operand, u32 lane) {
  if (operand.kind == OperandKind::kImmediate) return operand.bits;
  return operand.bytes == 8 ? warp.slots<u64>(operand.offset)[lane] : warp.slots<u32>(operand.offset)[lane];
}

void decode_address(Instruction& instruction, size_t index) {
  const Operand& operand = instruction.operands.at(index);
  if (operand.kind != OperandKind::kAddress) {
    fail("PTX line %u: address expected: %s", instruction.line, instruction.text.c_str());
  }
  instruction.base = operand.offset;
  instruction.base_bytes = operand.bytes;
  instruction.displacement = static_cast<i64>(operand.bits);
}

// The space an access goes to; arguments of a call are .param in name and local memory in fact.
Space space_of(const Instruction& instruction, u64 address) {
  if (instruction.space != Space::kGeneric && instruction.space != Space::kParam) return instruction.space;
  switch (address & (kSharedWindow | kLocalWindow)) {
    case kSharedWindow: return Space::kShared;
    case kLocalWindow: return Space::kLocal;
    default: return Space::kGlobal;
  }
}

// The same poll that returns the same value again and again: let other warps and blocks run.
void note_poll(Warp& warp, const Instruction& instruction, u64 value) {
  if (warp.polled_pc != instruction.pc || warp.polled_value != value) {
    warp.polled_pc = instruction.pc;
    warp.polled_value = value;
    warp.polled_times = 0;
  } else if (++warp.polled_times >= 2) {
    warp.yielded = true;
  }
}

namespace {

u64 extend(const u8* memory, u32 bytes, bool sign) {
  u64 value = 0;
  memcpy(&value, memory, bytes);
  const u32 unused = 64 - 8 * bytes;
  return sign ? static_cast<u64>(static_cast<i64>(value << unused) >> unused) : value;
}

void write_elements(Warp& warp, const Instruction& instruction, u32 lane, const u8* memory) {
  for (u32 element = 0; element < instruction.vector_length; element++, memory += instruction.element_bytes) {
    const u32 offset = instruction.reg[element];
    if (offset == kNone) continue;
    if (instruction.element_bytes == 4 && instruction.slot_bytes == 4) {
      memcpy(&warp.slots<u32>(offset)[lane], memory, 4);
      continue;
    }
    const u64 value = extend(memory, instruction.element_bytes, instruction.sign_extend);
    if (instruction.slot_bytes == 8) {
      warp.slots<u64>(offset)[lane] = value;
    } else {
      warp.slots<u32>(offset)[lane] = static_cast<u32>(value);
    }
  }
}

void read_elements(Warp& warp, const Instruction& instruction, u32 lane, u8* memory) {
  for (u32 element = 0; element < instruction.vector_length; element++, memory += instruction.element_bytes) {
    const u32 offset = instruction.reg[element];
    const u8* slot = instruction.slot_bytes == 8 ? reinterpret_cast<u8*>(&warp.slots<u64>(offset)[lane])
                                                 : reinterpret_cast<u8*>(&warp.slots<u32>(offset)[lane]);
    memcpy(memory, slot, instruction.element_bytes);
  }
}

u64 hash_result(Warp& warp, const Instruction& instruction) {
  u64 hash = 0;
  for_lanes(warp.active, [&](u32 lane) {
    const u32 offset = instruction.reg[0];
    const u64 value = instruction.slot_bytes == 8 ? warp.slots<u64>(offset)[lane] : warp.slots<u32>(offset)[lane];
    hash = hash * 1099511628211ull + value;
  });
  return hash;
}

void load(Warp& warp, const Instruction& instruction) {
  static const u8 zeros[64] = {};
  u64 addresses[32];
  u32 shared_offsets[32];
  u32 in_global = 0, in_shared = 0;
  const u32 bytes = instruction.access_bytes();
  addresses_of(warp, instruction, addresses);
  if (instruction.space == Space::kParam) {
    const Kernel& kernel = *warp.launch->kernel;
    for (u64& address : addresses) {
      if (address < kParamBase + kernel.param_bytes) {
        address += reinterpret_cast<u64>(kernel.param_memory) - kParamBase;
      }
    }
  }
  for_lanes(warp.active, [&](u32 lane) {
    const u64 address = addresses[lane];
    const u8* memory = nullptr;
    check_alignment(warp, instruction, lane, address, bytes);
    switch (space_of(instruction, address)) {
      case Space::kShared: {
        u32 offset;
        Cta* owner = nullptr;
        memory =
            shared_pointer(warp, instruction, lane, address, bytes, offset, instruction.in_cluster ? &owner : nullptr);
        if (!memory) break;
        note_shared_read(warp, instruction, lane, offset, bytes, instruction.strong ? Access::kAtomic : Access::kPlain,
                         owner);
        shared_offsets[lane] = offset;
        in_shared |= 1u << lane;
        break;
      }
      case Space::kLocal: memory = local_pointer(warp, instruction, lane, address, bytes); break;
      case Space::kGlobal:
        memory = global_pointer(warp, instruction, lane, address, bytes, false);
        if (!memory) break;
        if (!instruction.last_buffer->writer_of_word.empty()) {
          note_global_access(warp, instruction, lane, address, bytes, nullptr);
        }
        note_global_read(warp, instruction, lane, address, bytes, Proxy::kGeneric);
        in_global |= 1u << lane;
        break;
      default: memory = global_pointer(warp, instruction, lane, address, bytes, false);    // constants
    }
    write_elements(warp, instruction, lane, memory ? memory : zeros);
  });
  if (in_global) count_sectors(warp, instruction, addresses, in_global, bytes, false);
  if (in_shared) count_wavefronts(warp, instruction, shared_offsets, in_shared, bytes);
  if (instruction.polls) note_poll(warp, instruction, hash_result(warp, instruction));
}

void store(Warp& warp, const Instruction& instruction) {
  u64 addresses[32];
  u32 shared_offsets[32];
  u32 in_global = 0, in_shared = 0;
  u8 value[64];
  const u32 bytes = instruction.access_bytes();
  addresses_of(warp, instruction, addresses);
  for_lanes(warp.active, [&](u32 lane) {
    const u64 address = addresses[lane];
    u8* memory = nullptr;
    check_alignment(warp, instruction, lane, address, bytes);
    read_elements(warp, instruction, lane, value);
    switch (space_of(instruction, address)) {
      case Space::kShared: {
        u32 offset;
        Cta* owner = nullptr;
        memory =
            shared_pointer(warp, instruction, lane, address, bytes, offset, instruction.in_cluster ? &owner : nullptr);
        if (!memory) break;
        note_shared_write(warp, instruction, lane, offset, bytes, value,
                          instruction.strong ? Access::kAtomic : Access::kPlain, owner);
        shared_offsets[lane] = offset;
        in_shared |= 1u << lane;
        break;
      }
      case Space::kLocal: memory = local_pointer(warp, instruction, lane, address, bytes); break;
      default:
        memory = global_pointer(warp, instruction, lane, address, bytes, true);
        if (!memory) break;
        note_global_access(warp, instruction, lane, address, bytes, value);
        note_global_write(warp, instruction, lane, address, bytes, Proxy::kGeneric);
        in_global |= 1u << lane;
    }
    if (memory) memcpy(memory, value, bytes);
  });
  if (in_global) count_sectors(warp, instruction, addresses, in_global, bytes, true);
  if (in_shared) count_wavefronts(warp, instruction, shared_offsets, in_shared, bytes);
  warp.progressed = true;
}

// cvta; immediate: the window's bits; variant: 1 from generic (cvta.to), 0 to generic.
void convert_address(Warp& warp, const Instruction& instruction) {
  u64* out = warp.slots<u64>(instruction.reg[0]);
  const u64* in = warp.slots<u64>(instruction.reg[1]);
  const u64 window = static_cast<u64>(instruction.immediate);
  const u64 params = reinterpret_cast<u64>(warp.launch->kernel->param_memory) - kParamBase;
  for_lanes(warp.active, [&](u32 lane) {
    if (instruction.space != Space::kParam) {
      out[lane] = instruction.variant ? in[lane] & ~window : in[lane] | window;
    } else if (in[lane] >= kSharedWindow) {
      out[lane] = in[lane];    // the argument of a call
    } else {
      out[lane] = instruction.variant ? in[lane] - params : in[lane] + params;
    }
  });
}

// mapa d, a, rank: the same place in the shared memory of another block of the cluster. variant: 1 for getctarank d, a,
// which block's it is; modifier: 1 for generic addresses.
void map_to_block(Warp& warp, const Instruction& instruction) {
  constexpr u64 kPlace = (1ull << kRankShift) - 1;
  const vector<Operand>& operands = instruction.operands;
  for_lanes(warp.active, [&](u32 lane) {
    const u64 address = operand_value(warp, operands[1], lane);
    if (instruction.variant) {
      const u32 block = static_cast<u32>(address) >> kRankShift;
      warp.slots<u32>(operands[0].offset)[lane] = block ? block - 1 : warp.cta->rank;
      return;
    }
    const u64 rank = operand_value(warp, operands[2], lane);
    if (rank >= warp.launch->cluster_size()) {
      warp.launch->report("oob-shared", instruction, where(warp, lane),
                          format("there is no block %u in the cluster", static_cast<u32>(rank)));
    }
    const u64 mapped = (rank + 1) << kRankShift | (address & kPlace);
    if (instruction.modifier) {
      warp.slots<u64>(operands[0].offset)[lane] = mapped | kSharedWindow;
    } else {
      warp.slots<u32>(operands[0].offset)[lane] = static_cast<u32>(mapped);
    }
  });
}

void is_in_space(Warp& warp, const Instruction& instruction) {
  u32 lanes = 0;
  for_lanes(warp.active, [&](u32 lane) {
    const u64 window = warp.slots<u64>(instruction.reg[1])[lane] & (kSharedWindow | kLocalWindow);
    const u64 wanted = instruction.space == Space::kShared  ? kSharedWindow
                       : instruction.space == Space::kLocal ? kLocalWindow
                                                            : 0;
    lanes |= static_cast<u32>(window == wanted) << lane;
  });
  warp.set_predicate(instruction.reg[0], lanes);
}

void nothing(Warp&, const Instruction&) {}

// The cache policy of createpolicy: its value does not matter here.
void zero_result(Warp& warp, const Instruction& instruction) {
  for_lanes(warp.active, [&](u32 lane) { warp.slots<u64>(instruction.reg[0])[lane] = 0; });
}

bool decode_space(Instruction& instruction) {
  for (size_t i = 1; i < instruction.words.size(); i++) {
    const string& word = instruction.words[i];
    if (word == "global") instruction.space = Space::kGlobal;
    if (word.rfind("shared", 0) == 0) instruction.space = Space::kShared;
    if (word == "shared::cluster") instruction.in_cluster = true;
    if (word == "local") instruction.space = Space::kLocal;
    if (word == "const") instruction.space = Space::kConst;
    if (word.rfind("param", 0) == 0) instruction.space = Space::kParam;
    if (word == "v2") instruction.vector_length = 2;
    if (word == "v4") instruction.vector_length = 4;
    if (word == "v8") return false;    // sm_100
  }
  if (instruction.space == Space::kGeneric) instruction.in_cluster = true;
  return true;
}

// The registers that are loaded or stored: any that are at least as wide as the type.
void decode_elements(Kernel& kernel, Instruction& instruction, size_t index, bool is_load) {
  Operand& operand = instruction.operands.at(index);
  vector<Operand*> elements = {&operand};
  if (operand.is_vector()) {
    elements.clear();
    for (Operand& part : operand.parts) elements.push_back(&part);
  }
  const string& type = instruction.type();
  const u8 bytes = instruction.element_bytes;
  const auto complain = [&](const char* problem) {
    fail("PTX line %u: %s: %s", instruction.line, problem, instruction.text.c_str());
  };
  if (elements.size() != instruction.vector_length) complain("wrong vector length");
  instruction.slot_bytes = bytes == 8 ? 8 : 4;
  for (size_t i = 0; i < elements.size(); i++) {
    Operand& element = *elements[i];
    if (element.is_register()) {
      if (element.bytes < bytes || element.bytes == 0) complain("register too narrow");
      instruction.slot_bytes = element.bytes == 8 ? 8 : 4;
    } else if (element.kind == OperandKind::kSink && is_load) {
      element.offset = kNone;
    } else {
      element.offset = slot_of(kernel, instruction, element, type);
      element.kind = OperandKind::kRegister;
      element.bytes = bytes;
    }
    if (i < 4) instruction.reg[i] = element.offset;
  }
}

bool is_ignored(const Instruction& instruction) {
  static const char* ignored[] = {"membar", "fence", "prefetch", "prefetchu", "applypriority", "griddepcontrol"};
  return std::find(std::begin(ignored), std::end(ignored), instruction.opcode()) != std::end(ignored);
}

}    // namespace

Handler decode_memory(Kernel& kernel, Instruction& instruction) {
  const string& opcode = instruction.opcode();
  if (opcode == "fence" && instruction.has("proxy") && instruction.words.at(2).rfind("async", 0) == 0) {
    instruction.variant = instruction.has("global") ? 2 : instruction.type().rfind("shared", 0) == 0 ? 1 : 3;
    return proxy_fence;
  }
  // Memory is sequentially consistent here, so other fences have nothing to do.
  if (is_ignored(instruction)) return nothing;
  if (opcode == "createpolicy") {
    instruction.reg[0] = slot_of(kernel, instruction, instruction.operands.at(0), "b64");
    return zero_result;
  }
  if (opcode == "cvta") {
    decode_space(instruction);
    if (instruction.type() != "u64") return nullptr;
    instruction.reg[0] = slot_of(kernel, instruction, instruction.operands.at(0), "u64");
    instruction.reg[1] = slot_of(kernel, instruction, instruction.operands.at(1), "u64");
    instruction.variant = instruction.has("to");
    if (instruction.space == Space::kShared) instruction.immediate = static_cast<i64>(kSharedWindow);
    if (instruction.space == Space::kLocal) instruction.immediate = static_cast<i64>(kLocalWindow);
    return convert_address;
  }
  if (opcode == "mapa" || opcode == "getctarank") {
    instruction.variant = opcode == "getctarank";
    instruction.modifier = !instruction.has("shared::cluster");
    const char* address = instruction.modifier ? "u64" : "u32";
    const char* const types[] = {instruction.variant ? "u32" : address, address, "u32"};
    for (size_t i = 0; i < (instruction.variant ? 2 : 3); i++) {
      Operand& operand = instruction.operands.at(i);
      operand.offset = slot_of(kernel, instruction, operand, types[i]);
      operand.kind = OperandKind::kRegister;
      operand.bytes = types[i][1] == '6' ? 8 : 4;
    }
    return map_to_block;
  }
  if (opcode == "isspacep") {
    decode_space(instruction);
    instruction.reg[0] = slot_of(kernel, instruction, instruction.operands.at(0), "pred");
    instruction.reg[1] = slot_of(kernel, instruction, instruction.operands.at(1), "u64");
    return is_in_space;
  }
  if (opcode != "ld" && opcode != "st") return nullptr;
  if (instruction.has("async") || instruction.has("bulk")) return nullptr;
  const int bytes = type_bytes(instruction.type());
  if (!decode_space(instruction) || bytes <= 0) return nullptr;
  instruction.element_bytes = static_cast<u8>(bytes);
  instruction.sign_extend = instruction.type()[0] == 's';
  instruction.strong = instruction.has("relaxed") || instruction.has("acquire") || instruction.has("release");
  instruction.polls = instruction.strong || instruction.has("volatile") || instruction.has("mmio");
  const bool is_load = opcode == "ld";
  decode_elements(kernel, instruction, is_load ? 0 : 1, is_load);
  decode_address(instruction, is_load ? 1 : 0);
  return is_load ? load : store;
}

}    // namespace emulator
