// The Python module: parse a module, describe a kernel, launch it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"

namespace py = pybind11;
using namespace emulator;

namespace {

py::object error_class;    // PtxError of the Python front

// begin, end, name
using BufferArgument = std::tuple<u64, u64, string>;

u64 sectors(const vector<u64>& touched) {
  u64 count = 0;
  for (u64 word : touched) count += static_cast<u64>(__builtin_popcountll(word));
  return count;
}

string joined_opcode(const Instruction& instruction) {
  string opcode = instruction.words[0];
  for (size_t i = 1; i < instruction.words.size(); i++) opcode += "." + instruction.words[i];
  return opcode;
}

const char* space_name(Space space) {
  static const char* const names[] = {"generic", "global", "shared", "local", "const", "param"};
  return names[static_cast<int>(space)];
}

py::dict describe(const Kernel& kernel) {
  py::list parameters;
  for (const Parameter& parameter : kernel.parameters) {
    parameters.append(py::make_tuple(parameter.offset, parameter.bytes));
  }
  const u32* block = kernel.function->required_block;
  py::dict description;
  description["params"] = parameters;
  description["param_bytes"] = kernel.param_bytes;
  description["static_shared"] = kernel.static_shared;
  description["local_bytes"] = kernel.local_bytes;
  description["register_bytes"] = kernel.register_bytes;
  description["instructions"] = kernel.code.size();
  description["required_block"] = py::make_tuple(block[0], block[1], block[2]);
  return description;
}

py::dict results_of(const Launch& launch) {
  py::list issues, buffers, lines;
  for (const Issue& issue : launch.issues) {
    py::dict entry;
    entry["kind"] = issue.kind;
    entry["count"] = issue.count;
    entry["msg"] = py::bytes(issue.message).attr("decode")("utf-8", "replace");
    issues.append(entry);
  }
  for (const Buffer& buffer : launch.buffers) {
    if (buffer.internal) continue;
    buffers.append(
        py::make_tuple(buffer.name, buffer.end - buffer.begin, sectors(buffer.read), sectors(buffer.written)));
  }
  for (const Instruction& instruction : launch.kernel->code) {
    const Counter& counter = launch.counters[instruction.pc];
    if (!counter.warps) continue;
    py::dict line;
    line["line"] = instruction.line;
    line["op"] = joined_opcode(instruction);
    line["space"] = space_name(instruction.space);
    line["warps"] = counter.warps;
    line["threads"] = counter.threads;
    line["sectors"] = counter.sectors;
    line["requests"] = counter.requests;
    line["wavefronts"] = counter.wavefronts;
    line["ideal"] = counter.ideal_wavefronts;
    line["bytes"] = counter.bytes;
    lines.append(line);
  }
  py::dict results;
  results["steps"] = launch.total_steps;
  results["resident"] = launch.most_resident;
  results["shared_bytes"] = launch.shared_bytes;
  results["issues"] = issues;
  results["buffers"] = buffers;
  results["lines"] = lines;
  return results;
}

py::dict launch_kernel(Module& module, const string& name, const std::array<u32, 3>& grid,
                       const std::array<u32, 3>& block, const py::bytes& parameters,
                       const vector<BufferArgument>& buffers, u32 shared, u32 shared_limit, bool races,
                       bool proxy_fences, bool cooperative, u64 seed, u64 max_steps, u32 max_resident,
                       const std::array<u32, 3>& cluster) {
  Launch launch;
  launch.kernel = &module.kernel(name);
  std::copy(grid.begin(), grid.end(), launch.grid);
  std::copy(block.begin(), block.end(), launch.block);
  launch.dynamic_shared = shared;
  const string bytes = parameters;
  launch.parameters.assign(bytes.begin(), bytes.end());
  for (const auto& [begin, end, buffer_name] : buffers) {
    Buffer buffer;
    buffer.begin = begin;
    buffer.end = end;
    buffer.name = buffer_name;
    launch.buffers.push_back(buffer);
  }
  launch.options.races = races;
  launch.options.proxy_fences = proxy_fences;
  launch.options.cooperative = cooperative;
  launch.options.seed = seed;
  launch.options.max_steps = max_steps;
  launch.options.shared_limit = shared_limit;
  std::copy(cluster.begin(), cluster.end(), launch.options.cluster);
  if (max_resident) launch.options.max_resident = max_resident;
  launch.interrupt_check = [] {
    if (PyErr_CheckSignals()) throw py::error_already_set();
  };
  launch.run();
  return results_of(launch);
}

}    // namespace

PYBIND11_MODULE(emulator_core, m) {
  m.doc() = "Executes PTX on the CPU; used through the package emulator.";
  m.def("raise_as", [](py::object type) { error_class = std::move(type); });
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      py::set_error(error_class, error.what());
    }
  });
  py::class_<Module>(m, "Module")
      .def(py::init<const string&>(), py::arg("ptx"))
      .def_property_readonly("target", [](const Module& module) { return module.target; })
      .def_property_readonly("kernels",
                             [](const Module& module) {
                               vector<string> names;
                               for (const auto& [name, function] : module.functions) {
                                 if (function.is_kernel) names.push_back(name);
                               }
                               return names;
                             })
      .def("describe", [](Module& module, const string& name) { return describe(module.kernel(name)); })
      .def("launch", launch_kernel, py::kw_only(), py::arg("name"), py::arg("grid"), py::arg("block"),
           py::arg("parameters"), py::arg("buffers"), py::arg("shared"), py::arg("shared_limit"), py::arg("races"),
           py::arg("proxy_fences"), py::arg("cooperative"), py::arg("seed"), py::arg("max_steps"),
           py::arg("max_resident"), py::arg("cluster"));
  py::module_::import("atexit").attr("register")(py::cpp_function([] { error_class = py::object(); }));
}
