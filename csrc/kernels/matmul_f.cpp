// y[m, n] = sum_k w[n, k] x[m, k] for weights in fp32, fp16 or bf16 and activations in fp32.
//
// Numerics: one fp32 accumulator per output, one FMA per column, ascending k, in every tile; 16-bit weights
// are converted exactly. Cost per row, 16 outputs and column: 1 FMA with the activation as a broadcast from
// memory; the weight's load (and conversion) is shared by the tile's rows. Tiles of kRows x kPanels
// accumulators hide the FMA's latency: 4 x 4 on AVX-512 (16 of 32 registers, 4 more for weights), 2 x 2
// elsewhere.
#include "kernels/ops.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {
namespace {

#if defined(FASTLLM_ISA_avx512vnni)
constexpr int kRows = 4;
constexpr int kPanels = 4;
#else
constexpr int kRows = 2;
constexpr int kPanels = 2;
#endif

template <Codes kind>
struct Value;
template <>
struct Value<Codes::f32> {
  using type = float;
  static FASTLLM_INLINE f32x16 get(const float* p) { return load(p); }
};
template <>
struct Value<Codes::f16> {
  using type = uint16_t;
  static FASTLLM_INLINE f32x16 get(const uint16_t* p) { return load_f16(p); }
};
template <>
struct Value<Codes::bf16> {
  using type = uint16_t;
  static FASTLLM_INLINE f32x16 get(const uint16_t* p) { return load_bf16(p); }
};

template <Codes kind, int R, int P>
void tile(const PackedView* w, const float* x, int64_t ldx, int64_t panel, float* y, int64_t ldy,
          int accumulate) {
  using T = typename Value<kind>::type;
  const T* panels = reinterpret_cast<const T*>(w->codes) + panel * w->cols * kPanel;
  f32x16 acc[R][P];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) acc[r][p] = zero_f32();
  for (int64_t k = 0; k < w->cols; ++k) {
    f32x16 column[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) column[p] = Value<kind>::get(panels + (p * w->cols + k) * kPanel);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const f32x16 a = set1(x[r * ldx + k]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) acc[r][p] = fma(column[p], a, acc[r][p]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const int64_t n = (panel + p) * kPanel;
      const int64_t lanes = w->rows - n < kPanel ? w->rows - n : kPanel;
      float* out = y + r * ldy + n;
      store_first(out, accumulate ? add(load_first(out, lanes, 0.0f), acc[r][p]) : acc[r][p], lanes);
    }
}

template <Codes kind, int R>
void rows_tile(const PackedView* w, const float* x, int64_t ldx, int64_t panel_begin, int64_t panel_end,
               float* y, int64_t ldy, int accumulate) {
  int64_t panel = panel_begin;
  for (; panel + kPanels <= panel_end; panel += kPanels)
    tile<kind, R, kPanels>(w, x, ldx, panel, y, ldy, accumulate);
  for (; panel < panel_end; ++panel) tile<kind, R, 1>(w, x, ldx, panel, y, ldy, accumulate);
}

template <Codes kind>
void matmul(const PackedView* w, const float* x, int64_t ldx, int64_t rows, int64_t panel_begin,
            int64_t panel_end, float* y, int64_t ldy, int accumulate) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows)
    rows_tile<kind, kRows>(w, x + m * ldx, ldx, panel_begin, panel_end, y + m * ldy, ldy, accumulate);
  for (; m < rows; ++m)
    rows_tile<kind, 1>(w, x + m * ldx, ldx, panel_begin, panel_end, y + m * ldy, ldy, accumulate);
}

}  // namespace

void matmul_f(const PackedView* w, const float* x, int64_t ldx, int64_t rows, int64_t panel_begin,
              int64_t panel_end, float* y, int64_t ldy, int accumulate) {
  switch (w->kind) {
    case Codes::f32:
      matmul<Codes::f32>(w, x, ldx, rows, panel_begin, panel_end, y, ldy, accumulate);
      break;
    case Codes::f16:
      matmul<Codes::f16>(w, x, ldx, rows, panel_begin, panel_end, y, ldy, accumulate);
      break;
    case Codes::bf16:
      matmul<Codes::bf16>(w, x, ldx, rows, panel_begin, panel_end, y, ldy, accumulate);
      break;
    default:
      break;
  }
}

}  // namespace fastllm::FASTLLM_ISA
