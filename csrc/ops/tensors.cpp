// Addresses, strides and memory of tensors.
#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <exception>
#include <string>

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace linformer {

std::string torch_said() {
  const char* said =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  return said && *said ? "torch says: " + std::string(said) : std::string();
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: STD_TORCH_CHECK(false, "linformer_kernels: tensors must be float32, float16 or bfloat16");
  }
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && (!a.is_cuda() || a.get_device_index() == b.get_device_index());
}

namespace {

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

}    // namespace

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

void* memory_of(const Tensor& tensor, const char* name) {
  void* memory = tensor.data_ptr();
  STD_TORCH_CHECK(memory != nullptr || tensor.numel() == 0, "linformer_kernels: the memory of ", name,
                  " has been freed");
  return memory;
}

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

Rows rows_of(const Tensor& tensor) { return view_of(tensor, "result", tensor, tensor.dim() == 3).rows; }

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

Tensor workspace_of(int64_t bytes, int64_t align, const Tensor& like, std::byte** start) {
  Tensor workspace = new_empty("its workspace", like, {(bytes + align) / 4}, ScalarType::Float);
  const auto address = reinterpret_cast<uintptr_t>(workspace.data_ptr());
  *start = reinterpret_cast<std::byte*>((address + align - 1) / align * align);
  return workspace;
}

}    // namespace linformer
