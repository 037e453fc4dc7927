// Rows between global and shared memory: ragged sizes, masked rows, and tensors whose rows are not aligned.
#pragma once

#include "arguments.h"
#include "device.cuh"

namespace linformer::cuda {

// A matrix in global memory. What lies outside `rows` x `columns`, or in a masked row, reads as zero and is never
// touched: a NaN behind a mask does not leak.
template <DType kType>
struct Source {
  const Element<kType>* data = nullptr;
  int64_t stride = 0;
  int rows = 0;
  int columns = 0;
  const bool* mask = nullptr;    // true = take part
  int64_t mask_stride = 0;
  bool aligned = false;
};

// How kLanes threads share a tile: each has the same 16 bytes of every kBy-th row. kBy is even, so that rows that start
// at odd elements alternate for no thread.
template <DType kType, int kRows, int kColumns, int kLanes>
struct Share {
  static constexpr int kChunk = 16 / kBytes<kType>;
  static constexpr int kChunks = kColumns / kChunk;
  static constexpr int kBy = kLanes / kChunks / 2 * 2;
  static constexpr int kCount = (kRows + kBy - 1) / kBy;
  static constexpr int kAhead = smaller(4, kCount);    // loads of 16 loose bytes that are on their way together
  static_assert(kBy > 0 && kCount <= 32);
};

// 16 bytes from wherever an element may stand, in loads that wait for nothing. 16-bit elements: three words, of which
// the first is the chunk's own first or, `odd`, begins with its second element, and two elements at the ends.
template <DType kType>
struct Loose {
  uint32_t words[3], next, other;

  LINFORMER_DEVICE static bool is_odd(const Element<kType>* chunk) {
    return kBytes<kType> == 2 && reinterpret_cast<uintptr_t>(chunk) % 4 != 0;
  }

  // The first `count` elements of the chunk whose first word is at `word`. .cg: from L2, because L1 may hold what stood
  // there before another CTA wrote.
  LINFORMER_DEVICE void load(const Element<kType>* word, bool odd, int count) {
    using Bits = BitsOf<kType>;
    constexpr int kElements = 4 / kBytes<kType>;    // of a word
    const auto* from = reinterpret_cast<const Bits*>(word);
    const int left = count - (odd ? 1 : 0);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (left >= (i + 1) * kElements) words[i] = __ldcg(reinterpret_cast<const uint32_t*>(from) + i);
      if (kElements == 2 && left == 2 * i + 1) words[i] = __ldcg(from + 2 * i);
    }
    if (left > 3 * kElements) next = __ldcg(from + 3 * kElements);
    if constexpr (kElements == 2) {
      if (odd && count > 0) other = __ldcg(from - 1);
      if (left == 8) other = __ldcg(from + 7);
    }
  }
  template <int kOffset>
  LINFORMER_DEVICE void store(uint32_t to, bool odd) const {
    if constexpr (kType == DType::kFloat32) {
      store_shared<kOffset>(to, words[0], words[1], words[2], next);
    } else {
      const uint32_t first = odd ? 0x5410 : 0x7654, middle = odd ? 0x5432 : 0x7654, last = odd ? 0x5432 : 0x5410;
      store_shared<kOffset>(to, __byte_perm(other, words[0], first), __byte_perm(words[0], words[1], middle),
                            __byte_perm(words[1], words[2], middle),
                            __byte_perm(odd ? words[2] : next, odd ? next : other, last));
    }
  }
};

// A thread's share of a tile of which not everything exists, or is taken, or is aligned; kWhole: it is only not
// aligned. `first`: its first row in the tile, from where `from`, `mask`, and the `rows` and `columns` that exist
// count. kAhead rows at a time, so that their loads are on their way together. A function of its own: it would take the
// registers of the loops around it.
template <DType kType, int kRows, int kColumns, int kLanes, int kPitch, bool kWhole>
__device__ __noinline__ void load_ragged(uint32_t to, const Element<kType>* from, int64_t stride, int first, int rows,
                                         int columns, bool aligned, const bool* mask, int64_t mask_stride) {
  using Of = Share<kType, kRows, kColumns, kLanes>;
  constexpr int kBy = Of::kBy, kBytesBy = kBy * kPitch * kBytes<kType>;
  const int count = kWhole ? Of::kChunk : min(max(columns, 0), Of::kChunk);
  const bool odd = Loose<kType>::is_odd(from);
  from += odd ? 1 : 0;
  // From row to row by sums that the compiler does not see through: it would hold the distance of each from the first.
#pragma unroll 1
  for (; first < kRows; first += Of::kAhead * kBy) {
    bool taken[Of::kAhead];
#pragma unroll
    for (int i = 0; i < Of::kAhead; ++i) {
      taken[i] = kWhole ? kRows % kBy == 0 || first + i * kBy < kRows : i * kBy < rows && (!mask || *mask);
      if (mask) mask = again(mask + kBy * mask_stride);
    }
    if (!kWhole && aligned) {
      repeat<Of::kAhead>([&](auto i) {
        if (first + i * kBy < kRows) copy_async<i * kBytesBy>(to, from, taken[i] ? count * kBytes<kType> : 0);
        from = again(from + kBy * stride);
      });
    } else {
      Loose<kType> chunks[Of::kAhead] = {};
#pragma unroll
      for (int i = 0; i < Of::kAhead; ++i) {
        if (taken[i]) chunks[i].load(from, odd, count);
        from = again(from + kBy * stride);
      }
      repeat<Of::kAhead>([&](auto i) {
        if (first + i * kBy < kRows) chunks[i].template store<i * kBytesBy>(to, odd);
      });
    }
    to += Of::kAhead * kBytesBy;
    rows -= Of::kAhead * kBy;
  }
}

// A thread's share of tiles of kRows x kColumns that follow one another in a source: 16 bytes of every kBy-th row, for
// which whole tiles cost a pointer and copies at constant distances.
template <DType kType, int kRows, int kColumns, int kLanes, int kPitch>
struct Loader {
  using Of = Share<kType, kRows, kColumns, kLanes>;
  const Element<kType>* from;
  int64_t stride;
  int rows, columns;    // that exist from here on
  bool aligned;
  const bool* mask;
  int64_t mask_stride;

  LINFORMER_DEVICE static int first_row(uint32_t lane) { return static_cast<int>(lane / Of::kChunks); }
  LINFORMER_DEVICE static int first_column(uint32_t lane) { return static_cast<int>(lane % Of::kChunks * Of::kChunk); }

  // From (row, column), where this thread has its own columns: a tile may have several sources side by side.
  LINFORMER_DEVICE Loader(const Source<kType>& source, int row, int column, uint32_t lane)
      : from(source.data + (row + first_row(lane)) * source.stride + column),
        stride(source.stride),
        rows(source.rows - row),
        columns(source.columns - column),
        aligned(source.aligned),
        mask(source.mask ? source.mask + (row + first_row(lane)) * source.mask_stride : nullptr),
        mask_stride(source.mask_stride) {}

  LINFORMER_DEVICE void next_rows() {
    from += kRows * stride;
    rows -= kRows;
    if (mask) mask += kRows * mask_stride;
  }
  LINFORMER_DEVICE void next_columns() {
    from += kColumns;
    columns -= kColumns;
  }

  LINFORMER_DEVICE void load(Element<kType>* shared, uint32_t lane) const { load(shared_address(shared), lane); }
  LINFORMER_DEVICE void load(uint32_t shared, uint32_t lane) const {
    const int first = first_row(lane);
    if (Of::kBy * Of::kChunks < kLanes && first >= Of::kBy) return;
    const uint32_t to = shared + (first * kPitch + first_column(lane)) * kBytes<kType>;
    const bool whole = !mask && rows >= kRows && columns >= Of::kChunk;
    if (whole && aligned) {
      repeat<Of::kCount>([&](auto i) {
        constexpr int kRow = i * Of::kBy;
        if (kRows % Of::kBy && first + kRow >= kRows) return;
        copy_async<kRow * kPitch * kBytes<kType>>(to, from + kRow * stride);
      });
    } else if (whole) {
      load_ragged<kType, kRows, kColumns, kLanes, kPitch, true>(to, from, stride, first, 0, 0, false, nullptr, 0);
    } else {
      load_ragged<kType, kRows, kColumns, kLanes, kPitch, false>(to, from, stride, first, rows - first, columns,
                                                                 aligned, mask, mask_stride);
    }
  }
};

// kRows x kColumns of the source from (row, column), by kLanes threads. A function of its own, for tiles that are not
// loaded in an inner loop: inlined, its addresses are computed ahead of the loops around it and take the registers of
// the sums.
template <DType kType, int kRows, int kColumns, int kLanes, int kPitch>
__device__ __noinline__ void load_tile_apart(uint32_t shared, const Element<kType>* data, int64_t stride, int rows,
                                             int columns, bool aligned, int row, int column, uint32_t lane) {
  using Tiles = Loader<kType, kRows, kColumns, kLanes, kPitch>;
  Source<kType> source;
  source.data = data;
  source.stride = stride;
  source.rows = rows;
  source.columns = columns;
  source.aligned = aligned;
  Tiles(source, row, column + Tiles::first_column(lane), lane).load(shared, lane);
}
template <DType kType, int kRows, int kColumns, int kLanes, int kPitch>
LINFORMER_DEVICE void load_tile_apart(Element<kType>* shared, const Source<kType>& source, int row, int column,
                                      uint32_t lane) {
  load_tile_apart<kType, kRows, kColumns, kLanes, kPitch>(shared_address(shared), source.data, source.stride,
                                                          source.rows, source.columns, source.aligned, row, column,
                                                          lane);
}

// Two neighbours of a row. `columns` counts those that exist from the first of the two on.
template <DType kType>
LINFORMER_DEVICE void store_pair(Element<kType>* to, float first, float second, int columns, bool aligned) {
  if (aligned && columns >= 2) {
    if constexpr (kType == DType::kFloat32) {
      *reinterpret_cast<float2*>(to) = make_float2(first, second);
    } else {
      *reinterpret_cast<uint32_t*>(to) = pack<kType>(first, second);
    }
  } else {
    if (columns >= 1) to[0] = rounded<kType>(first);
    if (columns >= 2) to[1] = rounded<kType>(second);
  }
}

// 16 bytes, of which the first `count` elements exist.
template <DType kType>
LINFORMER_DEVICE void store_chunk(Element<kType>* to, const uint4& chunk, int count, bool aligned) {
  constexpr int kChunk = 16 / kBytes<kType>;
  if (aligned && count >= kChunk) {
    *reinterpret_cast<uint4*>(to) = chunk;
    return;
  }
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const uint32_t bits = words[e * kBytes<kType> / 4] >> e * kBytes<kType> * 8 % 32;
    if (e < count) *reinterpret_cast<BitsOf<kType>*>(to + e) = static_cast<BitsOf<kType>>(bits);
  }
}

// 16 rows x kColumns of one warp, out of shared memory.
template <DType kType, int kColumns>
LINFORMER_DEVICE void store_rows(Element<kType>* data, int64_t stride, int rows, int columns, bool aligned,
                                 const Element<kType>* shared, int pitch) {
  constexpr int kChunk = 16 / kBytes<kType>;
  constexpr int kChunks = kColumns / kChunk;
#pragma unroll 1
  for (int i = again(lane_id()); i < kMmaRows * kChunks; i += 32) {
    const int row = i / kChunks, column = i % kChunks * kChunk;
    store_chunk<kType>(data + row * stride + column, *reinterpret_cast<const uint4*>(shared + row * pitch + column),
                       row < rows ? columns - column : 0, aligned);
  }
}

template <DType kType>
LINFORMER_DEVICE Element<kType>* rows_at(const Rows& rows, int64_t b, int64_t head, int64_t row) {
  return static_cast<Element<kType>*>(rows.data) + b * rows.batch_stride + head * rows.head_stride +
         row * rows.row_stride;
}

// Where a sequence stands. Offsets are held inside the tensor, whatever they say: nothing is read out of bounds.
struct Sequence {
  int64_t start = 0;
  int length = 0;
};

LINFORMER_DEVICE Sequence sequence_of(const int64_t* offsets, int64_t b, int64_t total, int64_t longest) {
  if (!offsets) return {0, static_cast<int>(longest)};
  const int64_t start = min(max(offsets[b], int64_t{0}), total);
  const int64_t end = min(max(offsets[b + 1], start), total);
  return {start, static_cast<int>(min(end - start, longest))};
}
LINFORMER_DEVICE Sequence query_sequence(const Problem& p, int64_t b) {
  return sequence_of(p.cu_seqlens_q, b, p.total_q, p.len_q);
}
LINFORMER_DEVICE Sequence key_sequence(const Problem& p, int64_t b) {
  return sequence_of(p.cu_seqlens_k, b, p.total_k, min(p.len_k, p.seq_len_max));
}

// Item `index` of a list of runs of `rows` rows: the sequence and the first row. False if there is none.
//
// A packed sequence s has the items from offsets[s] / rows + s up to those of the next one: as many as it needs, or one
// more, which is none. So the list is never longer than total / rows + batch, and where a sequence begins in it depends
// on its own offset alone: halving finds it, in log2(batch) loads.
LINFORMER_DEVICE bool find_item(const int64_t* offsets, int64_t batch, int64_t total, int64_t longest, int rows,
                                int index, int* b, int* first) {
  if (!offsets) {
    const int items = (static_cast<int>(longest) + again(rows) - 1) / rows;
    *b = index / items;
    *first = index % items * rows;
    return true;
  }
  const auto begin = [&](int s) { return static_cast<int>(min(max(offsets[s], int64_t{0}), total)) / rows + s; };
  int low = 0, high = static_cast<int>(batch);    // of the sequence, and behind it
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (begin(middle) <= index ? low : high) = middle;
  }
  *b = low;
  *first = (index - begin(low)) * rows;
  return batch > 0 && *first >= 0 && *first < sequence_of(offsets, low, total, longest).length;
}

// E or F, dE or dF.
template <DType kType>
LINFORMER_DEVICE Source<kType> projection_source(const Arguments& a, bool value, int64_t b, int64_t head, int columns) {
  const Rows& rows = value ? a.p.proj_value : a.p.proj_key;
  Source<kType> source;
  source.data = rows_at<kType>(rows, b, head, 0);
  source.stride = rows.row_stride;
  source.rows = static_cast<int>(a.p.proj_dim);
  source.columns = columns;
  source.aligned = (a.aligned & (value ? kAlignedProjValue : kAlignedProjKey)) != 0;
  return source;
}

// The rows of key or value of one sequence and head.
template <DType kType>
LINFORMER_DEVICE Source<kType> sequence_source(const Arguments& a, bool value, int64_t b, int64_t head,
                                               const Sequence& sequence) {
  const Problem& p = a.p;
  Source<kType> source;
  source.data = rows_at<kType>(value ? p.value : p.key, b, head, sequence.start);
  source.stride = value ? p.value.row_stride : p.key.row_stride;
  source.rows = sequence.length;
  source.columns = static_cast<int>(value ? p.value_dim : p.head_dim);
  source.mask = p.mask ? p.mask + b * p.mask_batch_stride : nullptr;
  source.mask_stride = p.mask_row_stride;
  source.aligned = (a.aligned & (value ? kAlignedValue : kAlignedKey)) != 0;
  return source;
}

// Rows of K' and V' or of their gradients: proj_dim x columns.
template <DType kType>
LINFORMER_DEVICE Source<kType> projected_source(const Arguments& a, const Rows& rows, int64_t b, int64_t head,
                                                int64_t columns, uint32_t aligned) {
  Source<kType> source;
  source.data = rows_at<kType>(rows, b, head, 0);
  source.stride = rows.row_stride;
  source.rows = static_cast<int>(a.p.proj_dim);
  source.columns = static_cast<int>(columns);
  source.aligned = (a.aligned & aligned) != 0;
  return source;
}

// Up to 16 query rows of a warp, of query or of grad_out.
template <DType kType>
LINFORMER_DEVICE Source<kType> query_source(const Arguments& a, const Rows& tensor, int64_t b, int64_t head,
                                            int64_t row, int rows, int64_t columns, uint32_t aligned) {
  Source<kType> source;
  source.data = rows_at<kType>(tensor, b, head, row);
  source.stride = tensor.row_stride;
  source.rows = rows;
  source.columns = static_cast<int>(columns);
  source.aligned = (a.aligned & aligned) != 0;
  return source;
}

// Which head, tensor and columns a piece of a unit's tile holds.
struct Piece {
  bool exists = false;
  bool value = false;
  int head = 0;
  int column = 0;    // first column in the head
};

LINFORMER_DEVICE Piece piece_of(const Arguments& a, int unit, int tile, int slot) {
  const int slots = kTileColumns / a.piece;
  int index = tile * slots + slot, in_unit;
  Piece piece;
  if (slot >= slots) return piece;
  if (a.p.shared_kv) {
    in_unit = index / (2 * a.parts);
    piece.value = index / a.parts % 2 != 0;
  } else {
    const int half = a.unit_tiles / 2;
    piece.value = tile >= half;
    index = tile % half * slots + slot;
    in_unit = index / a.parts;
  }
  piece.head = unit * a.unit_heads + in_unit;
  piece.column = index % a.parts * a.piece;
  piece.exists = in_unit < a.unit_heads && piece.head < a.p.heads_kv;
  return piece;
}

// The next ticket of this CTA.
LINFORMER_DEVICE uint32_t next_ticket(uint32_t* counter, uint32_t* shared) {
  __syncthreads();    // the last ticket's work is done, its shared memory is free
  if (threadIdx.x == 0) *shared = atomicAdd(counter, 1u);
  __syncthreads();
  return *shared;
}

// This CTA's writes become visible to whoever waits for the counter: every thread has written before the barrier, and
// the one behind it releases for all (a barrier and a release are cumulative at GPU scope).
LINFORMER_DEVICE void signal(uint32_t* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    add_acquire_release(counter, 1u);
  }
}

// Until `count` CTAs have signaled. They drew their tickets before this one and run, so the wait ends.
LINFORMER_DEVICE void wait_for(const uint32_t* counter, uint32_t count) {
  if (threadIdx.x == 0) {
    while (load_acquire(counter) < count) __nanosleep(64);
    __threadfence();
  }
  __syncthreads();
}

// Adds the accumulators of all splits of a tile, in their order, in the CTA that comes last; true there.
template <int kTiles>
LINFORMER_DEVICE bool add_splits(float (&c)[kTiles][4], float* partial, uint32_t* arrived, int split, int splits,
                                 uint32_t* shared) {
  if (splits == 1) return true;
  float4* slots = reinterpret_cast<float4*>(partial) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    __stcg(slots + (split * kTiles + i) * kThreads, make_float4(c[i][0], c[i][1], c[i][2], c[i][3]));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *shared = add_acquire_release(arrived, 1u);
    __threadfence();
  }
  __syncthreads();
  if (*shared + 1 != static_cast<uint32_t>(splits)) return false;
  clear(c);
  for (int s = 0; s < splits; ++s) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float4 other = __ldcg(slots + (s * kTiles + i) * kThreads);
      c[i][0] += other.x;
      c[i][1] += other.y;
      c[i][2] += other.z;
      c[i][3] += other.w;
    }
  }
  return true;
}

}    // namespace linformer::cuda
