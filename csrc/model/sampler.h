// From one row of logits to a token, its log-probability and rank, and the most likely tokens.
//
// The order is vLLM's. Log-probabilities and ranks are those of the raw logits. To sample a token:
//   1. bias         logit += value
//   2. banned       logit = -inf, for the ids listed and for those whose bit in the mask is 0
//   3. penalties    repetition, over prompt and output: logit > 0 ? logit / r : logit * r; then, over the
//                   output only, logit -= frequency * count, logit -= presence
//   4. greedy       when temperature < 1e-5: the highest logit, the lowest id among equals
//   5. temperature  y = (logit - highest) * (1 / temperature)
//   6. min_p        keep y >= log(min_p), that is p >= min_p * highest p
//   7. top_k        keep logits not below the k-th highest: all that equal it stay
//   8. top_p        in order of falling logit, then rising id: keep a token while the probability before it,
//                   among those still kept, is below top_p; the first always stays
//   9. draw         the first kept token, in order of id, whose cumulative probability exceeds a uniform
//                   number from Philox keyed by (seed, sample_index, position)
// exp is the kernels', in fp32; sums are in double, in an order given by the list of kept tokens alone, so
// neither instruction set nor threads matter, and a filter that removes nothing changes no bit.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace fastllm {

// One row's parameters. Ids lie in [0, n); checked by the caller.
struct SampleRow {
  enum Kind : std::int32_t { kSample = 0, kLogprob = 1, kPool = 2 };  // kPool never comes to the sampler
  std::int32_t kind = kSample;
  std::int32_t target = -1;  // kLogprob: the token whose log-probability is wanted
  float temperature = 1.0f;
  std::int32_t top_k = 0;  // 0: off
  float top_p = 1.0f;
  float min_p = 0.0f;
  float presence = 0.0f;
  float frequency = 0.0f;
  float repetition = 1.0f;
  std::uint64_t seed = 0;
  std::int32_t sample_index = 0;
  std::int32_t position = 0;
  std::int32_t num_logprobs = -1;  // -1: none; n >= 0: the token's own and the n highest
  const std::int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  std::int64_t bias_count = 0;
  const std::int32_t* banned_ids = nullptr;
  std::int64_t banned_count = 0;
  const std::uint32_t* mask =
      nullptr;  // ceil(n / 32) words, bit i % 32 of word i / 32: id i is allowed; or null
  const std::int32_t* history = nullptr;  // prompt, then output
  std::int64_t history_count = 0;
  std::int64_t history_prompt_len = 0;
};

// The parameters of R rows as a StepBatch holds them: arrays of R; starts of R + 1 (CSR).
struct SampleArrays {
  std::int64_t rows;
  const std::int32_t *kind, *target, *num_logprobs;
  const float* temperature;
  const std::int32_t* top_k;
  const float *top_p, *min_p, *presence, *frequency, *repetition;
  const std::uint64_t* seed;
  const std::int32_t* sample_index;
  const std::int32_t *row_token, *positions;  // row r stands at positions[row_token[r]]
  const std::int32_t *bias_start, *bias_ids;
  const float* bias_values;
  const std::int32_t *banned_start, *banned_ids;
  const std::int32_t* mask_row;     // -1: none
  const std::uint32_t* mask_words;  // (M, mask_width)
  std::int64_t mask_width;
  const std::int32_t *history_start, *history, *history_prompt_len;

  SampleRow row(std::int64_t r) const;
};

struct SampleOut {
  std::int32_t token;     // sampled, or the target; -1 when the row failed
  float logprob;          // of that token; NaN when not asked for or failed
  std::int32_t rank;      // 1 + number of tokens with a greater raw logit; 0 when not asked for or failed
  std::int32_t* top_ids;  // room for min(num_logprobs, n); the highest first, the lower id first among equals
  float* top_logprobs;
};

// Memory of one thread: grows to what one vocabulary needs, then is reused.
struct SampleWorkspace {
  std::vector<float> logits;         // (n) after bias, bans and penalties
  std::vector<std::int32_t> counts;  // (n) all zero between rows
  std::vector<float> values;         // logits of the kept tokens, in order of id
  std::vector<std::int32_t> ids;
  std::vector<float> maximums;      // of blocks of the list at hand
  std::vector<float> order;         // a copy to partition
  std::vector<std::uint64_t> keys;  // selected logits with their places, as sortable integers
  std::vector<double> sums;         // of blocks of the list at hand
};

// logits: (n), 0 < n < 2^31. A row fails alone, with out.token = -1, when a raw logit is NaN or +infinity,
// when none is finite, or when bias, bans or penalties lead there. Throws nothing but std::bad_alloc while
// the workspace grows.
void sample_row(const Kernels& kernels, const float* logits, std::int64_t n, const SampleRow& row,
                SampleWorkspace& workspace, SampleOut& out);

}  // namespace fastllm
