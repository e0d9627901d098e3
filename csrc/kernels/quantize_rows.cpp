// Activations to int8: per row and group of 32 columns, scale = amax / 127, q = round(x * (127 / amax)).
//
// Both divisions are IEEE divisions and the rounding is to nearest even, so the codes are the same on every
// instruction set; |x| * (127 / amax) is at most 127 * (1 + 2^-23), so no code leaves [-127, 127].
// Cost per group of 32: 2 loads, 2 maxima, one reduction, 2 divisions, 2 conversions: about 40 cycles, once
// per row and layer, against 32 * N multiplications.
#include "kernels/ops.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {

void quantize_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, const QuantizedRows* out) {
  const i32x16 magnitude = set1_i32(0x7fffffff);
  const i32x16 largest_finite = set1_i32(0x7f7fffff);
  const f32x16 one = set1(1.0f);
  const int64_t kp = out->kp;
  for (int64_t m = 0; m < rows; ++m) {
    const QuantizedRows row = out->from_row(m);
    const float* source = x + m * ldx;
    for (int64_t g = 0; g < kp / 32; ++g) {
      const int64_t left = k - 32 * g;
      const int64_t in_a = left >= 16 ? 16 : (left > 0 ? left : 0);
      const int64_t in_b = left >= 32 ? 16 : (left > 16 ? left - 16 : 0);
      const f32x16 a = load_first(source + 32 * g, in_a, 0.0f);
      const f32x16 b = load_first(source + 32 * g + 16, in_b, 0.0f);
      const i32x16 abs_a = bit_and(bits(a), magnitude);
      const i32x16 abs_b = bit_and(bits(b), magnitude);
      const i32x16 broken = bit_or(greater(abs_a, largest_finite), greater(abs_b, largest_finite));
      const float amax = reduce_max(max(from_bits(abs_a), from_bits(abs_b)));
      if (reduce_max(from_bits(bit_and(broken, bits(one)))) > 0.0f) {
        row.scale[g] = __builtin_nanf("");
        for (int i = 0; i < 32; ++i) row.q[32 * g + i] = 0;
        row.sums16[2 * g] = row.sums16[2 * g + 1] = row.sums32[g] = 0;
        row.fsums16[2 * g] = row.fsums16[2 * g + 1] = row.fsums32[g] = __builtin_nanf("");
        continue;
      }
      // A group too small for a finite inverse (amax below 3.8e-37, or zero) counts as zero.
      const float quotient = 127.0f / amax;
      const bool finite = quotient <= 3.402823466e38f;
      const float scale = finite ? amax / 127.0f : 0.0f;
      const float inverse = finite ? quotient : 0.0f;
      const i32x16 qa = round_to_int(mul(a, set1(inverse)));
      const i32x16 qb = round_to_int(mul(b, set1(inverse)));
      store_s8(row.q + 32 * g, qa);
      store_s8(row.q + 32 * g + 16, qb);
      // Sums of at most 32 values below 128 are exact in fp32.
      const int sum_a = static_cast<int>(reduce_add(to_float(qa)));
      const int sum_b = static_cast<int>(reduce_add(to_float(qb)));
      row.scale[g] = scale;
      row.sums16[2 * g] = -sum_a;
      row.sums16[2 * g + 1] = -sum_b;
      row.sums32[g] = -(sum_a + sum_b);
      row.fsums16[2 * g] = scale * static_cast<float>(sum_a);
      row.fsums16[2 * g + 1] = scale * static_cast<float>(sum_b);
      row.fsums32[g] = scale * static_cast<float>(sum_a + sum_b);
    }
  }
}

}  // namespace fastllm::FASTLLM_ISA
