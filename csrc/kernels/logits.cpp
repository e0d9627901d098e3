// Maximum, sum of exponentials and argmax over one row of logits.
//   max_value  NaN when any value is NaN; -inf when n is 0. A maximum is exact, whatever the order.
//   exp_sum    sum of exp(x - max) over blocks of 256 values, in order, in double; in a block, 16 lanes of 16
//              fp32 additions each, then vec.h's tree. Relative error below 1.3e-6 (21 roundings in a
//              block), typically 1e-7. Exactly 0 for -inf.
//   argmax     the lowest index among equals; NaN never wins; 0 when nothing exceeds -inf. n < 2^31.
// Per 16 values: 1 load, 3 instructions for max_value, 20 for exp_sum, 4 for argmax (x 2 on AVX2).
#include "kernels/logits.h"

#include "kernels/simd/math.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

alignas(64) const int32_t kLaneIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

int64_t lanes_at(int64_t i, int64_t n) { return n - i < 16 ? n - i : 16; }

FASTLLM_INLINE i32x16 nan_lanes(f32x16 x) {
  return greater(bit_and(bits(x), set1_i32(0x7fffffff)), set1_i32(0x7f800000));
}

}  // namespace

float max_value(const float* x, int64_t n) {
  // Four chains, or the latency of one maximum would set the pace.
  f32x16 top[4] = {set1(-kInfinity), set1(-kInfinity), set1(-kInfinity), set1(-kInfinity)};
  i32x16 nan = set1_i32(0);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const f32x16 v = load(x + i + 16 * c);
      nan = bit_or(nan, nan_lanes(v));
      top[c] = max(v, top[c]);
    }
  }
  for (; i < n; i += 16) {
    const f32x16 v = load_first(x + i, lanes_at(i, n), -kInfinity);
    nan = bit_or(nan, nan_lanes(v));
    top[0] = max(v, top[0]);
  }
  if (reduce_max(from_bits(bit_and(nan, bits(set1(1.0f))))) > 0.0f) return __builtin_nanf("");
  return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

double exp_sum(const float* x, float max, int64_t n) {
  const f32x16 center = set1(max);
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kExpSumBlock) {
    const int64_t end = n - begin < kExpSumBlock ? n : begin + kExpSumBlock;
    f32x16 sum = zero_f32();
    for (int64_t i = begin; i < end; i += 16)
      sum = add(sum, exp(sub(load_first(x + i, lanes_at(i, end), -kInfinity), center)));
    total += static_cast<double>(reduce_add(sum));
  }
  return total;
}

int64_t argmax(const float* x, int64_t n) {
  f32x16 top = set1(-kInfinity);
  i32x16 at = load_i32(kLaneIndex);  // of `top`, per lane
  i32x16 here = at;
  const i32x16 sixteen = set1_i32(16);
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load_first(x + i, lanes_at(i, n), -kInfinity);
    const i32x16 better = greater(v, top);
    top = select(better, v, top);
    at = bits(select(better, from_bits(here), from_bits(at)));
    here = add(here, sixteen);
  }
  alignas(64) float value[16];
  alignas(64) int32_t index[16];
  store(value, top);
  store_i32(index, at);
  int best = 0;
  for (int lane = 1; lane < 16; ++lane) {
    if (value[lane] > value[best] || (value[lane] == value[best] && index[lane] < index[best])) best = lane;
  }
  return index[best];
}

}  // namespace fastllm::FASTLLM_ISA
