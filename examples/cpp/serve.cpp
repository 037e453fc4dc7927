// Serves an AOTInductor package of a model with linformer_kernels' operators, without Python: docs/deploying.md.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: serve _native.so model.pt2, and on stdin lines of: inputs.pt output.pt\n";
    return 2;
  }
  // The library defines the operators: the package finds them once it is loaded.
  void* library = dlopen(argv[1], RTLD_NOW);
  const auto problem = library ? reinterpret_cast<const char* (*)()>(dlsym(library, "linformer_problem")) : nullptr;
  if (!problem || *problem()) {
    std::cerr << (problem ? problem() : dlerror()) << '\n';
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[2]);

  const c10::InferenceMode inference;
  for (std::string from, to; std::cin >> from >> to;) {
    std::ifstream file(from, std::ios::binary);
    const std::vector<char> saved{std::istreambuf_iterator<char>(file), {}};    // by torch.save((src, padding), path)
    const c10::IValue tuple = torch::jit::pickle_load(saved);
    std::vector<at::Tensor> inputs;
    for (const c10::IValue& input : tuple.toTupleRef().elements()) inputs.push_back(input.toTensor());
    const std::vector<char> result = torch::jit::pickle_save(model.run(inputs).at(0));    // for torch.load(path)
    std::ofstream(to, std::ios::binary).write(result.data(), static_cast<std::streamsize>(result.size()));
    std::cout << from << " -> " << to << std::endl;
  }
}
