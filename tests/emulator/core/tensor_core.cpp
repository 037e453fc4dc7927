// mma.sync: m16n8k8 and m16n8k16 of f16 and bf16, m16n8k4 and m16n8k8 of tf32.
#include "tensor_core.h"

namespace emulator {
namespace {

constexpr u32 kColumns = 8;

// The compiler vectorises plain loops over a row along K, which takes a permutation for each product.
using Row = double __attribute__((vector_size(8 * sizeof(double)), aligned(8), may_alias));

// variant: 1 when the result is f16; modifier: when the addend is.
template <Element type, u32 K>
void mma(Warp& warp, const Instruction& instruction) {
  if (warp.active != kAllLanes) {
    warp.launch->report("divergent-collective", instruction, where(warp, lowest_lane(warp.active)), "part of a warp");
    return;
  }
  constexpr u32 kBlock = kBlockColumns<type>;
  double a[16 * K], b[K * kColumns], sums[16 * kColumns];
  unpack_a<type, K>(warp, instruction.operands[1].parts, a);
  for (u32 i = 0; i < K / kBlock; i++) {    // a block of B holds a column in each row
    double block[8 * kBlock];
    unpack_block<type>(warp, instruction.operands[2].parts[i], block);
    for (u32 k = 0; k < kBlock; k++) {
      for (u32 column = 0; column < 8; column++) b[(i * kBlock + k) * kColumns + column] = block[column * kBlock + k];
    }
  }
  load_sums(warp, instruction.operands[3].parts, instruction.modifier, kColumns, sums);
  for (u32 row = 0; row < 16; row++) {
    Row row_sums = *reinterpret_cast<const Row*>(sums + row * kColumns);
    for (u32 k = 0; k < K; k++) row_sums += a[row * K + k] * *reinterpret_cast<const Row*>(b + k * kColumns);
    *reinterpret_cast<Row*>(sums + row * kColumns) = row_sums;
  }
  store_sums(warp, instruction.operands[0].parts, instruction.variant, kColumns, sums);
}

Handler handler_for(Element type, u32 k) {
  switch (type) {
    case Element::kHalf: return k == 16 ? mma<Element::kHalf, 16> : k == 8 ? mma<Element::kHalf, 8> : nullptr;
    case Element::kBfloat: return k == 16 ? mma<Element::kBfloat, 16> : k == 8 ? mma<Element::kBfloat, 8> : nullptr;
    case Element::kTf32: return k == 8 ? mma<Element::kTf32, 8> : k == 4 ? mma<Element::kTf32, 4> : nullptr;
    default: return nullptr;
  }
}

}    // namespace

Handler decode_mma(Kernel& kernel, Instruction& instruction) {
  // words: mma.sync.aligned.SHAPE.row.col.D.A.B.C
  const vector<string>& words = instruction.words;
  if (words[0] != "mma" || words.size() != 10 || words[1] != "sync" || words[4] != "row" || words[5] != "col") {
    return nullptr;
  }
  const MmaShape shape = mma_shape(instruction);
  const Element type = element_named(words[7]);
  const Element result = element_named(words[6]);
  const Element addend = element_named(words[9]);
  const auto is_accumulator = [](Element e) { return e == Element::kHalf || e == Element::kFloat; };
  if (shape.m != 16 || shape.n != kColumns || words[8] != words[7]) return nullptr;
  if (!is_accumulator(result) || !is_accumulator(addend)) return nullptr;
  instruction.variant = result == Element::kHalf;
  instruction.modifier = addend == Element::kHalf;
  const u32 packed = 4 / element_bytes(type);
  const size_t counts[4] = {result == Element::kHalf ? 2u : 4u, 16 * shape.k / packed / 32, 8 * shape.k / packed / 32,
                            addend == Element::kHalf ? 2u : 4u};
  for (size_t i = 0; i < 4; i++) {
    Operand& operand = instruction.operands.at(i);
    if (!operand.is_vector()) operand.parts = {operand};
    operand.kind = OperandKind::kVector;
    if (operand.parts.size() != counts[i]) return nullptr;
    for (Operand& part : operand.parts) part.offset = slot_of(kernel, instruction, part, "b32");
  }
  return handler_for(type, shape.k);
}

}    // namespace emulator
