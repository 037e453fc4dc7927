// The tasks of the CPU plan. CMake compiles this file once for each instruction set, as LINFORMER_CPU_BUILD.
//
// Forward, for each kv head (DESIGN: K' = E key, V' = F value, out = softmax(scale query K'^T) V'):
//   project          a chunk of E is copied once and multiplied with the same chunk of every head of a group
//   finish_project   partial sums added in a fixed order, rounded to the input type, packed
//   attend           a tile of queries: all its scores, softmax, product with V'; scores never leave the cache
// Backward, with P recomputed and nothing of size N x K kept:
//   attend_backward  dP = dO V'^T; dS = P (dP - rowsum(P dP)) scale; dQ = dS K'; dK' += dS^T Q; dV' += P^T dO
//   project_backward dK = E^T dK'; dE += dK' K^T, held as its transpose so that key is read as it lies
// Pooling, which stands for project and project_backward where E is an average over segments:
//   pool             keys added to the row of their segment, in the order of the sequence, then divided by their number
//   pool_backward    the gradient of a row, over its number, to each of its keys
#include "kernels.h"

#include "common.h"

namespace linformer::cpu {
namespace {

// Whether rows of a result are streamed past the caches: where all results are too large to be still there when they
// are read, and where rows are whole lines.
template <class T>
bool streams(const Plan& plan, const T* target, int64_t stride, int64_t columns) {
  return plan.stream && reinterpret_cast<uintptr_t>(target) % 64 == 0 && stride * sizeof(T) % 64 == 0 &&
         columns * sizeof(T) % 64 == 0;
}

// fp32 rows out to the tensor; row i is multiplied by factor[i] where there are factors, and is zero where it is
// masked.
template <class T>
void store_rows(T* target, int64_t stride, const float* source, int64_t ld, int64_t rows, int64_t columns,
                const float* factor = nullptr, RowMask mask = {}, bool streamed = false) {
  for (int64_t i = 0; i < rows; ++i) {
    T* out = target + i * stride;
    const float* in = source + i * ld;
    if (!mask.kept(i)) {
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(columns) * sizeof(T));
      continue;
    }
    const VecF scale = splat(factor ? factor[i] : 1.0f);
    int64_t j = 0;
    if (streamed) {
      for (; j < columns; j += kWidth) stream(out + j, load(in + j) * scale);
      continue;
    }
    for (; j + kWidth <= columns; j += kWidth) store(out + j, load(in + j) * scale);
    if (j < columns) store_part(out + j, load_part(in + j, columns - j) * scale, columns - j);
  }
}

// Lanes that belong to the row in its last, partial vector.
LINFORMER_INLINE VecI tail_lanes(int64_t k) {
  VecI lanes = {};
  for (int i = 0; i < kWidth; ++i) lanes[i] = i < k % kWidth ? -1 : 0;
  return lanes;
}

// The largest of k values, value(j) a vector of them from j on.
template <class Value>
LINFORMER_INLINE float max_of_values(int64_t k, const Value& value) {
  const VecF lowest = splat(-__builtin_inff());
  const int64_t whole = k / kWidth * kWidth;
  VecF max[4] = {lowest, lowest, lowest, lowest};
  int64_t j = 0;
  for (; j + 4 * kWidth <= whole; j += 4 * kWidth) {
    for (int i = 0; i < 4; ++i) max[i] = lanes_max(value(j + i * kWidth), max[i]);
  }
  for (; j < whole; j += kWidth) max[0] = lanes_max(value(j), max[0]);
  if (whole < k) max[1] = lanes_max(select(tail_lanes(k), value(whole), lowest), max[1]);
  return max_of_lanes(lanes_max(lanes_max(max[0], max[1]), lanes_max(max[2], max[3])));
}

// The value of the row that is largest times c, for c of either sign.
LINFORMER_INLINE float max_of_row(const float* row, int64_t k, float c) {
  const VecU flip = (VecU)splat(c) & 0x80000000u;
  const float most = max_of_values(k, [&](int64_t j) { return (VecF)((VecU)load(row + j) ^ flip); });
  return c < 0 ? -most : most;
}

// The largest of row * c + bias, or 0 where all are minus infinity.
LINFORMER_INLINE float max_of_biased_row(const float* row, int64_t k, float c, const float* bias) {
  const float most = max_of_values(k, [&](int64_t j) { return load(row + j) * c + load(bias + j); });
  return most == -__builtin_inff() ? 0.0f : most;
}

// target = exp2((row - max) * c - headroom(k)), times the dropout factors where there are any, zero from k up to the
// next whole vector; returns the sum before dropout. The difference comes first: of the fused row * c - max * c the
// rounding of max * c alone exceeds the range of exponents from scores of 2^31 on. The target may be the row: 16-bit
// values are written behind what has been read.
template <class Out, bool kBiased>
LINFORMER_INLINE float exponentials_of_row(const float* row, Out* target, int64_t k, float c, float max,
                                           const float* keep, const float* bias) {
  const int64_t whole = k / kWidth * kWidth;
  const VecF top = splat(max);
  const float down = headroom(k);
  const auto power = [&](int64_t j) {
    if constexpr (!kBiased) return exp2_nonpositive((load(row + j) - top) * c, down);
    const VecF score = load(row + j) * c + load(bias + j);
    return select((VecI)(score == splat(-__builtin_inff())), VecF{}, exp2_nonpositive(score - top, down));
  };
  VecF sum = {};
  for (int64_t j = 0; j < whole; j += kWidth) {
    const VecF e = power(j);
    store(target + j, keep ? e * load(keep + j) : e);
    sum += e;
  }
  if (whole < k) {
    const VecF e = select(tail_lanes(k), power(whole), VecF{});
    store(target + whole, keep ? e * load(keep + whole) : e);
    sum += e;
  }
  return sum_of_lanes(sum);
}

// Rows of scores to exponentials of type Out, unnormalised, in place; inverse_sum gets what makes them probabilities.
// All maxima come first, so that no row waits for the end of its own reduction. keep_row(i) is null or row i's dropout
// factors. A bias, of powers of 2, is added to the scaled scores before all that.
template <class Out, class KeepRow>
void exponentials(float* scores, int64_t ld, int64_t rows, int64_t k, float scale, const float* bias,
                  float* inverse_sum, const KeepRow& keep_row) {
  const float c = scale * kLog2E;
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = scores + i * ld;
    inverse_sum[i] = bias ? max_of_biased_row(row, k, c, bias) : max_of_row(row, k, c);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = scores + i * ld;
    Out* out = reinterpret_cast<Out*>(scores + i * ld);
    const float max = inverse_sum[i];
    const float sum = bias ? exponentials_of_row<Out, true>(row, out, k, c, max, keep_row(i), bias)
                           : exponentials_of_row<Out, false>(row, out, k, c, max, keep_row(i), nullptr);
    inverse_sum[i] = inverse_of(sum, bias != nullptr);
  }
}

template <class T>
struct Tasks {
  using Math = typename Choose<T>::Math;
  using Word = typename Math::Word;

  static int64_t words(int64_t values) { return (values + Math::kValues - 1) / Math::kValues; }
  static Panels<Word> panels_of(const Plan& plan, int64_t bh) {
    return Panels<Word>(plan, plan.workspace + plan.panels + bh * plan.panels_stride);
  }

  static void project(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const ProjectScratch<Word> scratch(plan, memory);
    const int64_t split = task % plan.splits;
    const int64_t group = task / plan.splits % plan.group_count();
    const int64_t b = task / plan.splits / plan.group_count();
    const int64_t length = p.key_length(b);
    const int64_t chunks = (p.len_k + plan.chunk - 1) / plan.chunk;
    const int64_t chunks_a_split = (chunks + plan.splits - 1) / plan.splits;
    const int64_t first = split * chunks_a_split * plan.chunk;
    const int64_t last = smaller(length, first + chunks_a_split * plan.chunk);
    const int64_t head0 = group * plan.heads_in_group, head1 = smaller(p.heads_kv, head0 + plan.heads_in_group);

    // A split without rows runs once with none, which leaves zeros in its partial. Keys of all heads come before
    // values, so that one chunk of E or F at a time is in L2.
    for (int64_t n0 = first; n0 == first || n0 < last; n0 += plan.chunk) {
      const int64_t n = last > n0 ? smaller(plan.chunk, last - n0) : 0;
      const RowMask mask = mask_of(p, b, n0);
      const auto multiply_heads = [&](const Rows& rows, const Rows& proj, bool copy, int64_t width, int64_t padded,
                                      float* Partial::* sum, const Prefetch& next) {
        if (copy) {
          copy_rows<Math>(scratch.proj, scratch.ld, row_of<const T>(proj, b, head0, 0) + n0, proj.row_stride,
                          p.proj_dim, n);
        }
        for (int64_t h = head0; h < head1; ++h) {
          const Partial partial(plan, partial_of(plan, b * p.heads_kv + h, split, plan.splits));
          const T* source = row_of<const T>(rows, b, h, p.key_row(b, n0));
          multiply_rows<Math, false>(
              scratch.proj, scratch.ld, source, rows.row_stride, n, width, mask, scratch.panel, p.proj_dim,
              partial.*sum, padded, n0 != first,
              h + 1 < head1 ? Prefetch(source + rows.head_stride, rows.row_stride, n, width) : next);
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
                   Word* panel, Word* panel_t, std::byte* memory) {
    const FinishScratch<Word> scratch(plan, memory);
    const int64_t k = plan.problem.proj_dim;
    if (panel) {
      pack_panels<Math>(panel + words(part.first) * kTileColumns, words(k), source, stride, part.rows, columns);
    }
    if (panel_t) {
      copy_rows<Math>(scratch.rows, scratch.ld, source, stride, part.rows, columns);
      pack_panels_transposed(panel_t, scratch.rows, scratch.ld, part.first, part.rows, words(columns));
    }
  }

  static void finish_project(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const FinishPart part(plan, task);
    const Rows& target = part.value ? p.value_proj : p.key_proj;
    const int64_t width = part.value ? p.value_dim : p.head_dim;
    T* rows = row_of<T>(target, part.b, part.h, part.first);
    if (plan.stages & kProject) {
      const Sum total = sum_of_partials(plan, part, plan.splits);
      store_rows(rows, target.row_stride, total.rows, total.stride, part.rows, width);
    }
    if (plan.stages & kAttend) {
      const Panels<Word> panels = panels_of(plan, part.bh);
      pack(plan, part, rows, target.row_stride, width, part.value ? panels.value : nullptr,
           part.value ? nullptr : panels.key_t, memory);
    }
  }

  static void attend(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const AttendScratch<Word> scratch(plan, memory);
    const int64_t blocks = (p.len_q + plan.query_block - 1) / plan.query_block;
    const int64_t block = task % blocks, h = task / blocks % p.heads, b = task / blocks / p.heads;
    const int64_t h_kv = h / (p.heads / p.heads_kv);
    const Panels<Word> panels = panels_of(plan, b * p.heads_kv + h_kv);
    const float* bias = padded_bias(p, b, h_kv, plan.padded_k, kLog2E, scratch.bias);
    const int64_t end = smaller(p.query_length(b), (block + 1) * plan.query_block);
    for (int64_t m0 = block * plan.query_block; m0 < end; m0 += plan.query_tile) {
      const int64_t rows = smaller(plan.query_tile, end - m0);
      const T* query = row_of<const T>(p.query, b, h, p.query_row(b, m0));
      T* out = row_of<T>(p.out, b, h, p.query_row(b, m0));
      const bool streamed = streams(plan, out, p.out.row_stride, p.value_dim);
      const Operand<Word> q =
          rows_operand<Math>(scratch.query, scratch.ld_query, query, p.query.row_stride, rows, p.head_dim);
      multiply<Math, false>(q.words, q.ld, panels.key_t, rows, p.proj_dim, words(p.head_dim), scratch.scores,
                            scratch.ld_scores, false,
                            Prefetch(query + rows * p.query.row_stride, p.query.row_stride,
                                     smaller(plan.query_tile, p.query_length(b) - m0 - rows), p.head_dim));
      exponentials<typename Math::Value>(scratch.scores, scratch.ld_scores, rows, p.proj_dim, p.scale, bias,
                                         scratch.inverse_sum, [&](int64_t i) -> const float* {
                                           if (p.dropout_p == 0) return nullptr;
                                           dropout_factors(p, b, h, m0 + i, scratch.keep, 0, p.proj_dim, plan.padded_k);
                                           return scratch.keep;
                                         });
      constexpr int64_t kFloats = sizeof(Word) / sizeof(float);
      multiply<Math, false>(reinterpret_cast<const Word*>(scratch.scores), scratch.ld_scores / kFloats, panels.value,
                            rows, p.value_dim, words(p.proj_dim), scratch.out, plan.padded_dv, false,
                            Prefetch(out, p.out.row_stride, streamed ? 0 : rows, p.value_dim));
      store_rows(out, p.out.row_stride, scratch.out, plan.padded_dv, rows, p.value_dim, scratch.inverse_sum, {},
                 streamed);
    }
    end_streams();
  }

  static void prepare_backward(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const FinishPart part(plan, task);
    const Panels<Word> panels = panels_of(plan, part.bh);
    const Rows& source = part.value ? p.value_proj : p.key_proj;
    pack(plan, part, row_of<const T>(source, part.b, part.h, part.first), source.row_stride,
         part.value ? p.value_dim : p.head_dim, part.value ? nullptr : panels.key,
         part.value ? panels.value_t : panels.key_t, memory);
  }

  // A product whose result is rows of a tensor: written there at once if the tensor is fp32 and of whole vectors.
  template <bool kByColumns>
  static void multiply_out(const Word* a, int64_t lda, const Word* b, int64_t rows, int64_t padded, int64_t summed,
                           float* scratch, T* target, int64_t stride, int64_t columns, RowMask mask, bool streamed,
                           Prefetch next) {
    if constexpr (kSame<T, float>) {
      if (columns % kWidth == 0 && mask.keep == nullptr) {
        multiply<Math, kByColumns>(a, lda, b, rows, columns, words(summed),
                                   Target{target, stride, nullptr, 0, streamed}, scratch, padded, next);
        return;
      }
    }
    multiply<Math, kByColumns>(a, lda, b, rows, columns, words(summed), scratch, padded, false, next);
    store_rows(target, stride, scratch, padded, rows, columns, nullptr, mask, streamed);
  }

  // From exponentials e and dP of a row: what softmax and dropout make of them a vector at a time.
  struct RowGradient {
    const float *e, *dp, *keep;    // keep: the dropout factors, or null
    VecF inverse_sum, scale, delta;

    RowGradient() = default;
    RowGradient(const float* e_, const float* dp_, int64_t k, float inverse_sum_, float scale_, const float* keep_)
        : e(e_), dp(dp_), keep(keep_), inverse_sum(splat(inverse_sum_)), scale(splat(scale_)) {
      // Between k and the next whole vector e is zero, and dP comes from zero columns.
      VecF dot0 = {}, dot1 = {};
      int64_t j = 0;
      for (; j + kWidth < k; j += 2 * kWidth) {
        dot0 += load(e + j) * grad_probability(j);
        dot1 += load(e + j + kWidth) * grad_probability(j + kWidth);
      }
      if (j < k) dot0 += load(e + j) * grad_probability(j);
      delta = splat(sum_of_lanes(dot0 + dot1) * inverse_sum_);
    }
    LINFORMER_INLINE VecF grad_probability(int64_t j) const {
      return keep ? load(dp + j) * load(keep + j) : load(dp + j);
    }
    LINFORMER_INLINE VecF probability(int64_t j) const { return load(e + j) * inverse_sum; }
    LINFORMER_INLINE VecF dropped(int64_t j) const { return keep ? probability(j) * load(keep + j) : probability(j); }
    // Also adds it to the gradient of the bias, where that is wanted.
    LINFORMER_INLINE VecF grad_score(int64_t j, float* grad_bias) const {
      const VecF gradient = probability(j) * (grad_probability(j) - delta);
      if (grad_bias) store(grad_bias + j, load(grad_bias + j) + gradient);
      return gradient * scale;
    }
  };

  // P after dropout and dS of the rows, as operands: fp32 in place of e and dP; else words of both by columns and of dS
  // by rows, the rows of a word at a time.
  template <class KeepRow>
  static void differentiate_rows(const AttendBackwardScratch<Word>& scratch, int64_t rows, int64_t k, float scale,
                                 float* grad_bias, const KeepRow& keep_row) {
    const int64_t ld = scratch.ld_scores;
    // There is room for the rows that fill a word: backward_tile is a multiple of 16.
    for (int64_t i = rows; i % Math::kValues; ++i) {
      zero_words(scratch.scores + i * ld, round_up(k, kWidth));
      zero_words(scratch.grad_scores + i * ld, round_up(k, kWidth));
      scratch.inverse_sum[i] = 0.0f;
    }
    const auto gradient = [&](int64_t i) {
      return RowGradient(scratch.scores + i * ld, scratch.grad_scores + i * ld, k, scratch.inverse_sum[i], scale,
                         keep_row(i));
    };
    for (int64_t i = 0; i < rows; i += Math::kValues) {
      if constexpr (Math::kValues == 1) {
        const RowGradient row = gradient(i);
        for (int64_t j = 0; j < k; j += kWidth) {
          const VecF p = row.dropped(j), ds = row.grad_score(j, grad_bias);
          store(scratch.scores + i * ld + j, p);
          store(scratch.grad_scores + i * ld + j, ds);
        }
      } else {
        RowGradient row[Math::kValues];
#pragma GCC unroll 4
        for (int64_t r = 0; r < Math::kValues; ++r) row[r] = gradient(i + r);
        for (int64_t j = 0; j < k; j += kWidth) {
          VecF p[Math::kValues], ds[Math::kValues];
#pragma GCC unroll 4
          for (int64_t r = 0; r < Math::kValues; ++r) {
            p[r] = row[r].dropped(j);
            ds[r] = row[r].grad_score(j, grad_bias);
            store(reinterpret_cast<BFloat16*>(scratch.grad_scores_rows + (i + r) * scratch.ld_rows) + j, ds[r]);
          }
          Math::store_columns(scratch.scores_columns + i / Math::kValues * ld + j, p);
          Math::store_columns(scratch.grad_scores_columns + i / Math::kValues * ld + j, ds);
        }
      }
    }
  }

  static void attend_backward(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const AttendBackwardScratch<Word> scratch(plan, memory);
    const int64_t split = task % plan.backward_splits, bh = task / plan.backward_splits;
    const int64_t b = bh / p.heads_kv, h_kv = bh % p.heads_kv, group = p.heads / p.heads_kv;
    const Panels<Word> panels = panels_of(plan, bh);
    const Partial partial(plan, partial_of(plan, bh, split, plan.backward_splits));
    const int64_t length = p.query_length(b);
    // The tiles of all query heads of this kv head, in one row; this split takes its share of them.
    const int64_t tiles_a_head = (length + plan.backward_tile - 1) / plan.backward_tile;
    const int64_t tiles = tiles_a_head * group;
    const int64_t first = split * tiles / plan.backward_splits, last = (split + 1) * tiles / plan.backward_splits;
    const bool need_scores_gradient = p.needs_grad_scores();
    if (first == last) {
      zero_words(partial.key, Partial(plan, nullptr).bytes / 4);
      return;
    }
    const float* bias = padded_bias(p, b, h_kv, plan.padded_k, kLog2E, scratch.bias);
    float* grad_bias = p.grad_key_bias ? scratch.grad_bias : nullptr;
    for (int64_t t = first; t < last; ++t) {
      const int64_t h = h_kv * group + t / tiles_a_head;
      const int64_t m0 = t % tiles_a_head * plan.backward_tile;
      const int64_t rows = smaller(plan.backward_tile, length - m0);
      const T* query = row_of<const T>(p.query, b, h, p.query_row(b, m0));
      const T* grad_out = row_of<const T>(p.grad_out, b, h, p.query_row(b, m0));
      const Operand<Word> q =
          rows_operand<Math>(scratch.query, scratch.ld_query, query, p.query.row_stride, rows, p.head_dim);
      multiply<Math, false>(q.words, q.ld, panels.key_t, rows, p.proj_dim, words(p.head_dim), scratch.scores,
                            scratch.ld_scores, false, Prefetch(grad_out, p.grad_out.row_stride, rows, p.value_dim));
      const Operand<Word> g =
          rows_operand<Math>(scratch.grad_out, scratch.ld_grad_out, grad_out, p.grad_out.row_stride, rows, p.value_dim);
      if (need_scores_gradient) {
        multiply<Math, false>(g.words, g.ld, panels.value_t, rows, p.proj_dim, words(p.value_dim), scratch.grad_scores,
                              scratch.ld_scores, false,
                              Prefetch(query + rows * p.query.row_stride, p.query.row_stride,
                                       smaller(plan.backward_tile, length - m0 - rows), p.head_dim));
      } else {
        zero_words(scratch.grad_scores, rows * scratch.ld_scores);
      }
      exponentials<float>(scratch.scores, scratch.ld_scores, rows, p.proj_dim, p.scale, bias, scratch.inverse_sum,
                          [](int64_t) { return nullptr; });
      if (grad_bias) zero_words(grad_bias, plan.padded_k);
      differentiate_rows(scratch, rows, p.proj_dim, p.scale, grad_bias, [&](int64_t i) -> const float* {
        if (p.dropout_p == 0) return nullptr;
        float* factor = scratch.keep + i % Math::kValues * plan.padded_k;
        dropout_factors(p, b, h, m0 + i, factor, 0, p.proj_dim, plan.padded_k);
        return factor;
      });
      if (grad_bias) add_bias_of_tile(plan, grad_bias, partial.bias, t == first);
      // fp32 rows that serve as A serve as B too; pairs along the other dimension are made of the tensor.
      const auto add_product = [&](const Word* a, const Operand<Word>& words_by_rows, const T* source, int64_t stride,
                                   int64_t width, float* sum, int64_t padded) {
        const auto add = [&](const auto* rows_of_b, int64_t ld) {
          multiply_rows<Math, true>(a, scratch.ld_scores, rows_of_b, ld, rows, width, RowMask(), scratch.panel,
                                    p.proj_dim, sum, padded, t != first);
        };
        if constexpr (Math::kValues == 1) {
          add(words_by_rows.words, words_by_rows.ld);
        } else {
          add(source, stride);
        }
      };
      if (plan.need_grad_value_proj) {
        add_product(scratch.scores_columns, g, grad_out, p.grad_out.row_stride, p.value_dim, partial.value,
                    plan.padded_dv);
      }
      if (plan.need_grad_key_proj) {
        add_product(scratch.grad_scores_columns, q, query, p.query.row_stride, p.head_dim, partial.key, plan.padded_d);
      }
      if (p.grad_query.data) {
        T* target = row_of<T>(p.grad_query, b, h, p.query_row(b, m0));
        multiply_out<false>(scratch.grad_scores_rows, scratch.ld_rows, panels.key, rows, plan.padded_d, p.proj_dim,
                            scratch.grad_query, target, p.grad_query.row_stride, p.head_dim, RowMask(),
                            streams(plan, target, p.grad_query.row_stride, p.head_dim), Prefetch());
      }
    }
    end_streams();
  }

  // dK' and dV': written out where the caller wants them, packed where project_backward follows.
  static void finish_backward(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const FinishPart part(plan, task);
    finish_bias(plan, part);
    const Rows& tensor = part.value ? p.grad_value_proj : p.grad_key_proj;
    const int64_t width = part.value ? p.value_dim : p.head_dim;
    T* rows = tensor.data ? row_of<T>(tensor, part.b, part.h, part.first) : nullptr;
    const bool follows = plan.stages & kProjectBackward;
    const Panels<Word> panels = panels_of(plan, part.bh);
    Word* panel = part.value ? panels.grad_value : panels.grad_key;
    Word* panel_t = part.value ? panels.grad_value_t : panels.grad_key_t;
    if (!(plan.stages & kAttendBackward)) {
      pack(plan, part, rows, tensor.row_stride, width, panel, panel_t, memory);
    } else if (part.value ? plan.need_grad_value_proj : plan.need_grad_key_proj) {
      const Sum total = sum_of_partials(plan, part, plan.backward_splits);
      if (rows) store_rows(rows, tensor.row_stride, total.rows, total.stride, part.rows, width);
      if (follows) pack(plan, part, total.rows, total.stride, width, panel, panel_t, memory);
    }
  }

  static void project_backward(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const ProjectBackwardScratch<Word> scratch(plan, memory);
    const MatrixPart matrix(plan, task);
    const int64_t n0 = matrix.n0, columns = matrix.columns, used = matrix.used, head0 = matrix.head0,
                  head1 = matrix.head1;
    // With F = E one task serves both, and their gradients meet in one sum; else one task each.
    const bool with_key = p.shared_kv || !matrix.value, with_value = p.shared_kv || matrix.value;
    const Rows& proj = matrix.value ? p.proj_value : p.proj_key;
    const Rows& grad_proj = matrix.value ? p.grad_proj_value : p.grad_proj_key;
    if (used > 0) {
      const T* source = row_of<const T>(proj, matrix.b0, head0, 0) + n0;
      copy_columns(scratch.proj, scratch.ld_proj, source, proj.row_stride, p.proj_dim, used, used);
    }
    if (grad_proj.data) zero_words(scratch.grad_proj_t, columns * plan.padded_k);

    // dE first, then dK: the rows of one head are fetched while the product before them runs, and so is the target.
    const auto differentiate = [&](const Rows& rows, const Rows& grad_rows, const Word* panel, const Word* panel_t,
                                   int64_t width, int64_t padded, int64_t b, int64_t h, int64_t n, Prefetch next) {
      const RowMask mask = mask_of(p, b, n0);
      T* target = grad_rows.data ? row_of<T>(grad_rows, b, h, p.key_row(b, n0)) : nullptr;
      const bool streamed = streams(plan, target, grad_rows.row_stride, width);
      if (grad_proj.data) {
        const Operand<Word> source =
            rows_operand<Math>(scratch.rows, scratch.ld_rows, row_of<const T>(rows, b, h, p.key_row(b, n0)),
                               rows.row_stride, n, width, mask);
        multiply<Math, false>(source.words, source.ld, panel_t, n, p.proj_dim, words(width), scratch.grad_proj_t,
                              plan.padded_k, true,
                              Prefetch(target, grad_rows.row_stride, target && !streamed ? n : 0, width));
      }
      if (target) {
        multiply_out<true>(scratch.proj, scratch.ld_proj, panel, n, padded, p.proj_dim, scratch.grad_rows, target,
                           grad_rows.row_stride, width, mask, streamed, grad_proj.data ? next : Prefetch());
      }
    };
    for (int64_t b = matrix.b0; b < matrix.b1; ++b) {
      const int64_t n = smaller(used, p.key_length(b) - n0);
      for (int64_t h = head0; n > 0 && h < head1; ++h) {
        const Panels<Word> panels = panels_of(plan, b * p.heads_kv + h);
        const Rows& first = with_key ? p.key : p.value;
        const Prefetch next_head(row_of<const T>(first, b, h + 1, p.key_row(b, n0)), first.row_stride,
                                 h + 1 < head1 ? n : 0, with_key ? p.head_dim : p.value_dim);
        const Prefetch value(row_of<const T>(p.value, b, h, p.key_row(b, n0)), p.value.row_stride, n, p.value_dim);
        if (with_key) {
          differentiate(p.key, p.grad_key, panels.grad_key, panels.grad_key_t, p.head_dim, plan.padded_d, b, h, n,
                        with_value ? value : next_head);
        }
        if (with_value) {
          differentiate(p.value, p.grad_value, panels.grad_value, panels.grad_value_t, p.value_dim, plan.padded_dv, b,
                        h, n, next_head);
        }
      }
    }
    if (grad_proj.data)
      store_transposed(row_of<T>(grad_proj, matrix.b0, head0, 0) + n0, grad_proj.row_stride, columns,
                       scratch.grad_proj_t, plan);
    end_streams();
  }

  // dE^T of some columns, out as columns of dE, square by square.
  static void store_transposed(T* target, int64_t stride, int64_t columns, const float* source, const Plan& plan) {
    constexpr int64_t kSide = 16;
    const bool streamed = streams(plan, target, stride, kSide);
    float square[kSide * kSide];
    for (int64_t k = 0; k < plan.problem.proj_dim; k += kSide) {
      const int64_t rows = smaller(kSide, plan.problem.proj_dim - k);
      for (int64_t j = 0; j < columns; j += kSide) {
        const int64_t count = smaller(kSide, columns - j);
        for (int64_t r = 0; r < rows; r += kWidth) {
          for (int64_t i = 0; i < count; i += kWidth) {
            VecF block[kWidth];
            for (int q = 0; q < kWidth; ++q) {
              block[q] = i + q < count ? load(source + (j + i + q) * plan.padded_k + k + r) : VecF{};
            }
            transpose(block);
            for (int q = 0; q < kWidth; ++q) store(square + (r + q) * kSide + i, block[q]);
          }
        }
        store_rows(target + k * stride + j, stride, square, kSide, rows, count, nullptr, {},
                   streamed && count == kSide);
      }
    }
  }

  // The segments of one head of a sequence.
  static const int32_t* segments_of(const Problem& p, int64_t b, int64_t h) {
    return p.segments + b * p.segments_batch_stride + h * p.segments_head_stride +
           p.key_row(b, 0) * p.segments_row_stride;
  }

  // Each row adds up its keys in the order of the sequence, and no task shares a row with another: the same bits
  // however the rows are divided between tasks, and wherever the sequence lies in its batch.
  static void pool(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const PoolScratch scratch(plan, memory);
    const PoolPart part(plan, task);
    const Rows& source = part.value ? p.value : p.key;
    const int64_t width = part.value ? p.value_dim : p.head_dim, length = p.key_length(part.b);
    const int64_t whole = width / kWidth * kWidth, heads = part.head1 - part.head0;
    const auto rows_here = static_cast<uint64_t>(part.rows);
    zero_words(scratch.rows, heads * part.rows * scratch.ld);
    zero_words(scratch.count, heads * part.rows);
    const auto add_row = [&](int64_t n, int64_t i) {
      const int32_t* segments = segments_of(p, part.b, part.head0 + i);
      const auto k = static_cast<uint64_t>(segments[n * p.segments_row_stride] - part.first);
      if (k >= rows_here) return;
      const uint64_t place = static_cast<uint64_t>(i) * rows_here + k;
      scratch.count[place] += 1.0f;
      float* sum = scratch.rows + place * static_cast<uint64_t>(scratch.ld);
      const T* row = row_of<const T>(source, part.b, part.head0 + i, p.key_row(part.b, n));
      for (int64_t j = 0; j < whole; j += kWidth) store(sum + j, load(sum + j) + load(row + j));
      if (whole < width) store(sum + whole, load(sum + whole) + load_part(row + whole, width - whole));
    };
    for (int64_t n = 0; n < length; ++n) {
      for (int64_t i = 0; i < heads; ++i) add_row(n, i);
    }
    const Rows& target = part.value ? p.value_proj : p.key_proj;
    for (int64_t i = 0; i < heads; ++i) {
      const int64_t h = part.head0 + i;
      float* sums = scratch.rows + i * part.rows * scratch.ld;
      for (int64_t k = 0; k < part.rows; ++k) {
        const float count = scratch.count[i * part.rows + k];
        float* sum = sums + k * scratch.ld;
        for (int64_t j = 0; count > 1 && j < width; j += kWidth) store(sum + j, load(sum + j) / count);
        if (!part.value) p.count[(part.b * p.heads_kv + h) * p.proj_dim + part.first + k] = count;
      }
      store_rows(row_of<T>(target, part.b, h, part.first), target.row_stride, sums, scratch.ld, part.rows, width);
    }
  }

  static void pool_backward(const Plan& plan, int64_t task, std::byte* memory) {
    const Problem& p = plan.problem;
    const PoolScratch scratch(plan, memory);
    const int64_t blocks = (p.len_k + plan.pool_block - 1) / plan.pool_block;
    const int64_t first = task % blocks * plan.pool_block;
    const bool value = task / blocks % 2 != 0;
    const int64_t bh = task / blocks / 2, b = bh / p.heads_kv, h = bh % p.heads_kv;
    const Rows& source = value ? p.grad_value_proj : p.grad_key_proj;
    const Rows& target = value ? p.grad_value : p.grad_key;
    const int64_t width = value ? p.value_dim : p.head_dim;
    const int64_t last = smaller(p.key_length(b), first + plan.pool_block);
    if (target.data == nullptr || first >= last) return;
    for (int64_t k = 0; k < p.proj_dim; ++k) {
      const float count = p.count[bh * p.proj_dim + k];
      const T* row = row_of<const T>(source, b, h, k);
      float* out = scratch.rows + k * scratch.ld;
      int64_t j = 0;
      for (; j + kWidth <= width; j += kWidth) store(out + j, load(row + j) / count);
      if (j < width) store(out + j, load_part(row + j, width - j) / count);
    }
    const int32_t* segments = segments_of(p, b, h);
    T* rows = row_of<T>(target, b, h, p.key_row(b, 0));
    const bool streamed = streams(plan, rows, target.row_stride, width);
    for (int64_t n = first; n < last; ++n) {
      const auto k = static_cast<uint64_t>(static_cast<int64_t>(segments[n * p.segments_row_stride]));
      T* row = rows + n * target.row_stride;
      if (k >= static_cast<uint64_t>(p.proj_dim)) {
        std::memset(static_cast<void*>(row), 0, static_cast<size_t>(width) * sizeof(T));
      } else {
        store_rows(row, 0, scratch.rows + k * static_cast<uint64_t>(scratch.ld), 0, 1, width, nullptr, {}, streamed);
      }
    }
    end_streams();
  }
};

// The rate of `steps` rounds of multiply-adds on enough independent sums to cover the latency of two multiply-add
// units; the operands never change, so the values stay finite.
template <class Math>
double multiply_add_gflops(int64_t steps) {
  constexpr int kSums = kTileRows * kVectors;
  VecF sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = splat(static_cast<float>(i));
  VecF factor = splat(0.5f);
  __asm__ volatile("" : "+m"(factor));    // not a constant for the compiler
  timespec begin, end;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      if constexpr (Math::kValues == 4) {
        sum[i] = Math::multiply_add(sum[i], VecW{} + 0x3c003c003c003c00u, (VecW)factor);
      } else if constexpr (Math::kValues == 2) {
        sum[i] = Math::multiply_add(sum[i], 0x3c003c00u, factor);
      } else {
        sum[i] = sum[i] * factor + factor;
      }
    }
  }
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
  VecF all = {};
  for (int i = 0; i < kSums; ++i) all += sum[i];
  __asm__ volatile("" : "+m"(all));
  const double seconds =
      static_cast<double>(end.tv_sec - begin.tv_sec) + 1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
  return 2e-9 * kSums * kWidth * static_cast<double>(steps * Math::kValues) / seconds;
}

double peak_gflops(DType type) {
  // Best of several short runs: a shared machine is seldom quiet for long.
  double best = 0;
  for (int run = 0; run < 25; ++run) {
    const double rate = type == DType::kBFloat16 ? multiply_add_gflops<Choose<BFloat16>::Math>(200000)
                                                 : multiply_add_gflops<Fp32>(200000);
    if (rate > best) best = rate;
  }
  return best;
}

double probe_gflops() { return multiply_add_gflops<Fp32>(9000); }

#define LINFORMER_TASKS(T)                                                                                       \
  {Tasks<T>::project,         Tasks<T>::finish_project,  Tasks<T>::attend,           Tasks<T>::prepare_backward, \
   Tasks<T>::attend_backward, Tasks<T>::finish_backward, Tasks<T>::project_backward, Tasks<T>::pool,             \
   Tasks<T>::pool_backward}

}    // namespace

extern const KernelTable LINFORMER_CPU_TABLE;
const KernelTable LINFORMER_CPU_TABLE = {
    LINFORMER_CPU_NAME,
    {kTileColumns, LINFORMER_CPU_BF16, false},
    {LINFORMER_TASKS(float), LINFORMER_TASKS(Half), LINFORMER_TASKS(BFloat16)},
    peak_gflops,
    probe_gflops,
    nullptr,
};

}    // namespace linformer::cpu
