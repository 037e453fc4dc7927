// ldmatrix, stmatrix and movmatrix: 8 x 8 matrices of 16-bit values, each row of 16 bytes addressed by one lane.
#include "machine.h"

namespace emulator {
namespace {

using Matrix = u16[8][8];

// Lane 4 r + c holds elements (r, 2c) and (r, 2c + 1).
void from_lanes(const u32* words, Matrix& matrix, bool transposed) {
  for (u32 lane = 0; lane < 32; lane++) {
    const u32 row = lane / 4;
    const u32 column = lane % 4 * 2;
    for (u32 i = 0; i < 2; i++) {
      const u16 value = static_cast<u16>(words[lane] >> 16 * i);
      (transposed ? matrix[column + i][row] : matrix[row][column + i]) = value;
    }
  }
}

void to_lanes(const Matrix& matrix, u32* words, bool transposed) {
  for (u32 lane = 0; lane < 32; lane++) {
    const u32 row = lane / 4;
    const u32 column = lane % 4 * 2;
    const u16 low = transposed ? matrix[column][row] : matrix[row][column];
    const u16 high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
    words[lane] = low | static_cast<u32>(high) << 16;
  }
}

// vector_length: how many matrices; variant: 1 transposed.
void move_matrices(Warp& warp, const Instruction& instruction) {
  if (warp.active != kAllLanes) {
    warp.launch->report("divergent-collective", instruction, where(warp, lowest_lane(warp.active)), "part of a warp");
    return;
  }
  const bool is_store = instruction.is_store;
  const bool transposed = instruction.variant;
  const Operand& values = instruction.operands[is_store ? 1 : 0];
  u64 addresses[32];
  addresses_of(warp, instruction, addresses);
  for (u32 i = 0; i < instruction.vector_length; i++) {
    const Operand& value = values.is_vector() ? values.parts[i] : values;
    u32* words = warp.slots<u32>(value.offset);
    Matrix matrix = {};
    u32 offsets[32] = {};
    u32 rows = 0;
    if (is_store) from_lanes(words, matrix, transposed);
    for (u32 row = 0; row < 8; row++) {
      const u32 lane = 8 * i + row;
      u32 offset;
      check_alignment(warp, instruction, lane, addresses[lane], 16);
      u8* memory = shared_pointer(warp, instruction, lane, addresses[lane], 16, offset);
      if (!memory) continue;
      if (is_store) {
        const u8* bytes = reinterpret_cast<const u8*>(matrix[row]);
        note_shared_write(warp, instruction, lane, offset, 16, bytes, Access::kPlain);
        memcpy(memory, matrix[row], 16);
      } else {
        note_shared_read(warp, instruction, lane, offset, 16, Access::kPlain);
        memcpy(matrix[row], memory, 16);
      }
      offsets[row] = offset;
      rows |= 1u << row;
    }
    if (!is_store) to_lanes(matrix, words, transposed);
    count_wavefronts(warp, instruction, offsets, rows, 16);
  }
}

void transpose(Warp& warp, const Instruction& instruction) {
  Matrix matrix;
  from_lanes(warp.slots<u32>(instruction.reg[1]), matrix, false);
  to_lanes(matrix, warp.slots<u32>(instruction.reg[0]), true);
}

}    // namespace

Handler decode_matrix(Kernel& kernel, Instruction& instruction) {
  const string& opcode = instruction.opcode();
  if (opcode == "movmatrix") {
    instruction.reg[0] = slot_of(kernel, instruction, instruction.operands.at(0), "b32");
    instruction.reg[1] = slot_of(kernel, instruction, instruction.operands.at(1), "b32");
    return transpose;
  }
  if (opcode != "ldmatrix" && opcode != "stmatrix") return nullptr;
  if (!instruction.has("m8n8") || !instruction.has("b16")) return nullptr;
  instruction.is_store = opcode == "stmatrix";
  instruction.vector_length = instruction.has("x4") ? 4 : instruction.has("x2") ? 2 : 1;
  instruction.variant = instruction.has("trans");
  Operand& values = instruction.operands.at(instruction.is_store ? 1 : 0);
  if (!values.is_vector()) values.parts = {values};
  values.kind = OperandKind::kVector;
  if (values.parts.size() != instruction.vector_length) return nullptr;
  for (Operand& value : values.parts) value.offset = slot_of(kernel, instruction, value, "b32");
  decode_address(instruction, instruction.is_store ? 0 : 1);
  return move_matrices;
}

}    // namespace emulator
