// The operators' schemas, entered in torch while the library loads, so that to load this one file is enough to call
// them: dlopen in C++, torch.ops.load_library in Python. Part of ops.cpp.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "tensors.h"

// LINFORMER_NAMESPACE, that of the operators, is a parameter of the build.
#define LINFORMER_NAMESPACE_NAME C10_STRINGIZE(LINFORMER_NAMESPACE)

// Torch from 2.12 on has tags here. The older take these for granted, unless their user has chosen otherwise.
extern "C" __attribute__((weak)) int32_t torch_library_def_with_tags(TorchLibraryHandle library, const char* schema,
                                                                     const int32_t* tags, int32_t count);
extern "C" __attribute__((weak)) int32_t torch_tag_pt2_compliant_tag();
extern "C" __attribute__((weak)) int32_t torch_tag_needs_exact_strides();

namespace linformer {

// Nothing may be thrown while a library loads, which would end the process: what went wrong is kept.
class Schemas {
 public:
  Schemas() {
    constexpr const char* kSchemas[] = {
#include "../../linformer_kernels/schemas.inc"
    };
    bool fine = aoti_torch_library_init_def(LINFORMER_NAMESPACE_NAME, "csrc/ops/schemas.h", __LINE__, &library_) == 0;
    if (!fine) library_ = nullptr;
    for (const char* schema : kSchemas) fine = fine && define(schema) == 0;
    if (fine) return;
    problem_ =
        "linformer_kernels: the operators " LINFORMER_NAMESPACE_NAME
        "::* have been registered before, by another library; wanted: one in a process. To fix it: load one of them "
        "only, or build one with another LINFORMER_NAMESPACE. " +
        torch_said();
  }
  ~Schemas() {
    if (library_) aoti_torch_delete_library_object(library_);
  }
  Schemas(const Schemas&) = delete;
  Schemas& operator=(const Schemas&) = delete;

  // A sentence; empty: none.
  const std::string& problem() const { return problem_; }

 private:
  int32_t define(const char* schema) {
    if (!torch_library_def_with_tags) return aoti_torch_library_def(library_, schema);
    // The strides of results follow those of the arguments: a compiler may not hand over others than it traced.
    const int32_t tags[] = {torch_tag_pt2_compliant_tag(), torch_tag_needs_exact_strides()};
    return torch_library_def_with_tags(library_, schema, tags, 2);
  }

  TorchLibraryHandle library_ = nullptr;
  std::string problem_;
};

inline const Schemas& schemas() {
  static const Schemas schemas;
  return schemas;
}

using Implementation = std::pair<const char*, void (*)(StableIValue*, uint64_t, uint64_t)>;

// Not where the schemas are another library's.
inline void implement(torch::stable::detail::StableLibrary& m, std::initializer_list<Implementation> all) {
  if (!schemas().problem().empty()) return;
  for (const auto& [name, function] : all) m.impl(name, function);
}

}    // namespace linformer

// Why the operators are not this library's; empty where they are.
extern "C" __attribute__((visibility("default"))) const char* linformer_problem() {
  return linformer::schemas().problem().c_str();
}
extern "C" __attribute__((visibility("default"))) const char* linformer_namespace() { return LINFORMER_NAMESPACE_NAME; }
