// Lists of candidate tokens and the filters that shorten them, for the sampler. No filter sorts more than it
// must: blocks of 64 logits are skipped by their maximum, and a nucleus beyond 128 tokens is found by a
// histogram of probabilities.
#pragma once

#include <cstdint>

#include "model/sampler.h"

namespace fastllm {

// Tokens in order of id. y = (x - highest) * inverse_temperature.
struct Candidates {
  const float* x;           // (n) logits
  const std::int32_t* ids;  // (n), or null: place i is token i
  std::int64_t n;
  float highest;
  float inverse_temperature;

  std::int32_t id(std::int64_t place) const { return ids ? ids[place] : static_cast<std::int32_t>(place); }
};

// Puts the keys of the `count` <= n highest candidates, highest first and the lower place first among equals,
// into workspace.keys. Logits must not be NaN.
void select_highest(const Kernels& kernels, const Candidates& list, std::int64_t count,
                    SampleWorkspace& workspace);
std::int64_t place_of_key(std::uint64_t key);

// Each returns the list that is left, in workspace.values and ids, or `list` itself when nothing goes.
Candidates keep_min_p(const Kernels& kernels, const Candidates& list, float min_p,
                      SampleWorkspace& workspace);
Candidates keep_top_k(const Kernels& kernels, const Candidates& list, std::int64_t k,
                      SampleWorkspace& workspace);
Candidates keep_top_p(const Kernels& kernels, const Candidates& list, float p, SampleWorkspace& workspace);

// The token at which the cumulative sum of exp(y) exceeds uniform * total; -1 when no probability is
// positive.
std::int32_t draw(const Kernels& kernels, const Candidates& list, double uniform, SampleWorkspace& workspace);

}  // namespace fastllm
