// Pooling: rows of K' and V' are means of the keys and values of a segment; backward, each key gets the gradient of its
// row, over the count. One launch each, no workspace.
//
// Forward: a warp owns kPoolRows rows of K' or of V' of one head and passes over the numbers of the segments, 32 at a
// time. A ballot finds the keys of each row, whose columns the lanes add to fp32 sums, a lane its own columns, in the
// order of the sequence. So each sum has one order, that of the positions, which no schedule changes and which the CPU
// has too: the same bits. A pass for each kPoolRows rows, instead of a sort, because a number is 4 bytes and a key and
// its value some hundred, and because the warps of a CTA pass over the same numbers at about the same time.
//
// A number outside [0, K) belongs to no row: its key is not read, its gradient is zero.
#include "kernels.h"
#include "tile.cuh"

namespace linformer::cuda {
namespace {

// Adjacent columns of a lane.
template <DType kType, int kOwn>
struct alignas(kOwn* kBytes<kType> < 16 ? kOwn * kBytes<kType> : 16) Columns {
  Element<kType> values[kOwn];
};

template <DType kType>
LINFORMER_DEVICE float widened(Element<kType> value) {
  if constexpr (kType == DType::kFloat32) {
    return value;
  } else if constexpr (kType == DType::kFloat16) {
    return __half2float(__ushort_as_half(value));
  } else {
    return __uint_as_float(static_cast<uint32_t>(value) << 16);
  }
}

// `count` columns exist from the first of this lane on, or more.
template <DType kType, int kOwn>
LINFORMER_DEVICE Columns<kType, kOwn> load_own(const Element<kType>* from, int count, bool aligned) {
  Columns<kType, kOwn> own;
  if (aligned && count >= kOwn) return *reinterpret_cast<const Columns<kType, kOwn>*>(from);
#pragma unroll
  for (int e = 0; e < kOwn; ++e) own.values[e] = e < count ? from[e] : Element<kType>(0);
  return own;
}
template <DType kType, int kOwn>
LINFORMER_DEVICE void store_own(Element<kType>* to, const Columns<kType, kOwn>& own, int count, bool aligned) {
  if (aligned && count >= kOwn) {
    *reinterpret_cast<Columns<kType, kOwn>*>(to) = own;
  } else {
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      if (e < count) to[e] = own.values[e];
    }
  }
}

LINFORMER_DEVICE Sequence pooled_sequence(const Problem& p, int64_t b) {
  return sequence_of(p.cu_seqlens_k, b, p.total_k, p.len_k);
}
LINFORMER_DEVICE const int32_t* segments_of(const Problem& p, int64_t b, int64_t head, int64_t row) {
  return p.segments + b * p.segments_batch_stride + head * p.segments_head_stride + row * p.segments_row_stride;
}

template <DType kType, int kOwn>
LINFORMER_DEVICE void pool_rows(const Arguments& a, bool value, int64_t b, int64_t head, int first) {
  const Problem& p = a.p;
  const Sequence sequence = pooled_sequence(p, b);
  const Rows& tensor = value ? p.value : p.key;
  const int lane = lane_id(), column = lane * kOwn;
  const int columns = max(static_cast<int>(value ? p.value_dim : p.head_dim) - column, 0);
  const bool aligned = (a.aligned & (value ? kAlignedValue : kAlignedKey)) != 0;
  const Element<kType>* rows = rows_at<kType>(tensor, b, head, sequence.start) + column;
  const int32_t* segments = segments_of(p, b, head, sequence.start);
  const int taken = min(static_cast<int>(p.proj_dim) - first, kPoolRows);

  float sums[kPoolRows][kOwn];
  int counts[kPoolRows];
#pragma unroll
  for (int r = 0; r < kPoolRows; ++r) {
    counts[r] = 0;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) sums[r][e] = 0.0f;
  }
  const auto segment_at = [&](int64_t n) { return n < sequence.length ? segments[n * p.segments_row_stride] : -1; };
  int segment = segment_at(lane);
  for (int64_t n = 0; n < sequence.length; n += 32) {
    const uint32_t own = static_cast<uint32_t>(segment) - static_cast<uint32_t>(first);
    segment = segment_at(n + 32 + lane);    // while the rows of these are on their way
    if (!__any_sync(0xffffffffu, own < static_cast<uint32_t>(taken))) continue;
#pragma unroll
    for (int r = 0; r < kPoolRows; ++r) {
      uint32_t members = __ballot_sync(0xffffffffu, r < taken && own == static_cast<uint32_t>(r));
      counts[r] += __popc(members);
      // Some rows at a time, so that they are loaded together. Those behind the last are zero and change no sum, as no
      // sum is -0.
      while (members) {
        Columns<kType, kOwn> ahead[kPoolAhead] = {};
#pragma unroll
        for (int i = 0; i < kPoolAhead; ++i) {
          if (members) {
            const Element<kType>* row = rows + (n + __ffs(members) - 1) * tensor.row_stride;
            ahead[i] = load_own<kType, kOwn>(row, columns, aligned);
            members &= members - 1;
          }
        }
#pragma unroll
        for (int i = 0; i < kPoolAhead; ++i) {
#pragma unroll
          for (int e = 0; e < kOwn; ++e) sums[r][e] += widened<kType>(ahead[i].values[e]);
        }
      }
    }
  }

  const Rows& target = value ? p.value_proj : p.key_proj;
  const bool aligned_target = (a.aligned & (value ? kAlignedValueProj : kAlignedKeyProj)) != 0;
#pragma unroll
  for (int r = 0; r < kPoolRows; ++r) {
    if (r >= taken) continue;
    const float count = static_cast<float>(counts[r]);
    Columns<kType, kOwn> mean;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) mean.values[e] = rounded<kType>(sums[r][e] / fmaxf(count, 1.0f));
    store_own<kType, kOwn>(rows_at<kType>(target, b, head, first + r) + column, mean, columns, aligned_target);
    if (!value && lane == 0) p.count[(b * p.heads_kv + head) * p.proj_dim + first + r] = count;
  }
}

template <DType kType, int kOwn>
LINFORMER_DEVICE void spread_rows(const Arguments& a, bool value, int64_t b, int64_t head, int first) {
  const Problem& p = a.p;
  const Sequence sequence = pooled_sequence(p, b);
  const Rows &target = value ? p.grad_value : p.grad_key, &source = value ? p.grad_value_proj : p.grad_key_proj;
  const int lane = lane_id(), column = lane * kOwn;
  const int columns = max(static_cast<int>(value ? p.value_dim : p.head_dim) - column, 0);
  const bool aligned_target = (a.aligned & (value ? kAlignedGradValue : kAlignedGradKey)) != 0;
  const bool aligned = (a.aligned & (value ? kAlignedGradValueProj : kAlignedGradKeyProj)) != 0;
  const Element<kType>* grads = rows_at<kType>(source, b, head, 0) + column;
  Element<kType>* rows = rows_at<kType>(target, b, head, sequence.start + first) + column;
  const int taken = min(sequence.length - first, kPoolKeys);

  int own = -1;
  float own_count = 1.0f;
  if (lane < taken) own = *segments_of(p, b, head, sequence.start + first + lane);
  if (own < 0 || own >= p.proj_dim) {
    own = -1;
  } else {
    own_count = p.count[(b * p.heads_kv + head) * p.proj_dim + own];
  }
#pragma unroll 4
  for (int n = 0; n < taken; ++n) {
    const int segment = __shfl_sync(0xffffffffu, own, n);
    const float count = __shfl_sync(0xffffffffu, own_count, n);
    Columns<kType, kOwn> gradient = {};
    if (segment >= 0) {
      gradient = load_own<kType, kOwn>(grads + segment * source.row_stride, columns, aligned);
#pragma unroll
      for (int e = 0; e < kOwn; ++e) gradient.values[e] = rounded<kType>(widened<kType>(gradient.values[e]) / count);
    }
    store_own<kType, kOwn>(rows + n * target.row_stride, gradient, columns, aligned_target);
  }
}

// body(kOwn) with as many columns a lane as `columns` need.
template <class Body>
LINFORMER_DEVICE void with_own_columns(int64_t columns, const Body& body) {
  if (columns <= 32) return body(std::integral_constant<int, 1>());
  if (columns <= 64) return body(std::integral_constant<int, 2>());
  if (columns <= 128) return body(std::integral_constant<int, 4>());
  body(std::integral_constant<int, 8>());
}

// A task of a warp: the one of K' and V', the head and the sequence, and the block of rows.
template <DType kType>
LINFORMER_DEVICE void pool(const Arguments& a) {
  const Problem& p = a.p;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (task >= a.pool_tasks) return;
  const int64_t blocks = (p.proj_dim + kPoolRows - 1) / kPoolRows;
  const int64_t head = task / blocks / 2 % p.heads_kv, b = task / blocks / 2 / p.heads_kv;
  const bool value = task / blocks % 2 != 0;
  const int first = static_cast<int>(task % blocks) * kPoolRows;
  with_own_columns(value ? p.value_dim : p.head_dim,
                   [&](auto own) { pool_rows<kType, decltype(own)::value>(a, value, b, head, first); });
}

template <DType kType>
LINFORMER_DEVICE void pool_backward(const Arguments& a) {
  const Problem& p = a.p;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (task >= a.pool_tasks) return;
  const int64_t head = task / 2 % p.heads_kv;
  const bool value = task % 2 != 0;
  int b = 0, first = 0;
  if (!(value ? p.grad_value : p.grad_key).data || !find_item(p.cu_seqlens_k, p.batch, p.total_k, p.len_k, kPoolKeys,
                                                              static_cast<int>(task / 2 / p.heads_kv), &b, &first)) {
    return;
  }
  with_own_columns(value ? p.value_dim : p.head_dim,
                   [&](auto own) { spread_rows<kType, decltype(own)::value>(a, value, b, head, first); });
}

}    // namespace

#define LINFORMER_KERNEL(name, type)                                                                 \
  extern "C" __global__ void __launch_bounds__(kThreads) name(const __grid_constant__ Arguments a) { \
    pool<DType::type>(a);                                                                            \
  }
LINFORMER_KERNELS_OF_TYPE(LINFORMER_POOL_, LINFORMER_KERNEL)
#undef LINFORMER_KERNEL

#define LINFORMER_KERNEL(name, type)                                                                 \
  extern "C" __global__ void __launch_bounds__(kThreads) name(const __grid_constant__ Arguments a) { \
    pool_backward<DType::type>(a);                                                                   \
  }
LINFORMER_KERNELS_OF_TYPE(LINFORMER_POOL_BACKWARD_, LINFORMER_KERNEL)

}    // namespace linformer::cuda
