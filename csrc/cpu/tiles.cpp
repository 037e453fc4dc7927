// The tasks of the CPU plan on AMX tiles. CMake compiles this file twice: with the instructions, and in portable code
// for tests. The tasks are those of kernels.cpp, with results of products as tiles of 16 x 16 fp32 and:
//   attend           16 queries at a time and K in blocks, so that scores, K'^T and V' of a block are in L1. Exponents
//                    refer to the largest score of the first block; only one 2^40 above it makes what is there be
//                    scaled. P takes the place of the scores, as the first operand of the product with V'.
//   attend_backward  16 queries and all of K: P, then dS, in the place of the scores. dV'^T += dO^T P and dK'^T += Q^T
//   dS
//                    once a tile of queries: transposed, because P and dS are then B, whose words are made of two rows.
//   project_backward dE^T is summed over the heads in registers.
#include "common.h"
#include "kernels.h"
#include "tile.h"

namespace linformer::cpu {

extern const KernelTable LINFORMER_CPU_WITHOUT_TILES;

namespace {

static_assert(kWidth == kSide, "a row of fp32 of a tile is a vector");

// 2^x for x <= 127 to the accuracy of T. With the whole part taken by floor the last instruction adds it by itself.
// Relative error of degree 3 7.5e-5, of degree 4 2.6e-6, of degree 5 7.5e-8 (a Lawson iteration on [0, 1)).
template <class T>
LINFORMER_INLINE VecF exp2_for(VecF x) {
#if defined(__AVX512F__)
  const VecF f = (VecF)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  VecF p;
  if constexpr (kSame<T, BFloat16>) {
    p = splat(0x1.3f96a4p-4f) * f + splat(0x1.cefc4cp-3f);
    p = p * f + splat(0x1.64444cp-1f);
    p = p * f + splat(0x1.fff632p-1f);
  } else if constexpr (kSame<T, Half>) {
    p = splat(0x1.bb7cd4p-7f) * f + splat(0x1.aa13f0p-5f);
    p = p * f + splat(0x1.ee798ap-3f);
    p = p * f + splat(0x1.62d166p-1f);
    p = p * f + splat(0x1.00002cp+0f);
  } else {
    p = splat(0x1.ec320ap-10f) * f + splat(0x1.26900cp-7f);
    p = p * f + splat(0x1.c95446p-5f);
    p = p * f + splat(0x1.ebd5a8p-3f);
    p = p * f + splat(0x1.62e4f6p-1f);
    p = p * f + splat(0x1.fffffep-1f);
  }
  return (VecF)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return exp2_nonpositive(x, 0.0f);
#endif
}

LINFORMER_INLINE bool any_lane(VecI lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#else
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= lanes[i];
  return any != 0;
#endif
}

// Lanes below `count`.
LINFORMER_INLINE VecI first_lanes(int64_t count) {
  VecI lanes = {};
  for (int i = 0; i < kWidth; ++i) lanes[i] = i < count ? -1 : 0;
  return lanes;
}

template <class T>
struct TileTasks {
  static constexpr int kTermCount = kTerms<T>;
  static constexpr int64_t kStep = kTermCount * kTileBytes;    // one operand tile, with its terms
  static constexpr int64_t kScores =
      kTermCount > 2 ? kStep : 2 * kTileBytes;    // scores of 16 x 32, and P in their place

  // Lanes for which a problem is computed again without tiles: infinite, as unnormalised sums may become; where values
  // are cut into terms NaN too, which they make of an infinity.
  static LINFORMER_INLINE VecI doubtful(VecF value) {
    if constexpr (kTermCount == 1) return (VecI)((VecU)value & 0x7fffffffu) == 0x7f800000;
    return (VecI)((VecU)value & 0x7f800000u) == 0x7f800000;
  }

  // Operands and results of `columns` tiles a row.
  static LINFORMER_INLINE TileMatrix operand(std::byte* tiles, int64_t columns) {
    return {tiles, columns * kStep, kStep};
  }
  static LINFORMER_INLINE TileMatrix result(void* tiles, int64_t columns) {
    return {static_cast<std::byte*>(tiles), columns * kTileBytes, kTileBytes};
  }
  static TilePanels panels_of(const Plan& plan, int64_t bh) {
    return TilePanels(plan, plan.workspace + plan.panels + bh * plan.panels_stride);
  }
  static LINFORMER_INLINE int64_t steps(int64_t values) { return (values + kPair - 1) / kPair; }

  // Up to 16 rows of fp32 tiles out to a tensor, times a factor a row; `wrong` keeps the lanes that were doubtful.
  struct Out {
    T* target;
    int64_t stride, columns;
    bool stream;    // whole lines that nobody reads soon: past the caches, without reading them first
    VecI wrong = {};

    Out(T* target_, int64_t stride_, int64_t columns_, bool stream_)
        : target(target_), stride(stride_), columns(columns_) {
      constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
      stream = stream_ && columns % kLine == 0 && stride % kLine == 0 && reinterpret_cast<uintptr_t>(target) % 64 == 0;
    }

    LINFORMER_INLINE void write(T* to, VecF low, VecF high) {
      wrong |= doubtful(low) | doubtful(high);
#if defined(__AVX512BF16__)
      if constexpr (kSame<T, float>) {
        if (stream) {
          _mm512_stream_ps(to, (__m512)low);
          _mm512_stream_ps(to + kWidth, (__m512)high);
          return;
        }
      } else {
        __m512i both;
        if constexpr (kSame<T, BFloat16>) {
          both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        } else {
          both =
              _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)float_to_half(low)), (__m256i)float_to_half(high), 1);
        }
        if (stream) {
          _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
        } else {
          _mm512_storeu_si512(to, both);
        }
        return;
      }
#endif
      store(to, low);
      store(to + kWidth, high);
    }
    LINFORMER_INLINE void write_part(T* to, VecF low, VecF high, int64_t count) {
      wrong |= doubtful(low) | doubtful(high);
      T part[kPair];
      store(part, low);
      store(part + kWidth, high);
      std::memcpy(static_cast<void*>(to), part, static_cast<size_t>(count) * sizeof(T));
    }

    // Row i of the target from row i % 16 of tiles.
    LINFORMER_INLINE void rows(int64_t first, int64_t count, const TileMatrix& tiles, VecF factor, RowMask mask = {}) {
      float scale[kSide];
      store(scale, factor);
      if (kTermCount > 1) keep_awake();
      for (int64_t r = 0; r < count; ++r) {
        T* to = target + (first + r) * stride;
        const bool kept = mask.kept(first + r);
        const VecF by = splat(scale[r]);
        for (int64_t j = 0; j < columns; j += kPair) {
          const std::byte* tile = tiles.at(0, j / kSide);
          const VecF low = kept ? tile_row(tile, r) * by : VecF{};
          const VecF high = kept ? tile_row(tile + tiles.column, r) * by : VecF{};
          if (j + kPair <= columns) {
            write(to + j, low, high);
          } else {
            write_part(to + j, low, high, columns - j);
          }
        }
      }
    }

    void report(const Plan& plan) const { TileTasks::report(plan, wrong, stream); }
  };

  // At the end of a task: whether its results were finite, and what it streamed before another thread may read it.
  static void report(const Plan& plan, VecI wrong, bool streamed) {
    if (any_lane(wrong)) {
      __atomic_store_n(reinterpret_cast<int32_t*>(plan.workspace + plan.not_finite), 1, __ATOMIC_RELAXED);
    }
    if (streamed) end_streams();
  }

  // C (+)= A B in fp32 tiles in memory, `rows` and `columns` in tiles, both even.
  template <class AfterSquare>
  static void multiply_tiles(int64_t count, const TileMatrix& a, const TileMatrix& b, const TileMatrix& c, int64_t rows,
                             int64_t columns, bool accumulate, const AfterSquare& after) {
    for (int64_t j = 0; j < columns; j += 2) {
      for (int64_t i = 0; i < rows; i += 2) {
        std::byte* square = c.at(i, j);
        if (accumulate) {
          load_square(square, c.row, c.column);
        } else {
          zero_square();
        }
        multiply_square<kTermCount>(count, a.at(i, 0), a.row, a.column, 64, b.at(0, j), b.column, b.row);
        store_square(square, c.row, c.column);
        after();
      }
    }
  }

  static void project(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const TileProjectScratch scratch(plan, memory);
    const Tiles tiles;
    const int64_t split = task % plan.splits;
    const int64_t group = task / plan.splits % plan.group_count();
    const int64_t b = task / plan.splits / plan.group_count();
    const int64_t length = p.key_length(b);
    const int64_t chunks = (p.len_k + plan.chunk - 1) / plan.chunk;
    const int64_t chunks_a_split = (chunks + plan.splits - 1) / plan.splits;
    const int64_t first = split * chunks_a_split * plan.chunk;
    const int64_t last = smaller(length, first + chunks_a_split * plan.chunk);
    const int64_t head0 = group * plan.heads_in_group, head1 = smaller(p.heads_kv, head0 + plan.heads_in_group);
    const int64_t row_tiles = plan.padded_k / kSide;

    // As in kernels.cpp: a split without rows runs once with none, and keys of all heads come before values.
    for (int64_t n0 = first; n0 == first || n0 < last; n0 += plan.chunk) {
      const int64_t n = last > n0 ? smaller(plan.chunk, last - n0) : 0;
      const int64_t count = steps(n);
      const RowMask mask = mask_of(p, b, n0);
      const TileMatrix proj_tiles = operand(scratch.proj, count);
      const auto multiply_heads = [&](const Rows& rows, const Rows& proj, bool copy, int64_t width, int64_t padded,
                                      float* Partial::* sum, const Prefetch& after) {
        if (copy) {
          pack_rows<kTermCount>(proj_tiles, row_of<const T>(proj, b, head0, 0) + n0, proj.row_stride, p.proj_dim, n,
                                plan.padded_k, count * kPair);
        }
        // A pair of columns of tiles is packed into L1 just before E streams past it.
        const TileMatrix panel = {scratch.panel, kStep, count * kStep};    // (step, column)
        for (int64_t h = head0; h < head1; ++h) {
          const Partial partial(plan, partial_of(plan, b * p.heads_kv + h, split, plan.splits));
          const T* source = row_of<const T>(rows, b, h, p.key_row(b, n0));
          const TileMatrix sums = result(partial.*sum, padded / kSide);
          Prefetch next = h + 1 < head1 ? Prefetch(source + rows.head_stride, rows.row_stride, n, width) : after;
          const int64_t fetched = next.rows * 4 / (row_tiles * (padded / kSide)) + 1;
          for (int64_t j = 0; j < padded; j += kPair) {
            pack_pairs<kTermCount>(panel, source + j, rows.row_stride, n, width - j, count * kPair, kPair, mask);
            multiply_tiles(count, proj_tiles, panel, {sums.at(0, j / kSide), sums.row, sums.column}, row_tiles, 2,
                           n0 != first, [&] { next.fetch(fetched); });
          }
        }
      };
      const Prefetch value(row_of<const T>(p.value, b, head0, p.key_row(b, n0)), p.value.row_stride, n, p.value_dim);
      const Prefetch next_key(row_of<const T>(p.key, b, head0, p.key_row(b, n0 + n)), p.key.row_stride,
                              smaller(plan.chunk, last - n0 - n), p.head_dim);
      multiply_heads(p.key, p.proj_key, true, p.head_dim, plan.padded_d, &Partial::key, value);
      multiply_heads(p.value, p.proj_value, !p.shared_kv, p.value_dim, plan.padded_dv, &Partial::value, next_key);
    }
  }

  // Some rows of a K x `columns` matrix as B: its rows the summed dimension (panel), and its columns (panel_t).
  template <class Source>
  static void pack(const Plan& plan, const FinishPart& part, const Source* source, int64_t stride, int64_t columns,
                   int64_t padded, std::byte* panel, std::byte* panel_t, std::byte* memory) {
    const TileFinishScratch scratch(plan, memory);
    const int64_t count = padded / kPair, rows = steps(part.rows) * kPair;
    if (panel) {
      const TileMatrix all = operand(panel, padded / kSide);
      pack_pairs<kTermCount>({all.at(part.first / kPair, 0), all.row, all.column}, source, stride, part.rows, columns,
                             rows, padded);
    }
    if (panel_t) {
      const TileMatrix all = {panel_t, kStep, count * kStep};
      pack_columns<kTermCount>({all.at(0, part.first / kSide), all.row, all.column}, operand(scratch.row, count),
                               source, stride, part.rows, columns, rows, padded);
    }
  }

  // K'^T for scores: of the other sign where scale is negative, so that the largest score has the largest weight.
  static void turn_keys(const Plan& plan, const FinishPart& part, std::byte* panel_t) {
    if (plan.problem.scale >= 0) return;
    const int64_t column = steps(plan.problem.head_dim) * kStep;
    std::byte* first = panel_t + part.first / kSide * column;
    for (int64_t i = 0; i < steps(part.rows) * 2 * column; i += 64) {
      store_raw(first + i, load_raw<VecU>(first + i) ^ 0x80008000u);
    }
  }

  static void finish_project(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const Tiles tiles;
    FinishPart part(plan, task);
    const Rows& target = part.value ? p.value_proj : p.key_proj;
    const int64_t width = part.value ? p.value_dim : p.head_dim;
    const int64_t padded = part.value ? plan.padded_dv : plan.padded_d;
    T* rows = row_of<T>(target, part.b, part.h, part.first);
    if (plan.stages & kProject) {
      FinishPart whole = part;    // its tiles are
      whole.rows = round_up(part.rows, kSide);
      float* total = const_cast<float*>(sum_of_partials(plan, whole, plan.splits).rows);
      const TileMatrix sums = result(total, padded / kSide);
      Out out(rows, target.row_stride, width, false);
      for (int64_t i = 0; i < part.rows; i += kSide) {
        out.rows(i, smaller(kSide, part.rows - i), {sums.at(i / kSide, 0), 0, kTileBytes}, splat(1.0f));
      }
      out.report(plan);
    }
    if (plan.stages & kAttend) {
      const TilePanels panels = panels_of(plan, part.bh);
      pack(plan, part, rows, target.row_stride, width, padded, part.value ? panels.value : nullptr,
           part.value ? nullptr : panels.key_t, memory);
      if (!part.value) turn_keys(plan, part, panels.key_t);
    }
  }

  // 16 rows as A: where they lie if they are tiles already, else copied.
  struct RowsOfA {
    const std::byte* tiles;
    int64_t step = kStep, stride = 64;
    explicit RowsOfA(const std::byte* packed) : tiles(packed) {}
    RowsOfA(std::byte* scratch, const T* source, int64_t stride_, int64_t rows, int64_t columns, int64_t padded) {
      if constexpr (kSame<T, BFloat16>) {
        if (rows == kSide && columns == padded) {
          tiles = reinterpret_cast<const std::byte*>(source);
          step = 64;
          stride = stride_ * static_cast<int64_t>(sizeof(T));
          return;
        }
      }
      pack_rows<kTermCount>(operand(scratch, padded / kPair), source, stride_, rows, columns, kSide, padded);
      tiles = scratch;
    }
  };

  // One row of tiles of C, by fours and a last two; store(j) takes those from column tile j on out of the registers.
  template <class Begin, class Store>
  static LINFORMER_INLINE void multiply_columns(int64_t columns, int64_t count, const std::byte* a, int64_t a_step,
                                                int64_t a_stride, const TileMatrix& b, const Begin& begin,
                                                const Store& store) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      begin(j, Index<4>());
      multiply_row<kTermCount, 4>(count, a, a_step, a_stride, b.at(0, j), b.column, b.row);
      store(j, Index<4>());
    }
    if (j < columns) {
      begin(j, Index<2>());
      multiply_row<kTermCount, 2>(count, a, a_step, a_stride, b.at(0, j), b.column, b.row);
      store(j, Index<2>());
    }
  }
  template <int kCount>
  static LINFORMER_INLINE void store_tiles(Index<kCount>, std::byte* target, int64_t step) {
    tile_store<0>(target, 64);
    tile_store<1>(target + step, 64);
    if constexpr (kCount == 4) {
      tile_store<2>(target + 2 * step, 64);
      tile_store<3>(target + 3 * step, 64);
    }
  }
  template <int kCount>
  static LINFORMER_INLINE void load_tiles(Index<kCount>, const std::byte* source, int64_t step) {
    tile_load<0>(source, 64);
    tile_load<1>(source + step, 64);
    if constexpr (kCount == 4) {
      tile_load<2>(source + 2 * step, 64);
      tile_load<3>(source + 3 * step, 64);
    }
  }
  struct FromZero {
    template <int kCount>
    LINFORMER_INLINE void operator()(int64_t, Index<kCount>) const {
      zero_square();
    }
  };

  // Scores of 16 rows against `columns` tiles of columns: pairs of tiles, kScores apart.
  static LINFORMER_INLINE void multiply_scores(const RowsOfA& a, const TileMatrix& b, int64_t columns, int64_t count,
                                               std::byte* scores) {
    multiply_columns(columns, count, a.tiles, a.step, a.stride, b, FromZero(), [&](int64_t j, auto number) {
      std::byte* pair = scores + j / 2 * kScores;
      tile_store<0>(pair, 64);
      tile_store<1>(pair + kTileBytes, 64);
      if constexpr (decltype(number)::kIndex == 4) {
        tile_store<2>(pair + kScores, 64);
        tile_store<3>(pair + kScores + kTileBytes, 64);
      }
    });
  }

  // The largest score of each of 16 rows; of `columns` columns.
  static LINFORMER_INLINE VecF largest(const std::byte* scores, int64_t columns) {
    const VecF lowest = splat(-__builtin_inff());
    VecF most[kSide];
    const int64_t whole = columns / kPair;
    if (columns % kPair) {
      const std::byte* pair = scores + whole * kScores;
      const VecI low = first_lanes(columns % kPair), high = first_lanes(columns % kPair - kSide);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kSide; ++r) {
        most[r] =
            lanes_max(select(low, tile_row(pair, r), lowest), select(high, tile_row(pair + kTileBytes, r), lowest));
      }
    } else {
#pragma GCC unroll 16
      for (int64_t r = 0; r < kSide; ++r) most[r] = lowest;
    }
    for (int64_t j = 0; j < whole; ++j) {
      const std::byte* pair = scores + j * kScores;
#pragma GCC unroll 16
      for (int64_t r = 0; r < kSide; ++r) {
        most[r] = lanes_max(lanes_max(tile_row(pair, r), tile_row(pair + kTileBytes, r)), most[r]);
      }
    }
    return reduce_rows(most, [](VecF a, VecF b) { return lanes_max(a, b); });
  }

  static LINFORMER_INLINE VecF sum_rows(const VecF* rows) {
    return reduce_rows(rows, [](VecF a, VecF b) { return a + b; });
  }

  // Scores of 16 rows times scale, plus the bias of their columns.
  static LINFORMER_INLINE void add_bias(std::byte* scores, int64_t pairs, VecF scale, const float* bias) {
    for (int64_t j = 0; j < pairs; ++j) {
      const VecF low = load(bias + j * kPair), high = load(bias + j * kPair + kSide);
      std::byte* pair = scores + j * kScores;
      for (int64_t r = 0; r < kSide; ++r) {
        store_raw(pair + r * 64, tile_row(pair, r) * scale + low);
        store_raw(pair + kTileBytes + r * 64, tile_row(pair + kTileBytes, r) * scale + high);
      }
    }
  }

  // e, or zero where a bias of minus infinity has taken the column out.
  template <bool kBiased>
  static LINFORMER_INLINE VecF unless_out(VecF score, VecF e) {
    if constexpr (!kBiased) return e;
    return select((VecI)(score == splat(-__builtin_inff())), VecF{}, e);
  }

  static constexpr float kLowest = -0x1.fffffep127f;

  static void attend(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const TileAttendScratch scratch(plan, memory);
    const Tiles tiles;
    const int64_t blocks = (p.len_q + plan.query_block - 1) / plan.query_block;
    const int64_t block = task % blocks, h = task / blocks % p.heads, b = task / blocks / p.heads;
    const int64_t h_kv = h / (p.heads / p.heads_kv);
    const TilePanels panels = panels_of(plan, b * p.heads_kv + h_kv);
    const float* bias = padded_bias(p, b, h_kv, plan.padded_k, 1.0f, scratch.bias);
    const int64_t end = smaller(p.query_length(b), (block + 1) * plan.query_block);
    const int64_t count = steps(p.head_dim), value_tiles = plan.padded_dv / kSide;
    const TileMatrix keys = {panels.key_t, kStep, count * kStep}, values = operand(panels.value, value_tiles);
    const float scale = p.scale < 0 ? -p.scale : p.scale, c = bias ? kLog2E : scale * kLog2E;
    const bool one_block = p.proj_dim <= plan.k_block;
    const T* all_queries = row_of<const T>(p.query, b, h, p.query_row(b, 0));
    Out out(row_of<T>(p.out, b, h, p.query_row(b, 0)), p.out.row_stride, p.value_dim, plan.stream);

    for (int64_t m0 = block * plan.query_block; m0 < end; m0 += plan.query_tile) {
      const int64_t rows = smaller(plan.query_tile, end - m0);
      for (int64_t k0 = 0; k0 < p.proj_dim; k0 += plan.k_block) {
        const int64_t columns = smaller(plan.k_block, p.proj_dim - k0), pairs = steps(columns);
        const bool first = k0 == 0, last = k0 + plan.k_block >= p.proj_dim;
        for (int64_t m = 0; m < rows; m += kSide) {
          const int64_t n = smaller(kSide, rows - m);
          const T* query = all_queries + (m0 + m) * p.query.row_stride;
          std::byte* tile = scratch.query + m / kSide * count * kStep;
          Prefetch ahead(query + 3 * kSide * p.query.row_stride, p.query.row_stride,
                         first ? smaller(kSide, end - m0 - m - 3 * kSide) : 0, p.head_dim);
          ahead.fetch(kSide);
          const RowsOfA q = first || n < kSide || kTermCount == 1
                                ? RowsOfA(tile, query, p.query.row_stride, n, p.head_dim, plan.padded_d)
                                : RowsOfA(tile);
          multiply_scores(q, {keys.at(0, k0 / kSide), keys.row, keys.column}, 2 * pairs, count, scratch.scores);

          if (bias) add_bias(scratch.scores, pairs, splat(scale), bias + k0);
          float* reference = scratch.reference + m;
          float* sum = scratch.sum + m;
          std::byte* sums = scratch.out + (one_block ? 0 : m / kSide * value_tiles * kTileBytes);
          VecF most = largest(scratch.scores, columns);
          most = lanes_max(splat(kLowest), most);    // this way round a NaN passes through
          if (first) {
            store(reference, most);
          } else {
            const VecF before = load(reference);
            const VecI grown = (VecI)((most - before) * c > splat(40.0f));
            if (any_lane(grown)) rescale(sums, value_tiles, reference, sum, select(grown, most, before), c);
          }
          if (p.dropout_p > 0) {
            for (int64_t r = 0; r < n; ++r) {
              dropout_factors(p, b, h, m0 + m + r, scratch.keep + r * plan.k_block, k0, columns, pairs * kPair);
            }
          }
          const auto make = bias ? exponentials<true> : exponentials<false>;
          const VecF part = make(scratch.scores, columns, reference, c, p.dropout_p > 0 ? scratch.keep : nullptr,
                                 plan.k_block, headroom(p.proj_dim));
          store(sum, first ? part : load(sum) + part);

          const TileMatrix rows_of_v = {values.at(k0 / kPair, 0), values.row, values.column};
          const auto begin = [&](int64_t j, auto number) {
            if (first) {
              zero_square();
            } else {
              load_tiles(number, sums + j * kTileBytes, kTileBytes);
            }
          };
          multiply_columns(value_tiles, pairs, scratch.scores, kScores, 64, rows_of_v, begin,
                           [&](int64_t j, auto number) { store_tiles(number, sums + j * kTileBytes, kTileBytes); });
          if (last) out.rows(m0 + m, n, {sums, 0, kTileBytes}, inverse_of(load(sum), bias != nullptr));
        }
      }
    }
    out.report(plan);
  }

  // Sums so far to another reference.
  static void rescale(std::byte* sums, int64_t value_tiles, float* reference, float* sum, VecF now, float c) {
    const VecF factor = exp2_nonpositive((load(reference) - now) * c, 0.0f);
    float by[kSide];
    store(by, factor);
    store(sum, load(sum) * factor);
    store(reference, now);
    for (int64_t j = 0; j < value_tiles; ++j) {
      for (int64_t r = 0; r < kSide; ++r) {
        float* row = reinterpret_cast<float*>(sums + j * kTileBytes + r * 64);
        store(row, load(row) * by[r]);
      }
    }
  }

  // Scores to exponentials, as the first operand of the next product, in place; returns the sums of the rows, before
  // dropout.
  template <bool kBiased>
  static VecF exponentials(std::byte* scores, int64_t columns, const float* reference, float c, const float* keep,
                           int64_t keep_stride, float down) {
    VecF sums[kSide];
    const int64_t whole = columns / kPair;
    const VecI low_lanes = first_lanes(columns % kPair), high_lanes = first_lanes(columns % kPair - kSide);
    const auto row = [&](int64_t r, auto with_keep, auto power) {
      VecF low_sum = {}, high_sum = {};
      std::byte* at = scores + r * 64;
      const auto raised = [&](VecF score) { return unless_out<kBiased>(score, exp2_for<T>(power(score))); };
      const auto put = [&](int64_t j, VecF low, VecF high) {
        low_sum += low;
        high_sum += high;
        if constexpr (decltype(with_keep)::kIndex != 0) {
          low *= load(keep + r * keep_stride + j * kPair);
          high *= load(keep + r * keep_stride + j * kPair + kSide);
        }
        store_row_terms<kTermCount>(at, low, high);
        at += kScores;
      };
      for (int64_t j = 0; j < whole; ++j) {
        put(j, raised(tile_row(at, 0)), raised(tile_row(at + kTileBytes, 0)));
      }
      if (columns % kPair) {
        const VecF low = raised(tile_row(at, 0)), high = raised(tile_row(at + kTileBytes, 0));
        put(whole, select(low_lanes, low, VecF{}), select(high_lanes, high, VecF{}));
      }
      sums[r] = low_sum + high_sum;
    };
    each_row(reference, c, keep != nullptr, columns, down, row);
    return sum_rows(sums);
  }

  // Rows that take 100 to 200 ns, see keep_awake; a power of 2.
  static LINFORMER_INLINE int64_t rows_between(int64_t columns) {
    constexpr int64_t kValues = kTermCount == 1 ? 1024 : 512;
    int64_t rows = kSide;
    while (rows > 1 && rows * columns > kValues) rows /= 2;
    return rows;
  }

  // row(r, with dropout or not, the function from a score to its power of 2, less `down`) for 16 rows. The function is
  // score * c - top * c, one multiply-add, while top * c is at most 2^24: its rounding is a factor that all of the row
  // have in common, of 2^1/2 at most. Of scores of 2^31 and more it would exceed the range of exponents: there the
  // difference comes first.
  template <class Row>
  static LINFORMER_INLINE void each_row(const float* top, float c, bool with_keep, int64_t columns, float down,
                                        const Row& row) {
    const int64_t between = rows_between(columns);
    const VecF by = splat(c), limit = splat(0x1p24f), power = load(top) * by;
    const bool fused = !any_lane((VecI)(power > limit) | (VecI)(power < -limit));
    const auto rows = [&](auto keep) {
      if (fused) {
        for (int64_t r = 0; r < kSide; ++r) {
          const VecF offset = splat(-top[r] * c - down);
          if (r % between == between - 1) keep_awake();
          row(r, keep, [=](VecF score) { return score * by + offset; });
        }
      } else {
        for (int64_t r = 0; r < kSide; ++r) {
          const VecF most = splat(top[r]);
          row(r, keep, [=](VecF score) { return (score - most) * by - down; });
        }
      }
    };
    if (with_keep) {
      rows(Index<1>());
    } else {
      rows(Index<0>());
    }
  }

  static void prepare_backward(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const Tiles tiles;
    const FinishPart part(plan, task);
    const TilePanels panels = panels_of(plan, part.bh);
    const Rows& source = part.value ? p.value_proj : p.key_proj;
    pack(plan, part, row_of<const T>(source, part.b, part.h, part.first), source.row_stride,
         part.value ? p.value_dim : p.head_dim, part.value ? plan.padded_dv : plan.padded_d,
         part.value ? nullptr : panels.key, part.value ? panels.value_t : panels.key_t, memory);
    if (!part.value) turn_keys(plan, part, panels.key_t);
  }

  // A whose rows are columns of the source: the transpose of pairs of rows.
  static void pack_transposed(const TileMatrix& target, std::byte* square, const T* source, int64_t stride,
                              int64_t rows, int64_t columns, int64_t padded_columns) {
    for (int64_t i = 0; i < rows; i += kPair) {
      const TileMatrix words = {square, 0, kStep};
      pack_pairs<kTermCount>(words, source + i * stride, stride, smaller(kPair, rows - i), columns, kPair,
                             padded_columns);
      for (int64_t j = 0; j < padded_columns / kSide; ++j) {
        if (j % 2 == 0) keep_awake();
        for (int64_t term = 0; term < kTermCount; ++term) {
          transpose_tile(words.at(0, j) + term * kTileBytes, 64, target.at(j, i / kPair) + term * kTileBytes, 64);
        }
      }
    }
  }

  // From scores and dP of 16 rows: P after dropout and dS / scale, as B in the rows m of their pairs, and dS as A in
  // the place of the scores. What stands beyond `columns` becomes zero.
  // dS / scale is added to grad_bias, column by column, where that is wanted.
  template <bool kBiased>
  static void differentiate(std::byte* scores, const std::byte* grad_scores, int64_t columns, float c,
                            const float* keep, int64_t keep_stride, const TileMatrix& p_pairs,
                            const TileMatrix& ds_pairs, int64_t m, int64_t rows, float* grad_bias) {
    const int64_t pairs = steps(columns);
    const VecI low_lanes = columns % kPair ? first_lanes(columns % kPair) : ~VecI{};
    const VecI high_lanes = columns % kPair ? first_lanes(columns % kPair - kSide) : ~VecI{};
    float top[kSide], inverse[kSide], delta[kSide];
    store(top, lanes_max(splat(kLowest), largest(scores, columns)));
    VecF sums[kSide], dots[kSide];
    const auto row = [&](int64_t r, auto with_keep, auto power) {
      VecF low_sum = {}, high_sum = {}, low_dot = {}, high_dot = {};
      const auto raised = [&](VecF score) { return unless_out<kBiased>(score, exp2_for<T>(power(score))); };
      for (int64_t j = 0; j < pairs; ++j) {
        std::byte* at = scores + j * kScores + r * 64;
        const std::byte* grad = grad_scores + j * 2 * kTileBytes + r * 64;
        VecF low = raised(tile_row(at, 0)), high = raised(tile_row(at + kTileBytes, 0));
        if (j + 1 == pairs) {
          low = select(low_lanes, low, VecF{});
          high = select(high_lanes, high, VecF{});
        }
        store_raw(at, low);
        store_raw(at + kTileBytes, high);
        low_sum += low;
        high_sum += high;
        if constexpr (decltype(with_keep)::kIndex != 0) {
          const float* factor = keep + r * keep_stride + j * kPair;
          low *= load(factor);
          high *= load(factor + kSide);
        }
        low_dot += low * tile_row(grad, 0);
        high_dot += high * tile_row(grad + kTileBytes, 0);
      }
      sums[r] = low_sum + high_sum;
      dots[r] = low_dot + high_dot;
    };
    each_row(top, c, keep != nullptr, columns, headroom(columns), row);
    const VecF by = inverse_of(sum_rows(sums), kBiased);
    store(inverse, by);
    store(delta, sum_rows(dots) * by);
    const int64_t word = m % kPair / 2 * 64;
    const int64_t between = rows_between(columns);
    for (int64_t r = 0; r < kSide; r += 2) {
      if (r % between == 0) keep_awake();
      const VecF by0 = splat(inverse[r]), by1 = splat(inverse[r + 1]);
      const VecF delta0 = splat(delta[r]), delta1 = splat(delta[r + 1]);
      for (int64_t j = 0; j < pairs; ++j) {
        VecF p[4], ds[4];    // of both rows, low and high
        std::byte* at = scores + j * kScores + r * 64;
        const std::byte* grad = grad_scores + j * 2 * kTileBytes + r * 64;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int64_t where = i % 2 * kTileBytes + i / 2 * 64;
          p[i] = load_raw<VecF>(at + where) * (i / 2 ? by1 : by0);
          VecF gradient = load_raw<VecF>(grad + where);
          if (keep) {
            const VecF factor = load(keep + (r + i / 2) * keep_stride + j * kPair + i % 2 * kSide);
            gradient *= factor;
            ds[i] = p[i] * (gradient - (i / 2 ? delta1 : delta0));
            p[i] *= factor;
          } else {
            ds[i] = p[i] * (gradient - (i / 2 ? delta1 : delta0));
          }
        }
        // A query that is not there is zero, but zero times an infinity in K' would be a NaN in all of dK'.
        if (r + 1 >= rows) {
          p[2] = p[3] = ds[2] = ds[3] = VecF{};
          if (r >= rows) p[0] = p[1] = ds[0] = ds[1] = VecF{};
        }
        if constexpr (kBiased) {
          if (grad_bias) {
            float* sum = grad_bias + j * kPair;
            store(sum, load(sum) + (ds[0] + ds[2]));
            store(sum + kSide, load(sum + kSide) + (ds[1] + ds[3]));
          }
        }
        const int64_t step = m / kPair;
        store_pair_terms<kTermCount>(p_pairs.at(step, 2 * j) + word + r * 32, p[0], p[2]);
        store_pair_terms<kTermCount>(p_pairs.at(step, 2 * j + 1) + word + r * 32, p[1], p[3]);
        store_pair_terms<kTermCount>(ds_pairs.at(step, 2 * j) + word + r * 32, ds[0], ds[2]);
        store_pair_terms<kTermCount>(ds_pairs.at(step, 2 * j + 1) + word + r * 32, ds[1], ds[3]);
        store_row_terms<kTermCount>(at, ds[0], ds[1]);
        store_row_terms<kTermCount>(at + 64, ds[2], ds[3]);
      }
    }
  }

  // Rows 16..31 of the pairs of a step without them.
  static void zero_half(const TileMatrix& pairs, int64_t step, int64_t columns) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t term = 0; term < kTermCount; ++term) {
        std::memset(pairs.at(step, j) + term * kTileBytes + 512, 0, 512);
      }
    }
  }

  static void attend_backward(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const TileAttendBackwardScratch scratch(plan, memory);
    const int64_t split = task % plan.backward_splits, bh = task / plan.backward_splits;
    const int64_t b = bh / p.heads_kv, h_kv = bh % p.heads_kv, group = p.heads / p.heads_kv;
    const TilePanels panels = panels_of(plan, bh);
    const Partial partial(plan, partial_of(plan, bh, split, plan.backward_splits));
    const int64_t length = p.query_length(b);
    const int64_t tiles_a_head = (length + plan.backward_tile - 1) / plan.backward_tile;
    const int64_t all = tiles_a_head * group;
    const int64_t first = split * all / plan.backward_splits, last = (split + 1) * all / plan.backward_splits;
    const bool need_scores_gradient = p.needs_grad_scores();
    if (first == last) {
      zero_words(partial.key, Partial(plan, nullptr).bytes / 4);
      return;
    }
    const Tiles tiles;
    const int64_t key_steps = steps(p.head_dim), value_steps = steps(p.value_dim), k_tiles = plan.padded_k / kSide;
    const TileMatrix keys_t = {panels.key_t, kStep, key_steps * kStep};
    const TileMatrix values_t = {panels.value_t, kStep, value_steps * kStep};
    const TileMatrix keys = operand(panels.key, plan.padded_d / kSide);
    const float* bias = padded_bias(p, b, h_kv, plan.padded_k, 1.0f, scratch.bias);
    float* grad_bias = p.grad_key_bias ? scratch.grad_bias : nullptr;
    const float scale = p.scale < 0 ? -p.scale : p.scale, c = bias ? kLog2E : scale * kLog2E;
    const float* keep = p.dropout_p > 0 ? scratch.keep : nullptr;
    const auto differentiate_16 = bias ? differentiate<true> : differentiate<false>;
    VecI wrong = {};
    bool streamed = false;
    for (int64_t t = first; t < last; ++t) {
      const int64_t h = h_kv * group + t / tiles_a_head;
      const int64_t m0 = t % tiles_a_head * plan.backward_tile;
      const int64_t rows = smaller(plan.backward_tile, length - m0);
      const T* query = row_of<const T>(p.query, b, h, p.query_row(b, m0));
      const T* grad_out = row_of<const T>(p.grad_out, b, h, p.query_row(b, m0));
      const int64_t count = steps(rows);
      const TileMatrix p_pairs = {scratch.p_pairs, kStep, count * kStep};
      const TileMatrix ds_pairs = {scratch.ds_pairs, kStep, count * kStep};
      const TileMatrix query_t = operand(scratch.query_t, count), grad_out_t = operand(scratch.grad_out_t, count);
      if (plan.need_grad_key_proj) {
        pack_transposed(query_t, scratch.square, query, p.query.row_stride, rows, p.head_dim, plan.padded_d);
      }
      if (plan.need_grad_value_proj) {
        pack_transposed(grad_out_t, scratch.square, grad_out, p.grad_out.row_stride, rows, p.value_dim, plan.padded_dv);
      }
      Out out(p.grad_query.data ? row_of<T>(p.grad_query, b, h, p.query_row(b, m0)) : nullptr, p.grad_query.row_stride,
              p.head_dim, plan.stream);
      if (grad_bias) zero_words(grad_bias, plan.padded_k);
      for (int64_t m = 0; m < rows; m += kSide) {
        const int64_t n = smaller(kSide, rows - m);
        const RowsOfA q(scratch.query, query + m * p.query.row_stride, p.query.row_stride, n, p.head_dim,
                        plan.padded_d);
        multiply_scores(q, keys_t, k_tiles, key_steps, scratch.scores);
        if (bias) add_bias(scratch.scores, plan.padded_k / kPair, splat(scale), bias);
        if (need_scores_gradient) {
          const RowsOfA g(scratch.grad_out, grad_out + m * p.grad_out.row_stride, p.grad_out.row_stride, n, p.value_dim,
                          plan.padded_dv);
          multiply_columns(
              k_tiles, value_steps, g.tiles, g.step, g.stride, values_t, FromZero(),
              [&](int64_t j, auto number) { store_tiles(number, scratch.grad_scores + j * kTileBytes, kTileBytes); });
        } else {
          std::memset(scratch.grad_scores, 0, static_cast<size_t>(k_tiles * kTileBytes));
        }
        if (keep) {
          for (int64_t r = 0; r < n; ++r) {
            dropout_factors(p, b, h, m0 + m + r, scratch.keep + r * plan.padded_k, 0, p.proj_dim, plan.padded_k);
          }
          zero_words(scratch.keep + n * plan.padded_k, (kSide - n) * plan.padded_k);
        }
        differentiate_16(scratch.scores, scratch.grad_scores, p.proj_dim, c, keep, plan.padded_k, p_pairs, ds_pairs, m,
                         n, grad_bias);
        if (p.grad_query.data) {
          multiply_columns(
              plan.padded_d / kSide, plan.padded_k / kPair, scratch.scores, kScores, 64, keys, FromZero(),
              [&](int64_t j, auto number) { store_tiles(number, scratch.out + j * kTileBytes, kTileBytes); });
          out.rows(m, n, {scratch.out, 0, kTileBytes}, splat(p.scale));
        }
      }
      if (grad_bias) add_bias_of_tile(plan, grad_bias, partial.bias, t == first);
      if ((rows + kSide - 1) / kSide % 2) {
        zero_half(p_pairs, count - 1, k_tiles);
        zero_half(ds_pairs, count - 1, k_tiles);
      }
      if (plan.need_grad_value_proj) {
        multiply_tiles(count, grad_out_t, p_pairs, result(partial.value, k_tiles), plan.padded_dv / kSide, k_tiles,
                       t != first, [] {});
      }
      if (plan.need_grad_key_proj) {
        multiply_tiles(count, query_t, ds_pairs, result(partial.key, k_tiles), plan.padded_d / kSide, k_tiles,
                       t != first, [] {});
      }
      wrong |= out.wrong;
      streamed |= out.stream;
    }
    report(plan, wrong, streamed);
  }

  // The part's sum over all splits, in their order, as fp32 rows: partials are transposed.
  static Sum rows_of_partials(const Plan& plan, const FinishPart& part, float factor, float* rows) {
    const int64_t padded = part.value ? plan.padded_dv : plan.padded_d;
    const auto tiles_of_split = [&](int64_t split) {
      const Partial partial(plan, partial_of(plan, part.bh, split, plan.backward_splits));
      return result(part.value ? partial.value : partial.key, plan.padded_k / kSide);
    };
    const TileMatrix total = tiles_of_split(0);
    for (int64_t i = 0; i < padded / kSide; ++i) {
      for (int64_t j = 0; j < steps(part.rows) * 2; ++j) {
        std::byte* tile = total.at(i, part.first / kSide + j);
        for (int64_t r = 0; r < kSide; ++r) {
          VecF sum = tile_row(tile, r);
          for (int64_t s = 1; s < plan.backward_splits; ++s) {
            sum += tile_row(tiles_of_split(s).at(i, part.first / kSide + j), r);
          }
          store_raw(tile + r * 64, sum * factor);
        }
        transpose_tile(tile, 64, reinterpret_cast<std::byte*>(rows + j * kSide * padded + i * kSide), padded * 4);
      }
    }
    return {rows, padded};
  }

  static void finish_backward(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const Tiles tiles;
    const FinishPart part(plan, task);
    finish_bias(plan, part);
    const TileFinishScratch scratch(plan, memory);
    const Rows& tensor = part.value ? p.grad_value_proj : p.grad_key_proj;
    const int64_t width = part.value ? p.value_dim : p.head_dim;
    const int64_t padded = part.value ? plan.padded_dv : plan.padded_d;
    T* rows = tensor.data ? row_of<T>(tensor, part.b, part.h, part.first) : nullptr;
    const bool follows = plan.stages & kProjectBackward;
    const TilePanels panels = panels_of(plan, part.bh);
    std::byte* panel = part.value ? panels.grad_value : panels.grad_key;
    std::byte* panel_t = part.value ? panels.grad_value_t : panels.grad_key_t;
    if (!(plan.stages & kAttendBackward)) {
      pack(plan, part, rows, tensor.row_stride, width, padded, panel, panel_t, memory);
    } else if (part.value ? plan.need_grad_value_proj : plan.need_grad_key_proj) {
      const Sum total = rows_of_partials(plan, part, part.value ? 1.0f : p.scale, scratch.rows);
      if (rows) {
        VecI wrong = {};
        for (int64_t i = 0; i < part.rows; ++i) {
          for (int64_t j = 0; j < width; j += kWidth) {
            const VecF value = load(total.rows + i * total.stride + j);
            wrong |= doubtful(value);
            store_part(rows + i * tensor.row_stride + j, value, smaller(kWidth, width - j));
          }
        }
        report(plan, wrong, false);
      }
      if (follows) pack(plan, part, total.rows, total.stride, width, padded, panel, panel_t, memory);
    }
  }

  static void project_backward(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const TileProjectBackwardScratch scratch(plan, memory);
    const Tiles tiles;
    const MatrixPart matrix(plan, task);
    const int64_t n0 = matrix.n0, columns = matrix.columns, used = matrix.used, head0 = matrix.head0,
                  head1 = matrix.head1;
    const bool with_key = p.shared_kv || !matrix.value, with_value = p.shared_kv || matrix.value;
    const Rows& proj = matrix.value ? p.proj_value : p.proj_key;
    const Rows& grad_proj = matrix.value ? p.grad_proj_value : p.grad_proj_key;
    const int64_t k_tiles = plan.padded_k / kSide, k_steps = plan.padded_k / kPair;
    const bool want_key = with_key && p.grad_key.data, want_value = with_value && p.grad_value.data;

    const TileMatrix proj_t = operand(scratch.proj_t, k_steps);
    if (used > 0 && (want_key || want_value)) {
      const T* source = row_of<const T>(proj, matrix.b0, head0, 0) + n0;
      pack_transposed_columns(proj_t, scratch.out, source, proj.row_stride, p.proj_dim, used, plan.padded_k);
    }
    const TileMatrix sums = result(scratch.grad_proj_t, k_tiles);
    bool summed = false;    // something is in them
    VecI wrong = {};
    bool streamed = false;

    // Key, value or both of some heads of one sequence.
    const auto differentiate_heads = [&](const Rows& rows, const Rows& grad_rows, std::byte* TilePanels::* panel,
                                         std::byte* TilePanels::* panel_t, int64_t width, int64_t padded, int64_t b,
                                         int64_t h0, int64_t h1, int64_t n) {
      const RowMask mask = mask_of(p, b, n0);
      const int64_t count = steps(width), row_pairs = steps(n);
      if (grad_proj.data) {
        bool in_place = false;
        if constexpr (kSame<T, BFloat16>) in_place = mask.keep == nullptr && width == padded && n % kPair == 0;
        TileMatrix a = operand(scratch.rows, count);    // of one head; heads lie row_pairs * 2 rows of tiles apart
        int64_t a_head = row_pairs * 2 * a.row, a_stride = 64;
        if (in_place) {
          const T* source = row_of<const T>(rows, b, h0, p.key_row(b, n0));
          a = {reinterpret_cast<std::byte*>(const_cast<T*>(source)),
               rows.row_stride * kSide * static_cast<int64_t>(sizeof(T)), 64};
          a_head = rows.head_stride * static_cast<int64_t>(sizeof(T));
          a_stride = rows.row_stride * static_cast<int64_t>(sizeof(T));
        } else {
          for (int64_t h = h0; h < h1; ++h) {
            pack_rows<kTermCount>(TileMatrix{a.tiles + (h - h0) * a_head, a.row, a.column},
                                  row_of<const T>(rows, b, h, p.key_row(b, n0)), rows.row_stride, n, width,
                                  row_pairs * kPair, padded, mask);
          }
        }
        for (int64_t j = 0; j < k_tiles; j += 2) {
          for (int64_t i = 0; i < row_pairs * 2; i += 2) {
            const int64_t rest = n - i * kSide;    // rows that are there
            const TileMatrix part = {scratch.out, 2 * kTileBytes, kTileBytes};
            if (summed && rest >= kPair) {
              load_square(sums.at(i, j), sums.row, sums.column);
            } else {
              zero_square();
            }
            for (int64_t h = h0; h < h1; ++h) {
              const TilePanels panels = panels_of(plan, b * p.heads_kv + h);
              multiply_square<kTermCount>(count, a.at(i, 0) + (h - h0) * a_head, a.row, a.column, a_stride,
                                          panels.*panel_t + j * count * kStep, count * kStep, kStep);
            }
            if (rest >= kPair) {
              store_square(sums.at(i, j), sums.row, sums.column);
            } else {
              store_square(part.tiles, part.row, part.column);
              add_rows(part, {sums.at(i, j), sums.row, sums.column}, rest, summed);
            }
          }
        }
        if (!summed) {    // rows of the chunk that this sequence does not have
          const int64_t done = row_pairs * 2, rest = steps(columns) * 2 - done;
          if (rest > 0) std::memset(sums.at(done, 0), 0, static_cast<size_t>(rest * sums.row));
        }
        summed = true;
      }
      if (grad_rows.data) {
        for (int64_t h = h0; h < h1; ++h) {
          const TilePanels panels = panels_of(plan, b * p.heads_kv + h);
          const TileMatrix gradient = operand(panels.*panel, padded / kSide);
          Out out(row_of<T>(grad_rows, b, h, p.key_row(b, n0)), grad_rows.row_stride, width, plan.stream);
          const TileMatrix two = result(scratch.out, padded / kSide);
          for (int64_t i = 0; i < row_pairs * 2; i += 2) {
            multiply_tiles(k_steps, TileMatrix{proj_t.at(i, 0), proj_t.row, proj_t.column}, gradient, two, 2,
                           padded / kSide, false, [] {});
            for (int64_t u = 0; u < 2 && (i + u) * kSide < n; ++u) {
              out.rows((i + u) * kSide, smaller(kSide, n - (i + u) * kSide), {two.at(u, 0), 0, kTileBytes}, splat(1.0f),
                       mask);
            }
          }
          wrong |= out.wrong;
          streamed |= out.stream;
        }
      }
    };
    for (int64_t b = matrix.b0; b < matrix.b1; ++b) {
      const int64_t n = smaller(used, p.key_length(b) - n0);
      for (int64_t h = head0; n > 0 && h < head1; h += plan.heads_in_group) {
        const int64_t h1 = smaller(head1, h + plan.heads_in_group);
        if (with_key) {
          differentiate_heads(p.key, p.grad_key, &TilePanels::grad_key, &TilePanels::grad_key_t, p.head_dim,
                              plan.padded_d, b, h, h1, n);
        }
        if (with_value) {
          differentiate_heads(p.value, p.grad_value, &TilePanels::grad_value, &TilePanels::grad_value_t, p.value_dim,
                              plan.padded_dv, b, h, h1, n);
        }
      }
    }
    if (grad_proj.data) {
      if (!summed) std::memset(sums.tiles, 0, static_cast<size_t>(steps(columns) * 2 * sums.row));
      Out out(row_of<T>(grad_proj, matrix.b0, head0, 0) + n0, grad_proj.row_stride, columns, plan.stream);
      write_transposed(out, sums, p.proj_dim, columns, scratch.out);
      wrong |= out.wrong;
      streamed |= out.stream;
    }
    report(plan, wrong, streamed);
  }

  // 2 x 2 tiles of sums += those of `part`, `rows` of them; a row that is not there may hold a NaN, of zero times an
  // infinity in dK'.
  static void add_rows(const TileMatrix& part, const TileMatrix& sums, int64_t rows, bool accumulate) {
    for (int64_t r = 0; r < kPair; ++r) {
      for (int64_t j = 0; j < 2; ++j) {
        std::byte* row = sums.at(r / kSide, j) + r % kSide * 64;
        const VecF before = accumulate ? tile_row(row, 0) : VecF{};
        store_raw(row, r < rows ? before + tile_row(part.at(r / kSide, j), r % kSide) : before);
      }
    }
  }

  // E^T as A: tile (rows of n, steps of K), through pairs of rows of E, which are B of it.
  static void pack_transposed_columns(const TileMatrix& target, std::byte* square, const T* source, int64_t stride,
                                      int64_t rows, int64_t columns, int64_t padded_rows) {
    for (int64_t i = 0; i < padded_rows; i += kPair) {
      for (int64_t j = 0; j < columns; j += kPair) {
        const TileMatrix words = {square, 0, kStep};
        pack_pairs<kTermCount>(words, source + i * stride + j, stride, smaller(kPair, rows - i), columns - j, kPair,
                               kPair);
        keep_awake();
        for (int64_t u = 0; u < 2; ++u) {
          for (int64_t term = 0; term < kTermCount; ++term) {
            transpose_tile(words.at(0, u) + term * kTileBytes, 64,
                           target.at(j / kSide + u, i / kPair) + term * kTileBytes, 64);
          }
        }
      }
    }
  }

  // Sums of dE^T out as rows of dE.
  static void write_transposed(Out& out, const TileMatrix& sums, int64_t k, int64_t columns, std::byte* scratch) {
    for (int64_t i = 0; i < k; i += kSide) {
      for (int64_t j = 0; j < columns; j += kPair) {
        keep_awake();
        transpose_tile(sums.at(j / kSide, i / kSide), 64, scratch, 64);
        transpose_tile(sums.at(j / kSide + 1, i / kSide), 64, scratch + kTileBytes, 64);
        for (int64_t r = 0; r < smaller(kSide, k - i); ++r) {
          T* to = out.target + (i + r) * out.stride + j;
          const VecF low = tile_row(scratch, r), high = tile_row(scratch + kTileBytes, r);
          if (j + kPair <= columns) {
            out.write(to, low, high);
          } else {
            out.write_part(to, low, high, columns - j);
          }
        }
      }
    }
  }
};

// The rate of tile products, operands in registers.
double tile_gflops(int64_t rounds) {
  alignas(64) BFloat16 values[kSide * kPair];
  for (int i = 0; i < kSide * kPair; ++i) values[i].bits = static_cast<uint16_t>(0x3c00 + i * 40503 % 251);
  const std::byte* tile = reinterpret_cast<const std::byte*>(values);
  const Tiles tiles;
  zero_square();
  tile_load<4>(tile, 64);
  tile_load<5>(tile, 64);
  tile_load<6>(tile, 64);
  tile_load<7>(tile, 64);
  timespec begin, end;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
  for (int64_t i = 0; i < rounds; ++i) {
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
  const double seconds =
      static_cast<double>(end.tv_sec - begin.tv_sec) + 1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
  return 1e-9 * 4 * 2 * kSide * kSide * kPair * static_cast<double>(rounds) / seconds;
}

// Of tiles, by one product, three or six; or of multiply-adds on vectors where that is more.
double peak_gflops(DType type) {
  const int products = type == DType::kBFloat16 ? 1 : type == DType::kFloat16 ? 3 : 6;
  double best = products == 1 ? 0.0 : LINFORMER_CPU_WITHOUT_TILES.peak_gflops(type);
  for (int run = 0; run < 9; ++run) {
    const double rate = tile_gflops(LINFORMER_CPU_AMX ? 20000 : 20) / products;
    if (rate > best) best = rate;
  }
  return best;
}

double probe_gflops() { return tile_gflops(LINFORMER_CPU_AMX ? 1500 : 1); }

#define LINFORMER_TASKS(T)         \
  {TileTasks<T>::project,          \
   TileTasks<T>::finish_project,   \
   TileTasks<T>::attend,           \
   TileTasks<T>::prepare_backward, \
   TileTasks<T>::attend_backward,  \
   TileTasks<T>::finish_backward,  \
   TileTasks<T>::project_backward, \
   nullptr,                        \
   nullptr}

}    // namespace

extern const KernelTable LINFORMER_CPU_TABLE;
const KernelTable LINFORMER_CPU_TABLE = {
    LINFORMER_CPU_NAME,
    Shape{kPair, 1, true},
    {LINFORMER_TASKS(float), LINFORMER_TASKS(Half), LINFORMER_TASKS(BFloat16)},
    peak_gflops,
    probe_gflops,
    &LINFORMER_CPU_WITHOUT_TILES,
};

}    // namespace linformer::cpu
