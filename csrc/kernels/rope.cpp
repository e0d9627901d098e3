// Rotary position embedding, half style: for i < rotary/2
//   y[i] = x[i] cos_i - x[i + rotary/2] sin_i,   y[i + rotary/2] = x[i + rotary/2] cos_i + x[i] sin_i.
// Per 16 pairs: 4 loads, 2 multiplications, 2 FMAs, 2 stores.
#include "kernels/ops.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {

void rope(float* x, int64_t ldx, int64_t rows, int64_t heads, int64_t head_dim, int64_t rotary,
          const float* cos, const float* sin) {
  const int64_t half = rotary / 2;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t h = 0; h < heads; ++h) {
      float* low = x + m * ldx + h * head_dim;
      float* high = low + half;
      for (int64_t i = 0; i < half; i += 16) {
        const int64_t n = half - i < 16 ? half - i : 16;
        const f32x16 c = load_first(cos + m * half + i, n, 0.0f);
        const f32x16 s = load_first(sin + m * half + i, n, 0.0f);
        const f32x16 a = load_first(low + i, n, 0.0f);
        const f32x16 b = load_first(high + i, n, 0.0f);
        store_first(low + i, fma(a, c, sub(zero_f32(), mul(b, s))), n);
        store_first(high + i, fma(b, c, mul(a, s)), n);
      }
    }
  }
}

}  // namespace fastllm::FASTLLM_ISA
