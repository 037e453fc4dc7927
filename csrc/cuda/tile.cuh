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

template <DType kType>
LINFORMER_DEVICE void load_chunk(Element<kType>* shared, const Source<kType>& source, int row, int column) {
  constexpr int kChunk = 16 / kBytes<kType>;
  const bool taken = row < source.rows && (!source.mask || source.mask[row * source.mask_stride]);
  const int count = taken ? min(max(source.columns - column, 0), kChunk) : 0;
  const Element<kType>* from = source.data + row * source.stride + column;
  if (source.aligned) {
    copy_async(shared, count ? from : source.data, count * kBytes<kType>);
  } else {
    // .cg: from L2, because L1 may hold what stood there before another CTA wrote.
#pragma unroll 1
    for (int i = 0; i < kChunk; ++i) shared[i] = i < count ? __ldcg(from + i) : Element<kType>(0);
  }
}

// kRows x kColumns of the source from (row, column), by kLanes threads.
template <DType kType, int kRows, int kColumns, int kLanes>
LINFORMER_DEVICE void load_tile(Element<kType>* shared, int pitch, const Source<kType>& source, int row, int column,
                                int lane) {
  constexpr int kChunk = 16 / kBytes<kType>;
  constexpr int kChunks = kColumns / kChunk;
#pragma unroll 4
  for (int i = lane; i < kRows * kChunks; i += kLanes) {
    load_chunk<kType>(shared + i / kChunks * pitch + i % kChunks * kChunk, source, row + i / kChunks,
                      column + i % kChunks * kChunk);
  }
}

// load_tile as a function of its own, for tiles that are not loaded in an inner loop: inlined, its addresses are
// computed ahead of the loops around it and take the registers of the sums.
template <DType kType, int kRows, int kColumns, int kLanes>
__device__ __noinline__ void load_tile_apart(Element<kType>* shared, int pitch, const Element<kType>* data,
                                             int64_t stride, int rows, int columns, bool aligned, int row, int column,
                                             int lane) {
  Source<kType> source;
  source.data = data;
  source.stride = stride;
  source.rows = rows;
  source.columns = columns;
  source.aligned = aligned;
  load_tile<kType, kRows, kColumns, kLanes>(shared, pitch, source, row, column, lane);
}
template <DType kType, int kRows, int kColumns, int kLanes>
LINFORMER_DEVICE void load_tile_apart(Element<kType>* shared, int pitch, const Source<kType>& source, int row,
                                      int column, int lane) {
  load_tile_apart<kType, kRows, kColumns, kLanes>(shared, pitch, source.data, source.stride, source.rows,
                                                  source.columns, source.aligned, row, column, lane);
}

// As load_tile for a tile whose columns belong to several sources: this thread's columns are those of `source` from
// `column` on, and it keeps to them.
template <DType kType, int kRows, int kColumns>
LINFORMER_DEVICE void load_own_columns(Element<kType>* shared, int pitch, const Source<kType>& source, int row,
                                       int column) {
  constexpr int kChunk = 16 / kBytes<kType>;
  constexpr int kChunks = kColumns / kChunk;
  static_assert(kThreads % kChunks == 0);
  const int first = threadIdx.x / kChunks, at = threadIdx.x % kChunks * kChunk;
#pragma unroll
  for (int r = first; r < kRows; r += kThreads / kChunks) {
    load_chunk<kType>(shared + r * pitch + at, source, row + r, column);
  }
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

// 16 rows x kColumns of one warp, out of shared memory.
template <DType kType, int kColumns>
LINFORMER_DEVICE void store_rows(Element<kType>* data, int64_t stride, int rows, int columns, bool aligned,
                                 const Element<kType>* shared, int pitch) {
  constexpr int kChunk = 16 / kBytes<kType>;
  constexpr int kChunks = kColumns / kChunk;
  for (int i = lane_id(); i < kRowsPerWarp * kChunks; i += 32) {
    const int row = i / kChunks, column = i % kChunks * kChunk;
    const int count = row < rows ? min(columns - column, kChunk) : 0;
    const Element<kType>* from = shared + row * pitch + column;
    Element<kType>* to = data + row * stride + column;
    if (aligned && count == kChunk) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll 1
      for (int e = 0; e < count; ++e) to[e] = from[e];
    }
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

// Item `index` of a list that has ceil(length / rows) items for each sequence. Returns false behind its end.
LINFORMER_DEVICE bool find_item(const int64_t* offsets, int64_t batch, int64_t total, int64_t longest, int rows,
                                int64_t index, int* b, int* first) {
  if (!offsets) {
    const int64_t items = (longest + rows - 1) / rows;
    *b = static_cast<int>(index / items);
    *first = static_cast<int>(index % items) * rows;
    return true;
  }
  for (int64_t s = 0; s < batch; ++s) {
    const int items = (sequence_of(offsets, s, total, longest).length + rows - 1) / rows;
    if (index < items) {
      *b = static_cast<int>(s);
      *first = static_cast<int>(index) * rows;
      return true;
    }
    index -= items;
  }
  return false;
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
