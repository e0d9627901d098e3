// Parts of the sampler that run over a whole row of logits; contracts in kernels.h and logits.cpp.
#pragma once

#include "kernels/kernels.h"

namespace fastllm {

// exp_sum over n values is the sum, in order, of exp_sum over blocks of this many.
constexpr int64_t kExpSumBlock = 256;

}  // namespace fastllm

#ifdef FASTLLM_ISA
namespace fastllm::FASTLLM_ISA {

float max_value(const float* x, int64_t n);
double exp_sum(const float* x, float max, int64_t n);
int64_t argmax(const float* x, int64_t n);

}  // namespace fastllm::FASTLLM_ISA
#endif
