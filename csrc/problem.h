// The problem handed from ops.cpp to a device: plain pointers, sizes and strides. Both devices read it; neither knows
// torch.
#pragma once

#include <cstdint>

namespace linformer {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

// What an operation consists of; attention is kProject | kAttend, its backward kAttendBackward | kProjectBackward. The
// two of pooling come alone.
enum Stage : unsigned {
  kProject = 1,
  kAttend = 2,
  kAttendBackward = 4,
  kProjectBackward = 8,
  kPool = 16,
  kPoolBackward = 32
};

// Rows of a (batch, head, row, column) tensor. Strides count elements; columns are adjacent. A packed (total, head,
// column) tensor has batch stride 0 and finds its sequences through the offsets in Problem.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

// Every operation of the package is this problem with some of the stages below. A tensor that a stage does not need, or
// a gradient that nobody wants, has data == nullptr.
struct Problem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t heads = 0;    // query heads, a multiple of heads_kv
  int64_t heads_kv = 0;
  int64_t len_q = 0;      // longest query sequence; on a GPU, which does not read offsets early, a bound
  int64_t len_k = 0;      // longest key sequence, the same
  int64_t total_q = 0;    // rows of a packed query, of a packed key
  int64_t total_k = 0;
  int64_t seq_len_max = 0;    // columns of E and F
  int64_t proj_dim = 0;       // K
  int64_t head_dim = 0;       // D
  int64_t value_dim = 0;      // D_v

  Rows query, key, value, out;
  Rows proj_key,
      proj_value;               // E and F: rows are the K projections; stride 0 where sequences or heads share one
  Rows key_proj, value_proj;    // K' and V'
  Rows grad_out, grad_query, grad_key, grad_value;
  Rows grad_proj_key, grad_proj_value;    // dE and dF
  Rows grad_key_proj, grad_value_proj;    // dK' and dV'

  bool per_head_proj = false;     // E and F differ from head to head
  bool per_batch_proj = false;    // and from sequence to sequence
  bool shared_kv = false;         // F is E
  bool allow_tf32 = false;        // fp32 may be multiplied in TF32; a CPU does not look at it

  const int64_t* cu_seqlens_q = nullptr;    // batch + 1 offsets, or nullptr for padded tensors
  const int64_t* cu_seqlens_k = nullptr;
  const bool* mask = nullptr;    // (batch, len_k), true = take part
  int64_t mask_batch_stride = 0;
  int64_t mask_row_stride = 0;

  // Added to the scaled scores of the rows of K'; (batch, heads_kv, K), K adjacent.
  const float* key_bias = nullptr;
  int64_t key_bias_batch_stride = 0;
  int64_t key_bias_head_stride = 0;
  float* grad_key_bias = nullptr;    // (batch, heads_kv, K), contiguous

  // The segment of each key, batch stride 0 where packed, head stride 0 where heads share them. What is not in [0, K)
  // takes part nowhere. Pooling writes `count`, (batch, heads_kv, K), contiguous, and its backward reads it.
  const int32_t* segments = nullptr;
  int64_t segments_batch_stride = 0;
  int64_t segments_head_stride = 0;
  int64_t segments_row_stride = 0;
  float* count = nullptr;

  float scale = 1.0f;
  double dropout_p = 0.0;
  const int64_t* rng_state = nullptr;    // seed and offset of dropout

  // dK' or dV' is wanted, for its own sake or for the gradients behind it.
  bool needs_grad_key_proj() const { return grad_key_proj.data || grad_key.data || grad_proj_key.data; }
  bool needs_grad_scores() const { return grad_query.data || needs_grad_key_proj() || grad_key_bias; }
  bool needs_grad_value_proj() const {
    return grad_value_proj.data || grad_value.data || grad_proj_value.data || (shared_kv && grad_proj_key.data);
  }

  int64_t query_length(int64_t b) const { return cu_seqlens_q ? cu_seqlens_q[b + 1] - cu_seqlens_q[b] : len_q; }
  int64_t key_length(int64_t b) const { return cu_seqlens_k ? cu_seqlens_k[b + 1] - cu_seqlens_k[b] : len_k; }
  int64_t query_row(int64_t b, int64_t row) const { return cu_seqlens_q ? cu_seqlens_q[b] + row : row; }
  int64_t key_row(int64_t b, int64_t row) const { return cu_seqlens_k ? cu_seqlens_k[b] + row : row; }
};

}    // namespace linformer
