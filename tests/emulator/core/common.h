// Integer names, errors, and the loop over the lanes of a warp that all of the emulator uses.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using std::string;
using std::vector;

constexpr u32 kAllLanes = 0xffffffffu;
constexpr u32 kNone = 0xffffffffu;    // no register, no instruction, no thread

// The PTX is invalid or not covered, or the launch is invalid: PtxError in Python.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void fail(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline u32 lowest_lane(u32 mask) { return static_cast<u32>(__builtin_ctz(mask)); }
inline u32 count_lanes(u32 mask) { return static_cast<u32>(__builtin_popcount(mask)); }

// Calls body(lane) for every lane of the mask. The loop over a full warp is separate because the compiler vectorises
// it.
template <class Body>
inline __attribute__((always_inline)) void for_lanes(u32 mask, Body body) {
  if (mask == kAllLanes) {
    for (u32 lane = 0; lane < 32; lane++) body(lane);
    return;
  }
  for (; mask; mask &= mask - 1) body(lowest_lane(mask));
}

}    // namespace emulator
