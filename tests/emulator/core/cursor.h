// A position in PTX text, and how to read words and numbers from it.
#pragma once

#include "ptx.h"

namespace emulator {

struct Cursor {
  Cursor(const string& text, size_t begin, size_t end, u32 line) : text(text), at(begin), end(end), line(line) {}

  void skip_space();
  bool at_end();
  char peek();
  bool accept(char wanted);
  void expect(char wanted);
  string identifier();
  string opcode();       // with its dots and colons
  string directive();    // a word that begins with a dot
  void skip_line();
  void skip_past(char wanted);    // not inside strings
  void skip_braces();
  bool number(Operand& operand);    // an immediate, when one stands here
  u64 integer();                    // one that must stand here
  string rest(size_t length) const { return text.substr(at, length); }

  const string& text;
  size_t at, end;
  u32 line;
};

// One declaration after its state space: attributes, name, dimensions, initial value.
Variable parse_declaration(Cursor& cursor, Space space);
bool space_named(const string& directive, Space& space);

}    // namespace emulator
