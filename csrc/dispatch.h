// Chooses, once, the kernels for this machine: the best instruction set that the CPU and the operating system
// support, or the one named by FASTLLM_ISA.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace fastllm {

// The table in use. First call decides; throws ArgumentError when FASTLLM_ISA names a set that is
// unknown or that this machine cannot run.
const Kernels& kernels();

// The table of one instruction set by name; throws ArgumentError as above.
const Kernels& kernels_for(const std::string& name);

std::vector<std::string> built_isas();      // best first
std::vector<std::string> supported_isas();  // those of built_isas() that this machine runs

}  // namespace fastllm
