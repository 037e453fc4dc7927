// The matrix product of the CPU kernels: C (+)= A B with C fp32 and small enough for the caches, plus the packing it
// reads.
//
// A word is 32 bits of an operand: one fp32 (Fp32), or two bf16 that are neighbours along the summed dimension
// (PairedBf16); or 64 bits, four such bf16 (QuadBf16).
//   A  "rows":     word (i, s) at a[i * lda + s]       the summed dimension is adjacent
//      "columns":  word (i, s) at a[s * lda + i]       the rows are adjacent
//   B  panels:     word (s, j) at b[(panel * steps + s) * kTileColumns + j], or a panel at a time at b[s * ldb + j];
//                  columns padded to whole vectors
//   C              value (i, j) at c[i * ldc + j], the same
// A register tile of kTileRows x kTileColumns is kept for all steps: per step kVectors loads of B, kTileRows broadcasts
// of A and kTileRows * kVectors multiply-adds. (Of quads two words of A and two of B make an instruction's 2 x 2 sums:
// 2 kVectors loads of B, kTileRows / 2 of A and kTileRows * kVectors instructions.) Panels run in the outer loop so
// that one panel stays in L1 while A streams past it: a word of A is then read once for kTileColumns multiply-adds.
#pragma once

#include "simd.h"

namespace linformer::cpu {
namespace {

// On AVX-512 a step of 6 x 4 vectors has 10 loads, one of 12 x 2 has 14: forward + backward in fp32 takes 2 % less
// time, and 6 to 9 % less while the core is shared (N = 1024 and 4096, K = 128 and 256, Xeon with AMX).
constexpr int kVectors = LINFORMER_CPU_TILE_VECTORS;
constexpr int kTileColumns = kVectors * kWidth;
constexpr int kTileRows = LINFORMER_CPU_TILE_ROWS;

LINFORMER_INLINE int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
LINFORMER_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Steps summed in one go, from zero: a sum cut in short ones has a smaller error. Error of the op relative to plain
// PyTorch at D = 256, K = 128, fp32 (median of the ratio): 256 steps 1.59, 128 steps 0.99, 64 steps 0.73. It costs 2 to
// 5 % of the speed.
constexpr int64_t kStepsAtOnce = 64;

struct Fp32 {
  using Word = float;
  using Value = float;
  static constexpr int64_t kValues = 1;
  static constexpr int64_t kRowsTogether = 1;    // of A in an instruction

  static LINFORMER_INLINE VecF multiply_add(VecF sum, Word a, VecF b) { return sum + b * a; }

  template <class T>
  static LINFORMER_INLINE void copy_row(Word* target, const T* source, int64_t columns) {
    int64_t j = 0;
    for (; j + kWidth <= columns; j += kWidth) store(target + j, load(source + j));
    if (j < columns) store_part(target + j, load_part(source + j, columns - j), columns - j);
  }
};

// A row as bf16, with zeros up to the next whole word.
template <int64_t kValues, class T>
LINFORMER_INLINE void copy_bf16_row(BFloat16* target, const T* source, int64_t columns) {
  if constexpr (kSame<T, BFloat16>) {
    std::memcpy(target, source, static_cast<size_t>(columns) * sizeof(T));
  } else {
    int64_t j = 0;
    for (; j + kWidth <= columns; j += kWidth) store(target + j, load(source + j));
    if (j < columns) store_part(target + j, load_part(source + j, columns - j), columns - j);
  }
  for (; columns % kValues; ++columns) target[columns].bits = 0;
}

struct PairedBf16 {
  using Word = uint32_t;
  using Value = BFloat16;
  static constexpr int64_t kValues = 2;
  static constexpr int64_t kRowsTogether = 1;

  static LINFORMER_INLINE VecF multiply_add(VecF sum, Word a, VecF b) {
#if defined(__AVX512BF16__) && LINFORMER_CPU_WIDTH == 16
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
#else
    const VecF even = (VecF)((VecU)b << 16), odd = (VecF)((VecU)b & 0xffff0000u);
    const VecU both = VecU{} + a;
    return sum + even * (VecF)(both << 16) + odd * (VecF)(both & 0xffff0000u);
#endif
  }

  // The words (low[j], high[j]).
  static LINFORMER_INLINE VecU pair(const BFloat16* low, const BFloat16* high) {
    return __builtin_convertvector(load_raw<VecH>(low), VecU) | __builtin_convertvector(load_raw<VecH>(high), VecU)
                                                                    << 16;
  }
  static LINFORMER_INLINE VecU pair(const float* low, const float* high) { return pair(load(low), load(high)); }
  static LINFORMER_INLINE VecU pair(VecF low, VecF high) {
#if defined(__AVX512BF16__) && LINFORMER_CPU_WIDTH == 16
    alignas(64) static constexpr uint16_t kAlternate[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (VecU)_mm512_permutexvar_epi16(_mm512_load_si512(kAlternate), both);
#elif LINFORMER_CPU_NEON && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    const bfloat16x8_t evens = vcvtq_low_bf16_f32((float32x4_t)low), odds = vcvtq_low_bf16_f32((float32x4_t)high);
    return (VecU)vzip1q_u16((uint16x8_t)evens, (uint16x8_t)odds);
#else
    return (round_to_bfloat16(low) >> 16) | (round_to_bfloat16(high) & 0xffff0000u);
#endif
  }

  // Words of two rows, columns adjacent.
  static LINFORMER_INLINE void store_columns(Word* target, const VecF (&row)[kValues]) {
    store_raw(target, pair(row[0], row[1]));
  }

  template <class T>
  static LINFORMER_INLINE void copy_row(Word* target, const T* source, int64_t columns) {
    copy_bf16_row<kValues>(reinterpret_cast<BFloat16*>(target), source, columns);
  }
};

// For vectors of four floats. BFMMLA multiplies 2 words by 2 words, 16 products; sums of pairs of products are rounded
// to odd, what is subnormal is zero.
struct QuadBf16 {
  using Word = uint64_t;
  using Value = BFloat16;
  static constexpr int64_t kValues = 4;
  static constexpr int64_t kRowsTogether = 2;

  // Lane 2 i + j of the sum belongs to word i of a and word j of b.
  static LINFORMER_INLINE VecF multiply_add(VecF sum, VecW a, VecW b) {
#if LINFORMER_CPU_NEON && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return (VecF)vbfmmlaq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
    const VecU rows = (VecU)a, columns = (VecU)b;
    for (int half = 0; half < 2; ++half) {
      VecU x = {}, y = {};
      for (int lane = 0; lane < 4; ++lane) {
        x[lane] = rows[lane / 2 * 2 + half];
        y[lane] = columns[lane % 2 * 2 + half];
      }
      sum += (VecF)(x << 16) * (VecF)(y << 16) + (VecF)(x & 0xffff0000u) * (VecF)(y & 0xffff0000u);
    }
    return sum;
#endif
  }

  // Of pairs of the first two rows and of the last two.
  static LINFORMER_INLINE void store_columns(Word* target, VecU low, VecU high) {
#if LINFORMER_CPU_NEON
    store_raw(target, vzip1q_u32((uint32x4_t)low, (uint32x4_t)high));
    store_raw(target + 2, vzip2q_u32((uint32x4_t)low, (uint32x4_t)high));
#else
    for (int i = 0; i < kWidth; ++i) target[i] = low[i] | static_cast<uint64_t>(high[i]) << 32;
#endif
  }
  static LINFORMER_INLINE void store_columns(Word* target, const VecF (&row)[kValues]) {
    store_columns(target, PairedBf16::pair(row[0], row[1]), PairedBf16::pair(row[2], row[3]));
  }

  template <class T>
  static LINFORMER_INLINE void copy_row(Word* target, const T* source, int64_t columns) {
    copy_bf16_row<kValues>(reinterpret_cast<BFloat16*>(target), source, columns);
  }
};

template <class T>
struct Choose {
  using Math = Fp32;
};
#if LINFORMER_CPU_BF16 == 2
template <>
struct Choose<BFloat16> {
  using Math = PairedBf16;
};
#elif LINFORMER_CPU_BF16 == 4
template <>
struct Choose<BFloat16> {
  using Math = QuadBf16;
};
#endif

// Which rows of a copy are real: a masked row is replaced by zeros, never multiplied, so that a NaN in it cannot leak.
struct RowMask {
  const bool* keep = nullptr;
  int64_t stride = 0;
  LINFORMER_INLINE bool kept(int64_t row) const { return keep == nullptr || keep[row * stride]; }
  LINFORMER_INLINE RowMask from(int64_t row) const { return keep ? RowMask{keep + row * stride, stride} : RowMask{}; }
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

// A by rows where it lies, or copied where it must be: rows that are masked or apart, or words that are not there.
template <class Word>
struct Operand {
  const Word* words;
  int64_t ld;
};

template <class Math, class T>
Operand<typename Math::Word> rows_operand(typename Math::Word* scratch, int64_t ld, const T* source, int64_t stride,
                                          int64_t rows, int64_t columns, RowMask mask = {}) {
  using Word = typename Math::Word;
  if constexpr (sizeof(T) * Math::kValues == sizeof(Word)) {
    // Rows apart would meet in few sets of the cache.
    const bool aligned = reinterpret_cast<uintptr_t>(source) % sizeof(Word) == 0;
    if (mask.keep == nullptr && stride == columns && columns % Math::kValues == 0 && aligned) {
      return {reinterpret_cast<const Word*>(source), stride / Math::kValues};
    }
  }
  copy_rows<Math>(scratch, ld, source, stride, rows, columns, mask);
  return {scratch, ld};
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
      const VecU pair = PairedBf16::pair(a, b);
      if (padded - j >= kWidth) {
        store_raw(row + j, pair);
      } else {
        std::memcpy(row + j, &pair, static_cast<size_t>(padded - j) * 4);
      }
    }
  }
}

template <class T>
LINFORMER_INLINE void copy_columns(uint64_t* target, int64_t ld, const T* source, int64_t stride, int64_t rows,
                                   int64_t columns, int64_t padded, RowMask mask = {}) {
  for (int64_t s = 0; s < rows; s += 4) {
    for (int64_t j = 0; j < padded; j += kWidth) {
      T value[4][kWidth] = {};
      for (int64_t i = 0; i < smaller(4, rows - s); ++i) {
        const int64_t count = smaller(columns - j, kWidth);
        const T* from = source + (s + i) * stride + j;
        if (!mask.kept(s + i) || count <= 0) continue;
        if (count == kWidth) {
          std::memcpy(value[i], from, sizeof(value[i]));
        } else {
          std::memcpy(value[i], from, static_cast<size_t>(count) * sizeof(T));
        }
      }
      uint64_t words[kWidth];
      QuadBf16::store_columns(words, PairedBf16::pair(value[0], value[1]), PairedBf16::pair(value[2], value[3]));
      if (padded - j >= kWidth) {
        std::memcpy(target + s / 4 * ld + j, words, sizeof(words));
      } else {
        std::memcpy(target + s / 4 * ld + j, words, static_cast<size_t>(padded - j) * sizeof(uint64_t));
      }
    }
  }
}

// B from a matrix whose rows are the summed dimension; `steps` is the height of a panel, of which these rows may be a
// part.
template <class Math, class T>
void pack_panels(typename Math::Word* target, int64_t steps, const T* source, int64_t stride, int64_t rows,
                 int64_t columns, RowMask mask = {}) {
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    const int64_t count = smaller(kTileColumns, columns - j);
    copy_columns(target + j * steps, kTileColumns, source + j, stride, rows, count, round_up(count, kWidth), mask);
  }
}

// Columns `first` to `first + rows` of B, `first` a multiple of kWidth, from A's words by rows: column first + j of B
// is row j of A. The last vector is filled up with zeros. Whole vectors are read: rows have room.
template <class Word>
void pack_panels_transposed(Word* target, const Word* a, int64_t lda, int64_t first, int64_t rows, int64_t steps) {
  for (int64_t i = 0; i < rows; i += kWidth) {
    const int64_t j = first + i;
    Word* panel = target + j / kTileColumns * kTileColumns * steps + j % kTileColumns;
    for (int64_t s = 0; s < steps; s += kWidth) {
      VecF square[kWidth];
      for (int r = 0; r < kWidth; ++r) square[r] = i + r < rows ? load_raw<VecF>(a + (i + r) * lda + s) : VecF{};
      transpose(square);
      for (int64_t r = 0; r < smaller(kWidth, steps - s); ++r) store_raw(panel + (s + r) * kTileColumns, square[r]);
    }
  }
}

inline void pack_panels_transposed(uint64_t* target, const uint64_t* a, int64_t lda, int64_t first, int64_t rows,
                                   int64_t steps) {
  for (int64_t i = 0; i < round_up(rows, kWidth); ++i) {
    const int64_t j = first + i;
    uint64_t* panel = target + j / kTileColumns * kTileColumns * steps + j % kTileColumns;
    for (int64_t s = 0; s < steps; ++s) {
      store_raw(panel + s * kTileColumns, i < rows ? load_raw<uint64_t>(a + i * lda + s) : uint64_t{0});
    }
  }
}

// Where a product goes: c = sums + A B, or A B alone where sums is null. They may be the same.
struct Target {
  float* c;
  int64_t ldc;
  const float* sums = nullptr;
  int64_t ld_sums = 0;
  bool stream = false;    // past the caches, into whole aligned lines

  LINFORMER_INLINE Target at(int64_t row, int64_t column) const {
    return {c + row * ldc + column, ldc, sums ? sums + row * ld_sums + column : nullptr, ld_sums, stream};
  }
};

// The sums of a register tile, out. Several loops, so that the sums stay in registers: with the choice inside, they
// were spilled.
template <int kRows, int kColumns>
LINFORMER_INLINE void store_tile(VecF (&sum)[kRows][kColumns], const Target& target) {
  float* c = target.c;
  if (target.sums) {
    const float* sums = target.sums;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) sum[i][v] += load(sums + i * target.ld_sums + v * kWidth);
    }
  }
  if (target.stream) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) stream(c + i * target.ldc + v * kWidth, sum[i][v]);
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) store(c + i * target.ldc + v * kWidth, sum[i][v]);
    }
  }
}

// One register tile. noinline: the compiler allocates registers for this loop alone.
template <class Math, bool kByColumns, int kRows, int kColumns>
__attribute__((noinline)) void multiply_tile(const typename Math::Word* a, int64_t lda, const typename Math::Word* b,
                                             int64_t ldb, int64_t steps, const Target& target) {
  VecF sum[kRows][kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) sum[i][v] = VecF{};
  }
  // By rows, a pointer to every third: each reaches two more by an index. The compiler is kept from seeing how they
  // hang together, or it makes an index of every row, and has no register left for the last ones.
  constexpr int kBases = kByColumns ? 1 : (kRows + 2) / 3;
  const typename Math::Word* base[kBases];
#pragma GCC unroll 8
  for (int i = 0; i < kBases; ++i) {
    base[i] = a + 3 * i * lda;
    if (!kByColumns) __asm__("" : "+r"(base[i]));
  }
  for (int64_t s = 0; s < steps; ++s) {
    VecF column[kColumns];
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) column[v] = load_raw<VecF>(b + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename Math::Word word = kByColumns ? base[0][i] : base[i / 3][i % 3 * lda];
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) sum[i][v] = Math::multiply_add(sum[i][v], word, column[v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBases; ++i) base[i] += kByColumns ? lda : 1;
    b += ldb;
  }
  store_tile(sum, target);
}

LINFORMER_INLINE VecW two_words(const uint64_t* first, const uint64_t* second) {
#if LINFORMER_CPU_NEON
  // Left to g++ 12, some go through general registers, and memory.
  return (VecW)vld1q_lane_u64(second, vcombine_u64(vld1_u64(first), vdup_n_u64(0)), 1);
#else
  return VecW{*first, *second};
#endif
}

// The same of quads: 2 x 2 sums an instruction. An odd last row is multiplied twice.
template <bool kByColumns, int kRows, int kColumns>
__attribute__((noinline)) void multiply_tile_of_quads(const uint64_t* a, int64_t lda, const uint64_t* b, int64_t ldb,
                                                      int64_t steps, const Target& target) {
  constexpr int kPairs = (kRows + 1) / 2;
  VecF square[kPairs][2 * kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < 2 * kColumns; ++v) square[i][v] = VecF{};
  }
  for (int64_t s = 0; s < steps; ++s) {
    VecW row[kPairs];
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i) {
      const int second = 2 * i + 1 < kRows ? 2 * i + 1 : 2 * i;
      if (kByColumns && second > 2 * i) {
        row[i] = load_raw<VecW>(a + 2 * i);
      } else {
        row[i] = two_words(a + 2 * i * (kByColumns ? 1 : lda), a + second * (kByColumns ? 1 : lda));
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < 2 * kColumns; ++v) {
      const VecW column = load_raw<VecW>(b + 2 * v);
#pragma GCC unroll 8
      for (int i = 0; i < kPairs; ++i) square[i][v] = QuadBf16::multiply_add(square[i][v], row[i], column);
    }
    a += kByColumns ? lda : 1;
    b += ldb;
  }
  VecF sum[kRows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) {
      const VecW left = (VecW)square[i / 2][2 * v], right = (VecW)square[i / 2][2 * v + 1];
      sum[i][v] = (VecF)VecW{left[i % 2], right[i % 2]};
    }
  }
  store_tile(sum, target);
}

template <class Math, bool kByColumns, int kRows = kTileRows, int kColumns = kVectors>
LINFORMER_INLINE void multiply_tile_of(int64_t rows, int64_t vectors, const typename Math::Word* a, int64_t lda,
                                       const typename Math::Word* b, int64_t ldb, int64_t steps, const Target& target) {
  if (vectors == kColumns && rows == kRows) {
    if constexpr (Math::kValues == 4) {
      multiply_tile_of_quads<kByColumns, kRows, kColumns>(a, lda, b, ldb, steps, target);
    } else {
      multiply_tile<Math, kByColumns, kRows, kColumns>(a, lda, b, ldb, steps, target);
    }
  } else if (vectors != kColumns) {
    if constexpr (kColumns > 1) {
      multiply_tile_of<Math, kByColumns, kRows, kColumns - 1>(rows, vectors, a, lda, b, ldb, steps, target);
    }
  } else if constexpr (kRows > 1) {
    multiply_tile_of<Math, kByColumns, kRows - 1, kColumns>(rows, vectors, a, lda, b, ldb, steps, target);
  }
}

// A B for `columns` of one panel and at most kStepsAtOnce steps; fetches `fetched` rows of `next` a tile.
template <class Math, bool kByColumns>
LINFORMER_INLINE void multiply_panel(const typename Math::Word* a, int64_t lda, const typename Math::Word* b,
                                     int64_t ldb, int64_t rows, int64_t columns, int64_t steps, const Target& target,
                                     Prefetch& next, int64_t fetched) {
  const int64_t vectors = (columns + kWidth - 1) / kWidth;
  // Tiles of nearly equal height: 128 rows are 22 tiles of 5 or 6, rather than 21 of 6 and a slow one of 2.
  constexpr int64_t kTogether = Math::kRowsTogether;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, units = (rows + kTogether - 1) / kTogether;
  const int64_t height = tiles ? units / tiles : 0, taller = tiles ? units % tiles : 0;
  for (int64_t t = 0, i = 0; t < tiles; ++t) {
    int64_t count = (height + (t < taller)) * kTogether;
    if constexpr (kTogether > 1) count = smaller(count, rows - i);
    multiply_tile_of<Math, kByColumns>(count, vectors, a + (kByColumns ? i : i * lda), lda, b, ldb, steps,
                                       target.at(i, 0));
    i += count;
    next.fetch(fetched);
  }
}

// Rows to fetch after each register tile, so that all are on their way at the end.
LINFORMER_INLINE int64_t fetched_a_tile(const Prefetch& next, int64_t rows, int64_t columns, int64_t steps) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows * ((columns + kTileColumns - 1) / kTileColumns) *
                        ((steps + kStepsAtOnce - 1) / kStepsAtOnce);
  return tiles ? next.rows / tiles + 1 : 0;
}

// A B with A of `rows` x `steps` words and B of `columns`. What the target adds and the sums of all steps but the last
// ones are kept in `sums`, which may be the target itself.
template <class Math, bool kByColumns>
void multiply(const typename Math::Word* a, int64_t lda, const typename Math::Word* b, int64_t rows, int64_t columns,
              int64_t steps, const Target& target, float* sums, int64_t ld_sums, Prefetch next = {}) {
  const int64_t fetched = fetched_a_tile(next, rows, columns, steps);
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    int64_t s = 0;
    do {
      const bool last = s + kStepsAtOnce >= steps, add = s > 0 || target.sums;
      const Target part = {last ? target.c : sums, last ? target.ldc : ld_sums, add ? sums : nullptr, ld_sums,
                           last && target.stream};
      multiply_panel<Math, kByColumns>(a + (kByColumns ? s * lda : s), lda, b + j * steps + s * kTileColumns,
                                       kTileColumns, rows, smaller(kTileColumns, columns - j),
                                       smaller(kStepsAtOnce, steps - s), part.at(0, j), next, fetched);
      s += kStepsAtOnce;
    } while (s < steps);
  }
}

// C (+)= A B.
template <class Math, bool kByColumns>
void multiply(const typename Math::Word* a, int64_t lda, const typename Math::Word* b, int64_t rows, int64_t columns,
              int64_t steps, float* c, int64_t ldc, bool accumulate, Prefetch next = {}) {
  multiply<Math, kByColumns>(a, lda, b, rows, columns, steps, Target{c, ldc, accumulate ? c : nullptr, ldc}, c, ldc,
                             next);
}

// C (+)= A B where B's rows are those of `source`: read where they lie if they are words already and near each other,
// else packed a piece at a time just before it is used, so that it is written to L1 and read from there.
template <class Math, bool kByColumns, class T>
void multiply_rows(const typename Math::Word* a, int64_t lda, const T* source, int64_t stride, int64_t summed,
                   int64_t columns, RowMask mask, typename Math::Word* panel, int64_t rows, float* c, int64_t ldc,
                   bool accumulate, Prefetch next = {}) {
  const int64_t steps = (summed + Math::kValues - 1) / Math::kValues;
  const int64_t fetched = fetched_a_tile(next, rows, columns, steps);
  const bool in_place = kSame<T, typename Math::Word> && mask.keep == nullptr && columns % kWidth == 0 && stride <= 128;
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    int64_t s = 0;
    do {
      const int64_t count = smaller(kStepsAtOnce, steps - s);
      const int64_t row = s * Math::kValues;
      Operand<typename Math::Word> b = {panel, kTileColumns};
      if (!in_place) {
        pack_panels<Math>(panel, count, source + row * stride + j, stride,
                          smaller(kStepsAtOnce * Math::kValues, summed - row), smaller(kTileColumns, columns - j),
                          mask.from(row));
      } else if constexpr (kSame<T, typename Math::Word>) {
        b = {source + row * stride + j, stride};
      }
      multiply_panel<Math, kByColumns>(a + (kByColumns ? s * lda : s), lda, b.words, b.ld, rows,
                                       smaller(kTileColumns, columns - j), count,
                                       Target{c, ldc, accumulate || s > 0 ? c : nullptr, ldc}.at(0, j), next, fetched);
      s += kStepsAtOnce;
    } while (s < steps);
  }
}

}    // namespace
}    // namespace linformer::cpu
