// Arguments to Problems: shapes, types, devices and strides are checked while they are entered.
#include "arguments.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "run.h"

namespace linformer {

const int64_t* offsets_of(const OptionalTensor& offsets, const char* name, const Tensor& like, int64_t total,
                          int64_t batch, int64_t* longest) {
  if (!offsets) return nullptr;
  STD_TORCH_CHECK(same_device(*offsets, like) && offsets->scalar_type() == ScalarType::Long && offsets->dim() == 1 &&
                      offsets->is_contiguous() && offsets->size(0) == batch + 1,
                  "linformer_kernels: ", name, " must be a contiguous int64 tensor of batch + 1 offsets");
  const int64_t* at = static_cast<const int64_t*>(memory_of(*offsets, name));
  if (on_gpu(like)) return at;
  STD_TORCH_CHECK(at[0] == 0 && at[batch] == total, "linformer_kernels: ", name, " must go from 0 to ", total);
  *longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(at[b] <= at[b + 1], "linformer_kernels: ", name, " decreases after sequence ", b);
    if (at[b + 1] - at[b] > *longest) *longest = at[b + 1] - at[b];
  }
  return at;
}

int64_t batch_of(const OptionalTensor& offsets, int64_t padded_batch) {
  if (!offsets) return padded_batch;
  STD_TORCH_CHECK(offsets->dim() == 1 && offsets->size(0) >= 1, "linformer_kernels: offsets need at least one element");
  return offsets->size(0) - 1;
}

void set_query(Problem& p, const Tensor& query, const OptionalTensor& cu_seqlens_q) {
  const View view = view_of(query, "query", query, cu_seqlens_q.has_value());
  p.dtype = dtype_of(query);
  p.query = view.rows;
  p.batch = batch_of(cu_seqlens_q, view.batch);
  p.heads = view.heads;
  p.len_q = p.total_q = view.length;
  p.head_dim = view.columns;
  p.cu_seqlens_q = offsets_of(cu_seqlens_q, "cu_seqlens_q", query, view.length, p.batch, &p.len_q);
}

// E or F, or a gradient of theirs: (K, N), (heads, K, N) or (batch, 1 or heads, K, N).
static Rows projection_rows(const Tensor& proj, const char* name, const Tensor& like, const Problem& p) {
  STD_TORCH_CHECK(same_device(proj, like) && proj.scalar_type() == like.scalar_type(), "linformer_kernels: ", name,
                  " differs in device or dtype");
  const int64_t rank = p.per_batch_proj ? 4 : p.per_head_proj ? 3 : 2;
  STD_TORCH_CHECK(proj.dim() == rank, "linformer_kernels: ", name, " has the wrong number of dimensions");
  const int64_t heads = proj.dim() - 3, rows = proj.dim() - 2, columns = proj.dim() - 1;
  STD_TORCH_CHECK(proj.size(rows) == p.proj_dim && proj.size(columns) == p.seq_len_max &&
                      (!p.per_batch_proj || proj.size(0) == p.batch) &&
                      (heads < 0 || proj.size(heads) == (p.per_head_proj ? p.heads_kv : 1)),
                  "linformer_kernels: ", name, " has the wrong shape");
  STD_TORCH_CHECK(proj.size(columns) <= 1 || proj.numel() == 0 || proj.stride(columns) == 1,
                  "linformer_kernels: ", name, " needs adjacent elements in its last dimension");
  return {memory_of(proj, name), p.per_batch_proj ? proj.stride(0) : 0, p.per_head_proj ? proj.stride(heads) : 0,
          proj.stride(rows)};
}

void set_mask(Problem& p, const OptionalTensor& mask, const Tensor& key, bool packed) {
  if (!mask) return;
  STD_TORCH_CHECK(!packed && same_device(*mask, key) && mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                      mask->size(0) == p.batch && mask->size(1) == p.len_k,
                  "linformer_kernels: key_padding_mask must be a bool tensor of shape (batch, key length)");
  p.mask = static_cast<const bool*>(memory_of(*mask, "key_padding_mask"));
  p.mask_batch_stride = mask->stride(0);
  p.mask_row_stride = mask->stride(1);
}

void set_rows(Problem& p, const Tensor& key, const Tensor& value, const OptionalTensor& cu_seqlens_k) {
  const bool packed = cu_seqlens_k.has_value();
  const View k = view_of(key, "key", key, packed), v = view_of(value, "value", key, packed);
  STD_TORCH_CHECK(k.batch == v.batch && k.heads == v.heads && k.length == v.length,
                  "linformer_kernels: key and value differ in shape");
  p.dtype = dtype_of(key);
  p.batch = batch_of(cu_seqlens_k, k.batch);
  p.heads_kv = k.heads;
  p.len_k = p.total_k = k.length;
  p.head_dim = k.columns;
  p.value_dim = v.columns;
  p.key = k.rows;
  p.value = v.rows;
  p.cu_seqlens_k = offsets_of(cu_seqlens_k, "cu_seqlens_k", key, k.length, p.batch, &p.len_k);
}

void set_sequence(Problem& p, const Tensor& key, const Tensor& value, const Tensor& proj_key,
                  const OptionalTensor& proj_value, const OptionalTensor& mask, const OptionalTensor& cu_seqlens_k) {
  set_rows(p, key, value, cu_seqlens_k);
  const bool packed = cu_seqlens_k.has_value();
  STD_TORCH_CHECK(proj_key.dim() >= 2 && proj_key.dim() <= 4,
                  "linformer_kernels: proj_key must have 2, 3 or 4 dimensions");
  p.per_batch_proj = proj_key.dim() == 4;
  p.per_head_proj = proj_key.dim() == 3 || (p.per_batch_proj && proj_key.size(1) != 1);
  p.proj_dim = proj_key.size(proj_key.dim() - 2);
  p.seq_len_max = proj_key.size(proj_key.dim() - 1);
  const bool known = !packed || !on_gpu(key);
  STD_TORCH_CHECK(!known || p.len_k <= p.seq_len_max, "linformer_kernels: a sequence of ", p.len_k,
                  " is longer than proj_key's ", p.seq_len_max, " columns");
  STD_TORCH_CHECK(p.proj_dim >= 1 && p.head_dim >= 1 && p.value_dim >= 1,
                  "linformer_kernels: proj_dim and head dimensions must be at least 1");
  STD_TORCH_CHECK(p.heads_kv >= 1, "linformer_kernels: key needs at least one head");
  p.proj_key = projection_rows(proj_key, "proj_key", key, p);
  p.shared_kv = !proj_value.has_value();
  p.proj_value = p.shared_kv ? p.proj_key : projection_rows(*proj_value, "proj_value", key, p);
  set_mask(p, mask, key, packed);
}

// Sizes of which plans can compute with 64 bits. A tensor may be of any size without having memory: expanded.
//
// A plan's sums are products of some of these factors, padded to whole tiles, with constants far below 2^12; what a
// thread has for itself goes with K, D and D_v alone. A call of 2^58 multiply-adds would take days.
void check_sizes(const Problem& p) {
  const auto padded = [](int64_t size, double padding) { return static_cast<double>(size) + padding; };
  const double rows = padded(std::max({p.len_q, p.len_k, p.total_q, p.total_k, p.seq_len_max}), 512);
  const double work = padded(p.batch, 1) * padded(std::max(p.heads, p.heads_kv), 1) * rows * padded(p.proj_dim, 64) *
                      (padded(p.head_dim, 64) + padded(p.value_dim, 64));
  if (work < 0x1p58 && std::max({p.proj_dim, p.head_dim, p.value_dim}) < int64_t{1} << 36) return;
  refuse(
      "these sizes are beyond what can be computed: batch ", p.batch, ", ", p.heads, " heads, ", p.heads_kv,
      " key heads, ", p.len_q, " query rows, ", p.len_k, " key rows, N_max ", p.seq_len_max, ", K ", p.proj_dim, ", D ",
      p.head_dim, ", D_v ", p.value_dim,
      "; wanted: K, D and D_v below 2^36, and a product of all sizes below 2^58. To fix it: look for a tensor that was "
      "expanded by mistake.");
}

void check_query(const Problem& p, const Problem& sequence) {
  STD_TORCH_CHECK(p.batch == sequence.batch && p.head_dim == sequence.head_dim && p.dtype == sequence.dtype,
                  "linformer_kernels: query does not match key in batch, head_dim or dtype");
}

void check_heads(const Problem& p) {
  STD_TORCH_CHECK(p.heads > 0 && p.heads_kv > 0 && p.heads % p.heads_kv == 0,
                  "linformer_kernels: query heads must be a multiple of key heads");
}

Rows projected_rows(const Tensor& tensor, const char* name, const Tensor& like, const Problem& p, int64_t columns) {
  const View view = view_of(tensor, name, like, false);
  STD_TORCH_CHECK(
      view.batch == p.batch && view.heads == p.heads_kv && view.length == p.proj_dim && view.columns == columns,
      "linformer_kernels: ", name, " has the wrong shape");
  return view.rows;
}

void set_projected(Problem& p, const Tensor& key_proj, const Tensor& value_proj) {
  STD_TORCH_CHECK(key_proj.dim() == 4 && value_proj.dim() == 4, "linformer_kernels: K' and V' must have 4 dimensions");
  p.heads_kv = key_proj.size(1);
  p.proj_dim = key_proj.size(2);
  p.value_dim = value_proj.size(3);
  STD_TORCH_CHECK(p.proj_dim >= 1 && p.head_dim >= 1 && p.value_dim >= 1,
                  "linformer_kernels: proj_dim and head dimensions must be at least 1");
  p.key_proj = projected_rows(key_proj, "key_proj", key_proj, p, p.head_dim);
  p.value_proj = projected_rows(value_proj, "value_proj", key_proj, p, p.value_dim);
}

void set_softmax(Problem& p, const Tensor& query, const OptionalTensor& rng_state, double dropout_p, double scale) {
  check_sizes(p);
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "linformer_kernels: dropout_p must be in [0, 1)");
  p.scale = static_cast<float>(scale);
  p.dropout_p = dropout_p;
  if (dropout_p > 0) {
    STD_TORCH_CHECK(rng_state && same_device(*rng_state, query) && rng_state->scalar_type() == ScalarType::Long &&
                        rng_state->is_contiguous() && rng_state->numel() == 2,
                    "linformer_kernels: dropout needs rng_state, an int64 tensor (seed, offset)");
    p.rng_state = static_cast<const int64_t*>(memory_of(*rng_state, "rng_state"));
  }
}

// (batch, heads_kv, K) numbers a row of K'.
void set_bias(Problem& p, const OptionalTensor& key_bias, const Tensor& like) {
  if (!key_bias) return;
  STD_TORCH_CHECK(same_device(*key_bias, like) && key_bias->scalar_type() == ScalarType::Float &&
                      key_bias->dim() == 3 && key_bias->size(0) == p.batch && key_bias->size(1) == p.heads_kv &&
                      key_bias->size(2) == p.proj_dim && (p.proj_dim == 1 || key_bias->stride(2) == 1),
                  "linformer_kernels: key_bias must be a float32 tensor of shape (batch, key heads, K), K adjacent");
  p.key_bias = static_cast<const float*>(memory_of(*key_bias, "key_bias"));
  p.key_bias_batch_stride = key_bias->stride(0);
  p.key_bias_head_stride = key_bias->stride(1);
}

void set_grad_out(Problem& p, const Tensor& grad_out, const Tensor& query, bool packed) {
  const View view = view_of(grad_out, "grad_out", query, packed), q = view_of(query, "query", query, packed);
  STD_TORCH_CHECK(
      view.batch == q.batch && view.heads == q.heads && view.length == q.length && view.columns == p.value_dim,
      "linformer_kernels: grad_out has the wrong shape");
  p.grad_out = view.rows;
}

// The segments of `length` keys, of all heads or of each.
void set_segments(Problem& p, const Tensor& segments, const Tensor& like, bool packed) {
  const int64_t heads = packed ? 1 : segments.dim() - 2, rows = packed ? 0 : segments.dim() - 1;
  STD_TORCH_CHECK(
      same_device(segments, like) && segments.scalar_type() == ScalarType::Int && segments.dim() == (packed ? 2 : 3) &&
          (packed || segments.size(0) == p.batch) && segments.size(rows) == p.total_k &&
          (segments.size(heads) == 1 || segments.size(heads) == p.heads_kv),
      "linformer_kernels: segments must be an int32 tensor of shape (batch, 1 or key heads, key length), or "
      "(total, 1 or key heads)");
  p.segments = static_cast<const int32_t*>(memory_of(segments, "segments"));
  p.segments_batch_stride = packed ? 0 : segments.stride(0);
  p.segments_head_stride = segments.size(heads) == 1 ? 0 : segments.stride(heads);
  p.segments_row_stride = segments.stride(rows);
}

void check_pool_sizes(const Problem& p) {
  STD_TORCH_CHECK(p.proj_dim >= 1 && p.head_dim >= 1 && p.value_dim >= 1 && p.heads_kv >= 1,
                  "linformer_kernels: num_segments, heads and head dimensions must be at least 1");
  STD_TORCH_CHECK(p.proj_dim < int64_t{1} << 31, "linformer_kernels: num_segments is ", p.proj_dim,
                  ", beyond what can be computed: segments are int32");
  check_sizes(p);
}

Tensor gradient(bool wanted, const Tensor& like, Rows& rows) {
  if (!wanted) return nothing(like);
  Tensor result = empty_like("a gradient", like, like.size(like.dim() - 1));
  rows = rows_of(result);
  return result;
}

Tensor bias_gradient(bool wanted, const OptionalTensor& key_bias, const Tensor& like, Problem& p) {
  if (!wanted || !key_bias) return new_empty("nothing", like, {0}, ScalarType::Float);
  Tensor result = new_empty("a gradient", like, {p.batch, p.heads_kv, p.proj_dim}, ScalarType::Float);
  p.grad_key_bias = static_cast<float*>(result.data_ptr());
  return result;
}

Tensor projection_gradient(bool wanted, const Tensor& like, const Problem& p, Rows& rows) {
  if (!wanted) return nothing(like);
  Tensor result = empty_contiguous(like);
  rows = projection_rows(result, "gradient", like, p);
  return result;
}

}    // namespace linformer
