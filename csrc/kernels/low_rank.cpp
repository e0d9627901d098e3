// y[m, r] = scale * sum_k a[r, k] x[m, k]: the first product of a low-rank adapter, from the width of the
// model to a rank of at most a few hundred. (The second, back to the model's width, is matmul_f.)
//
// Numerics: per output one f32x16 accumulator, ascending k, vec.h's reduction tree, then the scale; the same
// in every tile. Few outputs with long rows: lanes along k leave a chain of K / 16 FMAs where matmul_f, lanes
// along the outputs, has one of K. Tiles of 4 x 4 accumulators on AVX-512 and 2 x 2 elsewhere, 1 x 4 for a
// last row, hide the FMA's latency. Per 16 columns of a tile of R x P: R + P loads, R * P FMAs.
#include "kernels/ops.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {
namespace {

#if defined(FASTLLM_ISA_avx512vnni)
constexpr int kRows = 4;
constexpr int kRanks = 4;
#else
constexpr int kRows = 2;
constexpr int kRanks = 2;
#endif
constexpr int kRanksOfOneRow = 4;

template <int R, int P>
FASTLLM_INLINE void tile(const float* a, const float* x, int64_t ldx, int64_t k, float scale, float* y,
                         int64_t ldy) {
  f32x16 acc[R][P];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) acc[r][p] = zero_f32();
  for_vectors(k, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    f32x16 row[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) row[p] = load_first(a + p * k + i, n, 0.0f);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const f32x16 v = load_first(x + r * ldx + i, n, 0.0f);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) acc[r][p] = fma(row[p], v, acc[r][p]);
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) y[r * ldy + p] = reduce_add(acc[r][p]) * scale;
}

template <int R, int P>
void rows_tile(const float* a, int64_t rank, const float* x, int64_t ldx, int64_t k, float scale, float* y,
               int64_t ldy) {
  int64_t p = 0;
  for (; p + P <= rank; p += P) tile<R, P>(a + p * k, x, ldx, k, scale, y + p, ldy);
  for (; p < rank; ++p) tile<R, 1>(a + p * k, x, ldx, k, scale, y + p, ldy);
}

}  // namespace

void low_rank(const float* a, int64_t rank, const float* x, int64_t ldx, int64_t rows, int64_t k, float scale,
              float* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows)
    rows_tile<kRows, kRanks>(a, rank, x + m * ldx, ldx, k, scale, y + m * ldy, ldy);
  for (; m < rows; ++m) rows_tile<1, kRanksOfOneRow>(a, rank, x + m * ldx, ldx, k, scale, y + m * ldy, ldy);
}

}  // namespace fastllm::FASTLLM_ISA
