// fastllm._core: the compiled core as Python sees it. One register_*.cpp per group of functions.
#include <pybind11/pybind11.h>

#include "bindings/errors.h"
#include "bindings/register.h"

PYBIND11_MODULE(_core, module) {
  module.doc() =
      "The compiled core of fastllm: kernels, packed weights, decoder. Arguments are checked here, once.";
  fastllm::register_errors(module);
  fastllm::register_runtime(module);
  fastllm::register_packed(module);
  fastllm::register_ops(module);
  fastllm::register_attention(module);
  fastllm::register_sampling(module);
  fastllm::register_decoder(module);
}
