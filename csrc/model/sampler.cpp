#include "model/sampler.h"

#include <algorithm>
#include <limits>

#include "core/math.h"
#include "model/philox.h"
#include "model/selection.h"

namespace fastllm {
namespace {

constexpr float kGreedyBelow = 1e-5f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int32_t kSeen = 1 << 30;  // in SampleWorkspace::counts: the token is in the history

bool is_finite(float x) { return x - x == 0.0f; }

bool has_penalty(const SampleRow& row) {
  return row.presence != 0.0f || row.frequency != 0.0f || row.repetition != 1.0f;
}

void apply_penalties(const SampleRow& row, std::int32_t* counts, float* x) {
  for (std::int64_t i = 0; i < row.history_count; ++i) {
    std::int32_t& count = counts[row.history[i]];
    count |= kSeen;
    if (i >= row.history_prompt_len) ++count;
  }
  for (std::int64_t i = 0; i < row.history_count; ++i) {
    const std::int32_t token = row.history[i];
    if (counts[token] == 0) continue;  // done at its first place
    const std::int32_t count = counts[token] & ~kSeen;
    counts[token] = 0;
    float& logit = x[token];
    logit = logit > 0.0f ? logit / row.repetition : logit * row.repetition;
    if (count == 0) continue;
    logit -= row.frequency * static_cast<float>(count);
    logit -= row.presence;
  }
}

// Takes away the ids whose bit is 0. Most words of a grammar's mask are all 0 or all 1.
void apply_mask(const std::uint32_t* mask, std::int64_t n, float* x) {
  for (std::int64_t begin = 0; begin < n; begin += 32) {
    const std::uint32_t word = mask[begin / 32];
    if (word == 0xffffffffu) continue;
    const std::int64_t count = std::min<std::int64_t>(n - begin, 32);
    for (std::int64_t i = 0; i < count; ++i)
      if ((word >> i & 1u) == 0) x[begin + i] = -kInfinity;
  }
}

// The logits after bias, bans and penalties: the raw ones where there are none.
const float* edited(const float* logits, std::int64_t n, const SampleRow& row, SampleWorkspace& workspace) {
  const bool penalty = has_penalty(row) && row.history_count > 0;
  if (row.bias_count == 0 && row.banned_count == 0 && row.mask == nullptr && !penalty) return logits;
  workspace.logits.assign(logits, logits + n);
  float* x = workspace.logits.data();
  for (std::int64_t i = 0; i < row.bias_count; ++i) x[row.bias_ids[i]] += row.bias_values[i];
  for (std::int64_t i = 0; i < row.banned_count; ++i) x[row.banned_ids[i]] = -kInfinity;
  if (row.mask != nullptr) apply_mask(row.mask, n, x);
  if (penalty) {
    if (static_cast<std::int64_t>(workspace.counts.size()) < n)
      workspace.counts.resize(static_cast<std::size_t>(n));
    apply_penalties(row, workspace.counts.data(), x);
  }
  return x;
}

std::int32_t sample_token(const Kernels& kernels, const float* logits, std::int64_t n, float raw_highest,
                          const SampleRow& row, SampleWorkspace& workspace) {
  const float* x = edited(logits, n, row, workspace);
  const float highest = x == logits ? raw_highest : kernels.max_value(x, n);
  if (!is_finite(highest)) return -1;
  if (row.temperature < kGreedyBelow) return static_cast<std::int32_t>(kernels.argmax(x, n));
  Candidates list = {x, nullptr, n, highest, 1.0f / row.temperature};
  list = keep_min_p(kernels, list, row.min_p, workspace);
  list = keep_top_k(kernels, list, row.top_k, workspace);
  list = keep_top_p(kernels, list, row.top_p, workspace);
  const double uniform = sample_uniform(row.seed, static_cast<std::uint32_t>(row.sample_index),
                                        static_cast<std::uint32_t>(row.position));
  return draw(kernels, list, uniform, workspace);
}

// 1 + the number of greater logits.
std::int32_t rank_of(const float* logits, std::int64_t n, std::int32_t token) {
  const float own = logits[token];
  std::int32_t greater = 0;
  for (std::int64_t i = 0; i < n; ++i) greater += logits[i] > own ? 1 : 0;
  return 1 + greater;
}

}  // namespace

SampleRow SampleArrays::row(std::int64_t r) const {
  SampleRow row;
  row.kind = kind[r];
  row.target = target[r];
  row.temperature = temperature[r];
  row.top_k = top_k[r];
  row.top_p = top_p[r];
  row.min_p = min_p[r];
  row.presence = presence[r];
  row.frequency = frequency[r];
  row.repetition = repetition[r];
  row.seed = seed[r];
  row.sample_index = sample_index[r];
  row.position = positions[row_token[r]];
  row.num_logprobs = num_logprobs[r];
  row.bias_ids = bias_ids + bias_start[r];
  row.bias_values = bias_values + bias_start[r];
  row.bias_count = bias_start[r + 1] - bias_start[r];
  row.banned_ids = banned_ids + banned_start[r];
  row.banned_count = banned_start[r + 1] - banned_start[r];
  if (mask_row[r] >= 0) row.mask = mask_words + mask_row[r] * mask_width;
  row.history = history + history_start[r];
  row.history_count = history_start[r + 1] - history_start[r];
  row.history_prompt_len = history_prompt_len[r];
  return row;
}

void sample_row(const Kernels& kernels, const float* logits, std::int64_t n, const SampleRow& row,
                SampleWorkspace& workspace, SampleOut& out) {
  out.token = -1;
  out.logprob = std::numeric_limits<float>::quiet_NaN();
  out.rank = 0;
  const float highest = kernels.max_value(logits, n);
  // NaN and +infinity come out of max_value; -infinity leaves nothing to choose.
  if (!is_finite(highest)) return;
  const bool given = row.kind == SampleRow::kLogprob;
  const std::int32_t token = given ? row.target : sample_token(kernels, logits, n, highest, row, workspace);
  out.token = token;
  if (token < 0 || (!given && row.num_logprobs < 0)) return;

  const double log_sum = log_double(kernels.exp_sum(logits, highest, n));
  const auto logprob = [&](std::int64_t id) {
    return static_cast<float>((static_cast<double>(logits[id]) - static_cast<double>(highest)) - log_sum);
  };
  out.logprob = logprob(token);
  out.rank = rank_of(logits, n, token);
  const std::int64_t count = std::min<std::int64_t>(row.num_logprobs, n);
  select_highest(kernels, {logits, nullptr, n, highest, 1.0f}, count, workspace);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t id = place_of_key(workspace.keys[static_cast<std::size_t>(i)]);
    out.top_ids[i] = static_cast<std::int32_t>(id);
    out.top_logprobs[i] = logprob(id);
  }
}

}  // namespace fastllm
