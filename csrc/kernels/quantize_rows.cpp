// Activations to int8: per row and group of 16 columns, scale = amax / 127, q = round(x * (127 / amax)).
//
// Both divisions are IEEE divisions and the rounding is to nearest even, so the codes are the same on every
// instruction set; |x| * (127 / amax) is at most 127 * (1 + 2^-23), so no code leaves [-127, 127].
// Groups of 16, not 32: on the default model the divergence from fp32 falls by almost half
// (docs/benchmarks/log.md).
//
// 16 groups are done together: their 16 scales are one vector. Cost per group: 2 loads, 2 reductions of 8
// instructions, 1 multiplication, 2 conversions, 1 narrowing store, and a sixteenth of 2 divisions.
#include "kernels/ops.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int64_t kTogether = 16;

// The columns of group g; past column k they are 0.
FASTLLM_INLINE f32x16 columns(const float* x, int64_t k, int64_t g) {
  const int64_t left = k - 16 * g;
  return load_first(x + 16 * g, left >= 16 ? 16 : (left > 0 ? left : 0), 0.0f);
}

// Groups [begin, end) of one row, at most 16.
void quantize_groups(const float* x, int64_t k, int64_t begin, int64_t end, const QuantizedRows& row) {
  alignas(64) float amax[kTogether] = {}, inverse[kTogether], sums[kTogether] = {};
  alignas(64) int32_t keep[kTogether];
  alignas(64) int32_t broken[kTogether] = {};
  i32x16 any_broken = set1_i32(0);
  for (int64_t g = begin; g < end; ++g) {
    const f32x16 v = columns(x, k, g);
    any_broken = bit_or(any_broken, not_finite(v));
    amax[g - begin] = reduce_max(from_bits(magnitude(v)));
  }
  if (any(any_broken)) {
    for (int64_t g = begin; g < end; ++g) broken[g - begin] = any(not_finite(columns(x, k, g))) ? -1 : 0;
  }
  // A group too small for a finite inverse (amax below 3.8e-37, or zero) counts as zero.
  const f32x16 top = load(amax);
  const f32x16 quotient = div(set1(127.0f), top);
  const i32x16 usable = bit_andnot(load_i32(broken), greater(set1_i32(0x7f800000), bits(quotient)));
  f32x16 scale = select(usable, div(top, set1(127.0f)), zero_f32());
  scale = select(load_i32(broken), set1(__builtin_nanf("")), scale);
  store(inverse, select(usable, quotient, zero_f32()));
  store_i32(keep, usable);  // without an inverse the code is 0 even where x is not finite
  for (int64_t g = begin; g < end; ++g) {
    const f32x16 scaled = mul(columns(x, k, g), set1(inverse[g - begin]));
    const i32x16 q = bit_and(round_to_int(scaled), set1_i32(keep[g - begin]));
    store_s8(row.q + 16 * g, q);
    sums[g - begin] = reduce_add(to_float(q));  // of 16 values below 128: exact in fp32
  }
  const int64_t count = end - begin;
  const f32x16 sum = load(sums);
  store_first(row.scale + begin, scale, count);
  store_first(row.fsums + begin, mul(scale, sum), count);
  const f32x16 minus = from_bits(round_to_int(sub(zero_f32(), sum)));
  store_first(reinterpret_cast<float*>(row.sums) + begin, minus, count);
}

}  // namespace

void quantize_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, const QuantizedRows* out) {
  const int64_t groups = out->kp / 16;
  for (int64_t m = 0; m < rows; ++m) {
    const QuantizedRows row = out->from_row(m);
    for (int64_t begin = 0; begin < groups; begin += kTogether) {
      const int64_t end = begin + kTogether < groups ? begin + kTogether : groups;
      quantize_groups(x + m * ldx, k, begin, end, row);
    }
  }
}

}  // namespace fastllm::FASTLLM_ISA
