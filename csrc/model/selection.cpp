#include "model/selection.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "core/math.h"
#include "kernels/logits.h"

namespace fastllm {
namespace {

constexpr std::int64_t kSkipBlock = 64;      // logits that one maximum stands for
constexpr std::int64_t kSmallNucleus = 128;  // tokens tried before the histogram
constexpr int kBuckets = 1024;               // of the histogram, each 1/32 of y wide
constexpr float kBucketsPerUnit = 32.0f;
static_assert(kExpSumBlock % kSkipBlock == 0);

std::int64_t blocks_of(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// Sorts as (x, then the lower place); -0 equals 0.
std::uint64_t key_of(float x, std::int64_t place) {
  const float normal = x + 0.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &normal, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return std::uint64_t{bits} << 32 | (0xffffffffu - static_cast<std::uint32_t>(place));
}

// y of places [begin, begin + count), count <= 256.
void scaled(const Candidates& list, std::int64_t begin, std::int64_t count, float* y) {
  for (std::int64_t i = 0; i < count; ++i)
    y[i] = (list.x[begin + i] - list.highest) * list.inverse_temperature;
}

// Sums of exp(y) over blocks of 256 into workspace.sums; their total.
double sum_blocks(const Kernels& kernels, const Candidates& list, SampleWorkspace& workspace) {
  workspace.sums.resize(static_cast<std::size_t>(blocks_of(list.n, kExpSumBlock)));
  double total = 0.0;
  std::int64_t begin = 0;
  for (double& sum : workspace.sums) {
    const std::int64_t count = std::min(list.n - begin, kExpSumBlock);
    if (list.inverse_temperature == 1.0f) {  // the same subtraction, inside the kernel
      sum = kernels.exp_sum(list.x + begin, list.highest, count);
    } else {
      float y[kExpSumBlock];
      scaled(list, begin, count, y);
      sum = kernels.exp_sum(y, 0.0f, count);
    }
    total += sum;
    begin += count;
  }
  return total;
}

void find_maximums(const Kernels& kernels, const Candidates& list, SampleWorkspace& workspace) {
  workspace.maximums.resize(static_cast<std::size_t>(blocks_of(list.n, kSkipBlock)));
  for (std::size_t b = 0; b < workspace.maximums.size(); ++b) {
    const std::int64_t begin = static_cast<std::int64_t>(b) * kSkipBlock;
    workspace.maximums[b] = kernels.max_value(list.x + begin, std::min(list.n - begin, kSkipBlock));
  }
}

// Calls visit(place, x) in order for all places of blocks whose maximum passes. Needs find_maximums.
template <typename Pass, typename Visit>
void visit_blocks(const Candidates& list, const SampleWorkspace& workspace, Pass pass, Visit visit) {
  for (std::size_t b = 0; b < workspace.maximums.size(); ++b) {
    if (!pass(workspace.maximums[b])) continue;
    const std::int64_t begin = static_cast<std::int64_t>(b) * kSkipBlock;
    const std::int64_t end = std::min(list.n, begin + kSkipBlock);
    for (std::int64_t i = begin; i < end; ++i) visit(i, list.x[i]);
  }
}

// A value that at least `count` candidates reach: the count-th highest block maximum. -infinity when there
// are too few blocks for that to cut much off. Needs find_maximums.
float lower_bound(std::int64_t count, SampleWorkspace& workspace) {
  if (count * 2 > static_cast<std::int64_t>(workspace.maximums.size())) return -__builtin_inff();
  workspace.order = workspace.maximums;
  const auto nth = workspace.order.begin() + (count - 1);
  std::nth_element(workspace.order.begin(), nth, workspace.order.end(), std::greater<float>());
  return *nth;
}

// The candidates of which keep(place, x) holds; only blocks whose maximum passes are looked at. Writing never
// overtakes reading, so the list may already lie in the workspace.
template <typename Pass, typename Keep>
Candidates compact(const Candidates& list, SampleWorkspace& workspace, Pass pass, Keep keep) {
  if (static_cast<std::int64_t>(workspace.values.size()) < list.n) {
    workspace.values.resize(static_cast<std::size_t>(list.n));
    workspace.ids.resize(static_cast<std::size_t>(list.n));
  }
  float* values = workspace.values.data();
  std::int32_t* ids = workspace.ids.data();
  std::int64_t n = 0;
  visit_blocks(list, workspace, pass, [&](std::int64_t place, float x) {
    if (!keep(place, x)) return;
    ids[n] = list.id(place);
    values[n++] = x;
  });
  Candidates left = list;
  left.x = values;
  left.ids = ids;
  left.n = n;
  return left;
}

// Where the nucleus ends: the candidate, in sorted order, with which the sum reaches `target`. False when
// none does.
struct Cutoff {
  float x;
  std::int64_t place;
};

// Walks workspace.keys, which are sorted, from the sum `before`.
bool walk_keys(const Kernels& kernels, const Candidates& list, double before, double target,
               const SampleWorkspace& workspace, Cutoff* cutoff) {
  const std::int64_t n = static_cast<std::int64_t>(workspace.keys.size());
  double sum = before;
  for (std::int64_t begin = 0; begin < n; begin += kExpSumBlock) {
    const std::int64_t count = std::min(n - begin, kExpSumBlock);
    float y[kExpSumBlock], e[kExpSumBlock];
    for (std::int64_t i = 0; i < count; ++i) {
      const float x = list.x[place_of_key(workspace.keys[static_cast<std::size_t>(begin + i)])];
      y[i] = (x - list.highest) * list.inverse_temperature;
    }
    kernels.exp(y, e, count);
    for (std::int64_t i = 0; i < count; ++i) {
      sum += static_cast<double>(e[i]);
      if (sum < target) continue;
      const std::int64_t place = place_of_key(workspace.keys[static_cast<std::size_t>(begin + i)]);
      *cutoff = {list.x[place], place};
      return true;
    }
  }
  return false;
}

int bucket_of(float y) {
  return static_cast<int>(std::min(-y * kBucketsPerUnit, static_cast<float>(kBuckets - 1)));
}

// For a nucleus of many tokens: probabilities by bucket of y, then only the bucket in which the sum reaches
// the target is sorted.
bool histogram_cutoff(const Kernels& kernels, const Candidates& list, double target,
                      SampleWorkspace& workspace, Cutoff* cutoff) {
  double sums[kBuckets] = {};
  float y[kExpSumBlock], e[kExpSumBlock];
  for (std::int64_t begin = 0; begin < list.n; begin += kExpSumBlock) {
    const std::int64_t count = std::min(list.n - begin, kExpSumBlock);
    scaled(list, begin, count, y);
    kernels.exp(y, e, count);
    for (std::int64_t i = 0; i < count; ++i) sums[bucket_of(y[i])] += static_cast<double>(e[i]);
  }
  double before = 0.0;
  int bucket = 0;
  while (bucket < kBuckets && before + sums[bucket] < target) before += sums[bucket++];
  if (bucket == kBuckets) return false;
  workspace.keys.clear();
  for (std::int64_t begin = 0; begin < list.n; begin += kExpSumBlock) {
    const std::int64_t count = std::min(list.n - begin, kExpSumBlock);
    scaled(list, begin, count, y);
    for (std::int64_t i = 0; i < count; ++i) {
      if (bucket_of(y[i]) == bucket) workspace.keys.push_back(key_of(list.x[begin + i], begin + i));
    }
  }
  std::sort(workspace.keys.begin(), workspace.keys.end(), std::greater<std::uint64_t>());
  if (walk_keys(kernels, list, before, target, workspace, cutoff)) return true;
  // The two orders of adding may differ by a rounding: then the nucleus ends with the bucket.
  const std::int64_t last = place_of_key(workspace.keys.back());
  *cutoff = {list.x[last], last};
  return true;
}

}  // namespace

std::int64_t place_of_key(std::uint64_t key) { return 0xffffffffu - static_cast<std::uint32_t>(key); }

void select_highest(const Kernels& kernels, const Candidates& list, std::int64_t count,
                    SampleWorkspace& workspace) {
  workspace.keys.clear();
  if (count <= 0) return;
  find_maximums(kernels, list, workspace);
  const float bound = lower_bound(count, workspace);
  visit_blocks(
      list, workspace, [&](float maximum) { return maximum >= bound; },
      [&](std::int64_t place, float x) {
        if (x >= bound) workspace.keys.push_back(key_of(x, place));
      });
  const auto end = workspace.keys.begin() + count;
  if (end != workspace.keys.end())
    std::nth_element(workspace.keys.begin(), end, workspace.keys.end(), std::greater<std::uint64_t>());
  workspace.keys.resize(static_cast<std::size_t>(count));
  std::sort(workspace.keys.begin(), workspace.keys.end(), std::greater<std::uint64_t>());
}

Candidates keep_min_p(const Kernels& kernels, const Candidates& list, float min_p,
                      SampleWorkspace& workspace) {
  if (!(min_p > 0.0f)) return list;
  const float lowest = static_cast<float>(log_double(static_cast<double>(min_p)));
  // y rises with x, so what holds for a block's maximum bounds the block.
  const auto passes = [&](float x) { return (x - list.highest) * list.inverse_temperature >= lowest; };
  find_maximums(kernels, list, workspace);
  return compact(list, workspace, passes, [&](std::int64_t, float x) { return passes(x); });
}

Candidates keep_top_k(const Kernels& kernels, const Candidates& list, std::int64_t k,
                      SampleWorkspace& workspace) {
  if (k <= 0 || k >= list.n) return list;
  find_maximums(kernels, list, workspace);
  const float bound = lower_bound(k, workspace);
  workspace.order.clear();
  visit_blocks(
      list, workspace, [&](float maximum) { return maximum >= bound; },
      [&](std::int64_t, float x) {
        if (x >= bound) workspace.order.push_back(x);
      });
  const auto nth = workspace.order.begin() + (k - 1);
  std::nth_element(workspace.order.begin(), nth, workspace.order.end(), std::greater<float>());
  const float lowest = *nth;
  return compact(
      list, workspace, [&](float maximum) { return maximum >= lowest; },
      [&](std::int64_t, float x) { return x >= lowest; });
}

Candidates keep_top_p(const Kernels& kernels, const Candidates& list, float p, SampleWorkspace& workspace) {
  if (!(p < 1.0f)) return list;
  const double target = static_cast<double>(p) * sum_blocks(kernels, list, workspace);
  const std::int64_t few = std::min(list.n, kSmallNucleus);
  Cutoff cutoff;
  select_highest(kernels, list, few, workspace);  // leaves the maximums that compact needs
  if (!walk_keys(kernels, list, 0.0, target, workspace, &cutoff)) {
    if (few == list.n || !histogram_cutoff(kernels, list, target, workspace, &cutoff)) return list;
  }
  return compact(
      list, workspace, [&](float maximum) { return maximum >= cutoff.x; },
      [&](std::int64_t place, float x) { return x > cutoff.x || (x == cutoff.x && place <= cutoff.place); });
}

std::int32_t draw(const Kernels& kernels, const Candidates& list, double uniform,
                  SampleWorkspace& workspace) {
  const double total = sum_blocks(kernels, list, workspace);
  if (!(total > 0.0)) return -1;
  double target = uniform * total;
  const std::int64_t blocks = static_cast<std::int64_t>(workspace.sums.size());
  const auto sum_of = [&](std::int64_t b) { return workspace.sums[static_cast<std::size_t>(b)]; };
  double before = 0.0;
  std::int64_t b = 0;
  while (b < blocks && !(before + sum_of(b) > target)) before += sum_of(b++);
  if (b == blocks) {  // the product was rounded up to the total: the last possible token
    target = total;
    do --b;
    while (!(sum_of(b) > 0.0));
  }
  const std::int64_t begin = b * kExpSumBlock, count = std::min(list.n - begin, kExpSumBlock);
  float y[kExpSumBlock], e[kExpSumBlock];
  scaled(list, begin, count, y);
  kernels.exp(y, e, count);
  // Adding one by one may round to less than the block's sum: then its last possible token.
  double sum = before;
  std::int64_t last = -1;
  for (std::int64_t i = 0; i < count; ++i) {
    if (!(e[i] > 0.0f)) continue;
    last = begin + i;
    sum += static_cast<double>(e[i]);
    if (sum > target) break;
  }
  return last < 0 ? -1 : list.id(last);
}

}  // namespace fastllm
