// Rotary position embedding, half style: for i < rotary/2
//   y[i] = x[i] cos_i - x[i + rotary/2] sin_i,   y[i + rotary/2] = x[i + rotary/2] cos_i + x[i] sin_i.
// A row's heads share their cosines and sines, so the heads are the inner loop. Per 16 pairs: 2 loads, 2
// multiplications, 2 FMAs, 1 subtraction, 2 stores.
#include "kernels/ops.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {

void rope(float* x, int64_t ldx, int64_t rows, int64_t heads, int64_t head_dim, int64_t rotary,
          const float* cos, const float* sin) {
  const int64_t half = rotary / 2;
  for (int64_t m = 0; m < rows; ++m) {
    for_vectors(half, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const f32x16 c = load_first(cos + m * half + i, n, 0.0f);
      const f32x16 s = load_first(sin + m * half + i, n, 0.0f);
      float* low = x + m * ldx + i;
      float* high = low + half;
      for (int64_t h = 0; h < heads; ++h, low += head_dim, high += head_dim) {
        const f32x16 a = load_first(low, n, 0.0f);
        const f32x16 b = load_first(high, n, 0.0f);
        store_first(low, fma(a, c, sub(zero_f32(), mul(b, s))), n);
        store_first(high, fma(b, c, mul(a, s)), n);
      }
    });
  }
}

}  // namespace fastllm::FASTLLM_ISA
