// What the tasks of every kernel build need besides their products: where rows lie, dropout, sums of partials, the
// peak.
#pragma once

#include <time.h>

#include "../philox.h"
#include "gemm.h"
#include "layout.h"

namespace linformer::cpu {
namespace {

constexpr float kLog2E = 0x1.715476p0f;

template <class T>
LINFORMER_INLINE T* row_of(const Rows& rows, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(rows.data) + b * rows.batch_stride + h * rows.head_stride + row * rows.row_stride;
}

// The row's dropout factors, 0 or 1 / (1 - p), of `count` columns from `first` (a multiple of 4) on; then zeros, up to
// `padded`.
void dropout_factors(const Problem& p, int64_t b, int64_t head, int64_t row, float* factor, int64_t first,
                     int64_t count, int64_t padded) {
  const uint32_t threshold = dropout_threshold(p.dropout_p);
  const float kept = static_cast<float>(1.0 / (1.0 - p.dropout_p));
  for (int64_t k = 0; k < count; k += 4) {
    const Philox4 random = philox(static_cast<uint32_t>((first + k) / 4), static_cast<uint32_t>(row),
                                  static_cast<uint32_t>(b * p.heads + head), static_cast<uint32_t>(p.rng_state[1]),
                                  static_cast<uint64_t>(p.rng_state[0]));
    for (int64_t i = 0; i < smaller(4, count - k); ++i) factor[k + i] = random.word[i] >= threshold ? kept : 0.0f;
  }
  for (int64_t k = count; k < padded; ++k) factor[k] = 0.0f;
}

// So that a row of k exponentials sums to no more than 1: sums of unnormalised exponentials times values then stay
// where those of probabilities would, and overflow for no values for which the formula does not.
LINFORMER_INLINE float headroom(int64_t k) {
  return k > 1 ? static_cast<float>(64 - __builtin_clzll(static_cast<uint64_t>(k - 1))) : 0.0f;
}

// The bias of K' of one head times a factor, padded with zeros; null without one. What is finite stays finite: minus
// infinity alone takes a row out.
const float* padded_bias(const Problem& p, int64_t b, int64_t h_kv, int64_t padded, float factor, float* target) {
  if (p.key_bias == nullptr) return nullptr;
  constexpr float kMost = 0x1.fffffep127f;
  const float* source = p.key_bias + b * p.key_bias_batch_stride + h_kv * p.key_bias_head_stride;
  for (int64_t k = 0; k < padded; ++k) {
    const float value = k < p.proj_dim ? source[k] : 0.0f;
    const float scaled = value * factor;
    target[k] = scaled < -kMost && value >= -kMost ? -kMost : scaled;
  }
  return target;
}

// What makes probabilities of exponentials with this sum. A bias of -inf may take all rows out; without one a sum of
// zero comes of scores that are all -inf, and is a NaN's.
LINFORMER_INLINE float inverse_of(float sum, bool biased) { return biased && sum == 0.0f ? 0.0f : 1.0f / sum; }
LINFORMER_INLINE VecF inverse_of(VecF sum, bool biased) {
  const VecF inverse = splat(1.0f) / sum;
  return biased ? select((VecI)(sum == VecF{}), VecF{}, inverse) : inverse;
}

LINFORMER_INLINE std::byte* partial_of(const Plan& plan, int64_t bh, int64_t split, int64_t splits) {
  return plan.workspace + plan.partials + (bh * splits + split) * Partial(plan, nullptr).bytes;
}

// A tile's gradient of the bias to that of its split.
LINFORMER_INLINE void add_bias_of_tile(const Plan& plan, const float* tile, float* sum, bool first) {
  for (int64_t j = 0; j < plan.padded_k; j += kWidth)
    store(sum + j, first ? load(tile + j) : load(sum + j) + load(tile + j));
}

// The gradient of the bias, out from the partials of its part of K'.
void finish_bias(const Plan& plan, const FinishPart& part) {
  if (plan.problem.grad_key_bias == nullptr || part.value) return;
  float* target = plan.problem.grad_key_bias + part.bh * plan.problem.proj_dim + part.first;
  for (int64_t s = 0; s < plan.backward_splits; ++s) {
    const float* more = Partial(plan, partial_of(plan, part.bh, s, plan.backward_splits)).bias + part.first;
    for (int64_t i = 0; i < part.rows; ++i) target[i] = s ? target[i] + more[i] : more[i];
  }
}

LINFORMER_INLINE RowMask mask_of(const Problem& p, int64_t b, int64_t row) {
  if (p.mask == nullptr) return {};
  return {p.mask + b * p.mask_batch_stride + row * p.mask_row_stride, p.mask_row_stride};
}

// fp32 rows of K', V' or their gradients.
struct Sum {
  const float* rows;
  int64_t stride;
};

// The part's sum over all splits, in their order, left in the first partial.
Sum sum_of_partials(const Plan& plan, const FinishPart& part, int64_t splits) {
  const int64_t stride = part.value ? plan.padded_dv : plan.padded_d;
  const auto rows_of_split = [&](int64_t split) {
    const Partial partial(plan, partial_of(plan, part.bh, split, splits));
    return (part.value ? partial.value : partial.key) + part.first * stride;
  };
  float* total = rows_of_split(0);
  for (int64_t s = 1; s < splits; ++s) {
    const float* more = rows_of_split(s);
    for (int64_t i = 0; i < part.rows * stride; i += kWidth) store(total + i, load(total + i) + load(more + i));
  }
  return {total, stride};
}

}    // namespace
}    // namespace linformer::cpu
