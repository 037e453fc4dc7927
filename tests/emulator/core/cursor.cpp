// Reads PTX text: words, numbers, and declarations of variables.
#include "cursor.h"

#include <algorithm>
#include <cctype>
#include <cstdarg>
#include <cstdlib>

namespace emulator {

string format(const char* pattern, ...) {
  char buffer[4096];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(buffer, sizeof buffer, pattern, arguments);
  va_end(arguments);
  return buffer;
}

void fail(const char* pattern, ...) {
  char buffer[4096];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(buffer, sizeof buffer, pattern, arguments);
  va_end(arguments);
  throw Error(buffer);
}

static bool is_word(char c) { return isalnum(static_cast<u8>(c)) || c == '_' || c == '$' || c == '%'; }
static bool is_space(char c) { return isspace(static_cast<u8>(c)); }
static bool is_digit(char c) { return isdigit(static_cast<u8>(c)); }

void Cursor::skip_space() {
  for (; at < end && is_space(text[at]); at++) line += text[at] == '\n';
}

bool Cursor::at_end() {
  skip_space();
  return at >= end;
}

char Cursor::peek() {
  skip_space();
  return at < end ? text[at] : '\0';
}

bool Cursor::accept(char wanted) {
  if (peek() != wanted) return false;
  at++;
  return true;
}

void Cursor::expect(char wanted) {
  if (!accept(wanted)) fail("PTX line %u: expected '%c' near '%s'", line, wanted, rest(40).c_str());
}

string Cursor::identifier() {
  skip_space();
  const size_t begin = at;
  while (at < end && is_word(text[at])) at++;
  return text.substr(begin, at - begin);
}

string Cursor::opcode() {
  skip_space();
  const size_t begin = at;
  while (at < end && (is_word(text[at]) || text[at] == '.' || text[at] == ':')) at++;
  return text.substr(begin, at - begin);
}

string Cursor::directive() {
  skip_space();
  const size_t begin = at;
  if (at < end && text[at] == '.') at++;
  while (at < end && (is_word(text[at]) || (text[at] == ':' && at + 1 < end && text[at + 1] == ':'))) {
    at += text[at] == ':' ? 2 : 1;
  }
  return text.substr(begin, at - begin);
}

void Cursor::skip_line() {
  while (at < end && text[at] != '\n') at++;
}

void Cursor::skip_past(char wanted) {
  for (; at < end && text[at] != wanted; at++) {
    line += text[at] == '\n';
    if (text[at] == '"') at = std::min(text.find('"', at + 1), end - 1);
  }
  at++;
}

void Cursor::skip_braces() {
  expect('{');
  for (int depth = 1; at < end && depth; at++) {
    const char c = text[at];
    line += c == '\n';
    depth += c == '{' ? 1 : c == '}' ? -1 : 0;
    if (c == '"') at = std::min(text.find('"', at + 1), end - 1);
  }
}

static void set_float(Operand& operand, double number, int bytes) {
  operand.is_float = true;
  operand.number = number;
  operand.bytes = static_cast<u8>(bytes);
  operand.bits = bytes == 4 ? bit_cast<u32>(static_cast<float>(number)) : bit_cast<u64>(number);
}

bool Cursor::number(Operand& operand) {
  skip_space();
  const size_t begin = at;
  bool negative = false;
  while (at < end && (text[at] == '-' || text[at] == '+')) {
    negative ^= text[at] == '-';
    at++;
    skip_space();
  }
  if (at >= end || !is_digit(text[at])) {
    at = begin;
    return false;
  }
  operand.kind = OperandKind::kImmediate;
  const char marker = text[at] == '0' && at + 1 < end ? static_cast<char>(tolower(text[at + 1])) : ' ';
  if (marker == 'f' || marker == 'd') {    // the bits of a float in hexadecimal
    const size_t digits = marker == 'f' ? 8 : 16;
    const u64 bits = strtoull(text.substr(at + 2, digits).c_str(), nullptr, 16);
    at += 2 + digits;
    if (marker == 'f') {    // by its bits: going through double would quiet a signalling NaN
      const u32 word = static_cast<u32>(bits) ^ (negative ? 0x80000000u : 0u);
      set_float(operand, bit_cast<float>(word), 4);
      operand.bits = word;
    } else {
      set_float(operand, bit_cast<double>(bits ^ (negative ? 1ull << 63 : 0ull)), 8);
    }
    return true;
  }
  size_t stop = at;
  const auto is_exponent_sign = [&](size_t i) {
    return (text[i] == '-' || text[i] == '+') && marker != 'x' && tolower(text[i - 1]) == 'e';
  };
  while (stop < end && (isalnum(static_cast<u8>(text[stop])) || text[stop] == '.' || is_exponent_sign(stop))) stop++;
  const string word = text.substr(at, stop - at);
  at = stop;
  if (word.find('.') != string::npos) {
    const double value = strtod(word.c_str(), nullptr);
    set_float(operand, negative ? -value : value, 8);
    return true;
  }
  operand.bits = marker == 'b' ? strtoull(word.c_str() + 2, nullptr, 2) : strtoull(word.c_str(), nullptr, 0);
  if (negative) operand.bits = -operand.bits;
  return true;
}

u64 Cursor::integer() {
  Operand operand;
  if (!number(operand)) fail("PTX line %u: expected a number near '%s'", line, rest(40).c_str());
  return operand.bits;
}

bool space_named(const string& directive, Space& space) {
  static const std::map<string, Space> spaces = {{".global", Space::kGlobal},
                                                 {".shared", Space::kShared},
                                                 {".local", Space::kLocal},
                                                 {".const", Space::kConst},
                                                 {".param", Space::kParam}};
  const auto found = spaces.find(directive);
  if (found == spaces.end()) return false;
  space = found->second;
  return true;
}

// One value of an initialiser, or a braced list of them.
static void parse_initial(Cursor& cursor, Variable& variable, u64 element_bytes) {
  if (cursor.accept('{')) {
    if (cursor.accept('}')) return;
    do {
      parse_initial(cursor, variable, element_bytes);
    } while (cursor.accept(','));
    cursor.expect('}');
    return;
  }
  const size_t at = variable.initial.size();
  variable.initial.resize(at + element_bytes);
  Operand value;
  if (cursor.number(value)) {
    u64 bits = value.bits;
    if (value.is_float && element_bytes == 4 && value.bytes == 8)
      bits = bit_cast<u32>(static_cast<float>(value.number));
    memcpy(&variable.initial[at], &bits, std::min<u64>(element_bytes, 8));
    return;
  }
  // The address of another variable, perhaps as generic(name) and with an offset.
  string name = cursor.identifier();
  u64 offset = 0;
  const auto add_offset = [&] {
    if (cursor.accept('+')) offset += cursor.integer();
  };
  if (name == "generic") {
    cursor.expect('(');
    name = cursor.identifier();
    add_offset();
    cursor.expect(')');
  }
  add_offset();
  if (element_bytes != 8) fail("PTX line %u: address of %s in %d bytes", cursor.line, name.c_str(), (int)element_bytes);
  memcpy(&variable.initial[at], &offset, 8);
  variable.relocations.push_back({at, name});
}

Variable parse_declaration(Cursor& cursor, Space space) {
  Variable variable;
  variable.space = space;
  u64 vector_length = 1;
  int element_bytes = 0;
  while (cursor.peek() == '.') {
    const string word = cursor.directive();
    Space ignored;
    if (word == ".align") {
      variable.align = static_cast<u32>(cursor.integer());
    } else if (word == ".v2" || word == ".v4") {
      vector_length = word == ".v2" ? 2 : 4;
    } else if (word == ".attribute") {
      cursor.expect('(');
      cursor.skip_past(')');
    } else if (word != ".ptr" && !space_named(word, ignored)) {
      element_bytes = type_bytes(word.substr(1));
      if (element_bytes <= 0) fail("PTX line %u: declaration word %s is not supported", cursor.line, word.c_str());
    }
  }
  variable.name = cursor.identifier();
  u64 elements = 1;
  while (cursor.accept('[')) {
    if (cursor.accept(']')) {
      elements = 0;
      continue;
    }
    elements *= cursor.integer();
    cursor.expect(']');
  }
  const u64 natural = static_cast<u64>(element_bytes) * vector_length;
  variable.bytes = elements * natural;
  variable.align = std::max<u32>(variable.align, static_cast<u32>(std::min<u64>(natural, 16)));
  if (cursor.accept('=')) {
    parse_initial(cursor, variable, static_cast<u64>(element_bytes));
    variable.bytes = std::max<u64>(variable.bytes, variable.initial.size());
  }
  return variable;
}

}    // namespace emulator
