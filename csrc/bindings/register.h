// The groups of functions that make up fastllm._core.
#pragma once

#include <pybind11/pybind11.h>

namespace fastllm {

void register_runtime(pybind11::module_& module);
void register_packed(pybind11::module_& module);
void register_ops(pybind11::module_& module);
void register_attention(pybind11::module_& module);
void register_sampling(pybind11::module_& module);
void register_decoder(pybind11::module_& module);

}  // namespace fastllm
