// exp and tanh on f32x16, ours, so that every instruction set gives the same bits.
#pragma once

#include "kernels/simd/vec.h"

namespace fastllm {
namespace {

// e^r by Taylor's coefficients, from the sixth power's down: p is that coefficient, with what higher powers
// add.
FASTLLM_INLINE f32x16 exp_taylor(f32x16 p, f32x16 r) {
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  return fma(p, r, set1(1.0f));
}

// exp(x) to about 1 unit in the last place. x = n ln 2 + r with |r| <= ln(2)/2 (ln 2 in two parts, Cody and
// Waite), and a polynomial of degree 7 for e^r (Taylor coefficients; the remainder is below 2^-27 there).
// Adding n to the exponent of e^r multiplies it by 2^n: the limits below keep the product a normal number.
// Below -87.3 the result is 0, above 88.7 infinite, whatever came out before; NaN stays NaN, its n is -2^31,
// of which the shift leaves 0. 12 FMA-class instructions, 8 others.
FASTLLM_INLINE f32x16 exp(f32x16 x) {
  const i32x16 n = round_to_int(mul(x, set1(1.44269504f)));
  const f32x16 nf = to_float(n);
  f32x16 r = fma(nf, set1(-0.693359375f), x);
  r = fma(nf, set1(2.12194440e-4f), r);
  const f32x16 p = exp_taylor(fma(set1(1.0f / 5040.0f), r, set1(1.0f / 720.0f)), r);
  f32x16 y = from_bits(add(bits(p), shift_left<23>(n)));
  y = select_greater(set1(-87.33654f), x, zero_f32(), y);
  return select_greater(x, set1(88.72283f), from_bits(set1_i32(0x7f800000)), y);
}

// exp(x) for x <= 0, to about 1.5 units in the last place; NaN stays NaN, below -87.3 the result is 0. Adding
// 1.5 * 2^23 + 127 to x / ln 2 rounds it to the integer n and leaves n + 127, the exponent of 2^n, in the low
// bits. A polynomial of degree 6 (Taylor; the remainder is below 2^-23). 11 FMA-class instructions, 3 others.
FASTLLM_INLINE f32x16 exp_negative(f32x16 x) {
  const f32x16 magic = set1(12583039.0f);
  const f32x16 shifted = fma(x, set1(1.44269504f), magic);
  const f32x16 n = sub(shifted, magic);
  f32x16 r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  const f32x16 p = exp_taylor(set1(1.0f / 720.0f), r);
  const f32x16 y = mul(p, from_bits(shift_left<23>(bits(shifted))));
  return select_greater(set1(-87.33654f), x, zero_f32(), y);
}

// tanh(x) = 1 - 2 / (exp(2x) + 1): absolute error below 2e-7.
FASTLLM_INLINE f32x16 tanh(f32x16 x) {
  const f32x16 e = exp(add(x, x));
  return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

}  // namespace
}  // namespace fastllm
