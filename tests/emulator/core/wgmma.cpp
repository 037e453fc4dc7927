// wgmma: products of a warpgroup whose operands the tensor cores read from shared memory on their own.
#include <algorithm>

#include "tensor_core.h"

namespace emulator {
namespace {

// A matrix in shared memory, as the 64-bit descriptor tells: where element (row, k) of a tile lies.
class SharedMatrix {
 public:
  SharedMatrix(u64 descriptor, bool k_is_contiguous, u32 bytes)
      : start_(field(descriptor, 0)),
        leading_(field(descriptor, 16)),
        stride_(field(descriptor, 32)),
        swizzle_(static_cast<u32>(descriptor >> 62)),
        k_is_contiguous_(k_is_contiguous),
        bytes_(bytes) {}

  // The address of 16 contiguous bytes that begin with element (row, k).
  u32 address(u32 row, u32 k) const {
    static const u32 spans[] = {16, 128, 64, 32};    // bytes of a swizzled row, by the code of the swizzle
    const u32 span = spans[swizzle_];
    const u32 in_span = span / bytes_;
    const u32 in_piece = 16 / bytes_;
    u32 offset;
    if (k_is_contiguous_ && swizzle_) {
      offset = row % 8 * span + row / 8 * stride_ + k * bytes_;
    } else if (k_is_contiguous_) {
      offset = row % 8 * 16 + row / 8 * stride_ + k / in_piece * leading_ + k % in_piece * bytes_;
    } else if (swizzle_) {
      offset = row % in_span * bytes_ + row / in_span * leading_ + k % 8 * span + k / 8 * stride_;
    } else {
      offset = row % in_piece * bytes_ + row / in_piece * stride_ + k % 8 * 16 + k / 8 * leading_;
    }
    const u32 plain = start_ + offset;
    switch (swizzle_) {
      case 1: return plain ^ (plain >> 7 & 7) << 4;
      case 2: return plain ^ (plain >> 7 & 3) << 4;
      case 3: return plain ^ (plain >> 7 & 1) << 4;
      default: return plain;
    }
  }

 private:
  static u32 field(u64 descriptor, u32 shift) { return static_cast<u32>(descriptor >> shift & 0x3fff) << 4; }

  u32 start_, leading_, stride_, swizzle_;
  bool k_is_contiguous_;
  u32 bytes_;
};

// What an instruction's modifiers and immediates say.
struct Wgmma {
  bool a_in_registers = false;
  bool a_transposed = false, b_transposed = false;
  double sign = 1;
};

Wgmma describe(const Instruction& instruction, bool is_16_bit) {
  const vector<Operand>& operands = instruction.operands;
  const auto immediate = [&](size_t i, i64 otherwise) {    // those after the predicate
    return i + 4 < operands.size() ? static_cast<i64>(operands[i + 4].bits) : otherwise;
  };
  Wgmma wgmma;
  wgmma.a_in_registers = operands[1].is_vector();
  wgmma.sign = static_cast<double>(immediate(0, 1) * immediate(1, 1));
  if (is_16_bit) {
    wgmma.a_transposed = !wgmma.a_in_registers && immediate(2, 0);
    wgmma.b_transposed = immediate(wgmma.a_in_registers ? 2 : 3, 0);
  }
  return wgmma;
}

// Reads `rows` x K elements through a descriptor, 16 contiguous bytes at a time: put(row, k, value).
// The four warps of a warpgroup read the same B: each one notes a quarter of it for the race detector (`share`).
template <Element type, u32 K, class Put>
void read_matrix(Warp& warp, const Instruction& instruction, u64 descriptor, bool transposed, u32 first_row, u32 rows,
                 bool share, u32 agent, Put put) {
  constexpr u32 kBytes = element_bytes(type);
  constexpr u32 kPiece = 16 / kBytes;
  Cta& cta = *warp.cta;
  const SharedMatrix matrix(descriptor, !transposed, kBytes);
  if (descriptor >> 49 & 7) warp.launch->report("wgmma", instruction, where(warp, 0), "base offset is not supported");
  const u32 row_step = transposed ? kPiece : 1;
  const u32 k_step = transposed ? 1 : kPiece;
  for (u32 row = 0; row < rows; row += row_step) {
    for (u32 k = 0; k < K; k += k_step) {
      const u32 address = matrix.address(first_row + row, k);
      u32 offset;
      if (!shared_pointer(warp, instruction, 0, address, 16, offset)) continue;
      if (!share || (address >> 4 & 3) == warp.index % 4) {
        note_agent_access(warp, instruction, 0, offset, 16, false, agent, warp.wgmma_groups + 1);
      }
      for (u32 i = 0; i < kPiece; i++) {
        u32 word = 0;
        memcpy(&word, &cta.shared[offset + i * kBytes], kBytes);
        put(transposed ? row + i : row, transposed ? k : k + i, to_float<type>(word));
      }
    }
  }
}

// This warp's 16 of the 64 rows. variant: 1 when the accumulators are f16; immediate: N; reg[3]: whether to add to D.
template <Element type, u32 K>
void multiply(Warp& warp, const Instruction& instruction) {
  if (warp.active != kAllLanes) {
    warp.launch->report("divergent-collective", instruction, where(warp, lowest_lane(warp.active)), "part of a warp");
    return;
  }
  const u32 n = static_cast<u32>(instruction.immediate);
  const bool is_half = instruction.variant;
  const Wgmma wgmma = describe(instruction, type != Element::kTf32);
  const vector<Operand>& accumulators = instruction.operands[0].parts;
  u32& agent = warp.cta->warps[warp.index & ~3u]->wgmma_agent;    // one for the warpgroup
  if (agent == kNone) agent = new_agent(warp);

  double a[16 * K];
  static thread_local vector<double> b, sums;
  b.assign(static_cast<size_t>(K) * n, 0);
  sums.assign(static_cast<size_t>(16) * n, 0);
  if (wgmma.a_in_registers) {
    unpack_a<type, K>(warp, instruction.operands[1].parts, a);
  } else {
    std::fill_n(a, 16 * K, 0.0);
    const u64 descriptor = warp.slots<u64>(instruction.operands[1].offset)[0];
    read_matrix<type, K>(warp, instruction, descriptor, wgmma.a_transposed, warp.index % 4 * 16, 16, false, agent,
                         [&](u32 row, u32 k, float value) { a[row * K + k] = value; });
  }
  const u64 descriptor = warp.slots<u64>(instruction.operands[2].offset)[0];
  read_matrix<type, K>(warp, instruction, descriptor, wgmma.b_transposed, 0, n, true, agent,
                       [&](u32 column, u32 k, float value) { b[k * n + column] = value; });
  if (warp.predicate(instruction.reg[3]) & 1) load_sums(warp, accumulators, is_half, n, sums.data());
  for (u32 row = 0; row < 16; row++) {
    double* row_sums = &sums[static_cast<size_t>(row) * n];
    for (u32 k = 0; k < K; k += 4) {
      const double* b_rows = &b[static_cast<size_t>(k) * n];
      double factors[4];
      for (u32 i = 0; i < 4; i++) factors[i] = a[row * K + k + i] * wgmma.sign;
      for (u32 column = 0; column < n; column++) {
        row_sums[column] += (factors[0] * b_rows[column] + factors[1] * b_rows[n + column]) +
                            (factors[2] * b_rows[2 * n + column] + factors[3] * b_rows[3 * n + column]);
      }
    }
  }
  store_sums(warp, accumulators, is_half, n, sums.data());
  for (const Operand& accumulator : accumulators) {
    warp.wgmma_pending.push_back({accumulator.offset, warp.wgmma_groups});
  }
}

void commit_group(Warp& warp, const Instruction&) { warp.wgmma_groups++; }

// immediate: groups that may stay in flight.
void wait_group(Warp& warp, const Instruction& instruction) {
  const u32 kept = static_cast<u32>(instruction.immediate);
  auto& pending = warp.wgmma_pending;
  const auto is_done = [&](const std::pair<u32, u32>& entry) { return entry.second + kept < warp.wgmma_groups; };
  pending.erase(std::remove_if(pending.begin(), pending.end(), is_done), pending.end());
  const u32 agent = warp.cta->warps[warp.index & ~3u]->wgmma_agent;
  if (agent != kNone && warp.wgmma_groups > kept) acquire_agent(warp, warp.active, agent, warp.wgmma_groups - kept);
}

void fence(Warp&, const Instruction&) {}

Handler handler_for(Element type, u32 k) {
  if (k == 16 && type == Element::kHalf) return multiply<Element::kHalf, 16>;
  if (k == 16 && type == Element::kBfloat) return multiply<Element::kBfloat, 16>;
  return k == 8 && type == Element::kTf32 ? multiply<Element::kTf32, 8> : nullptr;
}

}    // namespace

// An instruction that runs while wgmma groups are in flight must not read their accumulators. A plain mov may, because
// ptxas merges the two registers: it passes the state on.
void check_wgmma_hazard(Warp& warp, const Instruction& instruction) {
  const string& opcode = instruction.opcode();
  if (opcode == "wgmma") return;
  auto& pending = warp.wgmma_pending;
  const auto group_of = [&](const Operand& operand) -> const std::pair<u32, u32>* {
    if (!operand.is_register()) return nullptr;
    for (const auto& entry : pending) {
      if (entry.first == operand.offset) return &entry;
    }
    return nullptr;
  };
  const vector<Operand>& operands = instruction.operands;
  const bool has_no_result = opcode == "st" || opcode == "red" || opcode == "stmatrix";
  const std::pair<u32, u32>* read = nullptr;
  for (size_t i = has_no_result ? 0 : 1; i < operands.size() && !read; i++) {
    read = group_of(operands[i]);
    if (!operands[i].is_vector()) continue;
    for (const Operand& part : operands[i].parts) {
      if (!read) read = group_of(part);
    }
  }
  const bool writes_register = !has_no_result && !operands.empty() && operands[0].is_register();
  if (read && opcode == "mov" && writes_register) {
    const u32 group = read->second;
    pending.push_back({operands[0].offset, group});
  } else if (read) {
    warp.launch->report("wgmma-hazard", instruction, where(warp, 0),
                        "reads an accumulator of a wgmma group that has not been waited for");
  } else if (writes_register) {    // the register is used for something else now
    const u32 offset = operands[0].offset;
    const auto is_same = [&](const std::pair<u32, u32>& entry) { return entry.first == offset; };
    pending.erase(std::remove_if(pending.begin(), pending.end(), is_same), pending.end());
  }
}

Handler decode_wgmma(Kernel& kernel, Instruction& instruction) {
  const vector<string>& words = instruction.words;
  vector<Operand>& operands = instruction.operands;
  if (words[0] != "wgmma") return nullptr;
  if (words.at(1) == "fence") return fence;
  if (words[1] == "commit_group") return commit_group;
  if (words[1] == "wait_group") {
    instruction.immediate = static_cast<i64>(operands.at(0).bits);
    return wait_group;
  }
  // words: wgmma.mma_async.sync.aligned.SHAPE.D.A.B
  if (words[1] != "mma_async" || words.size() != 8 || words[6] != words[7]) return nullptr;
  const MmaShape shape = mma_shape(instruction);
  const Element type = element_named(words[6]);
  const bool is_half = words[5] == "f16";
  if (shape.m != 64 || (!is_half && words[5] != "f32")) return nullptr;
  instruction.variant = is_half;
  instruction.immediate = shape.n;
  if (operands.at(0).parts.size() != shape.n / (is_half ? 4 : 2)) return nullptr;
  for (Operand& part : operands[0].parts) part.offset = slot_of(kernel, instruction, part, "b32");
  for (size_t i = 1; i < 3; i++) {    // descriptors, or the registers of A
    Operand& operand = operands.at(i);
    const bool is_vector = operand.is_vector();
    if (is_vector && (i == 2 || operand.parts.size() != 4)) return nullptr;
    if (!is_vector) operand.offset = slot_of(kernel, instruction, operand, "b64");
    for (Operand& part : operand.parts) part.offset = slot_of(kernel, instruction, part, "b32");
  }
  if (operands.at(3).negated) return nullptr;
  instruction.reg[3] = slot_of(kernel, instruction, operands[3], "pred");
  return handler_for(type, shape.k);
}

}    // namespace emulator
