// Pieces of attention that forward and backward share: scores, softmax, dropout, and query rows through shared memory.
//
// A warp owns 16 query rows, or 32. A thread holds, of 16, rows g = lane / 4 and g + 8 of each tile of scores, columns
// 2t and 2t + 1 with t = lane % 4: element e of a tile is row g + 8 (e / 2), column 2t + e % 2.
#pragma once

#include "../philox.h"
#include "tile.cuh"

namespace linformer::cuda {

LINFORMER_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
LINFORMER_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Columns, or summed values, that are computed or left out together where a tile is ragged. Less is more branches.
constexpr int kRagged = 64;

// Of tiles of 16 x 8 for kTiles x 8 columns and further rows: those of rows from 16 m.
template <int kTiles, int kAll>
LINFORMER_DEVICE float (&row_tile(float (&c)[kAll][4], int m))
    [kTiles][4] { return reinterpret_cast<float (&)[kTiles][4]>(c[m * kTiles]); }

// c (16 kRowTiles x kColumns) += rows (16 kRowTiles x kSummed) times `tile`, whose columns are stored along the summed
// dimension; kFresh: c is what the product is. Columns from `columns` on do not matter. kTurned: the bits of `tile`
// times `rows`.
template <DType kType, int kRowTiles, int kSummed, int kColumns, int kRowPitch, int kPitch, bool kFresh,
          bool kTurned = false>
LINFORMER_DEVICE void multiply_rows(float (&c)[kRowTiles * kColumns / 8][4], const Element<kType>* rows,
                                    const Element<kType>* tile, int columns, bool allow_tf32) {
  if constexpr (kType == DType::kFloat32) {
    if (allow_tf32) {
      return multiply_rows<kTf32, kRowTiles, kSummed, kColumns, kRowPitch, kPitch, kFresh, kTurned>(c, rows, tile,
                                                                                                    columns, true);
    }
  }
  const OperandA<kType, false, kRowPitch> a_rows(rows);
  const OperandB<kType, false, kPitch> b_columns(tile);
  constexpr int kStep = Step<kType>::kSummed, kGroup = kColumns < kRagged ? kColumns : kRagged;
  repeat<kColumns / kGroup>([&](auto group) {
    if (group > 0 && group * kGroup >= columns) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if (kFresh) clear(row_tile<kGroup / 8>(row_tile<kColumns / 8>(c, m), group));
      }
      return;
    }
    repeat<kSummed / kStep>([&](auto s) {
      FragmentA<kType> a[kRowTiles];
      repeat<kRowTiles>([&](auto m) { a_rows.template load<m * kMmaRows, s * kStep>(a[m]); });
      repeat<kGroup / 16>([&](auto i) {
        constexpr int kTile = (group * kGroup + 16 * i) / 8;
        FragmentB<kType> b;
        b_columns.template load<8 * kTile, s * kStep>(b);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply<kType, kTurned, kFresh && s == 0>(c[m * kColumns / 8 + kTile], a[m], b, 0);
          multiply<kType, kTurned, kFresh && s == 0>(c[m * kColumns / 8 + kTile + 1], a[m], b, 1);
        }
      });
    });
  });
}

// c (16 x kColumns) = rows (16 x kSummed, in registers, as a step loads them) times `tile`, as multiply_rows.
template <DType kType, int kSummed, int kColumns, int kPitch, bool kTurned>
LINFORMER_DEVICE void multiply_held(float (&c)[kColumns / 8][4], const FragmentA<kType> (&rows)[kSummed / 16],
                                    const Element<kType>* tile) {
  const OperandB<kType, false, kPitch> b_columns(tile);
  repeat<kSummed / 16>([&](auto s) {
    repeat<kColumns / 16>([&](auto i) {
      FragmentB<kType> b;
      b_columns.template load<16 * i, 16 * s>(b);
      multiply<kType, kTurned, s == 0>(c[2 * i], rows[s], b, 0);
      multiply<kType, kTurned, s == 0>(c[2 * i + 1], rows[s], b, 1);
    });
  });
}

// c (16 kRowTiles x kColumns) += scores (16 kRowTiles x kSummed, in registers, rounded to the type) times `tile`,
// stored across. Scores from `summed` on are zero.
template <DType kType, int kRowTiles, int kSummed, int kColumns, int kPitch>
LINFORMER_DEVICE void multiply_scores(float (&c)[kRowTiles * kColumns / 8][4],
                                      float (&scores)[kRowTiles * kSummed / 8][4], const Element<kType>* tile,
                                      int summed, bool allow_tf32) {
  if constexpr (kType == DType::kFloat32) {
    if (allow_tf32) return multiply_scores<kTf32, kRowTiles, kSummed, kColumns, kPitch>(c, scores, tile, summed, true);
  }
  const OperandB<kType, true, kPitch> b_columns(tile);
  constexpr int kStep = Step<kType>::kSummed, kGroup = kSummed < kRagged ? kSummed : kRagged;
  repeat<kSummed / kGroup>([&](auto group) {
    if (group > 0 && group * kGroup >= summed) return;
    repeat<kGroup / kStep>([&](auto i) {
      constexpr int kFrom = group * kGroup + i * kStep;
      FragmentA<kType> a[kRowTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) as_a<kType>(a[m], row_tile<kSummed / 8>(scores, m), kFrom / kStep);
      repeat<kColumns / 16>([&](auto n) {
        FragmentB<kType> b;
        b_columns.template load<16 * n, kFrom>(b);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply<kType>(c[m * kColumns / 8 + 2 * n], a[m], b, 0);
          multiply<kType>(c[m * kColumns / 8 + 2 * n + 1], a[m], b, 1);
        }
      });
    });
  });
}

// Rows of a warp through its own piece of shared memory, kStaged columns at a time: body(column, loaded). Where one
// piece holds them all they are loaded only if `again`, else every time. `rows` makes their Source where it is needed,
// so that it takes no registers elsewhere.
template <class Traits, class Rows, class Body>
LINFORMER_DEVICE void for_each_staged(const Rows& rows, Element<Traits::kType>* staged, bool again, const Body& body) {
  constexpr int kPieces = Traits::kDim / Traits::kStaged;
  repeat<kPieces>([&](auto i) {
    const bool load = kPieces > 1 || again;
    if (load) {
      __syncwarp();    // the piece before it has been read
      load_tile_apart<Traits::kType, Traits::kRows, Traits::kStaged, 32, Traits::kStagePitch>(
          staged, rows(), 0, i * Traits::kStaged, lane_id());
      commit_copies();
      wait_copies<0>();
      __syncwarp();
    }
    body(Constant<i * Traits::kStaged>(), load);
  });
}

// A warp's 16 rows of results through its piece of shared memory, so that rows are written in whole sectors.
template <DType kType, int kStaged, int kTiles>
LINFORMER_DEVICE void store_staged(const float (&c)[kTiles][4], Element<kType>* staged, int pitch, Element<kType>* to,
                                   int64_t stride, int rows, int columns, bool aligned) {
  const int lane = again(lane_id()), g = lane / 4, t = lane % 4;
  repeat<kTiles * 8 / kStaged>([&](auto i) {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kStaged / 8; ++n) {
      const float (&tile)[4] = c[i * kStaged / 8 + n];
      store_pair<kType>(staged + g * pitch + 8 * n + 2 * t, tile[0], tile[1], 2, true);
      store_pair<kType>(staged + (g + 8) * pitch + 8 * n + 2 * t, tile[2], tile[3], 2, true);
    }
    __syncwarp();
    store_rows<kType, kStaged>(to + i * kStaged, stride, rows, columns - i * kStaged, aligned, staged, pitch);
  });
  __syncwarp();
}

constexpr float kLargestFloat = 3.402823466e38f;

// softmax(scale s), computed as 2^(c s - c largest) with c = |scale| log2 e and s of the sign of scale: one
// multiply-add and one exponential an element, and the rounding of c largest is common to a row, so it cancels.
//
// Divided by 2^headroom, K at least: the sums of unnormalised exponentials times values then stay where those of
// probabilities would, and overflow for no values for which the formula does not. Not in fp16: its values cannot
// overflow a sum in fp32, but its small exponentials would lose digits.
//
// With a bias s becomes (scale s + bias) log2 e and c is 1, so that no product overflows: a bias may be the lowest
// number, or -inf, which gives the exponential 0 because the largest score starts at a finite one.
struct Softmax {
  float c, headroom;
  bool negative;

  LINFORMER_DEVICE explicit Softmax(const Arguments& a) : c(a.exponent), headroom(a.headroom), negative(a.negative) {}

  template <int kTiles>
  LINFORMER_DEVICE void orient(float (&s)[kTiles][4]) const {
    if (negative) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = -s[n][e];
      }
    }
  }

  // Onto the scores, of which a thread has columns 8 n + 2 t, and the next one, of each tile: the bias of these
  // columns.
  template <int kTiles>
  LINFORMER_DEVICE static void add_bias(float (&s)[kTiles][4], const Arguments& a, const float* bias) {
    const float* own = bias + 2 * (lane_id() % 4);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 of = *reinterpret_cast<const float2*>(own + 8 * n);
      s[n][0] = fmaf(s[n][0], a.score_factor, of.x);
      s[n][1] = fmaf(s[n][1], a.score_factor, of.y);
      s[n][2] = fmaf(s[n][2], a.score_factor, of.x);
      s[n][3] = fmaf(s[n][3], a.score_factor, of.y);
    }
  }

  // The same of the thread's rows, g and g + 8.
  template <int kTiles>
  LINFORMER_DEVICE static void add_bias_of_rows(float (&s)[kTiles][4], const Arguments& a, const float* bias) {
    const float upper = bias[lane_id() / 4], lower = bias[lane_id() / 4 + 8];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      s[n][0] = fmaf(s[n][0], a.score_factor, upper);
      s[n][1] = fmaf(s[n][1], a.score_factor, upper);
      s[n][2] = fmaf(s[n][2], a.score_factor, lower);
      s[n][3] = fmaf(s[n][3], a.score_factor, lower);
    }
  }

  // All rows may be out, by a bias of -inf.
  LINFORMER_DEVICE static float over(float x, float sum) { return sum == 0.0f ? 0.0f : x / sum; }

  LINFORMER_DEVICE float shift(float largest) const { return __fadd_rn(__fmul_rn(largest, c), headroom); }
  LINFORMER_DEVICE float power(float s, float shift) const { return exp2_of(fmaf(s, c, -shift)); }

  // Of `columns` scores the further ones do not exist: their powers are 0.
  template <int kTiles>
  LINFORMER_DEVICE static void cut(float (&s)[kTiles][4], int columns) {
    if (columns >= 8 * kTiles) return;
    const int left = columns - lane_id() % 4 * 2;    // compared with constants: nothing to hold through the loop around
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = 8 * n + e % 2 < left ? s[n][e] : -INFINITY;
    }
  }

  // One block of scores: s becomes 2^(...), `largest` and this thread's share of `sum` go on, what was summed before
  // counts `correction` times.
  template <int kTiles>
  LINFORMER_DEVICE void step(float (&s)[kTiles][4], float (&largest)[2], float (&sum)[2], float (&correction)[2],
                             bool first) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      most = fmaxf(quad_max(most), largest[half]);
      // Of the rounded products, as those are what `power` subtracts: the exact difference would scale what was summed
      // before by their roundings, which are large where scores are.
      const float shifted = shift(most);
      correction[half] = first ? 0.0f : exp2_of(shift(largest[half]) - shifted);
      largest[half] = most;
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * half + e];
          x = power(x, shifted);
          added += x;
        }
      }
      sum[half] = sum[half] * correction[half] + added;
    }
  }
};

LINFORMER_DEVICE const float* bias_of(const Problem& p, int64_t b, int64_t head_kv) {
  return p.key_bias + b * p.key_bias_batch_stride + head_kv * p.key_bias_head_stride;
}

LINFORMER_DEVICE float bias_in_bits(float bias) {
  const float bits = bias * 1.4426950408889634f;
  return fabsf(bias) <= kLargestFloat ? fminf(fmaxf(bits, -kLargestFloat), kLargestFloat) : bias;
}

// `count` numbers of a bias to shared memory, in bits; 0 from `existing` on. A function of its own for the sake of
// registers, as load_tile_apart.
inline __device__ __noinline__ void load_bias(uint32_t shared, const float* bias, int existing, int count) {
  auto* to = static_cast<float*>(__cvta_shared_to_generic(shared));
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = i < existing ? bias_in_bits(bias[i]) : 0.0f;
}

// Which elements of P are dropped; the kept ones count `multiplier` times.
struct Dropout {
  bool on;
  float multiplier;
  uint32_t threshold, head;
  const int64_t* state;    // seed and offset

  LINFORMER_DEVICE Dropout(const Arguments& a, int64_t b, int64_t query_head)
      : on(a.drop_below != 0),
        multiplier(a.keep_multiplier),
        threshold(a.drop_below),
        head(static_cast<uint32_t>(b * a.p.heads + query_head)),
        state(a.p.rng_state) {}

  LINFORMER_DEVICE Philox4 draw(int row, int column) const {
    return philox(static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), head, static_cast<uint32_t>(state[1]),
                  static_cast<uint64_t>(state[0]));
  }

  LINFORMER_DEVICE bool kept(int row, int column) const {
    const Philox4 random = draw(row, column);
    const int word = column % 4;
    const uint32_t low = word & 1 ? random.word[1] : random.word[0], high = word & 1 ? random.word[3] : random.word[2];
    return (word & 2 ? high : low) >= threshold;
  }

  // Zeroes the dropped ones of a warp's rows from `row` and columns from `column`.
  template <int kTiles>
  LINFORMER_DEVICE void apply(float (&s)[kTiles][4], int row, int column) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t dropped[2] = {0, 0};    // a bit a tile
#pragma unroll 1                       // 10 rounds an iteration: unrolled, they push the scores out of the registers
      for (int n = 0; n < kTiles; ++n) {
        // Columns 2t and 2t + 1 are words 0, 1 or 2, 3 of one draw.
        const Philox4 random = draw(row + g + 8 * half, column + 8 * n + 2 * t);
        dropped[0] |= static_cast<uint32_t>((t & 1 ? random.word[2] : random.word[0]) < threshold) << n;
        dropped[1] |= static_cast<uint32_t>((t & 1 ? random.word[3] : random.word[1]) < threshold) << n;
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (dropped[e] >> n & 1) s[n][2 * half + e] = 0.0f;
        }
      }
    }
  }
};

}    // namespace linformer::cuda
