#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "core/argument_error.h"

namespace fastllm {

// A new instruction set adds its table here, a row to kEntries, and a function that says whether it runs.
extern const Kernels kernels_avx512vnni, kernels_avxvnni, kernels_avx2, kernels_baseline;

namespace {

struct Entry {
  const Kernels* table;
  bool (*supported)();
};

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
bool has_baseline() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3"); }
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c");
}
// gcc 12 has no name for AVX-VNNI: CPUID leaf 7, subleaf 1, EAX bit 4.
bool cpuid_avxvnni() {
  unsigned a = 7, b = 0, c = 1, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (a >> 4) & 1;
}
bool has_avxvnni() { return has_avx2() && cpuid_avxvnni(); }
bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

// Best first.
const Entry kEntries[] = {
    {&kernels_avx512vnni, has_avx512vnni},
    {&kernels_avxvnni, has_avxvnni},
    {&kernels_avx2, has_avx2},
    {&kernels_baseline, has_baseline},
};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Kernels& choose() {
  if (const char* name = std::getenv("FASTLLM_ISA"); name && *name) return kernels_for(name);
  for (const Entry& entry : kEntries)
    if (entry.supported()) return *entry.table;
  throw std::invalid_argument("this CPU has none of the instruction sets " + joined(built_isas()));
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Kernels& kernels_for(const std::string& name) {
  for (const Entry& entry : kEntries) {
    if (name != entry.table->name) continue;
    if (!entry.supported())
      throw ArgumentError("FASTLLM_ISA", name, "a set that this CPU runs (" + joined(supported_isas()) + ")");
    return *entry.table;
  }
  throw ArgumentError("FASTLLM_ISA", name, "one of " + joined(built_isas()));
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) names.emplace_back(entry.table->name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries)
    if (entry.supported()) names.emplace_back(entry.table->name);
  return names;
}

}  // namespace fastllm
