// RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight.   LayerNorm: y = (x - mean) / sqrt(var + eps) * weight +
// bias.
//
// Sums run over one f32x16 accumulator in ascending order and end in vec.h's reduction tree. That makes a row
// a chain of additions, each of which waits for the one before: so 4 rows are summed together, each into an
// accumulator of its own. The last pass goes row by row: its inputs and outputs are streams that would evict
// each other from L1 where rows lie a power of two apart. Per 16 columns: 2 passes, in sum 3 loads, 1 FMA, 2
// multiplications, 1 store; LayerNorm 3 passes, 5 loads, 2 FMAs, 4 other operations, 1 store.
#include "kernels/ops.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int kTogether = 4;

#define FASTLLM_EACH_ROW _Pragma("GCC unroll 4") for (int r = 0; r < kRows; ++r)

template <int kRows>
FASTLLM_INLINE void rms_norm_rows(const float* x, int64_t ldx, const float* weight, float eps, int64_t dim,
                                  float* y, int64_t ldy) {
  f32x16 squares[kRows];
  FASTLLM_EACH_ROW squares[r] = zero_f32();
  for_vectors(dim, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    FASTLLM_EACH_ROW {
      const f32x16 v = load_first(x + r * ldx + i, n, 0.0f);
      squares[r] = fma(v, v, squares[r]);
    }
  });
  float inverses[kRows];
  FASTLLM_EACH_ROW {
    const float mean = reduce_add(squares[r]) / static_cast<float>(dim);
    inverses[r] = 1.0f / __builtin_sqrtf(mean + eps);
  }
  for (int r = 0; r < kRows; ++r) {
    const f32x16 inverse = set1(inverses[r]);
    for_vectors(dim, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const f32x16 v = load_first(x + r * ldx + i, n, 0.0f);
      store_first(y + r * ldy + i, mul(mul(v, inverse), load_first(weight + i, n, 0.0f)), n);
    });
  }
}

template <int kRows>
FASTLLM_INLINE void layer_norm_rows(const float* x, int64_t ldx, const float* weight, const float* bias,
                                    float eps, int64_t dim, float* y, int64_t ldy) {
  f32x16 sum[kRows], squares[kRows];
  float mean[kRows], inverses[kRows];
  FASTLLM_EACH_ROW sum[r] = squares[r] = zero_f32();
  for_vectors(dim, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    FASTLLM_EACH_ROW sum[r] = add(sum[r], load_first(x + r * ldx + i, n, 0.0f));
  });
  FASTLLM_EACH_ROW mean[r] = reduce_add(sum[r]) / static_cast<float>(dim);
  const auto centered = [&](int r, int64_t i, int64_t n) __attribute__((always_inline)) {
    return sub(load_first(x + r * ldx + i, n, mean[r]), set1(mean[r]));
  };
  for_vectors(dim, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    FASTLLM_EACH_ROW {
      const f32x16 v = centered(r, i, n);
      squares[r] = fma(v, v, squares[r]);
    }
  });
  FASTLLM_EACH_ROW {
    const float variance = reduce_add(squares[r]) / static_cast<float>(dim);
    inverses[r] = 1.0f / __builtin_sqrtf(variance + eps);
  }
  for (int r = 0; r < kRows; ++r) {
    const f32x16 inverse = set1(inverses[r]);
    for_vectors(dim, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const f32x16 v = mul(centered(r, i, n), inverse);
      const f32x16 shift = bias != nullptr ? load_first(bias + i, n, 0.0f) : zero_f32();
      store_first(y + r * ldy + i, fma(v, load_first(weight + i, n, 0.0f), shift), n);
    });
  }
}

}  // namespace

void rms_norm(const float* x, int64_t ldx, const float* weight, float eps, int64_t rows, int64_t dim,
              float* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + kTogether <= rows; m += kTogether)
    rms_norm_rows<kTogether>(x + m * ldx, ldx, weight, eps, dim, y + m * ldy, ldy);
  for (; m < rows; ++m) rms_norm_rows<1>(x + m * ldx, ldx, weight, eps, dim, y + m * ldy, ldy);
}

void layer_norm(const float* x, int64_t ldx, const float* weight, const float* bias, float eps, int64_t rows,
                int64_t dim, float* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + kTogether <= rows; m += kTogether)
    layer_norm_rows<kTogether>(x + m * ldx, ldx, weight, bias, eps, dim, y + m * ldy, ldy);
  for (; m < rows; ++m) layer_norm_rows<1>(x + m * ldx, ldx, weight, bias, eps, dim, y + m * ldy, ldy);
}

}  // namespace fastllm::FASTLLM_ISA
