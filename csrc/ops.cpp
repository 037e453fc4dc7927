// The operators: what torch calls, on top of what the devices run. The only C++ file that knows torch, and of torch
// only the stable ABI, so that one library serves every torch from the version it was compiled for.
//
// Schemas stand in linformer_kernels/schemas.inc, shape rules for fake tensors in _ops.py beside it; arguments arrive
// validated from there. What is checked again here is what memory safety needs, because an operator can be called
// without its public function.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <exception>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/choose.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "problem.h"
#include "schemas.h"
#ifdef LINFORMER_WITH_CUDA
#include <dlfcn.h>

#include <cstring>

#include "cuda/launch.h"
#endif

namespace linformer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: STD_TORCH_CHECK(false, "linformer_kernels: tensors must be float32, float16 or bfloat16");
  }
}

#ifdef LINFORMER_WITH_CUDA
// Takes the launches of the CUDA plans instead of a GPU; the tests' emulator is one. CPU tensors then stand for a
// GPU's.
using Emulator = void (*)(const char* kernel, uint32_t grid, uint32_t block, uint32_t shared_bytes,
                          const void* arguments, uint64_t argument_bytes, const cuda::Region* regions, uint64_t count);
struct Emulation {
  Emulator launch = nullptr;
  cuda::Device device;
};
Emulation emulation;

bool on_gpu(const Tensor& tensor) { return tensor.is_cuda() || emulation.launch; }
#else
bool on_gpu(const Tensor&) { return false; }
#endif

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && (!a.is_cuda() || a.get_device_index() == b.get_device_index());
}

// An error that a user can meet by no mistake of a caller's: its words alone, without our file and line.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << "linformer_kernels: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// Memory from torch. A failure leaves the stable ABI without its text, and with that the word "memory", for which those
// look who try again with a smaller batch.
template <class Make>
Tensor allocate(const char* what, std::initializer_list<int64_t> sizes, double bytes_an_element, const Tensor& like,
                const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    double bytes = bytes_an_element;
    for (const int64_t size : sizes) bytes *= static_cast<double>(size);
    std::ostringstream amount;
    amount.precision(3);
    if (bytes >= 1 << 30) amount << " (" << bytes / (1 << 30) << " GiB)";
    const std::string reason = torch_said();
    const char* device = like.is_cuda() ? "GPU" : "CPU";
    const bool memory = reason.empty() || reason.find("memory") != std::string::npos;
    refuse(device, memory ? " out of memory. Tried to allocate " : ": torch did not allocate ",
           static_cast<int64_t>(bytes), " bytes", amount.str(), " for ", what, ". ", reason);
  }
}

// torch::stable::new_empty without its search for the operator by name and its boxed arguments, which are half of what
// the allocation of a small tensor costs.
Tensor new_empty(const char* what, const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return allocate(what, sizes, dtype == ScalarType::Float ? 4 : 2, like, [&] {
    int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle result = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.begin(), static_cast<int64_t>(sizes.size()),
                                                     &type, nullptr, nullptr, 0, nullptr, &result));
    return Tensor(result);
  });
}

Tensor new_empty(const char* what, const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_empty(what, like, sizes, like.scalar_type());
}

// The address of its first element; a storage that has been freed under its tensor has none.
void* memory_of(const Tensor& tensor, const char* name) {
  void* memory = tensor.data_ptr();
  STD_TORCH_CHECK(memory != nullptr || tensor.numel() == 0, "linformer_kernels: the memory of ", name,
                  " has been freed");
  return memory;
}

// A (B, H, N, D) or packed (total, H, D) tensor.
struct View {
  Rows rows;
  int64_t batch = 0, heads = 0, length = 0, columns = 0;
};

View view_of(const Tensor& tensor, const char* name, const Tensor& like, bool packed) {
  STD_TORCH_CHECK(same_device(tensor, like), "linformer_kernels: ", name, " is on another device");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "linformer_kernels: ", name, " differs in dtype");
  STD_TORCH_CHECK(tensor.dim() == (packed ? 3 : 4), "linformer_kernels: ", name, " has ", tensor.dim(),
                  " dimensions, expected ", packed ? 3 : 4);
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.numel() == 0 || tensor.stride(last) == 1,
                  "linformer_kernels: ", name, " needs adjacent elements in its last dimension");
  View view;
  view.rows.data = memory_of(tensor, name);
  if (packed) {
    view.rows.head_stride = tensor.stride(1);
    view.rows.row_stride = tensor.stride(0);
    view.batch = 1;
    view.length = tensor.size(0);
    view.heads = tensor.size(1);
    view.columns = tensor.size(2);
  } else {
    view.rows.batch_stride = tensor.stride(0);
    view.rows.head_stride = tensor.stride(1);
    view.rows.row_stride = tensor.stride(2);
    view.batch = tensor.size(0);
    view.heads = tensor.size(1);
    view.length = tensor.size(2);
    view.columns = tensor.size(3);
  }
  return view;
}

// A gradient or result in the layout of `like`: heads adjacent to columns where they are so in `like`. The same rule as
// _like in linformer_kernels/_ops.py.
Tensor empty_like(const char* what, const Tensor& like, int64_t columns) {
  if (like.dim() == 3) return new_empty(what, like, {like.size(0), like.size(1), columns});
  const bool heads_inner = like.size(1) > 1 && like.size(2) > 1 && like.stride(1) < like.stride(2);
  if (!heads_inner) return new_empty(what, like, {like.size(0), like.size(1), like.size(2), columns});
  return torch::stable::transpose(new_empty(what, like, {like.size(0), like.size(2), like.size(1), columns}), 1, 2);
}

Tensor empty_contiguous(const Tensor& like) {
  constexpr const char* kWhat = "a gradient";
  if (like.dim() == 2) return new_empty(kWhat, like, {like.size(0), like.size(1)});
  if (like.dim() == 3) return new_empty(kWhat, like, {like.size(0), like.size(1), like.size(2)});
  return new_empty(kWhat, like, {like.size(0), like.size(1), like.size(2), like.size(3)});
}

Tensor nothing(const Tensor& like) { return new_empty("nothing", like, {0}); }

// On a GPU the values are not read here, which would wait for it: the kernels hold them inside the tensor, and the
// longest sequence is as long as `total` for all that is known.
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
Rows projection_rows(const Tensor& proj, const char* name, const Tensor& like, const Problem& p) {
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

void set_sequence(Problem& p, const Tensor& key, const Tensor& value, const Tensor& proj_key,
                  const OptionalTensor& proj_value, const OptionalTensor& mask, const OptionalTensor& cu_seqlens_k) {
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

// query meets K' and V', which come from set_sequence in the fused operators.
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

Rows rows_of(const Tensor& tensor) { return view_of(tensor, "result", tensor, tensor.dim() == 3).rows; }

// A workspace aligned to `align` bytes; as fp32, so that torch's fill of uninitialised memory poisons it with NaN.
Tensor workspace_of(int64_t bytes, int64_t align, const Tensor& like, std::byte** start) {
  Tensor workspace = new_empty("its workspace", like, {(bytes + align) / 4}, ScalarType::Float);
  const auto address = reinterpret_cast<uintptr_t>(workspace.data_ptr());
  *start = reinterpret_cast<std::byte*>((address + align - 1) / align * align);
  return workspace;
}

#ifdef LINFORMER_WITH_CUDA
// The stable ABI of torch 2.10 has no current stream. The function lies in a library that a CPU torch does not have.
void* current_stream(int index) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(function && function(index, &stream) == 0,
                  "linformer_kernels: this torch does not tell its current CUDA stream");
  return stream;
}

void run_cuda(const Problem& problem, unsigned stages, const Tensor& like) {
  const int index = emulation.launch ? 0 : static_cast<int>(like.get_device_index());
  std::string error;
  const cuda::Device device = emulation.launch ? emulation.device : cuda::device_of(index, &error);
  STD_TORCH_CHECK(error.empty(), "linformer_kernels: CUDA: ", error);
  const cuda::Plan size = cuda::make_plan(problem, stages, device, nullptr);
  STD_TORCH_CHECK(!size.refusal, "linformer_kernels: ", size.refusal ? size.refusal : "");
  if (size.launches.empty()) return;
  constexpr int64_t kAlign = 256;
  std::byte* start = nullptr;
  const Tensor workspace = workspace_of(size.workspace_bytes, kAlign, like, &start);
  const cuda::Plan plan = cuda::make_plan(problem, stages, device, start);
  if (!emulation.launch) {
    // Torch's own guard: on the way back it does not wake a GPU that was current and never used.
    const torch::stable::accelerator::DeviceGuard guard(index);
    error = cuda::launch(plan, start, index, device.shared_bytes, current_stream(index));
    STD_TORCH_CHECK(error.empty(), "linformer_kernels: CUDA: ", error);
    return;
  }
  std::memset(start, 0, static_cast<size_t>(plan.counter_bytes));
  std::vector<cuda::Region> regions = cuda::regions_of(problem);
  regions.push_back({"workspace", start, plan.workspace_bytes});
  for (const cuda::Launch& one : plan.launches) {
    const cuda::HopperArguments all = cuda::joined(one);
    const bool mapped = !one.maps.empty();
    emulation.launch(one.kernel, one.grid, one.block, one.shared_bytes,
                     mapped ? &all : static_cast<const void*>(&all.a), mapped ? sizeof(all) : sizeof(all.a),
                     regions.data(), regions.size());
  }
}
#endif

void check_capability() {
  if (const char* problem = cpu::capability_problem()) refuse(problem);
}

void run(const Problem& problem, unsigned stages, const Tensor& like) {
#ifdef LINFORMER_WITH_CUDA
  if (on_gpu(like)) return run_cuda(problem, stages, like);
#endif
  check_capability();
  const int threads = cpu::threads_for(problem, stages, static_cast<int>(torch::stable::get_num_threads()));
  const auto run_on = [&](const cpu::KernelTable& table) {
    cpu::Plan plan = cpu::make_plan(problem, stages, table, threads);
    const Tensor workspace = workspace_of(plan.workspace_bytes, 64, like, &plan.workspace);
    return cpu::run_plan(plan, threads, [](int64_t count, const std::function<void(int64_t)>& body) {
      torch::stable::parallel_for(0, count, 1, [&body](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i);
      });
    });
  };
  const cpu::KernelTable& table = cpu::kernel_table_for(problem, stages);
  if (!run_on(table)) run_on(*table.without_tiles);
}

bool needed(int64_t needs, int bit) { return (needs >> bit & 1) != 0; }

// A wanted gradient: its tensor, entered in the problem. An unwanted one: an empty tensor.
Tensor gradient(bool wanted, const Tensor& like, Rows& rows) {
  if (!wanted) return nothing(like);
  Tensor result = empty_like("a gradient", like, like.size(like.dim() - 1));
  rows = rows_of(result);
  return result;
}

// float32, contiguous.
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

// The segments of `length` keys, of all heads or of each.
void set_segments(Problem& p, const Tensor& segments, const Tensor& like, int64_t sequences, bool packed) {
  const int64_t heads = packed ? 1 : segments.dim() - 2, rows = packed ? 0 : segments.dim() - 1;
  STD_TORCH_CHECK(
      same_device(segments, like) && segments.scalar_type() == ScalarType::Int && segments.dim() == (packed ? 2 : 3) &&
          (packed || segments.size(0) == sequences) && segments.size(rows) == p.len_k &&
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

std::tuple<Tensor, Tensor, Tensor> pool(Tensor key, Tensor value, Tensor segments, OptionalTensor cu_seqlens_k,
                                        int64_t num_segments) {
  const bool packed = cu_seqlens_k.has_value();
  const View k = view_of(key, "key", key, packed), v = view_of(value, "value", key, packed);
  STD_TORCH_CHECK(k.batch == v.batch && k.heads == v.heads && k.length == v.length,
                  "linformer_kernels: key and value differ in shape");
  Problem p;
  p.dtype = dtype_of(key);
  p.batch = batch_of(cu_seqlens_k, k.batch);
  p.heads_kv = k.heads;
  p.len_k = p.total_k = k.length;
  p.head_dim = k.columns;
  p.value_dim = v.columns;
  p.proj_dim = num_segments;
  p.key = k.rows;
  p.value = v.rows;
  set_segments(p, segments, key, k.batch, packed);
  p.cu_seqlens_k = offsets_of(cu_seqlens_k, "cu_seqlens_k", key, k.length, p.batch, &p.len_k);
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
  set_segments(p, segments, grad_key_proj, p.batch, packed);
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

// For tests: launches go to `emulator`, or to the GPU again with nullptr.
extern "C" __attribute__((visibility("default"))) void linformer_emulate(linformer::Emulator emulator,
                                                                         int32_t multiprocessors, int32_t shared_bytes,
                                                                         bool hopper) {
  linformer::emulation = {emulator, {multiprocessors, shared_bytes, hopper}};
}
#endif

STABLE_TORCH_LIBRARY_IMPL(LINFORMER_NAMESPACE, CompositeExplicitAutograd, m) {
  linformer::implement(m, {LINFORMER_OP(cpu_capability), LINFORMER_OP(cpu_use_capability), LINFORMER_OP(cpu_plan),
                           LINFORMER_OP(cpu_amx_refusal), LINFORMER_OP(cpu_peak_gflops), LINFORMER_OP(cpu_probe_gflops),
                           LINFORMER_OP(cuda_architectures), LINFORMER_OP(cuda_driver_problem)});
}
