// The proxy state of global memory: who wrote a place in this launch, a thread or a bulk copy, and whether a reader may
// count on it.
//
// Two rules. What a bulk store writes is not there before its group has been waited for, whoever reads it. And a bulk
// copy of what another block or another proxy wrote needs a fence.proxy.async that holds for global memory, between the
// two: of the thread that issues the copy, after the write, or, where a thread wrote, of that thread. Flags between
// blocks are not followed, only the order in which things happened here: run with several seeds.
#include "machine.h"

namespace emulator {
namespace {

constexpr u32 kShift = 4;    // 16 bytes, what bulk copies are made of

void complain(Warp& warp, const Instruction& instruction, u32 lane, const char* kind, const Buffer& buffer, u64 byte,
              const GlobalShadow& shadow, const char* what) {
  const Instruction& other = warp.launch->kernel->code[shadow.pc];
  warp.launch->report(kind, instruction, where(warp, lane),
                      format("byte %llu of '%s' was written by thread %u of block %u (line %u: %s), and %s",
                             static_cast<unsigned long long>(byte), buffer.name.c_str(), shadow.thread, shadow.block,
                             other.line, other.text.c_str(), what));
}

// False when it has been reported.
bool check(Warp& warp, const Instruction& instruction, u32 lane, const Buffer& buffer, u64 byte,
           const GlobalShadow& shadow, Proxy by) {
  const Proxy writer = static_cast<Proxy>(shadow.proxy);
  if (writer == Proxy::kNone) return true;
  if (writer == Proxy::kAsyncInFlight) {
    complain(warp, instruction, lane, "race-async", buffer, byte, shadow, "that store has not been waited for");
    return false;
  }
  if (by == Proxy::kGeneric || warp.global_fence[lane] > shadow.tick) return true;
  if (writer == Proxy::kAsync) {
    if (shadow.block == warp.cta->number) return true;    // the same proxy of the same block
  } else {
    const auto fence = warp.launch->proxy_fences.find(static_cast<u64>(shadow.block) << 32 | shadow.thread);
    if (fence != warp.launch->proxy_fences.end() && fence->second > shadow.tick) return true;
  }
  complain(warp, instruction, lane, "proxy-fence", buffer, byte, shadow,
           "no fence.proxy.async for global memory stands between that and this bulk copy");
  return false;
}

}    // namespace

void note_global_read(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u64 bytes, Proxy by) {
  const Buffer& buffer = *instruction.last_buffer;
  if (buffer.proxies.empty() || !bytes) return;
  const u64 end = address + bytes - buffer.begin;
  for (u64 i = (address - buffer.begin) >> kShift; i <= (end - 1) >> kShift; i++) {
    if (!check(warp, instruction, lane, buffer, i << kShift, buffer.proxies[i], by)) return;
  }
}

// `by` kAsyncInFlight when the store is issued, kAsync when it has landed.
void note_global_write(Warp& warp, const Instruction& instruction, u32 lane, u64 address, u64 bytes, Proxy by) {
  Buffer& buffer = *instruction.last_buffer;
  if (!bytes || buffer.internal || !warp.launch->follows_proxies()) return;
  if (buffer.proxies.empty()) buffer.proxies.resize(((buffer.end - buffer.begin) >> kShift) + 1);
  GlobalShadow shadow;
  shadow.tick = ++warp.launch->proxy_tick;
  shadow.block = warp.cta->number;
  shadow.thread = warp.index * 32 + lane;
  shadow.pc = instruction.pc;
  shadow.proxy = static_cast<u8>(by);
  const u64 end = address + bytes - buffer.begin;
  for (u64 i = (address - buffer.begin) >> kShift; i <= (end - 1) >> kShift; i++) buffer.proxies[i] = shadow;
}

}    // namespace emulator
