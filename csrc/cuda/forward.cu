// Forward, one launch: K' = E key, V' = F value, out = softmax(scale query K'^T + bias) V'.
//
// Work is a list of tickets. Projection tiles come first: kProjectRows rows of K' or V' by 128 columns, which are two
// heads of width 64, so that a tile of E is read once for both; a long sequence is split, and the CTA that delivers
// last adds the parts in their order. Attention tiles follow: 16 query rows a warp at a time, or 32, with K' and V' in
// shared memory for several of them. An attention tile waits until the projections of its heads are complete. Those
// tickets were drawn earlier by CTAs that run and never wait, so the wait ends however few CTAs are resident.
//
// Scores go in blocks of kKeys with the online softmax: a whole row of 256 would take half of all registers, and spill.
#include "attend.cuh"
#include "gemm.cuh"
#include "kernels.h"

namespace linformer::cuda {
namespace {

// The parts of a projection ticket.
struct ProjectTicket {
  int split, tile_id, block, tile, unit_id, unit, b;

  LINFORMER_DEVICE ProjectTicket(const Arguments& a, int ticket)
      : split(ticket % a.splits),
        tile_id(ticket / a.splits),
        block(tile_id % a.row_blocks),
        tile(tile_id / a.row_blocks % a.unit_tiles),
        unit_id(tile_id / a.row_blocks / a.unit_tiles),
        unit(unit_id % a.units),
        b(unit_id / a.units) {}
};

template <class Traits, class Shape>
LINFORMER_DEVICE void project_tile(const Arguments& a, Element<Traits::kType>* shared, uint32_t* shared_word,
                                   int ticket) {
  constexpr DType kType = Traits::kType;
  const Problem& p = a.p;
  const ProjectTicket of(a, ticket);
  const Sequence sequence = key_sequence(p, of.b);

  const int steps = (sequence.length + Shape::kStep - 1) / Shape::kStep;
  const int from = static_cast<int>(static_cast<int64_t>(steps) * of.split / a.splits);
  const int to = static_cast<int>(static_cast<int64_t>(steps) * (of.split + 1) / a.splits);

  using MatrixLoader = Loader<kType, Shape::kM, Shape::kStep, kThreads, Shape::kPitchA>;
  using RowsLoader = Loader<kType, Shape::kStep, Shape::kN, kThreads, Shape::kPitchB>;
  const Piece first = piece_of(a, of.unit, of.tile, 0);
  MatrixLoader matrix(projection_source<kType>(a, first.value, of.b, first.head, sequence.length), of.block * Shape::kM,
                      from * Shape::kStep + MatrixLoader::first_column(threadIdx.x), threadIdx.x);
  const int column = RowsLoader::first_column(threadIdx.x);
  const Piece mine = piece_of(a, of.unit, of.tile, column / a.piece);
  Source<kType> source = sequence_source<kType>(a, mine.value, of.b, mine.head, sequence);
  if (!mine.exists) source.rows = 0;    // reads as zero
  RowsLoader rows(source, from * Shape::kStep, mine.column + column % a.piece, threadIdx.x);

  float c[Shape::kTilesM * Shape::kTilesN][4];
  clear(c);
  const bool active = piece_of(a, of.unit, of.tile, warp_id() % 2 * Shape::kWarpN / a.piece).exists;
  multiply_stages<kType, Shape>(c, shared, to - from, active, p.allow_tf32, [&](auto* e_tile, auto* x_tile) {
    rows.load(x_tile, threadIdx.x);
    rows.next_rows();
    matrix.load(e_tile, threadIdx.x);
    matrix.next_columns();
  });

  constexpr int kTiles = Shape::kTilesM * Shape::kTilesN;
  const ProjectTicket part(a, again(ticket));
  float* partial = a.partial + static_cast<int64_t>(part.tile_id) * a.splits * kTiles * 4 * kThreads;
  if (!add_splits(c, partial, a.arrived + part.tile_id, part.split, a.splits, shared_word)) return;
  const ProjectTicket done(a, again(ticket));
  store_tile<kType, Shape>(c, shared, [&](int row, int at) {
    Target<kType> to;
    const Piece piece = piece_of(a, done.unit, done.tile, at / a.piece);
    const int k = done.block * Shape::kM + row;
    if (!piece.exists || k >= p.proj_dim) return to;
    const int d = piece.column + at % a.piece;
    to.data = rows_at<kType>(piece.value ? p.value_proj : p.key_proj, done.b, piece.head, k) + d;
    to.columns = static_cast<int>(piece.value ? p.value_dim : p.head_dim) - d;
    to.aligned = (a.aligned & (piece.value ? kAlignedValueProj : kAlignedKeyProj)) != 0;
    return to;
  });
  signal(a.ready + done.unit_id);
}

template <class Traits>
LINFORMER_DEVICE void attend_item(const Arguments& a, Element<Traits::kType>* shared, int ticket) {
  constexpr DType kType = Traits::kType;
  constexpr int kDim = Traits::kDim, kKeys = Traits::kKeys;
  const Problem& p = a.p;
  const int heads = static_cast<int>(p.heads), head = ticket % heads;
  int b = 0;
  int first_row = 0;
  if (!find_item(p.cu_seqlens_q, p.batch, p.total_q, p.len_q, a.query_tiles * Traits::kQueryRows, ticket / heads, &b,
                 &first_row)) {
    return;
  }
  const int head_kv = head / (again(heads) / static_cast<int>(p.heads_kv));
  if (a.project_tiles) {
    wait_for(a.ready + b * a.units + head_kv / a.unit_heads, static_cast<uint32_t>(a.unit_tiles * a.row_blocks));
  }
  const Sequence sequence = query_sequence(p, b);
  const int proj_dim = static_cast<int>(p.proj_dim);
  const auto keys = [&] {
    return projected_source<kType>(a, p.key_proj, again(b), head_kv, p.head_dim, kAlignedKeyProj);
  };
  const auto values = [&] {
    return projected_source<kType>(a, p.value_proj, again(b), head_kv, p.value_dim, kAlignedValueProj);
  };
  const int value_dim = static_cast<int>(p.value_dim);
  constexpr int kRows = Traits::kRows, kRowTiles = Traits::kRowTiles;
  constexpr int kBuffer = Traits::kQueryRows * Traits::kStagePitch;
  Element<kType>* buffers = shared + warp_id() * kRows * Traits::kStagePitch;
  Element<kType>* key_tiles = shared + a.query_buffers * kBuffer;
  Element<kType>* value_tiles = key_tiles + a.keys * Traits::kKeyPitch;
  float* bias_tiles = reinterpret_cast<float*>(value_tiles + a.keys * Traits::kValuePitch);
  const bool resident = proj_dim <= a.keys;
  // With two buffers the rows of the next tile are on their way while those of this one are multiplied.
  const bool ahead = Traits::kBuffers == 2 && a.query_buffers == 2;
  const Softmax softmax(a);
  const Dropout dropout(a, b, head);
  const auto row_of = [&](int tile) { return first_row + tile * Traits::kQueryRows + warp_id() * kRows; };
  const auto queries_of = [&](int tile) {
    const int row = row_of(tile), rows = min(max(sequence.length - row, 0), kRows);
    return query_source<kType>(a, p.query, again(b), head, sequence.start + row, rows, p.head_dim, kAlignedQuery);
  };
  const auto load_ahead = [&](int tile) {
    if (tile < a.query_tiles && row_of(tile) < sequence.length) {
      load_tile_apart<kType, kRows, Traits::kStaged, 32, Traits::kStagePitch>(buffers + tile % 2 * kBuffer,
                                                                              queries_of(tile), 0, 0, lane_id());
    }
    commit_copies();
  };
  if (ahead) load_ahead(0);
  for (int tile = 0; tile < a.query_tiles; ++tile) {
    if (first_row + tile * Traits::kQueryRows >= sequence.length) break;
    const int row = row_of(tile), rows = sequence.length - row;    // that exist, or more, or none
    Element<kType>* staged = buffers + (ahead ? tile % 2 * kBuffer : 0);
    if (ahead) {
      wait_copies<0>();
      __syncwarp();
      load_ahead(tile + 1);
    }

    float out[kRowTiles * kDim / 8][4];
    clear(out);
    float largest[kRowTiles][2], sum[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      largest[m][0] = largest[m][1] = a.lowest;
      sum[m][0] = sum[m][1] = 0.0f;
    }
    for (int k = 0; k < proj_dim; k += kKeys) {
      const int slot = resident ? k : k % a.keys;    // row of the block in shared memory
      bool waiting = slot == 0 && (!resident || tile == 0);
      if (waiting) {
        __syncthreads();    // nobody reads the blocks before them any more
#pragma unroll 1
        for (int next = 0; next < min(a.keys, proj_dim - k); next += kKeys) {
          load_tile_apart<kType, kKeys, kDim, kThreads, Traits::kKeyPitch>(key_tiles + next * Traits::kKeyPitch, keys(),
                                                                           k + next, 0, threadIdx.x);
          load_tile_apart<kType, kKeys, kDim, kThreads, Traits::kValuePitch>(value_tiles + next * Traits::kValuePitch,
                                                                             values(), k + next, 0, threadIdx.x);
        }
        commit_copies();
        if (p.key_bias) load_bias(shared_address(bias_tiles), bias_of(p, b, head_kv) + k, proj_dim - k, a.keys);
      }
      const Element<kType>* key_tile = key_tiles + slot * Traits::kKeyPitch;
      const int left = proj_dim - k;
      float scores[kRowTiles * kKeys / 8][4];
      for_each_staged<Traits>([&] { return queries_of(tile); }, staged, k == 0 && !ahead,
                              [&](auto column, bool loaded) {
                                if (waiting) {    // with the rows, the copies above have been waited for
                                  if (!loaded) wait_copies<0>();
                                  __syncthreads();
                                  waiting = false;
                                }
                                if (rows <= 0) return;    // nothing of this warp
                                multiply_rows<kType, kRowTiles, Traits::kStaged, kKeys, Traits::kStagePitch,
                                              Traits::kKeyPitch, column == 0>(scores, staged, key_tile + column, left,
                                                                              p.allow_tf32);
                              });
      if (rows <= 0) continue;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        auto& own = row_tile<kKeys / 8>(scores, m);
        softmax.orient(own);
        if (p.key_bias) softmax.add_bias(own, a, bias_tiles + slot);
        Softmax::cut(own, left);
        float correction[2];
        softmax.step(own, largest[m], sum[m], correction, k == 0);
        if (dropout.on) dropout.apply(own, row + m * kMmaRows, k);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[m * kDim / 8 + n][e] *= correction[e / 2];
        }
      }
      multiply_scores<kType, kRowTiles, kKeys, kDim, Traits::kValuePitch>(
          out, scores, value_tiles + slot * Traits::kValuePitch, left, p.allow_tf32);
    }

#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      auto& own = row_tile<kDim / 8>(out, m);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = Softmax::over(dropout.multiplier, quad_sum(sum[m][half]));
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          own[n][2 * half] *= scale;
          own[n][2 * half + 1] *= scale;
        }
      }
      store_staged<kType, Traits::kStaged>(
          own, staged, Traits::kStagePitch, rows_at<kType>(p.out, again(b), head, sequence.start + row + m * kMmaRows),
          p.out.row_stride, rows - m * kMmaRows, value_dim, (a.aligned & kAlignedOut) != 0);
    }
  }
}

template <class Traits>
LINFORMER_DEVICE void forward(const Arguments& a) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ uint32_t word;
  auto* shared = reinterpret_cast<Element<Traits::kType>*>(memory);
  const auto next = [&] { return static_cast<int>(next_ticket(a.ticket, &word)); };
  // Tickets of a CTA rise, so each role has a loop of its own, and what does not change within one takes no registers
  // from the other.
  int ticket;
  while ((ticket = next()) < a.project_tiles) project_tile<Traits, typename Traits::Project>(a, shared, &word, ticket);
  while (ticket < a.project_tiles + a.attend_tiles) {
    attend_item<Traits>(a, shared, ticket - a.project_tiles);
    ticket = next();
  }
}

}    // namespace

#define LINFORMER_KERNEL(name, type, dim, rows, warp_rows)                                              \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) name(const __grid_constant__ Arguments a) { \
    forward<Forward<DType::type, dim, rows, warp_rows>>(a);                                             \
  }
LINFORMER_KERNELS_OF_TYPE(LINFORMER_FORWARD_, LINFORMER_KERNEL)

}    // namespace linformer::cuda
