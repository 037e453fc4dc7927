// The operators: what torch calls, on top of what the devices run.
//
// Schemas stand in linformer_kernels/schemas.inc, shape rules for fake tensors in _ops.py beside it. One library serves
// every torch from the version that it was compiled for: this file and ops/ use the stable ABI alone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu/choose.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "ops/arguments.h"
#include "ops/run.h"
#include "ops/schemas.h"
#ifdef LINFORMER_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace linformer {
namespace {

std::tuple<Tensor, Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, Tensor proj_key,
                                             OptionalTensor proj_value, OptionalTensor key_bias,
                                             OptionalTensor key_padding_mask, OptionalTensor cu_seqlens_q,
                                             OptionalTensor cu_seqlens_k, OptionalTensor rng_state, double dropout_p,
                                             double scale, bool allow_tf32) {
  Problem p;
  p.allow_tf32 = allow_tf32;
  set_sequence(p, key, value, proj_key, proj_value, key_padding_mask, cu_seqlens_k);
  const Problem sequence = p;
  set_query(p, query, cu_seqlens_q);
  check_query(p, sequence);
  check_heads(p);
  set_softmax(p, query, rng_state, dropout_p, scale);
  set_bias(p, key_bias, query);
  Tensor out = empty_like("the result", query, p.value_dim);
  Tensor key_proj = new_empty("K' and V'", key, {p.batch, p.heads_kv, p.proj_dim, p.head_dim});
  Tensor value_proj = new_empty("K' and V'", key, {p.batch, p.heads_kv, p.proj_dim, p.value_dim});
  p.out = rows_of(out);
  p.key_proj = rows_of(key_proj);
  p.value_proj = rows_of(value_proj);
  run(p, kProject | kAttend, query);
  return {out, key_proj, value_proj};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor proj_key, OptionalTensor proj_value,
    OptionalTensor key_bias, OptionalTensor key_padding_mask, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor rng_state, Tensor key_proj, Tensor value_proj, double dropout_p, double scale, bool allow_tf32,
    int64_t needs) {
  Problem p;
  p.allow_tf32 = allow_tf32;
  set_sequence(p, key, value, proj_key, proj_value, key_padding_mask, cu_seqlens_k);
  const Problem sequence = p;
  set_query(p, query, cu_seqlens_q);
  check_query(p, sequence);
  p.key_proj = projected_rows(key_proj, "key_proj", key, p, p.head_dim);
  p.value_proj = projected_rows(value_proj, "value_proj", key, p, p.value_dim);
  check_heads(p);
  set_softmax(p, query, rng_state, dropout_p, scale);
  set_bias(p, key_bias, query);
  set_grad_out(p, grad_out, query, cu_seqlens_q.has_value());
  Tensor grad_query = gradient(needed(needs, 0), query, p.grad_query);
  Tensor grad_key = gradient(needed(needs, 1), key, p.grad_key);
  Tensor grad_value = gradient(needed(needs, 2), value, p.grad_value);
  Tensor grad_proj_key = projection_gradient(needed(needs, 3), proj_key, p, p.grad_proj_key);
  Tensor grad_proj_value = projection_gradient(needed(needs, 4) && proj_value, proj_key, p, p.grad_proj_value);
  Tensor grad_key_bias = bias_gradient(needed(needs, 5), key_bias, query, p);
  run(p, kAttendBackward | kProjectBackward, query);
  return {grad_query, grad_key, grad_value, grad_proj_key, grad_proj_value, grad_key_bias};
}

std::tuple<Tensor, Tensor> project(Tensor key, Tensor value, Tensor proj_key, OptionalTensor proj_value,
                                   OptionalTensor key_padding_mask, OptionalTensor cu_seqlens_k, bool allow_tf32) {
  Problem p;
  p.allow_tf32 = allow_tf32;
  set_sequence(p, key, value, proj_key, proj_value, key_padding_mask, cu_seqlens_k);
  check_sizes(p);
  Tensor key_proj = new_empty("K' and V'", key, {p.batch, p.heads_kv, p.proj_dim, p.head_dim});
  Tensor value_proj = new_empty("K' and V'", key, {p.batch, p.heads_kv, p.proj_dim, p.value_dim});
  p.key_proj = rows_of(key_proj);
  p.value_proj = rows_of(value_proj);
  run(p, kProject, key);
  return {key_proj, value_proj};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> project_backward(Tensor grad_key_proj, Tensor grad_value_proj, Tensor key,
                                                            Tensor value, Tensor proj_key, OptionalTensor proj_value,
                                                            OptionalTensor key_padding_mask,
                                                            OptionalTensor cu_seqlens_k, bool allow_tf32,
                                                            int64_t needs) {
  Problem p;
  p.allow_tf32 = allow_tf32;
  set_sequence(p, key, value, proj_key, proj_value, key_padding_mask, cu_seqlens_k);
  check_sizes(p);
  p.grad_key_proj = projected_rows(grad_key_proj, "grad_key_proj", key, p, p.head_dim);
  p.grad_value_proj = projected_rows(grad_value_proj, "grad_value_proj", key, p, p.value_dim);
  Tensor grad_key = gradient(needed(needs, 0), key, p.grad_key);
  Tensor grad_value = gradient(needed(needs, 1), value, p.grad_value);
  Tensor grad_proj_key = projection_gradient(needed(needs, 2), proj_key, p, p.grad_proj_key);
  Tensor grad_proj_value = projection_gradient(needed(needs, 3) && proj_value, proj_key, p, p.grad_proj_value);
  run(p, kProjectBackward, key);
  return {grad_key, grad_value, grad_proj_key, grad_proj_value};
}

Tensor projected_attention(Tensor query, Tensor key_proj, Tensor value_proj, OptionalTensor key_bias,
                           OptionalTensor cu_seqlens_q, OptionalTensor rng_state, double dropout_p, double scale,
                           bool allow_tf32) {
  Problem p;
  p.allow_tf32 = allow_tf32;
  set_query(p, query, cu_seqlens_q);
  STD_TORCH_CHECK(key_proj.scalar_type() == query.scalar_type(), "linformer_kernels: key_proj differs in dtype");
  set_projected(p, key_proj, value_proj);
  check_heads(p);
  set_softmax(p, query, rng_state, dropout_p, scale);
  set_bias(p, key_bias, query);
  Tensor out = empty_like("the result", query, p.value_dim);
  p.out = rows_of(out);
  run(p, kAttend, query);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> projected_attention_backward(Tensor grad_out, Tensor query, Tensor key_proj,
                                                                        Tensor value_proj, OptionalTensor key_bias,
                                                                        OptionalTensor cu_seqlens_q,
                                                                        OptionalTensor rng_state, double dropout_p,
                                                                        double scale, bool allow_tf32, int64_t needs) {
  Problem p;
  p.allow_tf32 = allow_tf32;
  set_query(p, query, cu_seqlens_q);
  STD_TORCH_CHECK(key_proj.scalar_type() == query.scalar_type(), "linformer_kernels: key_proj differs in dtype");
  set_projected(p, key_proj, value_proj);
  check_heads(p);
  set_softmax(p, query, rng_state, dropout_p, scale);
  set_bias(p, key_bias, query);
  set_grad_out(p, grad_out, query, cu_seqlens_q.has_value());
  Tensor grad_query = gradient(needed(needs, 0), query, p.grad_query);
  Tensor grad_key_proj = nothing(query), grad_value_proj = nothing(query);
  if (needed(needs, 1)) {
    grad_key_proj = empty_contiguous(key_proj);
    p.grad_key_proj = rows_of(grad_key_proj);
  }
  if (needed(needs, 2)) {
    grad_value_proj = empty_contiguous(value_proj);
    p.grad_value_proj = rows_of(grad_value_proj);
  }
  Tensor grad_key_bias = bias_gradient(needed(needs, 3), key_bias, query, p);
  run(p, kAttendBackward, query);
  return {grad_query, grad_key_proj, grad_value_proj, grad_key_bias};
}

std::tuple<Tensor, Tensor, Tensor> pool(Tensor key, Tensor value, Tensor segments, OptionalTensor cu_seqlens_k,
                                        int64_t num_segments) {
  Problem p;
  set_rows(p, key, value, cu_seqlens_k);
  p.proj_dim = num_segments;
  set_segments(p, segments, key, cu_seqlens_k.has_value());
  check_pool_sizes(p);
  Tensor key_proj = new_empty("K' and V'", key, {p.batch, p.heads_kv, p.proj_dim, p.head_dim});
  Tensor value_proj = new_empty("K' and V'", key, {p.batch, p.heads_kv, p.proj_dim, p.value_dim});
  Tensor count = new_empty("the counts", key, {p.batch, p.heads_kv, p.proj_dim}, ScalarType::Float);
  p.key_proj = rows_of(key_proj);
  p.value_proj = rows_of(value_proj);
  p.count = static_cast<float*>(count.data_ptr());
  run(p, kPool, key);
  return {key_proj, value_proj, count};
}

std::tuple<Tensor, Tensor> pool_backward(Tensor grad_key_proj, Tensor grad_value_proj, Tensor count, Tensor segments,
                                         OptionalTensor cu_seqlens_k, bool heads_inner, int64_t needs) {
  const bool packed = cu_seqlens_k.has_value();
  const View k = view_of(grad_key_proj, "grad_key_proj", grad_key_proj, false);
  const View v = view_of(grad_value_proj, "grad_value_proj", grad_key_proj, false);
  STD_TORCH_CHECK(k.batch == v.batch && k.heads == v.heads && k.length == v.length,
                  "linformer_kernels: grad_key_proj and grad_value_proj differ in shape");
  Problem p;
  p.dtype = dtype_of(grad_key_proj);
  p.batch = k.batch;
  p.heads_kv = k.heads;
  p.proj_dim = k.length;
  p.head_dim = k.columns;
  p.value_dim = v.columns;
  p.grad_key_proj = k.rows;
  p.grad_value_proj = v.rows;
  STD_TORCH_CHECK(segments.dim() >= 1, "linformer_kernels: segments needs dimensions");
  p.len_k = p.total_k = segments.size(packed ? 0 : segments.dim() - 1);
  set_segments(p, segments, grad_key_proj, packed);
  p.cu_seqlens_k = offsets_of(cu_seqlens_k, "cu_seqlens_k", grad_key_proj, p.total_k, p.batch, &p.len_k);
  STD_TORCH_CHECK(same_device(count, grad_key_proj) && count.scalar_type() == ScalarType::Float && count.dim() == 3 &&
                      count.is_contiguous() && count.size(0) == p.batch && count.size(1) == p.heads_kv &&
                      count.size(2) == p.proj_dim,
                  "linformer_kernels: count must be as pool returns it");
  p.count = static_cast<float*>(memory_of(count, "count"));
  check_pool_sizes(p);
  const auto make = [&](bool wanted, int64_t columns, Rows& rows) {
    if (!wanted) return nothing(grad_key_proj);
    constexpr const char* kWhat = "a gradient";
    Tensor result = packed        ? new_empty(kWhat, grad_key_proj, {p.total_k, p.heads_kv, columns})
                    : heads_inner ? torch::stable::transpose(
                                        new_empty(kWhat, grad_key_proj, {p.batch, p.len_k, p.heads_kv, columns}), 1, 2)
                                  : new_empty(kWhat, grad_key_proj, {p.batch, p.heads_kv, p.len_k, columns});
    rows = rows_of(result);
    return result;
  };
  Tensor grad_key = make(needed(needs, 0), p.head_dim, p.grad_key);
  Tensor grad_value = make(needed(needs, 1), p.value_dim, p.grad_value);
  run(p, kPoolBackward, grad_key_proj);
  return {grad_key, grad_value};
}

// For the CPU alone; elsewhere linformer_kernels/segments.py computes the same.
Tensor choose_segments(Tensor query, Tensor key, OptionalTensor key_padding_mask, OptionalTensor cu_seqlens_q,
                       OptionalTensor cu_seqlens_k, int64_t num_segments, int64_t singles, int64_t first,
                       int64_t last) {
  const bool packed = cu_seqlens_k.has_value();
  cpu::SegmentChoice choice;
  Problem& p = choice.problem;
  set_query(p, query, cu_seqlens_q);
  const View k = view_of(key, "key", query, packed);
  STD_TORCH_CHECK(k.columns == p.head_dim && batch_of(cu_seqlens_k, k.batch) == p.batch,
                  "linformer_kernels: query does not match key in batch or head_dim");
  p.heads_kv = k.heads;
  p.len_k = p.total_k = k.length;
  p.key = k.rows;
  p.proj_dim = num_segments;
  check_heads(p);
  set_mask(p, key_padding_mask, key, packed);
  p.cu_seqlens_k = offsets_of(cu_seqlens_k, "cu_seqlens_k", key, k.length, p.batch, &p.len_k);
  // Without a sum, which could overflow.
  STD_TORCH_CHECK(first >= 0 && last >= 0 && first <= singles && last <= singles - first && singles < num_segments,
                  "linformer_kernels: wanted: 0 <= first + last <= singles < num_segments");
  choice.singles = singles;
  choice.first = first;
  choice.last = last;
  constexpr const char* kWhat = "the segments";
  Tensor segments = packed ? new_empty(kWhat, key, {k.length, p.heads_kv}, ScalarType::Int)
                           : new_empty(kWhat, key, {p.batch, p.heads_kv, p.len_k}, ScalarType::Int);
  choice.segments = static_cast<int32_t*>(segments.data_ptr());
  choice.batch_stride = packed ? 0 : p.heads_kv * p.len_k;
  choice.head_stride = packed ? 1 : p.len_k;
  choice.row_stride = packed ? p.heads_kv : 1;
  if (segments.numel() == 0) return segments;
  torch::stable::parallel_for(0, p.batch * p.heads_kv, 1, [&choice](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) cpu::choose_segments(choice, i);
  });
  return segments;
}

std::string cpu_capability() {
  check_capability();
  return cpu::kernel_table().name;
}

std::string cpu_use_capability(std::string name) {
  cpu::use_capability(name.c_str());
  return cpu_capability();
}

// Tasks of each phase, in their order.
std::vector<int64_t> cpu_plan(int64_t batch, int64_t heads, int64_t length, int64_t proj_dim, int64_t head_dim,
                              bool shared_kv, bool backward, int64_t threads) {
  Problem p;
  p.batch = batch;
  p.heads = p.heads_kv = heads;
  p.len_q = p.len_k = p.seq_len_max = length;
  p.proj_dim = proj_dim;
  p.head_dim = p.value_dim = head_dim;
  p.shared_kv = shared_kv;
  const cpu::Plan plan = cpu::make_plan(p, backward ? kAttendBackward | kProjectBackward : kProject | kAttend,
                                        cpu::kernel_table_for(p, kProject | kAttend), static_cast<int>(threads));
  std::vector<int64_t> tasks;
  for (int i = 0; i < plan.phase_count; ++i) tasks.push_back(plan.phases[i].tasks);
  return tasks;
}

std::string cpu_amx_refusal() { return cpu::amx_refusal(); }

std::string cuda_architectures() {
#ifdef LINFORMER_WITH_CUDA
  return LINFORMER_CUDA_ARCHS;
#else
  return "";
#endif
}

std::string cuda_driver_problem([[maybe_unused]] bool ptx) {
#ifdef LINFORMER_WITH_CUDA
  return cuda::driver_problem(ptx);
#else
  return "";
#endif
}

double cpu_peak_gflops(std::string dtype) {
  check_capability();
  const DType type = dtype == "bfloat16" ? DType::kBFloat16 : dtype == "float16" ? DType::kFloat16 : DType::kFloat32;
  return cpu::kernel_table().peak_gflops(type);
}

double cpu_probe_gflops() { return cpu::kernel_table().probe_gflops(); }

}    // namespace
}    // namespace linformer

#define LINFORMER_OP(name) \
  linformer::Implementation { #name, TORCH_BOX(&linformer::name) }

// The same functions for both devices: what differs is behind run().
static void implement_on_device(torch::stable::detail::StableLibrary& m) {
  linformer::implement(
      m, {LINFORMER_OP(attention), LINFORMER_OP(attention_backward), LINFORMER_OP(project),
          LINFORMER_OP(project_backward), LINFORMER_OP(projected_attention), LINFORMER_OP(projected_attention_backward),
          LINFORMER_OP(pool), LINFORMER_OP(pool_backward)});
}

STABLE_TORCH_LIBRARY_IMPL(LINFORMER_NAMESPACE, CPU, m) {
  implement_on_device(m);
  linformer::implement(m, {LINFORMER_OP(choose_segments)});
}
#ifdef LINFORMER_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(LINFORMER_NAMESPACE, CUDA, m) { implement_on_device(m); }
#endif

STABLE_TORCH_LIBRARY_IMPL(LINFORMER_NAMESPACE, CompositeExplicitAutograd, m) {
  linformer::implement(m, {LINFORMER_OP(cpu_capability), LINFORMER_OP(cpu_use_capability), LINFORMER_OP(cpu_plan),
                           LINFORMER_OP(cpu_amx_refusal), LINFORMER_OP(cpu_peak_gflops), LINFORMER_OP(cpu_probe_gflops),
                           LINFORMER_OP(cuda_architectures), LINFORMER_OP(cuda_driver_problem)});
}
