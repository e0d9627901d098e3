// Which instruction sets are built, which run here, which is in use; and how many processors may be used.
#include <malloc.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/register.h"
#include "core/thread_pool.h"
#include "dispatch.h"

namespace fastllm {

void register_runtime(pybind11::module_& module) {
  namespace py = pybind11;
  module.def(
      "isa", [] { return std::string(kernels().name); },
      "The instruction set in use: the best that this CPU runs, or the one that FASTLLM_ISA names.\n\n"
      "Raises:\n    RequestError: FASTLLM_ISA names an unknown set, or one that this CPU does not run.");
  module.def("built_isas", &built_isas, "Instruction sets compiled into this module, best first.");
  module.def("supported_isas", &supported_isas, "Those of built_isas() that this CPU runs, best first.");
  module.def("available_processors", &available_processors,
             "Processors this process may use: affinity bounded by the control group's CPU quota.");
  module.def(
      "trim_memory", [] { return malloc_trim(0) == 1; },
      "Hands freed heap pages back to the operating system; True when there were any.");
}

}  // namespace fastllm
