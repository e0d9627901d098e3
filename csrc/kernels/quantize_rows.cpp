// Activations to int8: per row and group of 16 columns, scale = amax / 127, q = round(x * (127 / amax)).
//
// Both divisions are IEEE divisions and the rounding is to nearest even, so the codes are the same on every
// instruction set; |x| * (127 / amax) is at most 127 * (1 + 2^-23), so no code leaves [-127, 127].
// Groups of 16, not 32: on the default model the divergence from fp32 falls by almost half
// (docs/benchmarks/log.md).
//
// 16 groups are done together: their maxima, scales and sums are one vector each, lane g for group g, made by
// vec.h's trees. Maxima are those of the magnitudes' bits, which are ordered as the magnitudes are, with what
// is not finite on top; sums are of integers: the order of neither matters. The scales of the whole row are
// found before its codes, or the codes would wait for two divisions while the next groups wait for them.
// Cost per group: 2 loads and a broadcast; 2 shuffles and 2 operations for the maximum; a multiplication, a
// conversion, a shuffle and a quarter of a store for the codes; less than 1 instruction for the sum; and a
// sixteenth of 2 divisions.
#include "kernels/ops.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int kQuads = 4;  // quads of groups that are done together
constexpr int64_t kQuadColumns = 4 * kActivationGroup;

// A row from quad i on.
FASTLLM_INLINE QuantizedRows from_quad(const QuantizedRows& row, int64_t i) {
  return {row.q + i * kQuadColumns, row.scale + 4 * i, row.sums + 4 * i, row.fsums + 4 * i, row.kp};
}

// Scales of the first kCount quads of a row. fsums holds the inverses 127 / amax until the codes are known.
template <int kCount>
FASTLLM_INLINE void find_scales(const float* x, const QuantizedRows& row) {
  vi quads[kQuads] = {vi_set1(0), vi_set1(0), vi_set1(0), vi_set1(0)};
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    i32x16 v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) v[j] = magnitude(load(x + i * kQuadColumns + j * kActivationGroup));
    quads[i] = max_quad(v);
  }
  const f32x16 amax = from_bits(fold_quads(quads, vi_max));
  const f32x16 infinity = from_bits(set1_i32(0x7f800000));
  // A group too small for a finite inverse (amax below 3.8e-37, or zero) counts as zero.
  const f32x16 inverse = div(set1(127.0f), amax);
  const f32x16 scale = select_greater(infinity, inverse, div(amax, set1(127.0f)), zero_f32());
  store_first(row.scale, select(not_finite(amax), set1(__builtin_nanf("")), scale), 4 * kCount);
  store_first(row.fsums, select_greater(infinity, inverse, inverse, zero_f32()), 4 * kCount);
}

// Codes and sums of those groups.
template <int kCount>
FASTLLM_INLINE void find_codes(const float* x, const QuantizedRows& row) {
  vi quads[kQuads] = {vi_set1(0), vi_set1(0), vi_set1(0), vi_set1(0)};
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    i32x16 codes[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const f32x16 v = load(x + i * kQuadColumns + j * kActivationGroup);
      codes[j] = round_to_int(mul(v, set1(row.fsums[4 * i + j])));
    }
    quads[i] = store_s8_sum_quad(row.q + i * kQuadColumns, codes);
  }
  i32x16 sum = fold_quads(quads, vi_add);
  const f32x16 scale = load_first(row.scale, 4 * kCount, 0.0f);
  const i32x16 broken = not_finite(scale);
  if (any(broken)) {  // what is not finite has no code, not even times 0: such a group's codes become 0 here
    alignas(64) int32_t clear[16];
    store_i32(clear, broken);
    for (int g = 0; g < 4 * kCount; ++g)
      if (clear[g] != 0) store_s8(row.q + g * kActivationGroup, set1_i32(0));
    sum = bit_andnot(broken, sum);
  }
  store_first(row.fsums, mul(scale, to_float(sum)), 4 * kCount);
  store_first(reinterpret_cast<float*>(row.sums), from_bits(sub(set1_i32(0), sum)), 4 * kCount);
}

// The last groups of a row, fewer than a quad or not all whole: on copies, with zeros past column k.
void quantize_rest(const float* x, int64_t k, int64_t groups, const QuantizedRows& row) {
  alignas(64) float columns[kQuadColumns] = {};
  alignas(64) int8_t q[kQuadColumns];
  float scale[4], fsums[4];
  int32_t sums[4];
  for (int64_t i = 0; i < k; ++i) columns[i] = x[i];
  const QuantizedRows copy = {q, scale, sums, fsums, kQuadColumns};
  find_scales<1>(columns, copy);
  find_codes<1>(columns, copy);
  for (int64_t g = 0; g < groups; ++g) {
    store_s8(row.q + g * kActivationGroup, load_s8(q + g * kActivationGroup));
    row.scale[g] = scale[g];
    row.sums[g] = sums[g];
    row.fsums[g] = fsums[g];
  }
}

}  // namespace

void quantize_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, const QuantizedRows* out) {
  const int64_t groups = out->kp / kActivationGroup, quads = k / kQuadColumns, rest = quads * kQuadColumns;
  for (int64_t m = 0; m < rows; ++m) {
    const float* in = x + m * ldx;
    const QuantizedRows row = out->from_row(m);
    int64_t i = 0;
    for (; i + kQuads <= quads; i += kQuads) find_scales<kQuads>(in + i * kQuadColumns, from_quad(row, i));
    for (; i < quads; ++i) find_scales<1>(in + i * kQuadColumns, from_quad(row, i));
    for (i = 0; i + kQuads <= quads; i += kQuads)
      find_codes<kQuads>(in + i * kQuadColumns, from_quad(row, i));
    for (; i < quads; ++i) find_codes<1>(in + i * kQuadColumns, from_quad(row, i));
    if (4 * quads < groups) quantize_rest(in + rest, k - rest, groups - 4 * quads, from_quad(row, quads));
  }
}

}  // namespace fastllm::FASTLLM_ISA
