// Elementwise ops: SiLU and GELU gates, addition, soft-cap, exp. Each is one pass; the gates cost one exp and
// one division per 16 values.
#include "kernels/ops.h"
#include "kernels/simd/math.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// out[i] = f(a[i], b[i]) over n values, 16 at a time.
template <typename F>
FASTLLM_INLINE void map(const float* a, const float* b, float* out, int64_t n, F f) {
  for_vectors(n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    store_first(out + i, f(load_first(a + i, lanes, 0.0f), load_first(b + i, lanes, 0.0f)), lanes);
  });
}

}  // namespace

// silu(g) * u, silu(g) = g / (1 + exp(-g))
void silu_mul(const float* gate, const float* up, float* y, int64_t n) {
  map(gate, up, y, n, [](f32x16 g, f32x16 u) __attribute__((always_inline)) {
    return mul(div(g, add(set1(1.0f), exp(sub(zero_f32(), g)))), u);
  });
}

// gelu(g) * u, gelu(g) = g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3)))
void gelu_tanh_mul(const float* gate, const float* up, float* y, int64_t n) {
  map(gate, up, y, n, [](f32x16 g, f32x16 u) __attribute__((always_inline)) {
    const f32x16 cubic = fma(mul(mul(g, g), g), set1(0.044715f), g);
    const f32x16 t = tanh(mul(cubic, set1(0.7978845608028654f)));
    return mul(mul(mul(g, set1(0.5f)), add(set1(1.0f), t)), u);
  });
}

void add_vectors(const float* x, const float* y, float* out, int64_t n) {
  map(x, y, out, n, [](f32x16 a, f32x16 b) __attribute__((always_inline)) { return add(a, b); });
}

void softcap(float* x, float cap, int64_t n) {
  map(x, x, x, n, [cap](f32x16 a, f32x16) __attribute__((always_inline)) {
    return mul(tanh(div(a, set1(cap))), set1(cap));
  });
}

void exp_values(const float* x, float* y, int64_t n) {
  map(x, x, y, n, [](f32x16 a, f32x16) __attribute__((always_inline)) { return exp(a); });
}

}  // namespace fastllm::FASTLLM_ISA
