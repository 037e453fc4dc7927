// Runs the CPU kernels without torch, for processors that only an emulator has: bare PROBLEM RESULT.
//
// PROBLEM is a line "memory BYTES", those bytes, and then words: the fields of Problem by their names, each followed by
// its values, addresses as offsets into the memory; "run STAGES THREADS" computes with the fields as they are,
// "choose ..." the segments, "clear" takes all fields back. RESULT is the memory afterwards. Prints the build that ran.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <string>

#include "../../csrc/cpu/choose.h"
#include "../../csrc/cpu/kernels.h"

namespace {

using linformer::Problem;
using linformer::Rows;

constexpr std::size_t kLine = 64;

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<std::byte, Free>;

// As floats NaN: what nobody writes shows.
Memory allocate(int64_t bytes) {
  const std::size_t size = (static_cast<std::size_t>(bytes) / kLine + 1) * kLine;
  Memory memory(static_cast<std::byte*>(std::aligned_alloc(kLine, size)));
  std::memset(memory.get(), 0xff, size);
  return memory;
}

[[noreturn]] void stop(const std::string& what) {
  std::cerr << "bare: " << what << "\n";
  std::exit(2);
}

const std::map<std::string, int64_t Problem::*> kNumbers = {
    {"batch", &Problem::batch},
    {"heads", &Problem::heads},
    {"heads_kv", &Problem::heads_kv},
    {"len_q", &Problem::len_q},
    {"len_k", &Problem::len_k},
    {"total_q", &Problem::total_q},
    {"total_k", &Problem::total_k},
    {"seq_len_max", &Problem::seq_len_max},
    {"proj_dim", &Problem::proj_dim},
    {"head_dim", &Problem::head_dim},
    {"value_dim", &Problem::value_dim},
    {"mask_batch_stride", &Problem::mask_batch_stride},
    {"mask_row_stride", &Problem::mask_row_stride},
    {"key_bias_batch_stride", &Problem::key_bias_batch_stride},
    {"key_bias_head_stride", &Problem::key_bias_head_stride},
    {"segments_batch_stride", &Problem::segments_batch_stride},
    {"segments_head_stride", &Problem::segments_head_stride},
    {"segments_row_stride", &Problem::segments_row_stride},
};
const std::map<std::string, bool Problem::*> kChoices = {
    {"per_head_proj", &Problem::per_head_proj},
    {"per_batch_proj", &Problem::per_batch_proj},
    {"shared_kv", &Problem::shared_kv},
};
const std::map<std::string, Rows Problem::*> kRows = {
    {"query", &Problem::query},
    {"key", &Problem::key},
    {"value", &Problem::value},
    {"out", &Problem::out},
    {"proj_key", &Problem::proj_key},
    {"proj_value", &Problem::proj_value},
    {"key_proj", &Problem::key_proj},
    {"value_proj", &Problem::value_proj},
    {"grad_out", &Problem::grad_out},
    {"grad_query", &Problem::grad_query},
    {"grad_key", &Problem::grad_key},
    {"grad_value", &Problem::grad_value},
    {"grad_proj_key", &Problem::grad_proj_key},
    {"grad_proj_value", &Problem::grad_proj_value},
    {"grad_key_proj", &Problem::grad_key_proj},
    {"grad_value_proj", &Problem::grad_value_proj},
};

// As ops.cpp runs a problem, on one thread; the plan is made for several, which cuts sums into parts.
const char* run(const Problem& problem, unsigned stages, int threads) {
  namespace cpu = linformer::cpu;
  const cpu::KernelTable& table = cpu::kernel_table_for(problem, stages);
  cpu::Plan plan = cpu::make_plan(problem, stages, table, threads);
  const Memory workspace = allocate(plan.workspace_bytes);
  plan.workspace = workspace.get();
  cpu::run_plan(plan, threads, [](int64_t count, const std::function<void(int64_t)>& body) {
    for (int64_t i = 0; i < count; ++i) body(i);
  });
  return table.name;
}

struct Reader {
  std::istream& in;
  std::byte* memory;
  int64_t bytes;

  template <class T = int64_t>
  T number() {
    T value;
    if (!(in >> value)) stop("a number is missing");
    return value;
  }
  template <class T>
  T* address() {
    const int64_t offset = number();
    if (offset < 0 || offset > bytes) stop("offset " + std::to_string(offset) + " is outside of the memory");
    return reinterpret_cast<T*>(memory + offset);
  }
};

}    // namespace

int main(int count, char** arguments) {
  if (count != 3) stop("wanted: bare PROBLEM RESULT");
  if (const char* problem = linformer::cpu::capability_problem()) stop(problem);
  std::ifstream in(arguments[1], std::ios::binary);
  std::string word;
  int64_t bytes = 0;
  if (!(in >> word >> bytes) || word != "memory") stop(std::string(arguments[1]) + " does not begin with memory BYTES");
  in.get();
  const Memory memory = allocate(bytes);
  if (!in.read(reinterpret_cast<char*>(memory.get()), bytes)) stop("the memory is shorter than it says");

  Reader read{in, memory.get(), bytes};
  Problem p;
  std::string name = linformer::cpu::kernel_table().name;
  while (in >> word) {
    if (const auto number = kNumbers.find(word); number != kNumbers.end()) {
      p.*number->second = read.number();
    } else if (const auto choice = kChoices.find(word); choice != kChoices.end()) {
      p.*choice->second = read.number() != 0;
    } else if (const auto rows = kRows.find(word); rows != kRows.end()) {
      void* data = read.address<void>();
      const int64_t batch = read.number(), head = read.number(), row = read.number();
      p.*rows->second = {data, batch, head, row};
    } else if (word == "dtype") {
      p.dtype = static_cast<linformer::DType>(read.number());
    } else if (word == "scale") {
      p.scale = read.number<float>();
    } else if (word == "dropout_p") {
      p.dropout_p = read.number<double>();
    } else if (word == "rng_state") {
      p.rng_state = read.address<int64_t>();
    } else if (word == "cu_seqlens_q") {
      p.cu_seqlens_q = read.address<int64_t>();
    } else if (word == "cu_seqlens_k") {
      p.cu_seqlens_k = read.address<int64_t>();
    } else if (word == "mask") {
      p.mask = read.address<bool>();
    } else if (word == "key_bias") {
      p.key_bias = read.address<float>();
    } else if (word == "grad_key_bias") {
      p.grad_key_bias = read.address<float>();
    } else if (word == "segments") {
      p.segments = read.address<int32_t>();
    } else if (word == "count") {
      p.count = read.address<float>();
    } else if (word == "run") {
      const unsigned stages = static_cast<unsigned>(read.number());
      name = run(p, stages, static_cast<int>(read.number()));
    } else if (word == "choose") {
      linformer::cpu::SegmentChoice c;
      c.problem = p;
      c.singles = read.number();
      c.first = read.number();
      c.last = read.number();
      c.segments = read.address<int32_t>();
      c.batch_stride = read.number();
      c.head_stride = read.number();
      c.row_stride = read.number();
      for (int64_t i = 0; i < p.batch * p.heads_kv; ++i) linformer::cpu::choose_segments(c, i);
    } else if (word == "clear") {
      p = Problem();
    } else {
      stop("no such field: " + word);
    }
  }
  std::ofstream out(arguments[2], std::ios::binary);
  out.write(reinterpret_cast<const char*>(memory.get()), bytes);
  if (!out.flush()) stop(std::string("cannot write ") + arguments[2]);
  std::cout << name << "\n";
}
