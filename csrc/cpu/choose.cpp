// Single tokens and windows of a sequence, as linformer_kernels/segments.py defines them, with the same arithmetic to
// the last bit: float32, no multiply-add, sums by halves. So this file is compiled once, without contraction, for any
// processor: it reads each key once, and memory is what that takes.
#include "choose.h"

#include <algorithm>
#include <vector>

#include "common.h"

namespace linformer::cpu {
namespace {

constexpr int64_t kSamples = 64;    // SAMPLES in segments.py

// x[0] of `count` rows, a power of two, each `width` values `stride` apart, summed by halves, in place.
void sum_by_halves(float* x, int64_t count, int64_t stride, int64_t width) {
  for (int64_t half = count / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      for (int64_t j = 0; j < width; j += kWidth) {
        store(x + i * stride + j, load(x + i * stride + j) + load(x + (i + half) * stride + j));
      }
    }
  }
}

// The sum of the lanes by halves, after whole vectors have been summed into x.
float sum_of_halves(float* x, int64_t count) {
  for (int64_t half = count / 2; half > 0; half /= 2) {
    if (half >= kWidth) {
      for (int64_t j = 0; j < half; j += kWidth) store(x + j, load(x + j) + load(x + half + j));
    } else {
      for (int64_t j = 0; j < half; ++j) x[j] += x[half + j];
    }
  }
  return x[0];
}

template <class T>
void copy_as_float(float* target, const T* source, int64_t count, int64_t padded) {
  int64_t j = 0;
  for (; j + kWidth <= count; j += kWidth) store(target + j, load(source + j));
  if (j < count) {
    store(target + j, load_part(source + j, count - j));
    j += kWidth;
  }
  for (; j < padded; ++j) target[j] = 0.0f;
}

// Floats in their order, -0 as 0.
int64_t ordered(float value) {
  value += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

template <class T>
void choose(const SegmentChoice& c, int64_t task) {
  const Problem& p = c.problem;
  const int64_t b = task / p.heads_kv, h = task % p.heads_kv, group = p.heads / p.heads_kv, k = p.proj_dim;
  const int64_t rows = p.key_length(b);
  int32_t* segments = c.segments + b * c.batch_stride + h * c.head_stride + p.key_row(b, 0) * c.row_stride;

  std::vector<int64_t> position;    // of those that take part
  position.reserve(static_cast<size_t>(rows));
  const RowMask mask = mask_of(p, b, 0);
  for (int64_t n = 0; n < rows; ++n) {
    segments[n * c.row_stride] = -1;
    if (mask.kept(n)) position.push_back(n);
  }
  const auto length = static_cast<int64_t>(position.size());
  if (length <= k) {
    for (int64_t r = 0; r < length; ++r)
      segments[position[static_cast<size_t>(r)] * c.row_stride] = static_cast<int32_t>(r);
    return;
  }

  int64_t width = kWidth;    // a power of two
  while (width < p.head_dim) width *= 2;
  std::vector<float> samples(static_cast<size_t>(kSamples * width)), asked(static_cast<size_t>(width)),
      products = asked;
  const bool same = p.mask != nullptr && p.len_q == p.len_k;
  const int64_t queries = same ? length : p.query_length(b);
  for (int64_t member = 0; queries > 0 && member < group; ++member) {
    for (int64_t s = 0; s < kSamples; ++s) {
      const int64_t rank = s * queries / kSamples;
      const int64_t row = same ? position[static_cast<size_t>(rank)] : rank;
      copy_as_float(samples.data() + s * width, row_of<const T>(p.query, b, h * group + member, p.query_row(b, row)),
                    p.head_dim, width);
    }
    sum_by_halves(samples.data(), kSamples, width, width);
    for (int64_t j = 0; j < width; ++j) asked[j] = member ? asked[j] + samples[j] : samples[j];
  }

  struct Scored {
    int64_t score, rank;
  };
  const int64_t wanted = c.singles - c.first - c.last;
  std::vector<uint8_t> single(static_cast<size_t>(length), 0);
  for (int64_t r = 0; r < c.first; ++r) single[static_cast<size_t>(r)] = 1;
  for (int64_t r = length - c.last; r < length; ++r) single[static_cast<size_t>(r)] = 1;
  if (wanted > 0) {
    std::vector<Scored> scored;
    scored.reserve(static_cast<size_t>(length));
    const int64_t whole = p.head_dim / kWidth * kWidth;
    for (int64_t r = c.first; r < length - c.last; ++r) {
      constexpr int64_t kAhead = 16;    // as in pooling
      if (r + kAhead < length) {
        const int64_t n = position[static_cast<size_t>(r + kAhead)];
        Prefetch(row_of<const T>(p.key, b, h, p.key_row(b, n)), 0, 1, p.head_dim).fetch(1);
      }
      const T* key = row_of<const T>(p.key, b, h, p.key_row(b, position[static_cast<size_t>(r)]));
      for (int64_t j = 0; j < whole; j += kWidth) store(products.data() + j, load(key + j) * load(asked.data() + j));
      if (whole < p.head_dim) {
        store(products.data() + whole, load_part(key + whole, p.head_dim - whole) * load(asked.data() + whole));
      }
      for (int64_t j = round_up(p.head_dim, kWidth); j < width; ++j) products[static_cast<size_t>(j)] = 0.0f;
      scored.push_back({ordered(sum_of_halves(products.data(), width)), r});
    }
    const auto better = [](const Scored& x, const Scored& y) {
      return x.score != y.score ? x.score > y.score : x.rank < y.rank;
    };
    std::nth_element(scored.begin(), scored.begin() + (wanted - 1), scored.end(), better);
    for (int64_t i = 0; i < wanted; ++i) single[static_cast<size_t>(scored[static_cast<size_t>(i)].rank)] = 1;
  }

  int64_t place = 0, other = 0;
  for (int64_t r = 0; r < length; ++r) {
    const int64_t segment =
        single[static_cast<size_t>(r)] ? place++ : c.singles + other++ * (k - c.singles) / (length - c.singles);
    segments[position[static_cast<size_t>(r)] * c.row_stride] = static_cast<int32_t>(segment);
  }
}

}    // namespace

void choose_segments(const SegmentChoice& choice, int64_t task) {
  switch (choice.problem.dtype) {
    case DType::kFloat32: return choose<float>(choice, task);
    case DType::kFloat16: return choose<Half>(choice, task);
    case DType::kBFloat16: return choose<BFloat16>(choice, task);
  }
}

}    // namespace linformer::cpu
