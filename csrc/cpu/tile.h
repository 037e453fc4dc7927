// Products of AMX tiles, and the packing that makes tiles of rows. Compiled with the instructions (LINFORMER_CPU_AMX
// 1), and with the same algorithm in portable code, so that every machine can test it.
//
// A tile is 16 rows of 64 bytes, 1 KB. One instruction adds the product of two tiles to a third:
//   A   16 rows of 32 bf16, which are summed over
//   B   16 rows of 16 pairs of bf16: word (s, j) holds values 2 s and 2 s + 1 of column j
//   C   16 x 16 fp32
// A type that bf16 does not hold is cut into terms, each a bf16, whose sum it is: fp16 into two, fp32 into three, both
// without a rest. Of the products of terms those below the type's own rounding are left out:
//   bf16  1 term,  1 product
//   fp16  2 terms, 3 products      error of a product of K = 512 relative to its size 2.8e-6
//   fp32  3 terms, 6 products      1.9e-7; FMA in order 4.1e-7
// The terms of a tile lie one after another. Of an infinity the other terms make NaN, and sums of exponentials that are
// not divided yet may overflow: what is not finite is computed again without tiles, see TileTasks::doubtful. Every
// matrix is padded with zeros to whole pairs of tiles, 32.
//
// The instruction takes subnormal bf16 for zero and gives zero for subnormal fp32, whatever the thread's mode says.
#pragma once

#include <cstddef>

#include "gemm.h"

namespace linformer::cpu {
namespace {

constexpr int64_t kTileBytes = 1024, kSide = 16, kPair = 32;    // rows, and rows or columns of a pair of tiles

template <class T>
constexpr int kTerms = 3;    // float
template <>
constexpr int kTerms<Half> = 2;
template <>
constexpr int kTerms<BFloat16> = 1;

#if LINFORMER_CPU_AMX

template <int kTile>
LINFORMER_INLINE void tile_load(const std::byte* source, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(source), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
LINFORMER_INLINE void tile_store(std::byte* target, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(target), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
LINFORMER_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kC, int kA, int kB>
LINFORMER_INLINE void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// The unit that multiplies tiles falls asleep: after 240 to 380 ns without a product the next ones wait for 290 ns (64
// products 515 ns, after vectors for 570 ns 819 ns; a Xeon of the fifth generation). A product that nobody needs, every
// 100 ns or so in what happens between products, keeps it awake, at 2 % of the speed of that. Tiles 3, 5 and 7 hold
// nothing then.
LINFORMER_INLINE void keep_awake() { tile_multiply<3, 5, 7>(); }

// Tiles are configured for the length of a task and given back at its end: what a thread leaves in them is saved at
// every switch, and lost in a forked child.
class Tiles {
 public:
  Tiles() {
    alignas(64) Configuration all = {};
    all.palette = 1;
    for (int i = 0; i < 8; ++i) {
      all.row_bytes[i] = 64;
      all.rows[i] = 16;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(all));
  }
  ~Tiles() { __asm__ volatile("tilerelease" : :); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

#else

thread_local float tile_register[8][kSide * kSide];

template <int kTile>
LINFORMER_INLINE void tile_load(const std::byte* source, int64_t stride) {
  for (int64_t i = 0; i < kSide; ++i) std::memcpy(tile_register[kTile] + i * kSide, source + i * stride, 64);
}
template <int kTile>
LINFORMER_INLINE void tile_store(std::byte* target, int64_t stride) {
  for (int64_t i = 0; i < kSide; ++i) std::memcpy(target + i * stride, tile_register[kTile] + i * kSide, 64);
}
template <int kTile>
LINFORMER_INLINE void tile_zero() {
  std::memset(tile_register[kTile], 0, sizeof(tile_register[kTile]));
}
// As the processor does it, to the bit where nothing is subnormal: the first and the second values of the pairs are
// summed apart, from zero, and then added to C.
template <int kC, int kA, int kB>
LINFORMER_INLINE void tile_multiply() {
  for (int64_t i = 0; i < kSide; ++i) {
    VecF even = {}, odd = {};
    for (int64_t s = 0; s < kSide; ++s) {
      uint32_t word;
      std::memcpy(&word, tile_register[kA] + i * kSide + s, sizeof(word));
      const VecU a = VecU{} + word, b = load_raw<VecU>(tile_register[kB] + s * kSide);
      even += (VecF)(a << 16) * (VecF)(b << 16);
      odd += (VecF)(a & 0xffff0000u) * (VecF)(b & 0xffff0000u);
    }
    float* row = tile_register[kC] + i * kSide;
    store(row, load(row) + (even + odd));
  }
}

LINFORMER_INLINE void keep_awake() {}

class Tiles {
 public:
  Tiles() { std::memset(tile_register, 0xff, sizeof(tile_register)); }
  ~Tiles() {}
};

#endif

template <int kNumber>
struct Index {
  static constexpr int kIndex = kNumber;
};

// A matrix of tiles: where tile (i, j) begins. Its terms follow it, `terms` times kTileBytes.
struct TileMatrix {
  std::byte* tiles = nullptr;
  int64_t row = 0, column = 0;    // bytes from one row or column of tiles to the next
  LINFORMER_INLINE std::byte* at(int64_t i, int64_t j) const { return tiles + i * row + j * column; }
};

// Registers 0..3 += A B: 2 x 2 tiles of C.
template <int kTermCount>
LINFORMER_INLINE void multiply_square(int64_t steps, const std::byte* a, int64_t a_row, int64_t a_step,
                                      int64_t a_stride, const std::byte* b, int64_t b_column, int64_t b_step) {
  const auto load_a = [&](int64_t term) {
    tile_load<4>(a + term * kTileBytes, a_stride);
    tile_load<5>(a + a_row + term * kTileBytes, a_stride);
  };
  const auto load_b = [&](int64_t term) {
    tile_load<6>(b + term * kTileBytes, 64);
    tile_load<7>(b + b_column + term * kTileBytes, 64);
  };
  const auto multiply_all = [] {
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  };
  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (kTermCount == 1) {
      tile_load<4>(a, a_stride);
      tile_load<6>(b, 64);
      tile_multiply<0, 4, 6>();
      tile_load<7>(b + b_column, 64);
      tile_multiply<1, 4, 7>();
      tile_load<5>(a + a_row, a_stride);
      tile_multiply<2, 5, 6>();
      tile_multiply<3, 5, 7>();
    } else if constexpr (kTermCount == 2) {
      load_a(0), load_b(1), multiply_all();
      load_b(0), multiply_all();
      load_a(1), multiply_all();
    } else {    // in an order in which one operand of each pair stays
      load_a(0), load_b(2), multiply_all();
      load_b(1), multiply_all();
      load_a(1), multiply_all();
      load_b(0), multiply_all();
      load_a(2), multiply_all();
      load_a(0), multiply_all();
    }
    a += a_step;
    b += b_step;
  }
}

LINFORMER_INLINE void zero_square() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}
LINFORMER_INLINE void load_square(const std::byte* c, int64_t row, int64_t column) {
  tile_load<0>(c, 64);
  tile_load<1>(c + column, 64);
  tile_load<2>(c + row, 64);
  tile_load<3>(c + row + column, 64);
}
LINFORMER_INLINE void store_square(std::byte* c, int64_t row, int64_t column) {
  tile_store<0>(c, 64);
  tile_store<1>(c + column, 64);
  tile_store<2>(c + row, 64);
  tile_store<3>(c + row + column, 64);
}

// Registers 0..kColumns-1 += A B: one row of 2 or 4 tiles of C.
template <int kTermCount, int kColumns>
LINFORMER_INLINE void multiply_row(int64_t steps, const std::byte* a, int64_t a_step, int64_t a_stride,
                                   const std::byte* b, int64_t b_column, int64_t b_step) {
  for (int64_t s = 0; s < steps; ++s) {
    tile_load<4>(a, a_stride);
    if constexpr (kTermCount > 1) tile_load<5>(a + kTileBytes, a_stride);
    if constexpr (kTermCount > 2) tile_load<6>(a + 2 * kTileBytes, a_stride);
    const auto column = [&](auto index) {
      constexpr int kC = decltype(index)::kIndex;
      const std::byte* tile = b + kC * b_column;
      if constexpr (kTermCount == 1) {
        constexpr int kB = 5 + kC % 3;
        tile_load<kB>(tile, 64);
        tile_multiply<kC, 4, kB>();
      } else if constexpr (kTermCount == 2) {
        tile_load<7>(tile + kTileBytes, 64);
        tile_multiply<kC, 4, 7>();
        tile_load<6>(tile, 64);
        tile_multiply<kC, 5, 6>();
        tile_multiply<kC, 4, 6>();
      } else {
        tile_load<7>(tile + 2 * kTileBytes, 64);
        tile_multiply<kC, 4, 7>();
        tile_load<7>(tile + kTileBytes, 64);
        tile_multiply<kC, 5, 7>();
        tile_multiply<kC, 4, 7>();
        tile_load<7>(tile, 64);
        tile_multiply<kC, 6, 7>();
        tile_multiply<kC, 5, 7>();
        tile_multiply<kC, 4, 7>();
      }
    };
    column(Index<0>());
    column(Index<1>());
    if constexpr (kColumns == 4) {
      column(Index<2>());
      column(Index<3>());
    }
    a += a_step;
    b += b_step;
  }
}

LINFORMER_INLINE VecF upper(VecF value) { return (VecF)((VecU)value & 0xffff0000u); }

// The terms of 32 values of a row of A.
template <int kTermCount>
LINFORMER_INLINE void store_row_terms(std::byte* target, VecF low, VecF high) {
  for (int term = 0; term < kTermCount - 1; ++term) {
    const VecF low_part = upper(low), high_part = upper(high);
#if defined(__AVX512BW__)
    alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    store_raw(target, _mm512_permutex2var_epi16((__m512i)low_part, _mm512_load_si512(kUpper), (__m512i)high_part));
#else
    store_raw(target, __builtin_convertvector((VecU)low_part >> 16, VecH));
    store_raw(target + 32, __builtin_convertvector((VecU)high_part >> 16, VecH));
#endif
    low -= low_part;
    high -= high_part;
    target += kTileBytes;
  }
#if defined(__AVX512BF16__)
  store_raw(target, _mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  store(reinterpret_cast<BFloat16*>(target), low);
  store(reinterpret_cast<BFloat16*>(target + 32), high);
#endif
}

// The terms of 16 pairs, words of B: `even` and `odd` are neighbours along the summed dimension.
template <int kTermCount>
LINFORMER_INLINE void store_pair_terms(std::byte* target, VecF even, VecF odd) {
  for (int term = 0; term < kTermCount - 1; ++term) {
    const VecF odd_part = upper(odd);
    store_raw(target, ((VecU)even >> 16) | (VecU)odd_part);
    even -= upper(even);
    odd -= odd_part;
    target += kTileBytes;
  }
  if constexpr (kTermCount == 3) {    // what is left of fp32 is a bf16, or has bits below the smallest of them
    store_raw(target, ((VecU)even >> 16) | (VecU)upper(odd));
  } else {
    store_raw(target, PairedBf16::pair(even, odd));
  }
}

// Words (a[j], b[j]) of 32 columns of two bf16 rows, in two tiles.
LINFORMER_INLINE void store_pairs(std::byte* left, std::byte* right, const BFloat16* a, const BFloat16* b) {
#if defined(__AVX512BW__)
  alignas(64) static constexpr uint16_t kLeft[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  alignas(64) static constexpr uint16_t kRight[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                      24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
  store_raw(left, _mm512_permutex2var_epi16(first, _mm512_load_si512(kLeft), second));
  store_raw(right, _mm512_permutex2var_epi16(first, _mm512_load_si512(kRight), second));
#else
  store_raw(left, PairedBf16::pair(a, b));
  store_raw(right, PairedBf16::pair(a + kSide, b + kSide));
#endif
}

// Up to 32 values of a row; beyond `count` zero.
template <class S>
struct Values {
  S at[kPair];
  LINFORMER_INLINE Values(const S* source, int64_t count) {
    std::memset(static_cast<void*>(at), 0, sizeof(at));
    if (source) std::memcpy(static_cast<void*>(at), source, static_cast<size_t>(smaller(count, kPair)) * sizeof(S));
  }
};

// Rows of A from the first padded_columns columns of rows of a tensor, with zeros where there are no more and where a
// row is masked.
template <int kTermCount, class S>
void pack_rows(TileMatrix target, const S* source, int64_t stride, int64_t rows, int64_t columns, int64_t padded_rows,
               int64_t padded_columns, RowMask mask = {}) {
  columns = smaller(columns, padded_columns);
  Prefetch ahead(source + 2 * stride, stride, rows - 2, columns);
  const auto put = [](std::byte* tile, const S* values) {
    if constexpr (kTermCount == 1 && kSame<S, BFloat16>) {
      std::memcpy(tile, values, 64);
    } else {
      store_row_terms<kTermCount>(tile, load(values), load(values + kSide));
    }
  };
  for (int64_t i = 0; i < padded_rows; ++i) {
    const bool real = i < rows && mask.kept(i);
    const S* row = source + i * stride;
    std::byte* tile = target.at(i / kSide, 0) + i % kSide * 64;
    ahead.fetch(1);
    if (i % 8 == 7) keep_awake();
    int64_t j = 0;
    if (real) {
      for (; j + kPair <= columns; j += kPair, tile += target.column) put(tile, row + j);
    }
    for (; j < padded_columns; j += kPair, tile += target.column) {
      put(tile, Values<S>(real && j < columns ? row + j : nullptr, columns - j).at);
    }
  }
}

// B from rows of a tensor that are the summed dimension: tile (step, column).
template <int kTermCount, class S>
void pack_pairs(TileMatrix target, const S* source, int64_t stride, int64_t rows, int64_t columns, int64_t padded_rows,
                int64_t padded_columns, RowMask mask = {}) {
  columns = smaller(columns, padded_columns);
  const auto put = [&](std::byte* left, const S* a, const S* b) {
    std::byte* right = left + target.column;
    if constexpr (kTermCount == 1 && kSame<S, BFloat16>) {
      store_pairs(left, right, a, b);
    } else {
      store_pair_terms<kTermCount>(left, load(a), load(b));
      store_pair_terms<kTermCount>(right, load(a + kSide), load(b + kSide));
    }
  };
  for (int64_t i = 0; i < padded_rows; i += 2) {
    const bool first = i < rows && mask.kept(i), second = i + 1 < rows && mask.kept(i + 1);
    const S *a = source + i * stride, *b = a + stride;
    std::byte* tile = target.at(i / kPair, 0) + i % kPair / 2 * 64;
    if (i % kPair == kSide && (kTermCount > 1 || i % 64 < kPair)) keep_awake();
    int64_t j = 0;
    if (first && second) {
      for (; j + kPair <= columns; j += kPair, tile += 2 * target.column) put(tile, a + j, b + j);
    }
    for (; j < padded_columns; j += kPair, tile += 2 * target.column) {
      put(tile, Values<S>(first && j < columns ? a + j : nullptr, columns - j).at,
          Values<S>(second && j < columns ? b + j : nullptr, columns - j).at);
    }
  }
}

// 16 x 16 words transposed: rows of 64 bytes, `from` and `to` bytes apart.
LINFORMER_INLINE void transpose_tile(const std::byte* source, int64_t from, std::byte* target, int64_t to) {
  VecF r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = load_raw<VecF>(source + i * from);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const VecF a = r[2 * i], b = r[2 * i + 1];
    t[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[2 * i + 1] = __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto low = [](VecF a, VecF b) {
      return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    };
    const auto high = [](VecF a, VecF b) {
      return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    };
    r[4 * i] = low(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = high(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = low(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = high(t[4 * i + 1], t[4 * i + 3]);
  }
  const auto even = [](VecF a, VecF b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  const auto odd = [](VecF a, VecF b) {
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = even(r[i], r[i + 4]);
    t[i + 4] = odd(r[i], r[i + 4]);
    t[i + 8] = even(r[i + 8], r[i + 12]);
    t[i + 12] = odd(r[i + 8], r[i + 12]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    store_raw(target + i * to, even(t[i], t[i + 8]));
    store_raw(target + (i + 8) * to, odd(t[i], t[i + 8]));
  }
}

// B from rows of a tensor that are its columns, through rows of A.
template <int kTermCount, class S>
void pack_columns(const TileMatrix& target, const TileMatrix& scratch, const S* source, int64_t stride, int64_t rows,
                  int64_t columns, int64_t padded_rows, int64_t padded_columns) {
  for (int64_t i = 0; i < padded_rows; i += kSide) {
    pack_rows<kTermCount>(scratch, source + i * stride, stride, smaller(kSide, rows - i), columns, kSide,
                          padded_columns);
    for (int64_t j = 0; j < padded_columns / kPair; ++j) {
      for (int64_t term = 0; term < kTermCount; ++term) {
        transpose_tile(scratch.at(0, j) + term * kTileBytes, 64, target.at(j, i / kSide) + term * kTileBytes, 64);
      }
    }
  }
}

// 16 vectors to one, whose lane i is the largest, or the sum, of the lanes of vector i.
template <class Combine>
LINFORMER_INLINE VecF reduce_rows(const VecF* row, const Combine& combine) {
  VecF w[8], x[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const VecF a = row[i < 4 ? i : i + 4], b = row[i < 4 ? i + 4 : i + 8];
    w[i] = combine(__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                   __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {    // rows i, i + 4, i + 8, i + 12, four lanes each
    x[i] = combine(__builtin_shufflevector(w[i], w[i + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
                   __builtin_shufflevector(w[i], w[i + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
  }
  const auto two = [&](VecF a, VecF b) {
    return combine(__builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29),
                   __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31));
  };
  const VecF u = two(x[0], x[1]), z = two(x[2], x[3]);
  return combine(__builtin_shufflevector(u, z, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                 __builtin_shufflevector(u, z, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
}

LINFORMER_INLINE VecF tile_row(const std::byte* tile, int64_t row) { return load_raw<VecF>(tile + row * 64); }

}    // namespace
}    // namespace linformer::cpu
