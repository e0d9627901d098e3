// RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight.   LayerNorm: y = (x - mean) / sqrt(var + eps) * weight +
// bias.
//
// Sums run over one f32x16 accumulator in ascending order and end in vec.h's reduction tree. 2 passes
// (LayerNorm 3) over a row that lies in L1.
#include "kernels/ops.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {
namespace {

FASTLLM_INLINE int64_t lanes_at(int64_t i, int64_t n) { return n - i < 16 ? n - i : 16; }

}  // namespace

void rms_norm(const float* x, int64_t ldx, const float* weight, float eps, int64_t rows, int64_t dim,
              float* y, int64_t ldy) {
  for (int64_t m = 0; m < rows; ++m) {
    const float* in = x + m * ldx;
    float* out = y + m * ldy;
    f32x16 squares = zero_f32();
    for (int64_t i = 0; i < dim; i += 16) {
      const f32x16 v = load_first(in + i, lanes_at(i, dim), 0.0f);
      squares = fma(v, v, squares);
    }
    const float mean = reduce_add(squares) / static_cast<float>(dim);
    const f32x16 inverse = set1(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t i = 0; i < dim; i += 16) {
      const int64_t n = lanes_at(i, dim);
      const f32x16 v = load_first(in + i, n, 0.0f);
      store_first(out + i, mul(mul(v, inverse), load_first(weight + i, n, 0.0f)), n);
    }
  }
}

void layer_norm(const float* x, int64_t ldx, const float* weight, const float* bias, float eps, int64_t rows,
                int64_t dim, float* y, int64_t ldy) {
  for (int64_t m = 0; m < rows; ++m) {
    const float* in = x + m * ldx;
    float* out = y + m * ldy;
    f32x16 sum = zero_f32();
    for (int64_t i = 0; i < dim; i += 16) sum = add(sum, load_first(in + i, lanes_at(i, dim), 0.0f));
    const float mean = reduce_add(sum) / static_cast<float>(dim);
    const f32x16 center = set1(mean);
    f32x16 squares = zero_f32();
    for (int64_t i = 0; i < dim; i += 16) {
      const f32x16 v = sub(load_first(in + i, lanes_at(i, dim), mean), center);
      squares = fma(v, v, squares);
    }
    const float variance = reduce_add(squares) / static_cast<float>(dim);
    const f32x16 inverse = set1(1.0f / __builtin_sqrtf(variance + eps));
    for (int64_t i = 0; i < dim; i += 16) {
      const int64_t n = lanes_at(i, dim);
      const f32x16 v = mul(sub(load_first(in + i, n, mean), center), inverse);
      const f32x16 shift = bias != nullptr ? load_first(bias + i, n, 0.0f) : zero_f32();
      store_first(out + i, fma(v, load_first(weight + i, n, 0.0f), shift), n);
    }
  }
}

}  // namespace fastllm::FASTLLM_ISA
