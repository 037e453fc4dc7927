// Backward of attention, one launch: dQ, dK', dV'. Nothing of size N x K leaves the chip; P is computed again.
//
//   S = scale Q K'^T + bias    P = softmax(S)    dP = M (dO V'^T)    delta = rowsum(P dP)    dS = P (dP - delta)
//   dQ = scale dS K'    dK' = scale dS^T Q    dV' = (M P)^T dO    dbias = sum of dS over the queries
//   M: 0 or 1 / (1 - p)
//
// Row tiles come first: 128 query rows, 16 a warp, pass over K' and V' for the statistics of their rows (the largest
// score, 1 / sum, delta: 16 bytes a row are kept) and for dQ. For K <= kKeys the one block stays in registers; of a
// larger K each block is computed twice, out of shared memory. Column tiles follow: up to 128 rows of K', 16 a warp,
// with dK' and dV' in registers, stream past the query rows of all heads of their group. They compute S^T and dP^T, so
// that P^T and dS^T are already the first operand of the next product and never touch shared memory. That costs S and
// dP a second time, 7 products instead of 5, and saves all traffic between CTAs but the statistics. A column tile waits
// for the row tiles of its heads.
#include "attend.cuh"
#include "kernels.h"

namespace linformer::cuda {
namespace {

LINFORMER_DEVICE int64_t statistics_row(const Problem& p, int64_t b, int64_t head, int64_t row) {
  return p.cu_seqlens_q ? head * p.total_q + row : (b * p.heads + head) * p.len_q + row;
}

// kBiased: there is a bias.
template <class Traits, bool kBiased>
LINFORMER_DEVICE void row_item(const Arguments& a, Element<Traits::kType>* shared, int ticket) {
  constexpr DType kType = Traits::kType;
  constexpr int kDim = Traits::kDim, kKeys = Traits::kKeys;
  const Problem& p = a.p;
  const int heads = static_cast<int>(p.heads), head = ticket % heads;
  const auto head_kv = [&] { return again(head) / (static_cast<int>(p.heads) / static_cast<int>(p.heads_kv)); };
  int b = 0;
  int first_row = 0;
  if (!find_item(p.cu_seqlens_q, p.batch, p.total_q, p.len_q, a.query_tiles * Traits::kQueryRows, ticket / heads, &b,
                 &first_row)) {
    return;
  }
  const Sequence sequence = query_sequence(p, b);
  const int proj_dim = static_cast<int>(p.proj_dim);
  const auto keys = [&] {
    return projected_source<kType>(a, p.key_proj, again(b), head_kv(), p.head_dim, kAlignedKeyProj);
  };
  const auto values = [&] {
    return projected_source<kType>(a, p.value_proj, again(b), head_kv(), p.value_dim, kAlignedValueProj);
  };
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  Element<kType>* staged = shared + warp_id() * 2 * Traits::kRows * Traits::kStagePitch;
  Element<kType>* staged_grad = staged + Traits::kRows * Traits::kStagePitch;
  Element<kType>* key_tiles = shared + 2 * Traits::kQueryRows * Traits::kStagePitch;
  Element<kType>* value_tiles = key_tiles + a.keys * Traits::kPitch;
  float* bias_tiles = reinterpret_cast<float*>(value_tiles + a.keys * Traits::kPitch);
  const bool resident = proj_dim <= a.keys;    // K' and V' stay in shared memory
  const bool single = proj_dim <= kKeys;       // P and dP stay in registers
  const Softmax softmax(a);
  for (int tile = 0; tile < a.query_tiles; ++tile) {
    const int first = first_row + tile * Traits::kQueryRows;
    if (first >= sequence.length) break;
    const int row = first + warp_id() * Traits::kRows;
    const int rows = min(max(sequence.length - row, 0), Traits::kRows);
    const int64_t at = sequence.start + row;
    const auto queries = [&] {
      return query_source<kType>(a, p.query, again(b), head, at, rows, p.head_dim, kAlignedQuery);
    };
    const auto grads = [&] {
      return query_source<kType>(a, p.grad_out, again(b), head, at, rows, p.value_dim, kAlignedGradOut);
    };

    float scores[kKeys / 8][4], grad[kKeys / 8][4];    // S, then P, then dS; dP
    // Else nvcc finds it too long to inline for fp32 and width 256, and what it refers to would lie in local memory.
    const auto compute = [&](int k, bool load_block, bool load_rows) __attribute__((always_inline)) {
      const int slot = resident ? k * Traits::kPitch : 0;
      const Element<kType>*key_tile = key_tiles + slot, *value_tile = value_tiles + slot;
      if (load_block) {
        __syncthreads();    // nobody reads what stands there any more
        load_tile_apart<kType, kKeys, kDim, kThreads, Traits::kPitch>(key_tiles + slot, keys(), k, 0, threadIdx.x);
        load_tile_apart<kType, kKeys, kDim, kThreads, Traits::kPitch>(value_tiles + slot, values(), k, 0, threadIdx.x);
        if (kBiased)
          load_bias(shared_address(bias_tiles + (resident ? k : 0)), bias_of(p, b, head_kv()) + k, proj_dim - k, kKeys);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
      }
      for_each_staged<Traits>(queries, staged, load_rows, [&](auto column, bool) {
        multiply_rows<kType, 1, Traits::kStaged, kKeys, Traits::kStagePitch, Traits::kPitch, column == 0>(
            scores, staged, key_tile + column, proj_dim - k, p.allow_tf32);
      });
      for_each_staged<Traits>(grads, staged_grad, load_rows, [&](auto column, bool) {
        multiply_rows<kType, 1, Traits::kStaged, kKeys, Traits::kStagePitch, Traits::kPitch, column == 0>(
            grad, staged_grad, value_tile + column, proj_dim - k, p.allow_tf32);
      });
      softmax.orient(scores);
      if (kBiased) softmax.add_bias(scores, a, bias_tiles + (resident ? k : 0));
      Softmax::cut(scores, proj_dim - k);
      const Dropout dropout(a, b, head);
      if (dropout.on) {
        dropout.apply(grad, row, k);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) grad[n][e] *= dropout.multiplier;
        }
      }
    };

    float largest[2] = {kBiased ? a.lowest : -INFINITY, kBiased ? a.lowest : -INFINITY}, sum[2] = {0.0f, 0.0f},
          delta[2] = {0.0f, 0.0f};
    for (int k = 0; k < proj_dim; k += kKeys) {
      compute(k, !resident || tile == 0, k == 0);
      float correction[2];
      softmax.step(scores, largest, sum, correction, k == 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          added += scores[n][2 * half] * grad[n][2 * half] + scores[n][2 * half + 1] * grad[n][2 * half + 1];
        }
        delta[half] = delta[half] * correction[half] + added;
      }
    }
    float inverse[2];
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      inverse[half] = kBiased ? Softmax::over(1.0f, quad_sum(sum[half])) : 1.0f / quad_sum(sum[half]);
      delta[half] = quad_sum(delta[half]) * inverse[half];
      const int r = g + 8 * half;
      if (t == 0 && r < rows) {
        const int64_t index = statistics_row(p, b, head, at + r);
        __stcg(reinterpret_cast<float4*>(a.statistics) + index,
               make_float4(largest[half], inverse[half], delta[half], 0.0f));
      }
    }

    if (p.grad_query.data) {
      float out[kDim / 8][4];
      clear(out);
      for (int k = 0; k < proj_dim; k += kKeys) {
        if (!single) {
          compute(k, !resident, false);
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[n][e] = softmax.power(scores[n][e], softmax.shift(largest[e / 2]));
          }
        }
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) scores[n][e] *= inverse[e / 2] * (grad[n][e] - delta[e / 2]);
        }
        multiply_scores<kType, 1, kKeys, kDim, Traits::kPitch>(
            out, scores, key_tiles + (resident ? k * Traits::kPitch : 0), proj_dim - k, p.allow_tf32);
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[n][e] *= p.scale;
      }
      store_staged<kType, Traits::kStaged>(out, staged, Traits::kStagePitch,
                                           rows_at<kType>(p.grad_query, again(b), head, at), p.grad_query.row_stride,
                                           rows, head_dim, (a.aligned & kAlignedGradQuery) != 0);
    }
  }
  signal(a.ready + b * p.heads_kv + head_kv());
}

template <class Traits, bool kBiased>
LINFORMER_DEVICE void column_tile(const Arguments& a, Element<Traits::kType>* shared, uint32_t* shared_word,
                                  int ticket) {
  constexpr DType kType = Traits::kType;
  constexpr int kDim = Traits::kDim, kRows = Traits::kColumnRows, kQueries = Traits::kQueries, kOut = Traits::kOut;
  const Problem& p = a.p;
  const int split = ticket % a.column_splits, tile_id = ticket / a.column_splits;
  const int part = tile_id % Traits::kParts, block = tile_id / Traits::kParts % a.column_blocks;
  // Anew for each tile, as what is the same for all would be held, or spilled, through their loops.
  const int heads_kv = again(static_cast<int>(p.heads_kv)), group = static_cast<int>(p.heads) / heads_kv;
  const int head_kv = tile_id / Traits::kParts / a.column_blocks % heads_kv;
  const int b = tile_id / Traits::kParts / a.column_blocks / heads_kv;
  const Sequence sequence = query_sequence(p, b);
  const int item_rows = a.query_tiles * Traits::kQueryRows;
  wait_for(a.ready + b * p.heads_kv + head_kv,
           static_cast<uint32_t>((sequence.length + item_rows - 1) / item_rows * group));

  const int proj_dim = static_cast<int>(p.proj_dim), first_k = block * kRows;
  const auto keys = [&] { return projected_source<kType>(a, p.key_proj, b, head_kv, p.head_dim, kAlignedKeyProj); };
  const auto values = [&] {
    return projected_source<kType>(a, p.value_proj, b, head_kv, p.value_dim, kAlignedValueProj);
  };
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  Element<kType>* key_tile = shared;
  Element<kType>* value_tile = key_tile + kRows * Traits::kPitch;
  unsigned char* stages = reinterpret_cast<unsigned char*>(value_tile + kRows * Traits::kPitch);
  // Of the rows the bias, and of each thread its sums of the gradient, which in registers would be in the way of
  // others.
  float* bias_tile = reinterpret_cast<float*>(stages + Traits::kStages * Traits::kQueryBytes);
  float* bias_sums = bias_tile + kRows;
  load_tile_apart<kType, kRows, kDim, kThreads, Traits::kPitch>(key_tile, keys(), first_k, 0, threadIdx.x);
  load_tile_apart<kType, kRows, kDim, kThreads, Traits::kPitch>(value_tile, values(), first_k, 0, threadIdx.x);
  if (kBiased && threadIdx.x < kRows) {
    const int k = first_k + threadIdx.x;
    bias_tile[threadIdx.x] = k < proj_dim ? bias_in_bits(bias_of(p, b, head_kv)[k]) : 0.0f;
  }
  commit_copies();

  const int tiles = (sequence.length + kQueries - 1) / kQueries;    // of one head
  const int from = static_cast<int>(static_cast<int64_t>(tiles) * group * split / a.column_splits);
  const int to = static_cast<int>(static_cast<int64_t>(tiles) * group * (split + 1) / a.column_splits);
  const Softmax softmax(a);
  const auto load = [&](int step) {
    auto* q_tile = reinterpret_cast<Element<kType>*>(stages + (step - from) % Traits::kStages * Traits::kQueryBytes);
    auto* grad_tile = q_tile + kQueries * Traits::kPitch;
    auto* statistics = reinterpret_cast<float*>(grad_tile + kQueries * Traits::kPitch);
    const int head = head_kv * group + step / tiles, row = step % tiles * kQueries;
    load_tile_apart<kType, kQueries, kDim, kThreads, Traits::kPitch>(
        q_tile, query_source<kType>(a, p.query, b, head, sequence.start, sequence.length, p.head_dim, kAlignedQuery),
        row, 0, threadIdx.x);
    load_tile_apart<kType, kQueries, kDim, kThreads, Traits::kPitch>(
        grad_tile,
        query_source<kType>(a, p.grad_out, b, head, sequence.start, sequence.length, p.value_dim, kAlignedGradOut), row,
        0, threadIdx.x);
    if (threadIdx.x < kQueries) {
      const int r = row + threadIdx.x;
      const int64_t index = statistics_row(p, b, head, sequence.start + r);
      const float4 own = r < sequence.length ? __ldcg(reinterpret_cast<const float4*>(a.statistics) + index)
                                             : make_float4(kLargestFloat, 0.0f, 0.0f, 0.0f);    // P = 0
      float* to = statistics + threadIdx.x;
      to[0] = softmax.shift(own.x);
      to[kQueries] = own.y;
      to[2 * kQueries] = own.z;
    }
  };

  const int g = lane_id() / 4, t = lane_id() % 4;
  const int warp_row = warp_id() * Traits::kRows;
  const bool active = warp_row < kRows && first_k + warp_row < proj_dim;
  float sums[2 * kOut / 8][4];    // dK', then dV'
  clear(sums);
  const bool want_bias = kBiased && p.grad_key_bias && part == 0 && active;
  const int own_sum = 64 * warp_id() + lane_id();    // of row g; 32 further that of row g + 8
  if (want_bias) bias_sums[own_sum] = bias_sums[own_sum + 32] = 0.0f;
  float (&grad_key)[kOut / 8][4] = *reinterpret_cast<float (*)[kOut / 8][4]>(&sums[0]);
  float (&grad_value)[kOut / 8][4] = *reinterpret_cast<float (*)[kOut / 8][4]>(&sums[kOut / 8]);
  if (Traits::kStages == 2 && from < to) load(from);
  if (Traits::kStages == 2) commit_copies();
  // A third of what a step would load from shared memory, which is what limits these tiles (python -m bench.counts).
  constexpr int kSteps = Traits::kHeld ? kDim / 16 : 1;
  FragmentA<kType> key_rows[kSteps], value_rows[kSteps];
  if constexpr (Traits::kHeld) {
    wait_copies<0>();
    __syncthreads();
    repeat<kSteps>([&](auto s) {
      using Operand = OperandA<kType, false, Traits::kPitch>;
      Operand(key_tile + warp_row * Traits::kPitch).template load<0, 16 * s>(key_rows[s]);
      Operand(value_tile + warp_row * Traits::kPitch).template load<0, 16 * s>(value_rows[s]);
    });
  }
  for (int step = from; step < to; ++step) {
    if (Traits::kStages == 1) {
      __syncthreads();
      load(step);
      commit_copies();
    }
    wait_copies<0>();
    __syncthreads();
    if (Traits::kStages == 2) {
      if (step + 1 < to) load(step + 1);
      commit_copies();
    }
    if (!active) continue;
    const auto* q_tile =
        reinterpret_cast<const Element<kType>*>(stages + (step - from) % Traits::kStages * Traits::kQueryBytes);
    const auto* grad_tile = q_tile + kQueries * Traits::kPitch;
    const auto* statistics = reinterpret_cast<const float*>(grad_tile + kQueries * Traits::kPitch) + 2 * t;
    const int head = head_kv * group + step / tiles, row = step % tiles * kQueries;
    const Dropout dropout(a, b, head);

    float scores[kQueries / 8][4], grad[kQueries / 8][4];    // S^T, then P^T; dP^T, then dS^T
    // Turned: the very scores that the statistics are of. A last bit of a large one would make P of what is surely
    // chosen another number than 1.
    const bool want_grad = a.want_key_proj || (kBiased && p.grad_key_bias);
    if constexpr (Traits::kHeld) {
      multiply_held<kType, kDim, kQueries, Traits::kPitch, true>(scores, key_rows, q_tile);
      if (want_grad) multiply_held<kType, kDim, kQueries, Traits::kPitch, true>(grad, value_rows, grad_tile);
    } else {
      multiply_rows<kType, 1, kDim, kQueries, Traits::kPitch, Traits::kPitch, true, true>(
          scores, key_tile + warp_row * Traits::kPitch, q_tile, kQueries, p.allow_tf32);
      if (want_grad) {
        multiply_rows<kType, 1, kDim, kQueries, Traits::kPitch, Traits::kPitch, true, true>(
            grad, value_tile + warp_row * Traits::kPitch, grad_tile, kQueries, p.allow_tf32);
      }
    }
    if (!want_grad) clear(grad);
    softmax.orient(scores);
    if (kBiased) softmax.add_bias_of_rows(scores, a, bias_tile + warp_row);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
      const auto of_queries = [&](int which) {
        return *reinterpret_cast<const float2*>(statistics + which * kQueries + 8 * n);
      };
      const float2 shifts = of_queries(0), inverses = of_queries(1), deltas = of_queries(2);
      const float shift[2] = {shifts.x, shifts.y}, inverse[2] = {inverses.x, inverses.y},
                  delta[2] = {deltas.x, deltas.y};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float probability = softmax.power(scores[n][e], shift[e % 2]) * inverse[e % 2];
        float multiplier = 1.0f;
        if (dropout.on) {
          const bool kept = dropout.kept(row + 8 * n + 2 * t + e % 2, first_k + warp_row + g + e / 2 * 8);
          multiplier = kept ? dropout.multiplier : 0.0f;
        }
        grad[n][e] = probability * (multiplier * grad[n][e] - delta[e % 2]);
        scores[n][e] = multiplier * probability;
      }
    }
    if (want_bias) {
      float added[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) added[e / 2] += grad[n][e];
      }
      bias_sums[own_sum] += added[0];
      bias_sums[own_sum + 32] += added[1];
    }
    const int out_column = part * kOut;
    if (a.want_value_proj) {
      multiply_scores<kType, 1, kQueries, kOut, Traits::kPitch>(grad_value, scores, grad_tile + out_column, kQueries,
                                                                p.allow_tf32);
    }
    if (a.want_key_proj) {
      multiply_scores<kType, 1, kQueries, kOut, Traits::kPitch>(grad_key, grad, q_tile + out_column, kQueries,
                                                                p.allow_tf32);
    }
  }
  wait_copies<0>();

  float* partial = a.partial + static_cast<int64_t>(tile_id) * a.column_splits * (2 * kOut / 8) * 4 * kThreads;
  float* partial_bias = a.partial_bias + static_cast<int64_t>(tile_id) * a.column_splits * 4 * kRows + own_sum;
  if (want_bias && a.column_splits > 1) {    // visible to the last CTA as the partial sums are
    __stcg(partial_bias + split * 4 * kRows, bias_sums[own_sum]);
    __stcg(partial_bias + split * 4 * kRows + 32, bias_sums[own_sum + 32]);
  }
  if (!add_splits(sums, partial, a.arrived + tile_id, split, a.column_splits, shared_word) || !active) return;
  // Anew: how much of each pair of columns exists would be held in registers from tile to tile.
  const int own_lane = again(lane_id()), own_g = own_lane / 4, own_t = own_lane % 4;
  if (want_bias) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float sum = a.column_splits > 1 ? 0.0f : bias_sums[own_sum + 32 * half];
#pragma unroll 1
      for (int s = 0; a.column_splits > 1 && s < a.column_splits; ++s) {
        sum += __ldcg(partial_bias + s * 4 * kRows + 32 * half);
      }
      sum = quad_sum(sum);
      const int k = first_k + warp_row + own_g + 8 * half;
      if (own_t == 0 && k < proj_dim) {
        p.grad_key_bias[(static_cast<int64_t>(b) * p.heads_kv + head_kv) * p.proj_dim + k] = sum;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int k = first_k + warp_row + own_g + 8 * half;
    if (k >= proj_dim) continue;
#pragma unroll
    for (int n = 0; n < kOut / 8; ++n) {
      const int d = part * kOut + 8 * n + 2 * own_t;
      if (a.want_key_proj) {
        store_pair<kType>(rows_at<kType>(p.grad_key_proj, b, head_kv, k) + d, p.scale * grad_key[n][2 * half],
                          p.scale * grad_key[n][2 * half + 1], head_dim - d, (a.aligned & kAlignedGradKeyProj) != 0);
      }
      if (a.want_value_proj) {
        store_pair<kType>(rows_at<kType>(p.grad_value_proj, b, head_kv, k) + d, grad_value[n][2 * half],
                          grad_value[n][2 * half + 1], value_dim - d, (a.aligned & kAlignedGradValueProj) != 0);
      }
    }
  }
}

template <class Traits, bool kBiased>
LINFORMER_DEVICE void backward(const Arguments& a) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ uint32_t word;
  auto* shared = reinterpret_cast<Element<Traits::kType>*>(memory);
  const auto next = [&] { return static_cast<int>(next_ticket(a.ticket, &word)); };
  // Tickets of a CTA rise, so each role has a loop of its own. In one loop for both, what does not change within a role
  // takes registers from the other: 136 bytes of stack for 16 bits and width 64 on sm_100 (cuobjdump -res-usage).
  int ticket;
  while ((ticket = next()) < a.attend_tiles) row_item<Traits, kBiased>(a, shared, ticket);
  while (ticket < a.attend_tiles + a.column_tiles) {
    column_tile<Traits, kBiased>(a, shared, &word, ticket - a.attend_tiles);
    ticket = next();
  }
}

}    // namespace

#define LINFORMER_KERNEL(name, type, dim, biased)                                                       \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) name(const __grid_constant__ Arguments a) { \
    backward<Backward<DType::type, dim>, biased>(a);                                                    \
  }
LINFORMER_KERNELS_OF_TYPE(LINFORMER_BACKWARD_, LINFORMER_KERNEL)

}    // namespace linformer::cuda
