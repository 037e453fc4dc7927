// Counts the traffic of an access: sectors of global memory, wavefronts of shared memory.
#include <algorithm>

#include "machine.h"

namespace emulator {

constexpr u32 kSectorShift = 5;    // 32 bytes

// In the buffer the instruction last touched.
void mark_sector(Warp&, const Instruction& instruction, u64 sector, bool write) {
  Buffer& buffer = *instruction.last_buffer;
  vector<u64>& touched = write ? buffer.written : buffer.read;
  const u64 bit = sector - (buffer.begin >> kSectorShift);
  if (bit / 64 < touched.size()) touched[bit / 64] |= 1ull << bit % 64;
}

void count_sectors(Warp& warp, const Instruction& instruction, const u64* addresses, u32 lanes, u32 bytes, bool write) {
  if (instruction.last_buffer->internal) return;
  u64 sectors[64];    // an aligned access of up to 32 bytes lies in one sector, a misaligned one in two
  u32 found = 0;
  bool sorted = true;
  for_lanes(lanes, [&](u32 lane) {
    const u64 last = (addresses[lane] + bytes - 1) >> kSectorShift;
    for (u64 sector = addresses[lane] >> kSectorShift; sector <= last && found < 64; sector++) {
      if (found && sector == sectors[found - 1]) continue;
      if (found && sector < sectors[found - 1]) sorted = false;
      sectors[found++] = sector;
    }
  });
  if (!sorted) {
    std::sort(sectors, sectors + found);
    found = static_cast<u32>(std::unique(sectors, sectors + found) - sectors);
  }
  Counter& counter = warp.launch->counter(instruction);
  counter.requests++;
  counter.sectors += found;
  counter.bytes += static_cast<u64>(count_lanes(lanes)) * bytes;
  for (u32 i = 0; i < found; i++) {
    const u64 begin = sectors[i] << kSectorShift;
    const Buffer& last = *instruction.last_buffer;
    if (begin + 31 < last.begin || begin >= last.end) {    // lanes of one request may go to several buffers
      Buffer* buffer = warp.launch->find(begin);
      if (!buffer) buffer = warp.launch->find(begin + 31);
      if (!buffer) continue;
      instruction.last_buffer = buffer;
    }
    mark_sector(warp, instruction, sectors[i], write);
  }
}

// A contiguous piece of an asynchronous tensor copy.
void count_row(Warp& warp, const Instruction& instruction, u64 address, u64 bytes, bool write) {
  if (!bytes) return;
  Counter& counter = warp.launch->counter(instruction);
  for (u64 sector = address >> kSectorShift; sector <= (address + bytes - 1) >> kSectorShift; sector++) {
    counter.sectors++;
    mark_sector(warp, instruction, sector, write);
  }
  counter.bytes += bytes;
}

// A request is served in groups of lanes that ask for 128 bytes together; in each, a bank gives one word a wavefront.
void count_wavefronts(Warp& warp, const Instruction& instruction, const u32* offsets, u32 lanes, u32 bytes) {
  const u32 group = bytes <= 4 ? 32 : 128 / bytes;
  Counter& counter = warp.launch->counter(instruction);
  counter.requests++;
  counter.bytes += static_cast<u64>(count_lanes(lanes)) * bytes;
  for (u32 first = 0; first < 32; first += group) {
    const u32 members = lanes >> first & (group == 32 ? kAllLanes : (1u << group) - 1);
    if (!members) continue;
    u32 words[32][32];    // the different words asked of each bank
    u8 counts[32] = {};
    u32 most = 0;
    for_lanes(members, [&](u32 lane) {
      const u32 offset = offsets[first + lane];
      for (u32 word = offset >> 2; word <= (offset + bytes - 1) >> 2; word++) {
        const u32 bank = word & 31;
        const u32* end = words[bank] + counts[bank];
        if (std::find(words[bank] + 0, words[bank] + counts[bank], word) != end || counts[bank] == 32) continue;
        words[bank][counts[bank]++] = word;
        most = std::max<u32>(most, counts[bank]);
      }
    });
    counter.ideal_wavefronts++;
    counter.wavefronts += most;
  }
}

}    // namespace emulator
