// Kernel bodies to arrays of instructions with their operands resolved to places in the register file.
#include <algorithm>
#include <cctype>
#include <unordered_map>

#include "cursor.h"

namespace emulator {

int type_bytes(const string& type) {
  static const std::unordered_map<string, int> bytes = {
      {"pred", 0}, {"b8", 1},  {"u8", 1},    {"s8", 1},    {"b16", 2}, {"u16", 2},   {"s16", 2},  {"f16", 2},
      {"bf16", 2}, {"b32", 4}, {"u32", 4},   {"s32", 4},   {"f32", 4}, {"f16x2", 4}, {"tf32", 4}, {"bf16x2", 4},
      {"b64", 8},  {"u64", 8}, {"u16x2", 4}, {"s16x2", 4}, {"s64", 8}, {"f64", 8}};
  const auto found = bytes.find(type);
  return found == bytes.end() ? -1 : found->second;
}

bool is_float_type(const string& type) {
  return type[0] == 'f' || type == "bf16" || type == "bf16x2" || type == "tf32";
}

Rounding rounding_of(const Instruction& instruction) {
  static const char* names[] = {"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna"};
  for (u8 i = 0; i < 9; i++) {
    if (instruction.has(names[i])) return static_cast<Rounding>(i);
  }
  return Rounding::kUnstated;
}

// Registers of up to 32 bits take 4 bytes a lane; a predicate is 4 bytes in all.
static int slot_class(int bytes) { return bytes == 0 ? 0 : bytes <= 4 ? 4 : 8; }

u32 allocate_register(Kernel& kernel, int bytes) {
  const u32 size = bytes == 0 ? 4 : 32 * static_cast<u32>(slot_class(bytes));
  const u32 align = bytes == 0 ? 4 : 64;
  const u32 offset = (kernel.register_bytes + align - 1) / align * align;
  kernel.register_bytes = offset + size;
  return offset;
}

u32 constant_slot(Kernel& kernel, u64 value, int bytes) {
  const int width = slot_class(bytes);
  const auto found = kernel.constants.find({value, width});
  if (found != kernel.constants.end()) return found->second;
  const u32 offset = allocate_register(kernel, width);
  kernel.register_image.resize(kernel.register_bytes);
  if (width == 0) memcpy(&kernel.register_image[offset], &value, 4);
  for (u32 lane = 0; width && lane < 32; lane++) {
    memcpy(&kernel.register_image[offset + lane * static_cast<u32>(width)], &value, static_cast<size_t>(width));
  }
  kernel.constants[{value, width}] = offset;
  return offset;
}

u32 slot_of(Kernel& kernel, const Instruction& instruction, const Operand& operand, const string& type) {
  const auto complain = [&](const char* problem) {
    fail("PTX line %u: '%s': %s %s", instruction.line, instruction.text.c_str(), problem, type.c_str());
  };
  const int bytes = type_bytes(type);
  if (bytes < 0) complain("unsupported type");
  if (operand.kind == OperandKind::kRegister) {
    if (slot_class(operand.bytes) != slot_class(bytes)) complain("register width does not fit type");
    return operand.offset;
  }
  if (operand.kind == OperandKind::kSink) return allocate_register(kernel, bytes);
  if (operand.kind != OperandKind::kImmediate) complain("operand does not fit type");
  u64 value = operand.bits;
  if (operand.is_float && bytes == 8 && operand.bytes == 4) value = bit_cast<u64>(operand.number);
  if (operand.is_float && bytes == 4 && operand.bytes == 8) value = bit_cast<u32>(static_cast<float>(operand.number));
  if (bytes == 0) value = value ? kAllLanes : 0;
  if (bytes > 0 && bytes < 8) value &= (1ull << 8 * bytes) - 1;
  return constant_slot(kernel, value, bytes);
}

namespace {

Operand immediate(u64 bits) {
  Operand operand;
  operand.kind = OperandKind::kImmediate;
  operand.bits = bits;
  return operand;
}

// A block in braces: names are looked up from the inside out.
struct Scope {
  int parent;
  std::unordered_map<string, Operand> symbols;
  std::unordered_map<string, u32> labels;
  std::unordered_map<string, vector<string>> branch_tables;
};

class Compiler {
 public:
  Compiler(Kernel& kernel, u32 dynamic_shared_at)
      : kernel_(kernel), module_(*kernel.module), dynamic_at_(dynamic_shared_at), cursor_(module_.text, 0, 0, 0) {}

  void run() {
    function_number(kernel_.function->name);
    for (u32 i = 0; i < kernel_.function_names.size(); i++) {    // grows while calls are found
      const auto found = module_.functions.find(kernel_.function_names[i]);
      if (found != module_.functions.end() && found->second.body_begin) compile_body(i, found->second);
    }
    resolve_branches();
  }

  u32 static_shared_end() const { return (shared_top_ + dynamic_align_ - 1) / dynamic_align_ * dynamic_align_; }

 private:
  u32 function_number(const string& name) {
    const auto [found, is_new] = numbers_.insert({name, static_cast<u32>(kernel_.function_names.size())});
    if (is_new) {
      kernel_.function_names.push_back(name);
      kernel_.entry_points.push_back(kNone);
      kernel_.argument_addresses.emplace_back();
      kernel_.result_addresses.emplace_back();
    }
    return found->second;
  }

  u32 allocate_local(u64 bytes, u32 align) {
    const u32 offset = (kernel_.local_bytes + align - 1) / align * align;
    kernel_.local_bytes = offset + static_cast<u32>(bytes);
    return offset;
  }

  // Statically sized variables in the order in which they are met, then the dynamic part.
  u32 shared_address(const string& name, const Variable& variable) {
    if (variable.bytes == 0) {
      dynamic_align_ = std::max(dynamic_align_, variable.align);
      return dynamic_at_;
    }
    const auto found = shared_addresses_.find(name);
    if (found != shared_addresses_.end()) return found->second;
    const u32 address = (shared_top_ + variable.align - 1) / variable.align * variable.align;
    shared_top_ = address + static_cast<u32>(variable.bytes);
    return shared_addresses_[name] = address;
  }

  Operand special_register(const string& name) {
    Operand operand;
    operand.kind = OperandKind::kRegister;
    operand.bytes = name == "%clock64" || name == "%globaltimer" || name == "%gridid" ? 8 : 4;
    operand.symbol = name;
    for (const auto& [known, offset] : kernel_.special_registers) {
      if (known != name) continue;
      operand.offset = offset;
      return operand;
    }
    operand.offset = allocate_register(kernel_, operand.bytes);
    kernel_.special_registers.push_back({name, operand.offset});
    return operand;
  }

  bool find_symbol(const string& name, Operand& operand) {
    for (int i = scope_; i >= 0; i = scopes_[static_cast<size_t>(i)].parent) {
      const auto& symbols = scopes_[static_cast<size_t>(i)].symbols;
      const auto found = symbols.find(name);
      if (found == symbols.end()) continue;
      operand = found->second;
      return true;
    }
    const auto found = module_.variables.find(name);
    if (found == module_.variables.end()) return false;
    const Variable& variable = found->second;
    operand = immediate(variable.space == Space::kShared ? shared_address(name, variable) : variable.address);
    operand.symbol = name;
    return true;
  }

  Scope& scope() { return scopes_[static_cast<size_t>(scope_)]; }

  void open_scope() {
    scopes_.push_back({scope_, {}, {}, {}});
    scope_ = static_cast<int>(scopes_.size()) - 1;
  }

  void parse_list(Operand& operand, OperandKind kind, char open, char close) {
    operand.kind = kind;
    cursor_.expect(open);
    if (cursor_.accept(close)) return;
    do {
      operand.parts.push_back(parse_operand());
    } while (cursor_.accept(','));
    cursor_.expect(close);
  }

  Operand parse_operand() {
    Operand operand;
    switch (cursor_.peek()) {
      case '[': return parse_address();
      case '{': parse_list(operand, OperandKind::kVector, '{', '}'); return operand;
      case '(': parse_list(operand, OperandKind::kList, '(', ')'); return operand;
      case '!':
        cursor_.expect('!');
        operand = parse_operand();
        operand.negated = true;
        return operand;
      default: break;
    }
    if (cursor_.number(operand)) return operand;
    string name = cursor_.identifier();
    if (name.empty()) fail("PTX line %u: operand near '%s'", cursor_.line, cursor_.rest(40).c_str());
    const string after = cursor_.at + 1 < cursor_.end ? cursor_.rest(2) : "";
    if (name[0] == '%' && (after == ".x" || after == ".y" || after == ".z" || after == ".w")) {
      name += after;
      cursor_.at += 2;
    }
    if (name == "WARP_SZ") {
      operand = immediate(32);
    } else if (name != "_" && !find_symbol(name, operand)) {
      if (name[0] == '%') {
        operand = special_register(name);
      } else {
        operand.kind = OperandKind::kSymbol;
        operand.symbol = name;
      }
    }
    if (operand.kind == OperandKind::kImmediate && cursor_.accept('+')) operand.bits += cursor_.integer();
    if (cursor_.accept('|')) operand.parts.push_back(parse_operand());
    return operand;
  }

  Operand parse_address() {
    cursor_.expect('[');
    const Operand base = parse_operand();
    Operand address;
    address.kind = OperandKind::kAddress;
    address.offset = kNone;
    if (base.is_register()) {
      address.offset = base.offset;
      address.bytes = base.bytes;
    } else if (base.kind == OperandKind::kImmediate) {
      address.bits = base.bits;
      address.symbol = base.symbol;
    } else {
      fail("PTX line %u: address of %s", cursor_.line, base.symbol.c_str());
    }
    while (cursor_.peek() == '+' || cursor_.peek() == '-') address.bits += cursor_.integer();
    while (cursor_.accept(',')) address.parts.push_back(parse_operand());
    cursor_.expect(']');
    return address;
  }

  // Kernel parameters have addresses of their own; those of functions lie in local memory.
  void declare_parameters(u32 number, const Function& function) {
    if (function.is_kernel) {
      for (const Parameter& parameter : function.parameters) {
        scope().symbols[parameter.name] = immediate(kParamBase + parameter.offset);
      }
      return;
    }
    const auto declare = [&](const vector<Parameter>& parameters, vector<u64>& addresses) {
      for (const Parameter& parameter : parameters) {
        addresses.push_back(allocate_local(parameter.bytes, std::max(parameter.align, 8u)));
        scope().symbols[parameter.name] = immediate(kLocalWindow | addresses.back());
      }
    };
    declare(function.parameters, kernel_.argument_addresses[number]);
    declare(function.results, kernel_.result_addresses[number]);
  }

  void compile_body(u32 number, const Function& function) {
    function_ = number;
    is_kernel_ = function.is_kernel;
    kernel_.entry_points[number] = static_cast<u32>(kernel_.code.size());
    scope_ = -1;
    open_scope();
    declare_parameters(number, function);
    cursor_.at = function.body_begin;
    cursor_.end = function.body_end;
    cursor_.line = function.line;
    source_file_ = source_line_ = 0;
    while (!cursor_.at_end()) {
      switch (cursor_.peek()) {
        case '{':
          cursor_.at++;
          open_scope();
          break;
        case '}':
          cursor_.at++;
          scope_ = scope().parent;
          break;
        case ';': cursor_.at++; break;
        case '.': compile_directive(); break;
        default:
          if (!parse_label()) compile_instruction();
      }
    }
    Instruction end;
    end.words = {"ret"};
    end.text = "ret (end of function)";
    end.control = function.is_kernel ? Control::kExit : Control::kReturn;
    end.line = cursor_.line;
    end.pc = static_cast<u32>(kernel_.code.size());
    end.function = number;
    kernel_.code.push_back(end);
  }

  bool parse_label() {
    const Cursor before = cursor_;
    const string name = cursor_.identifier();
    if (name.empty() || cursor_.peek() != ':' || cursor_.rest(2) == "::") {
      cursor_.at = before.at;
      cursor_.line = before.line;
      return false;
    }
    cursor_.at++;
    if (cursor_.peek() == '.' && cursor_.rest(14) == ".branchtargets") {
      cursor_.directive();
      vector<string>& targets = scope().branch_tables[name];
      do {
        targets.push_back(cursor_.identifier());
      } while (cursor_.accept(','));
      cursor_.expect(';');
    } else {
      scope().labels[name] = static_cast<u32>(kernel_.code.size());
    }
    return true;
  }

  void compile_directive() {
    const string word = cursor_.directive();
    Space space;
    if (word == ".loc") {
      source_file_ = static_cast<u32>(cursor_.integer());
      source_line_ = static_cast<u32>(cursor_.integer());
      cursor_.skip_line();
    } else if (word == ".reg") {
      declare_registers();
    } else if (word == ".pragma") {
      cursor_.skip_past(';');
    } else if (space_named(word, space) && space != Space::kGlobal && space != Space::kConst) {
      declare_variables(space);
    } else {
      fail("PTX line %u: directive %s is not supported in a body", cursor_.line, word.c_str());
    }
  }

  void declare_registers() {
    const string type = cursor_.directive();
    const int bytes = type_bytes(type.substr(1));
    if (bytes < 0) fail("PTX line %u: registers of type %s are not supported", cursor_.line, type.c_str());
    const auto declare = [&](const string& name) {
      Operand operand;
      operand.kind = OperandKind::kRegister;
      operand.bytes = static_cast<u8>(bytes);
      operand.offset = allocate_register(kernel_, bytes);
      scope().symbols[name] = operand;
    };
    do {
      const string name = cursor_.identifier();
      if (!cursor_.accept('<')) {
        declare(name);
        continue;
      }
      const u64 count = cursor_.integer();
      cursor_.expect('>');
      for (u64 i = 0; i < count; i++) declare(name + std::to_string(i));
    } while (cursor_.accept(','));
    cursor_.expect(';');
  }

  void declare_variables(Space space) {
    do {
      const Variable variable = parse_declaration(cursor_, space);
      u64 address;
      if (space == Space::kShared) {
        address = shared_address(format("%u:%d:%s", function_, scope_, variable.name.c_str()), variable);
      } else {
        address = allocate_local(variable.bytes, std::max<u32>(variable.align, 8));
        if (space == Space::kParam) address |= kLocalWindow;    // arguments of a call
      }
      scope().symbols[variable.name] = immediate(address);
    } while (cursor_.accept(','));
    cursor_.expect(';');
  }

  void compile_instruction() {
    Instruction instruction;
    cursor_.skip_space();
    const size_t begin = cursor_.at;
    instruction.line = cursor_.line;
    instruction.function = function_;
    instruction.pc = static_cast<u32>(kernel_.code.size());
    instruction.source_file = source_file_;
    instruction.source_line = source_line_;
    if (cursor_.accept('@')) {
      instruction.guard_negated = cursor_.accept('!');
      const Operand guard = parse_operand();
      if (!guard.is_register() || guard.bytes) fail("PTX line %u: guard is no predicate", cursor_.line);
      instruction.guard = guard.offset;
    }
    const string opcode = cursor_.opcode();
    for (size_t at = 0; at < opcode.size();) {
      const size_t dot = std::min(opcode.find('.', at), opcode.size());
      if (dot > at) instruction.words.push_back(opcode.substr(at, dot - at));
      at = dot + 1;
    }
    if (instruction.words.empty()) fail("PTX line %u: no opcode near '%s'", cursor_.line, cursor_.rest(40).c_str());
    if (cursor_.peek() != ';') {
      do {
        instruction.operands.push_back(parse_operand());
      } while (cursor_.accept(','));
    }
    cursor_.expect(';');
    instruction.text = module_.text.substr(begin, cursor_.at - begin);
    std::replace_if(
        instruction.text.begin(), instruction.text.end(), [](char c) { return isspace(static_cast<u8>(c)); }, ' ');
    instruction.flush = instruction.has("ftz");
    instruction.saturate = instruction.has("sat");
    instruction.relu = instruction.has("relu");
    try {
      decode(instruction);
    } catch (const std::out_of_range&) {    // operands.at: fewer operands than any form of it that we know
      instruction.handler = nullptr;
      instruction.control = Control::kNone;
    }
    if (!instruction.handler && instruction.control == Control::kNone) {
      fail("PTX line %u: instruction not supported: %s", instruction.line, instruction.text.c_str());
    }
    kernel_.code.push_back(std::move(instruction));
  }

  void decode(Instruction& instruction) {
    const string& opcode = instruction.opcode();
    vector<Operand>& operands = instruction.operands;
    if (opcode == "bra") {
      instruction.control = Control::kBranch;
      branches_.push_back({instruction.pc, scope_, operands.at(0).symbol});
    } else if (opcode == "brx") {
      instruction.control = Control::kBranchTable;
      instruction.reg[1] = slot_of(kernel_, instruction, operands.at(0), "u32");
      branches_.push_back({instruction.pc, scope_, operands.at(1).symbol});
    } else if (opcode == "call") {
      decode_call(instruction);
    } else if (opcode == "ret") {
      instruction.control = is_kernel_ ? Control::kExit : Control::kReturn;
    } else if (!decode_control(kernel_, instruction)) {
      static constexpr Handler (*decoders[])(Kernel&, Instruction&) = {
          decode_integer,     decode_float,  decode_compare,    decode_move,       decode_convert,
          decode_memory,      decode_atomic, decode_async_copy, decode_matrix,     decode_mbarrier,
          decode_tensor_copy, decode_mma,    decode_wgmma,      decode_collective,
      };
      for (const auto decoder : decoders) {
        instruction.handler = decoder(kernel_, instruction);
        if (instruction.handler) break;
      }
      if (!instruction.handler) instruction.control = Control::kNone;
    }
  }

  // Afterwards the operands are the list of results and the list of arguments.
  void decode_call(Instruction& instruction) {
    const auto is_list = [&](size_t i) {
      return i < instruction.operands.size() && instruction.operands[i].kind == OperandKind::kList;
    };
    Operand results, arguments;
    size_t next = 0;
    if (is_list(next)) results = instruction.operands[next++];
    const Operand callee = instruction.operands.at(next++);
    if (is_list(next)) arguments = instruction.operands[next];
    if (callee.kind != OperandKind::kSymbol) {
      fail("PTX line %u: indirect calls are not supported: %s", instruction.line, instruction.text.c_str());
    }
    instruction.target = function_number(callee.symbol);
    instruction.operands = {results, arguments};
    instruction.control = Control::kCall;
  }

  struct Branch {
    u32 pc;
    int scope;
    string label;
  };

  u32 find_label(const Branch& branch, const string& label) {
    for (int i = branch.scope; i >= 0; i = scopes_[static_cast<size_t>(i)].parent) {
      const auto& labels = scopes_[static_cast<size_t>(i)].labels;
      const auto found = labels.find(label);
      if (found != labels.end()) return found->second;
    }
    fail("PTX line %u: no label %s", kernel_.code[branch.pc].line, label.c_str());
  }

  void resolve_branches() {
    for (const Branch& branch : branches_) {
      Instruction& instruction = kernel_.code[branch.pc];
      if (instruction.control == Control::kBranch) {
        instruction.target = find_label(branch, branch.label);
        continue;
      }
      instruction.operands.clear();
      for (int i = branch.scope; i >= 0; i = scopes_[static_cast<size_t>(i)].parent) {
        const auto& tables = scopes_[static_cast<size_t>(i)].branch_tables;
        const auto found = tables.find(branch.label);
        if (found == tables.end()) continue;
        for (const string& label : found->second) instruction.operands.push_back(immediate(find_label(branch, label)));
        break;
      }
      if (instruction.operands.empty()) fail("PTX line %u: no table %s", instruction.line, branch.label.c_str());
    }
  }

  Kernel& kernel_;
  Module& module_;
  u32 dynamic_at_;
  u32 dynamic_align_ = 16;
  u32 shared_top_ = kSharedReserved;
  std::unordered_map<string, u32> shared_addresses_;
  std::unordered_map<string, u32> numbers_;    // of functions
  vector<Branch> branches_;
  vector<Scope> scopes_;
  int scope_ = -1;
  Cursor cursor_;
  u32 function_ = 0;
  bool is_kernel_ = true;
  u32 source_file_ = 0, source_line_ = 0;
};

u32 granule_shift(const vector<Instruction>& code) {
  u32 bytes = 4;
  for (const Instruction& instruction : code) {
    const string& opcode = instruction.opcode();
    if (opcode != "ld" && opcode != "st" && opcode != "atom" && opcode != "red") continue;
    if (instruction.space != Space::kShared && instruction.space != Space::kGeneric) continue;
    bytes = std::min(bytes, std::max(1u, instruction.access_bytes()));
  }
  return bytes == 4 ? 2 : bytes == 2 ? 1 : 0;
}

}    // namespace

void compile_kernel(Kernel& kernel) {
  Module& module = *kernel.module;
  u32 param_bytes = 0;
  for (const Parameter& parameter : kernel.function->parameters) {
    param_bytes = std::max(param_bytes, parameter.offset + parameter.bytes);
  }
  module.storage.emplace_back(param_bytes + 128);
  const u64 storage = reinterpret_cast<u64>(module.storage.back().data());

  // Twice: the first pass finds how much static shared memory there is, and with it where the dynamic part begins.
  u32 dynamic_at = kSharedReserved;
  for (int pass = 0; pass < 2; pass++) {
    Kernel compiled;
    compiled.module = &module;
    compiled.function = kernel.function;
    compiled.parameters = kernel.function->parameters;
    compiled.param_bytes = param_bytes;
    compiled.param_memory = reinterpret_cast<u8*>((storage + 63) / 64 * 64);
    Compiler compiler(compiled, dynamic_at);
    compiler.run();
    dynamic_at = compiler.static_shared_end();
    compiled.static_shared = dynamic_at - kSharedReserved;
    compiled.register_bytes = (compiled.register_bytes + 63) / 64 * 64;
    compiled.register_image.resize(compiled.register_bytes);
    compiled.granule_shift = granule_shift(compiled.code);
    kernel = std::move(compiled);
  }
}

}    // namespace emulator
