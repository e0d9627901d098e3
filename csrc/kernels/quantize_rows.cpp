// Activations to int8: per row and group of 16 columns, scale = amax / 127, q = round(x * (127 / amax)).
//
// Both divisions are IEEE divisions and the rounding is to nearest even, so the codes are the same on every
// instruction set; |x| * (127 / amax) is at most 127 * (1 + 2^-23), so no code leaves [-127, 127].
// Groups of 16, not 32: on the default model the divergence from fp32 falls by almost half
// (docs/benchmarks/log.md). Cost per group: 1 load, 3 reductions, 2 divisions, 2 conversions: about 40
// cycles, once per row and layer, against 16 * N multiplications.
#include "kernels/ops.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {

void quantize_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, const QuantizedRows* out) {
  const i32x16 magnitude = set1_i32(0x7fffffff);
  const i32x16 largest_finite = set1_i32(0x7f7fffff);
  const f32x16 one = set1(1.0f);
  for (int64_t m = 0; m < rows; ++m) {
    const QuantizedRows row = out->from_row(m);
    const float* source = x + m * ldx;
    for (int64_t g = 0; g < out->kp / 16; ++g) {
      const int64_t left = k - 16 * g;
      const f32x16 v = load_first(source + 16 * g, left >= 16 ? 16 : (left > 0 ? left : 0), 0.0f);
      const i32x16 absolute = bit_and(bits(v), magnitude);
      const i32x16 broken = greater(absolute, largest_finite);
      if (reduce_max(from_bits(bit_and(broken, bits(one)))) > 0.0f) {
        row.scale[g] = row.fsums[g] = __builtin_nanf("");
        row.sums[g] = 0;
        store_s8(row.q + 16 * g, set1_i32(0));
        continue;
      }
      const float amax = reduce_max(from_bits(absolute));
      // A group too small for a finite inverse (amax below 3.8e-37, or zero) counts as zero.
      const float quotient = 127.0f / amax;
      const bool finite = quotient <= 3.402823466e38f;
      const float scale = finite ? amax / 127.0f : 0.0f;
      const i32x16 q = round_to_int(mul(v, set1(finite ? quotient : 0.0f)));
      store_s8(row.q + 16 * g, q);
      // A sum of 16 values below 128 is exact in fp32.
      const float sum = reduce_add(to_float(q));
      row.scale[g] = scale;
      row.sums[g] = -static_cast<int32_t>(sum);
      row.fsums[g] = scale * sum;
    }
  }
}

}  // namespace fastllm::FASTLLM_ISA
