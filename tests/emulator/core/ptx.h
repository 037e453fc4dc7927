// A PTX module as parsed: its variables and functions, and kernels compiled to arrays of instructions.
//
// A warp is interpreted as a 32-lane SIMD unit. Every PTX register is an array of 32 slots in the warp's register file:
// 4 bytes a slot up to 32-bit registers, 8 bytes for 64-bit ones; a predicate is one 32-bit lane mask. Immediates,
// addresses of variables and special registers are slots filled beforehand, so an instruction is a function pointer and
// byte offsets.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <utility>

#include "common.h"

namespace emulator {

struct Warp;
struct Instruction;
struct Kernel;
struct Buffer;
using Handler = void (*)(Warp&, const Instruction&);

// Generic addresses: host pointers stand for themselves; shared and local memory have windows far above them.
constexpr u64 kSharedWindow = 1ull << 60;
constexpr u64 kLocalWindow = 2ull << 60;
constexpr u64 kParamBase = 256;          // where kernel parameters begin in the .param space
constexpr u32 kSharedReserved = 1024;    // as on hardware, the first KiB of the shared window is not the kernel's
constexpr u32 kRankShift = 24;           // in an address of shared memory: 1 + rank of the block, 0 for the own one

enum class Space : u8 { kGeneric, kGlobal, kShared, kLocal, kConst, kParam };

enum class OperandKind : u8 { kSink, kRegister, kImmediate, kAddress, kVector, kList, kSymbol };

struct Operand {
  OperandKind kind = OperandKind::kSink;
  u32 offset = 0;           // in the register file: the register, or the base of an address (kNone: it has none)
  u8 bytes = 0;             // width of that register; 0 for a predicate
  bool negated = false;     // !predicate
  bool is_float = false;    // an immediate written as a floating-point number
  double number = 0;        // its value
  u64 bits = 0;             // an immediate's bits, or an address's displacement
  vector<Operand> parts;    // elements of a vector or list; q of "p|q"; what follows a comma inside an address
  string symbol;

  bool is_register() const { return kind == OperandKind::kRegister; }
  bool is_vector() const { return kind == OperandKind::kVector; }
};

// What the scheduler has to do with an instruction; kNone is everything that only has a handler.
enum class Control : u8 {
  kNone,
  kBranch,
  kBranchTable,
  kExit,
  kReturn,
  kCall,
  kBarrier,
  kWarpBarrier,
  kCollective,
  kWgmmaWait,
  kClusterWait,
  kSetRegisters,
  kYield,
  kTrap,
};

enum class Rounding : u8 {
  kNearest,
  kZero,
  kDown,
  kUp,
  kIntNearest,
  kIntZero,
  kIntDown,
  kIntUp,
  kNearestAway,
  kUnstated
};

struct Instruction {
  Handler handler = nullptr;
  Handler inner = nullptr;                      // the handler that a rounding or saturating wrapper calls
  u32 reg[4] = {kNone, kNone, kNone, kNone};    // destination and sources
  u32 guard = kNone;                            // predicate
  bool guard_negated = false;
  Control control = Control::kNone;
  Space space = Space::kGeneric;
  u8 variant = 0;       // which form of the operation; the meaning is the handler's
  u8 modifier = 0;      // a second choice, likewise
  i64 immediate = 0;    // an immediate or an extra register offset, likewise
  Rounding rounding = Rounding::kNearest;
  bool flush = false;       // .ftz
  bool saturate = false;    // .sat
  bool relu = false;
  bool has_mask = false;      // a collective with a member mask in reg[3]
  bool aligned = false;       // a barrier that the whole warp must reach together
  bool in_cluster = false;    // shared memory of the whole cluster may be meant

  // Loads, stores and atomics.
  u32 base = kNone;    // register of the address
  u8 base_bytes = 0;
  i64 displacement = 0;
  u8 element_bytes = 0;
  u8 vector_length = 1;
  u8 slot_bytes = 4;    // of the register that holds an element: 4 or 8
  bool sign_extend = false;
  bool is_store = false;      // of ldmatrix/stmatrix and the bulk copies
  bool has_result = false;    // atom, not red
  bool strong = false;        // relaxed, acquire, release, atomic: may race with others of its kind
  bool polls = false;         // strong or volatile: a loop around it may be waiting for another block

  u32 target = kNone;    // of a branch (instruction) or call (function)
  u32 pc = 0, line = 0, function = 0;
  u32 source_file = 0, source_line = 0;     // from .loc
  mutable Buffer* last_buffer = nullptr;    // global buffer this instruction last touched: most accesses hit it again
  vector<Operand> operands;
  vector<string> words;    // opcode, split at the dots
  string text;

  bool has(const char* word) const {
    for (const string& candidate : words) {
      if (candidate == word) return true;
    }
    return false;
  }
  const string& opcode() const { return words[0]; }
  const string& type(size_t from_last = 0) const { return words[words.size() - 1 - from_last]; }
  u32 access_bytes() const { return static_cast<u32>(element_bytes) * vector_length; }
};

struct Parameter {
  string name;
  u32 bytes = 0, align = 1, offset = 0;
};

struct Variable {
  string name;
  Space space = Space::kGlobal;
  u64 bytes = 0;
  u32 align = 1;
  u64 address = 0;
  bool is_external = false;
  vector<u8> initial;
  vector<std::pair<u64, string>> relocations;    // offset into initial, symbol whose address is added
};

struct Function {
  string name;
  bool is_kernel = false;
  vector<Parameter> parameters, results;
  size_t body_begin = 0, body_end = 0;    // in the text; 0 for a declaration
  u32 line = 0;
  u32 required_block[3] = {0, 0, 0};
  u32 required_cluster[3] = {0, 0, 0};
  u32 max_threads = 0, max_registers = 0, min_blocks = 1;
};

struct Module {
  explicit Module(const string& source);
  Kernel& kernel(const string& name);

  string text;    // with comments blanked
  string target;
  std::map<string, Function> functions;
  std::map<string, Variable> variables;
  std::map<u32, string> files;
  std::deque<vector<u8>> storage;    // memory of variables and parameters
  std::map<string, std::unique_ptr<Kernel>> kernels;
};

struct Kernel {
  Module* module = nullptr;
  Function* function = nullptr;
  vector<Instruction> code;
  vector<string> function_names;                               // the kernel itself, then what it calls
  vector<u32> entry_points;                                    // kNone: not defined in the module
  vector<vector<u64>> argument_addresses, result_addresses;    // local memory of each function's parameters
  vector<u8> register_image;                                   // the register file of a fresh warp, constants filled in
  u32 register_bytes = 0;
  vector<std::pair<string, u32>> special_registers;
  std::map<std::pair<u64, int>, u32> constants;    // value and width to slot
  u32 local_bytes = 0, static_shared = 0, param_bytes = 0;
  u32 granule_shift = 2;    // log2 of the bytes that the race detector treats as one: the narrowest access, at most 4
  vector<Parameter> parameters;
  u8* param_memory = nullptr;
  bool has_bulk_copies = false;    // of the async proxy
};

// compile.cpp
void compile_kernel(Kernel& kernel);
u32 allocate_register(Kernel& kernel, int bytes);
u32 constant_slot(Kernel& kernel, u64 value, int bytes);
// The slot that holds an operand, read as the given PTX type.
u32 slot_of(Kernel& kernel, const Instruction& instruction, const Operand& operand, const string& type);
int type_bytes(const string& type);    // 0 for predicates, -1 for a word that is no type
bool is_float_type(const string& type);
Rounding rounding_of(const Instruction& instruction);    // kUnstated when it names none

// Decoders: fill in the fields that the handler reads and return it, or nullptr when the instruction is not theirs.
Handler decode_integer(Kernel& kernel, Instruction& instruction);
Handler decode_float(Kernel& kernel, Instruction& instruction);
Handler decode_compare(Kernel& kernel, Instruction& instruction);
Handler decode_move(Kernel& kernel, Instruction& instruction);
Handler decode_convert(Kernel& kernel, Instruction& instruction);
Handler decode_memory(Kernel& kernel, Instruction& instruction);
Handler decode_atomic(Kernel& kernel, Instruction& instruction);
Handler decode_async_copy(Kernel& kernel, Instruction& instruction);
Handler decode_matrix(Kernel& kernel, Instruction& instruction);
Handler decode_mbarrier(Kernel& kernel, Instruction& instruction);
Handler decode_tensor_copy(Kernel& kernel, Instruction& instruction);
Handler decode_mma(Kernel& kernel, Instruction& instruction);
Handler decode_wgmma(Kernel& kernel, Instruction& instruction);
Handler decode_collective(Kernel& kernel, Instruction& instruction);
bool decode_control(Kernel& kernel, Instruction& instruction);    // instructions that have no handler

}    // namespace emulator
