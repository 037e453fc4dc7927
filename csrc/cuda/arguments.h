// What a kernel gets: the problem, the decomposition that the plan chose, and its workspace. Passed by value.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace linformer::cuda {

// Tensors whose rows all start at multiples of 16 bytes; others are read and written element by element.
enum Aligned : uint32_t {
  kAlignedQuery = 1,
  kAlignedKey = 2,
  kAlignedValue = 4,
  kAlignedOut = 8,
  kAlignedProjKey = 16,
  kAlignedProjValue = 32,
  kAlignedKeyProj = 64,
  kAlignedValueProj = 128,
  kAlignedGradOut = 256,
  kAlignedGradQuery = 512,
  kAlignedGradKeyProj = 1024,
  kAlignedGradValueProj = 2048,
  kAlignedGradKey = 4096,
  kAlignedGradValue = 8192,
  kAlignedGradProjKey = 16384,
  kAlignedGradProjValue = 32768,
};

struct Arguments {
  Problem p;
  uint32_t aligned = 0;

  // Of softmax and dropout, once for all.
  float exponent = 0.0f;           // |scale| log2 e; with a bias 1, as scores are in bits then
  float score_factor = 0.0f;       // with a bias: scale log2 e
  float lowest = 0.0f;             // what the largest score starts at
  bool negative = false;           // scale < 0
  float headroom = 0.0f;           // log2 of what exponentials are divided by, see Softmax
  uint32_t drop_below = 0;         // random words below are dropped; 0: no dropout
  float keep_multiplier = 1.0f;    // 1 / (1 - p)

  // Units of heads whose projections share tiles of E and F: `unit_heads` heads of one sequence.
  int32_t unit_heads = 1;
  int32_t units = 1;            // in a sequence
  int32_t piece = 32;           // columns of a head in a tile
  int32_t parts = 1;            // pieces of a head
  int32_t unit_tiles = 1;       // tiles of kTileColumns columns in a unit, over both matrices
  int32_t row_blocks = 1;       // blocks of rows of K' and V'
  int32_t splits = 1;           // of the sequence
  int32_t project_tiles = 0;    // tickets, all units

  int32_t keys = 0;             // rows of K' and V' in shared memory
  int32_t query_items = 0;      // runs of query_tiles tiles of query rows over all sequences (packed: at most)
  int32_t query_tiles = 1;      // tiles of an item
  int32_t query_buffers = 1;    // forward: for the rows of a tile, and of the next
  int32_t attend_tiles = 0;     // tickets: query_items * heads

  int32_t column_blocks = 1;    // backward: blocks of rows of K'
  int32_t column_splits = 1;    // of the query rows
  int32_t column_tiles = 0;     // tickets

  int32_t input_items = 0;      // tiles of sequence rows over all sequences (packed: at most)
  int32_t input_tiles = 0;      // tiles of dK and dV
  int32_t matrix_tiles = 0;     // tiles of dE and dF
  int32_t matrix_blocks = 1;    // blocks of columns of E

  int32_t pool_tasks = 0;    // of a warp each

  bool want_key_proj = false;    // dK', for its own sake or for dK and dE
  bool want_value_proj = false;

  // Workspace. Counters are zero when the kernel starts.
  uint32_t* ticket = nullptr;
  uint32_t* arrived = nullptr;      // a tile: splits that have delivered
  uint32_t* ready = nullptr;        // a unit, or a (sequence, kv head): tiles that are complete
  float* partial = nullptr;         // (tile, split): accumulators in the order of registers
  float* partial_bias = nullptr;    // (tile, split, row of the tile, 4): gradient of the bias
  float* statistics = nullptr;      // (sequence, head, query row, 4): largest score, 1 / sum, delta, unused
};

}    // namespace linformer::cuda
