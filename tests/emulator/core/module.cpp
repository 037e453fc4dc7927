// PTX text to a Module: its variables, laid out in memory, and where its functions stand.
#include <algorithm>

#include "cursor.h"

namespace emulator {
namespace {

// Blanks, so that lines and columns stay.
void blank_comments(string& text) {
  for (size_t i = 0; i + 1 < text.size(); i++) {
    if (text[i] == '"') {
      i = std::min(text.find('"', i + 1), text.size());
    } else if (text[i] == '/' && text[i + 1] == '/') {
      for (; i < text.size() && text[i] != '\n'; i++) text[i] = ' ';
    } else if (text[i] == '/' && text[i + 1] == '*') {
      const size_t stop = std::min(text.find("*/", i + 2), text.size() - 2) + 2;
      for (; i < stop; i++) {
        if (text[i] != '\n') text[i] = ' ';
      }
    }
  }
}

vector<Parameter> parse_parameters(Cursor& cursor) {
  vector<Parameter> parameters;
  u32 offset = 0;
  cursor.expect('(');
  if (cursor.accept(')')) return parameters;
  do {
    cursor.directive();    // .param or .reg
    const Variable declared = parse_declaration(cursor, Space::kParam);
    offset = (offset + declared.align - 1) / declared.align * declared.align;
    parameters.push_back({declared.name, static_cast<u32>(declared.bytes), declared.align, offset});
    offset += static_cast<u32>(declared.bytes);
  } while (cursor.accept(','));
  cursor.expect(')');
  return parameters;
}

// .reqntid and its like, between the parameters and the body.
void parse_performance_directive(Cursor& cursor, Function& function) {
  const string word = cursor.directive();
  if (word == ".pragma") {
    cursor.skip_past(';');
    return;
  }
  vector<u32> values;
  for (Operand value; cursor.number(value);) {
    values.push_back(static_cast<u32>(value.bits));
    if (!cursor.accept(',')) break;
  }
  values.resize(3, 1);
  if (word == ".reqntid") std::copy(values.begin(), values.end(), function.required_block);
  if (word == ".maxntid") function.max_threads = values[0] * values[1] * values[2];
  if (word == ".maxnreg") function.max_registers = values[0];
  if (word == ".minnctapersm") function.min_blocks = values[0];
  if (word == ".reqnctapercluster") std::copy(values.begin(), values.end(), function.required_cluster);
}

Function parse_function(Cursor& cursor, bool is_kernel) {
  Function function;
  function.is_kernel = is_kernel;
  while (cursor.peek() == '.') cursor.directive();    // .noreturn and its like
  if (cursor.peek() == '(') function.results = parse_parameters(cursor);
  function.name = cursor.identifier();
  if (cursor.peek() == '(') function.parameters = parse_parameters(cursor);
  while (cursor.peek() == '.') parse_performance_directive(cursor, function);
  function.line = cursor.line;
  if (cursor.peek() == '{') {
    function.line = cursor.line;
    function.body_begin = cursor.at + 1;
    cursor.skip_braces();
    function.body_end = cursor.at - 1;
  } else {
    cursor.expect(';');
  }
  return function;
}

void parse_file(Cursor& cursor, Module& module) {
  const u32 number = static_cast<u32>(cursor.integer());
  cursor.skip_space();
  const size_t begin = cursor.at + 1;
  const string path = module.text.substr(begin, module.text.find('"', begin) - begin);
  module.files[number] = path.substr(path.rfind('/') + 1);
  cursor.skip_line();
}

void parse_item(Cursor& cursor, Module& module) {
  string word = cursor.directive();
  if (word.empty()) {
    if (cursor.accept(';')) return;
    fail("PTX line %u: unexpected text '%s'", cursor.line, cursor.rest(40).c_str());
  }
  if (word == ".file") return parse_file(cursor, module);
  if (word == ".version" || word == ".target" || word == ".address_size" || word == ".loc") {
    const size_t begin = cursor.at;
    cursor.skip_line();
    if (word == ".target") module.target = module.text.substr(begin, cursor.at - begin);
    return;
  }
  if (word == ".section") {
    while (cursor.peek() != '{' && !cursor.at_end()) cursor.at++;
    return cursor.skip_braces();
  }
  if (word == ".pragma") return cursor.skip_past(';');
  if (word == ".visible" || word == ".weak" || word == ".common") return;
  const bool is_external = word == ".extern";
  if (is_external) word = cursor.directive();
  if (word == ".entry" || word == ".func") {
    const Function function = parse_function(cursor, word == ".entry");
    Function& known = module.functions[function.name];
    if (!known.body_begin) known = function;    // a definition replaces a declaration
    return;
  }
  Space space;
  if (!space_named(word, space)) fail("PTX line %u: directive %s is not supported", cursor.line, word.c_str());
  do {
    Variable variable = parse_declaration(cursor, space);
    variable.is_external = is_external && variable.bytes == 0;
    const auto known = module.variables.find(variable.name);
    if (known == module.variables.end() || known->second.is_external) module.variables[variable.name] = variable;
  } while (cursor.accept(','));
  cursor.expect(';');
}

void place_variables(Module& module) {
  for (auto& [name, variable] : module.variables) {
    if (variable.space != Space::kGlobal && variable.space != Space::kConst) continue;
    module.storage.emplace_back(variable.bytes + variable.align + 16);
    const u64 memory = reinterpret_cast<u64>(module.storage.back().data());
    variable.address = (memory + variable.align - 1) / variable.align * variable.align;
    u8* begin = reinterpret_cast<u8*>(variable.address);
    std::copy(variable.initial.begin(), variable.initial.end(), begin);
  }
  for (auto& [name, variable] : module.variables) {
    for (const auto& [at, symbol] : variable.relocations) {
      const auto found = module.variables.find(symbol);
      if (found == module.variables.end()) fail("variable %s: address of %s", name.c_str(), symbol.c_str());
      u8* place = reinterpret_cast<u8*>(variable.address + at);
      u64 value;
      memcpy(&value, place, 8);
      value += found->second.address;
      memcpy(place, &value, 8);
    }
  }
}

}    // namespace

Module::Module(const string& source) : text(source) {
  blank_comments(text);
  Cursor cursor(text, 0, text.size(), 1);
  while (!cursor.at_end()) parse_item(cursor, *this);
  place_variables(*this);
}

Kernel& Module::kernel(const string& name) {
  std::unique_ptr<Kernel>& slot = kernels[name];
  if (slot) return *slot;
  const auto found = functions.find(name);
  if (found == functions.end() || !found->second.is_kernel) fail("no kernel named %s in the module", name.c_str());
  slot = std::make_unique<Kernel>();
  slot->module = this;
  slot->function = &found->second;
  try {
    compile_kernel(*slot);
  } catch (...) {
    kernels.erase(name);
    throw;
  }
  return *slot;
}

}    // namespace emulator
