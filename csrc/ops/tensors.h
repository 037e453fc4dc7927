// Tensors as a device's code reads them: addresses and strides, and memory for results. With arguments.h, run.h and
// schemas.h beside it and ops.cpp above the only C++ that knows torch, and of torch only the stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../problem.h"

namespace linformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An error that a user can meet by no mistake of a caller's: its words alone, without our file and line.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << "linformer_kernels: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// What torch said when a call of the stable ABI failed; torch from 2.13 on tells.
std::string torch_said();

DType dtype_of(const Tensor& tensor);

bool same_device(const Tensor& a, const Tensor& b);

// The address of its first element; a storage that has been freed under its tensor has none.
void* memory_of(const Tensor& tensor, const char* name);

// A (B, H, N, D) or packed (total, H, D) tensor.
struct View {
  Rows rows;
  int64_t batch = 0, heads = 0, length = 0, columns = 0;
};

View view_of(const Tensor& tensor, const char* name, const Tensor& like, bool packed);

Rows rows_of(const Tensor& tensor);

// New memory; `what` is for the error where there is none.
Tensor new_empty(const char* what, const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor new_empty(const char* what, const Tensor& like, std::initializer_list<int64_t> sizes);

// A gradient or result in the layout of `like`: heads adjacent to columns where they are so in `like`. The same rule as
// _like in linformer_kernels/_ops.py.
Tensor empty_like(const char* what, const Tensor& like, int64_t columns);

Tensor empty_contiguous(const Tensor& like);

Tensor nothing(const Tensor& like);

// A workspace aligned to `align` bytes; as fp32, so that torch's fill of uninitialised memory poisons it with NaN.
Tensor workspace_of(int64_t bytes, int64_t align, const Tensor& like, std::byte** start);

}    // namespace linformer
