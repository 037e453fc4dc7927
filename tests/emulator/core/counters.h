// What a launch counts: per instruction, and per named buffer of global memory.
#pragma once

#include "common.h"

namespace emulator {

// One instruction of the PTX, over the whole launch.
struct Counter {
  u64 warps = 0;         // times a warp executed it
  u64 threads = 0;       // lanes that took part
  u64 requests = 0;      // memory requests, one a warp (or one an asynchronous tensor copy)
  u64 sectors = 0;       // 32-byte sectors of global memory, counted once a request
  u64 wavefronts = 0;    // passes over the banks of shared memory
  u64 ideal_wavefronts = 0;
  u64 bytes = 0;    // asked for by the threads
};

// Who wrote 16 bytes of global memory in this launch, and through which proxy.
struct GlobalShadow {
  u64 tick = 0;
  u32 block = 0, thread = 0, pc = 0;
  u8 proxy = 0;
};

// A range of global memory the kernel may touch.
struct Buffer {
  u64 begin = 0, end = 0;
  string name;
  bool read_only = false;
  bool internal = false;           // parameters, module variables: checked, but not counted as traffic
  vector<u64> read, written;       // a bit for each 32-byte sector that was touched
  vector<u32> writer_of_word;      // 1 + number of the block that last wrote each 4 bytes; empty before the first write
  vector<GlobalShadow> proxies;    // of each 16 bytes; empty before the first write that is followed
};

}    // namespace emulator
