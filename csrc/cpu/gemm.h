// The matrix product of the CPU kernels: C (+)= A B with C fp32 and small enough for the caches, plus the packing it
// reads.
//
// A word is 32 bits of an operand: one fp32 (Fp32), or two bf16 that are neighbours along the summed dimension
// (PairedBf16).
//   A  "rows":     word (i, s) at a[i * lda + s]       the summed dimension is adjacent
//      "columns":  word (i, s) at a[s * lda + i]       the rows are adjacent
//   B  panels:     word (s, j) at b[(panel * steps + s) * kTileColumns + j]
//   C              value (i, j) at c[i * ldc + j], columns padded to whole panels
// A register tile of kTileRows x kTileColumns is kept for all steps: per step kVectors loads of B, kTileRows broadcasts
// of A and kTileRows * kVectors multiply-adds. Panels run in the outer loop so that one panel stays in L1 while A
// streams past it: a word of A is then read once for kTileColumns multiply-adds.
#pragma once

#include "simd.h"

namespace linformer::cpu {
namespace {

constexpr int kVectors = 2;
constexpr int kTileColumns = kVectors * kWidth;
constexpr int kTileRows = LINFORMER_CPU_TILE_ROWS;

LINFORMER_INLINE int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
LINFORMER_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Fp32 {
  using Word = float;
  static constexpr int64_t kValues = 1;

  static LINFORMER_INLINE VecF multiply_add(VecF sum, Word a, VecF b) { return sum + b * a; }

  template <class T>
  static LINFORMER_INLINE void copy_row(Word* target, const T* source, int64_t columns) {
    int64_t j = 0;
    for (; j + kWidth <= columns; j += kWidth) store(target + j, load(source + j));
    if (j < columns) store_part(target + j, load_part(source + j, columns - j), columns - j);
  }
};

struct PairedBf16 {
  using Word = uint32_t;
  static constexpr int64_t kValues = 2;

  static LINFORMER_INLINE VecF multiply_add(VecF sum, Word a, VecF b) {
#if defined(__AVX512BF16__) && LINFORMER_CPU_WIDTH == 16
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
#else
    const VecF even = (VecF)((VecU)b << 16), odd = (VecF)((VecU)b & 0xffff0000u);
    const VecU both = VecU{} + a;
    return sum + even * (VecF)(both << 16) + odd * (VecF)(both & 0xffff0000u);
#endif
  }

  static LINFORMER_INLINE VecU upper_bits(const BFloat16* source) {
    return __builtin_convertvector(load_raw<VecH>(source), VecU) << 16;
  }
  static LINFORMER_INLINE VecU upper_bits(const float* source) { return round_to_bfloat16(load(source)) & 0xffff0000u; }

  template <class T>
  static LINFORMER_INLINE void copy_row(Word* target, const T* source, int64_t columns) {
    BFloat16* values = reinterpret_cast<BFloat16*>(target);
    int64_t j = 0;
    for (; j + kWidth <= columns; j += kWidth) store(values + j, load(source + j));
    if (j < columns) store_part(values + j, load_part(source + j, columns - j), columns - j);
    if (columns % 2) values[columns].bits = 0;
  }
};

template <class T>
struct Choose {
  using Math = Fp32;
};
#if LINFORMER_CPU_PAIRED
template <>
struct Choose<BFloat16> {
  using Math = PairedBf16;
};
#endif

// Which rows of a copy are real: a masked row is replaced by zeros, never multiplied, so that a NaN in it cannot leak.
struct RowMask {
  const bool* keep = nullptr;
  int64_t stride = 0;
  LINFORMER_INLINE bool kept(int64_t row) const { return keep == nullptr || keep[row * stride]; }
};

template <class Word>
LINFORMER_INLINE void zero_words(Word* target, int64_t count) {
  std::memset(target, 0, static_cast<size_t>(count) * sizeof(Word));
}

// Rows that the next step of the caller will read or write first: a product, which leaves memory idle, fetches them
// along the way, a few after each register tile. It helps most where a sequence streams from memory once.
struct Prefetch {
  const char* at = nullptr;
  int64_t stride = 0, rows = 0, bytes = 0;

  Prefetch() = default;
  template <class T>
  LINFORMER_INLINE Prefetch(const T* first, int64_t row_stride, int64_t row_count, int64_t columns)
      : at(reinterpret_cast<const char*>(first)),
        stride(row_stride * static_cast<int64_t>(sizeof(T))),
        rows(row_count),
        bytes(columns * static_cast<int64_t>(sizeof(T))) {}

  // The i-th of n nearly equal parts.
  LINFORMER_INLINE Prefetch part(int64_t i, int64_t n) const {
    Prefetch piece = *this;
    piece.at += i * rows / n * stride;
    piece.rows = (i + 1) * rows / n - i * rows / n;
    return piece;
  }

  LINFORMER_INLINE void fetch(int64_t count) {
    for (; count > 0 && rows > 0; --count, --rows, at += stride) {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    }
  }
};

// A by rows: target row i = source row i.
template <class Math, class T>
void copy_rows(typename Math::Word* target, int64_t ld, const T* source, int64_t stride, int64_t rows, int64_t columns,
               RowMask mask = {}) {
  // Rows of E lie far apart, so the processor does not guess the next one.
  Prefetch ahead(source + 2 * stride, stride, rows - 2, columns);
  for (int64_t i = 0; i < rows; ++i) {
    ahead.fetch(1);
    if (mask.kept(i)) {
      Math::copy_row(target + i * ld, source + i * stride, columns);
    } else {
      zero_words(target + i * ld, (columns + Math::kValues - 1) / Math::kValues);
    }
  }
}

// Words along the rows of the source: target[s * ld + j] holds value (s, j), or values (2 s, j) and (2 s + 1, j).
// Columns from `columns` to `padded` become zero.
template <class T>
LINFORMER_INLINE void copy_columns(float* target, int64_t ld, const T* source, int64_t stride, int64_t rows,
                                   int64_t columns, int64_t padded, RowMask mask = {}) {
  for (int64_t s = 0; s < rows; ++s) {
    float* row = target + s * ld;
    if (!mask.kept(s)) {
      zero_words(row, padded);
      continue;
    }
    Fp32::copy_row(row, source + s * stride, columns);
    if (columns < padded) zero_words(row + columns, padded - columns);
  }
}

template <class T>
LINFORMER_INLINE void copy_columns(uint32_t* target, int64_t ld, const T* source, int64_t stride, int64_t rows,
                                   int64_t columns, int64_t padded, RowMask mask = {}) {
  const T nothing[kWidth] = {};
  for (int64_t s = 0; s < rows; s += 2) {
    uint32_t* row = target + s / 2 * ld;
    const bool first = mask.kept(s), second = s + 1 < rows && mask.kept(s + 1);
    for (int64_t j = 0; j < padded; j += kWidth) {
      const int64_t count = smaller(columns - j, kWidth);
      T low[kWidth] = {}, high[kWidth] = {};
      const T *a = nothing, *b = nothing;
      if (count == kWidth) {
        if (first) a = source + s * stride + j;
        if (second) b = source + (s + 1) * stride + j;
      } else if (count > 0) {
        if (first) std::memcpy(low, source + s * stride + j, static_cast<size_t>(count) * sizeof(T));
        if (second) std::memcpy(high, source + (s + 1) * stride + j, static_cast<size_t>(count) * sizeof(T));
        a = low;
        b = high;
      }
      const VecU pair = (PairedBf16::upper_bits(a) >> 16) | PairedBf16::upper_bits(b);
      if (padded - j >= kWidth) {
        store_raw(row + j, pair);
      } else {
        std::memcpy(row + j, &pair, static_cast<size_t>(padded - j) * 4);
      }
    }
  }
}

// B from a matrix whose rows are the summed dimension.
template <class Math, class T>
void pack_panels(typename Math::Word* target, const T* source, int64_t stride, int64_t rows, int64_t columns,
                 RowMask mask = {}) {
  const int64_t steps = (rows + Math::kValues - 1) / Math::kValues;
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    copy_columns(target + j * steps, kTileColumns, source + j, stride, rows, smaller(kTileColumns, columns - j),
                 kTileColumns, mask);
  }
}

// B from A's words by rows: column j of B is row j of A. Done once a head, so plain loops do.
template <class Word>
void pack_panels_transposed(Word* target, const Word* a, int64_t lda, int64_t rows, int64_t steps) {
  for (int64_t j0 = 0; j0 < rows; j0 += kTileColumns) {
    const int64_t columns = smaller(kTileColumns, rows - j0);
    Word* panel = target + j0 * steps;
    zero_words(panel, columns < kTileColumns ? steps * kTileColumns : 0);
    for (int64_t j = 0; j < columns; ++j) {
      const Word* source = a + (j0 + j) * lda;
      for (int64_t s = 0; s < steps; ++s) panel[s * kTileColumns + j] = source[s];
    }
  }
}

// One register tile. noinline: the compiler allocates registers for this loop alone.
template <class Math, bool kByColumns, int kRows>
__attribute__((noinline)) void multiply_tile(const typename Math::Word* a, int64_t lda, const typename Math::Word* b,
                                             int64_t steps, float* c, int64_t ldc, bool accumulate) {
  VecF sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = VecF{};
  }
  for (int64_t s = 0; s < steps; ++s) {
    VecF column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = load_raw<VecF>(b + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename Math::Word word = kByColumns ? a[i] : a[i * lda];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Math::multiply_add(sum[i][v], word, column[v]);
    }
    a += kByColumns ? lda : 1;
    b += kTileColumns;
  }
  // Two loops, so that the sums stay in registers: with the choice inside, they were spilled.
  if (accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* p = c + i * ldc + v * kWidth;
        store(p, load(p) + sum[i][v]);
      }
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(c + i * ldc + v * kWidth, sum[i][v]);
    }
  }
}

template <class Math, bool kByColumns, int kRows = kTileRows>
LINFORMER_INLINE void multiply_tile_of(int64_t rows, const typename Math::Word* a, int64_t lda,
                                       const typename Math::Word* b, int64_t steps, float* c, int64_t ldc,
                                       bool accumulate) {
  if (rows == kRows) {
    multiply_tile<Math, kByColumns, kRows>(a, lda, b, steps, c, ldc, accumulate);
  } else if constexpr (kRows > 1) {
    multiply_tile_of<Math, kByColumns, kRows - 1>(rows, a, lda, b, steps, c, ldc, accumulate);
  }
}

// Steps summed in one go, from zero: a sum cut in short ones has a smaller error. Error of the op relative to plain
// PyTorch at D = 256, K = 128, fp32 (median of the ratio): 256 steps 1.59, 128 steps 0.99, 64 steps 0.73. It costs 2 to
// 5 % of the speed.
constexpr int64_t kStepsAtOnce = 64;

// C (+)= A B with A of `rows` x `steps` words and B of `columns` (whole panels).
template <class Math, bool kByColumns>
void multiply(const typename Math::Word* a, int64_t lda, const typename Math::Word* b, int64_t rows, int64_t columns,
              int64_t steps, float* c, int64_t ldc, bool accumulate, Prefetch next = {}) {
  // Tiles of nearly equal height: 128 rows are 22 tiles of 5 or 6, rather than 21 of 6 and a slow one of 2.
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t height = tiles ? rows / tiles : 0, taller = tiles ? rows % tiles : 0;
  const int64_t fetched_a_tile = tiles ? next.rows * kTileColumns / (tiles * columns) + 1 : 0;
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    int64_t s = 0;
    do {
      const int64_t count = smaller(kStepsAtOnce, steps - s);
      for (int64_t t = 0, i = 0; t < tiles; ++t) {
        const int64_t count_rows = height + (t < taller);
        multiply_tile_of<Math, kByColumns>(count_rows, a + (kByColumns ? i + s * lda : i * lda + s), lda,
                                           b + j * steps + s * kTileColumns, count, c + i * ldc + j, ldc,
                                           accumulate || s > 0);
        i += count_rows;
        next.fetch(fetched_a_tile);
      }
      s += count;
    } while (s < steps);
  }
}

// C (+)= A B with B packed from the rows of `source`, each panel just before it is used: it is written to L1 and read
// from there.
template <class Math, bool kByColumns, class T>
void multiply_rows(const typename Math::Word* a, int64_t lda, const T* source, int64_t stride, int64_t summed,
                   int64_t columns, RowMask mask, typename Math::Word* panel, int64_t rows, float* c, int64_t ldc,
                   bool accumulate, Prefetch next = {}) {
  const int64_t panels = (columns + kTileColumns - 1) / kTileColumns;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t j = i * kTileColumns;
    pack_panels<Math>(panel, source + j, stride, summed, smaller(kTileColumns, columns - j), mask);
    multiply<Math, kByColumns>(a, lda, panel, rows, kTileColumns, (summed + Math::kValues - 1) / Math::kValues, c + j,
                               ldc, accumulate, next.part(i, panels));
  }
}

}    // namespace
}    // namespace linformer::cpu
