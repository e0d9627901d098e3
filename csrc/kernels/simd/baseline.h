// x86-64-v2 (SSE4.2): a vector is one xmm, four make a logical f32x16. See vec.h for what each primitive
// promises.
//
// There is no fused multiply-add and no half-precision conversion here; both are computed exactly, so that
// this set gives the same bits as the others. It is meant to be right everywhere, not fast.
#pragma once

#include <smmintrin.h>

namespace fastllm {
namespace {

constexpr int kLanes = 4;
using vf = __m128;
using vi = __m128i;
using vb = __m128i;

inline vf v_load(const float* p) { return _mm_loadu_ps(p); }
inline void v_store(float* p, vf x) { _mm_storeu_ps(p, x); }
inline vf v_set1(float x) { return _mm_set1_ps(x); }
inline vf v_add(vf a, vf b) { return _mm_add_ps(a, b); }
inline vf v_sub(vf a, vf b) { return _mm_sub_ps(a, b); }
inline vf v_mul(vf a, vf b) { return _mm_mul_ps(a, b); }
inline vf v_div(vf a, vf b) { return _mm_div_ps(a, b); }
inline vf v_max(vf a, vf b) { return _mm_max_ps(a, b); }
inline vf v_min(vf a, vf b) { return _mm_min_ps(a, b); }
inline vf v_sqrt(vf a) { return _mm_sqrt_ps(a); }

// a * b + c in double, rounded to odd: the product of two floats is exact in double, and a sum rounded to odd
// with 53 bits rounds to 24 bits as the exact sum does (Boldo and Melquiond, "Emulation of FMA and correctly
// rounded sums: proved algorithms using rounding to odd", 2008).
inline __m128d fma_to_odd(__m128d a, __m128d b, __m128d c) {
  const __m128d p = _mm_mul_pd(a, b);
  const __m128d s = _mm_add_pd(p, c);
  const __m128d c2 = _mm_sub_pd(s, p);  // Knuth's two-sum: error = exact(p + c) - s
  const __m128d error = _mm_add_pd(_mm_sub_pd(p, _mm_sub_pd(s, c2)), _mm_sub_pd(c, c2));
  const __m128i bits = _mm_castpd_si128(s);
  const __m128i one = _mm_set1_epi64x(1);
  const __m128i inexact = _mm_castpd_si128(
      _mm_or_pd(_mm_cmplt_pd(error, _mm_setzero_pd()), _mm_cmpgt_pd(error, _mm_setzero_pd())));
  const __m128i even = _mm_cmpeq_epi64(_mm_and_si128(bits, one), _mm_setzero_si128());
  // Away from zero when the error has the sign of the sum, else toward zero.
  const __m128i opposite = _mm_srli_epi64(_mm_xor_si128(bits, _mm_castpd_si128(error)), 63);
  const __m128i step = _mm_sub_epi64(one, _mm_slli_epi64(opposite, 1));
  return _mm_castsi128_pd(_mm_add_epi64(bits, _mm_and_si128(step, _mm_and_si128(inexact, even))));
}
// A call, or every kernel would hold hundreds of copies of these forty instructions.
__attribute__((noinline, unused)) vf v_fma(vf a, vf b, vf c) {
  const __m128d low = fma_to_odd(_mm_cvtps_pd(a), _mm_cvtps_pd(b), _mm_cvtps_pd(c));
  const __m128d high = fma_to_odd(_mm_cvtps_pd(_mm_movehl_ps(a, a)), _mm_cvtps_pd(_mm_movehl_ps(b, b)),
                                  _mm_cvtps_pd(_mm_movehl_ps(c, c)));
  return _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
}

inline vi vi_load(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void vi_store(void* p, vi x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
inline vi vi_set1(int x) { return _mm_set1_epi32(x); }
inline vi vi_add(vi a, vi b) { return _mm_add_epi32(a, b); }
inline vi vi_sub(vi a, vi b) { return _mm_sub_epi32(a, b); }
inline vi vi_mul(vi a, vi b) { return _mm_mullo_epi32(a, b); }
inline vi vi_max(vi a, vi b) { return _mm_max_epi32(a, b); }
inline vi vi_and(vi a, vi b) { return _mm_and_si128(a, b); }
inline vi vi_or(vi a, vi b) { return _mm_or_si128(a, b); }
inline vi vi_andnot(vi m, vi b) { return _mm_andnot_si128(m, b); }
template <int n>
inline vi vi_shl(vi a) {
  return _mm_slli_epi32(a, n);
}
template <int n>
inline vi vi_shr(vi a) {
  return _mm_srli_epi32(a, n);
}
template <int n>
inline vi vi_sar(vi a) {
  return _mm_srai_epi32(a, n);
}
inline vi vi_gt(vi a, vi b) { return _mm_cmpgt_epi32(a, b); }
inline vi vi_eq(vi a, vi b) { return _mm_cmpeq_epi32(a, b); }
inline vi v_gt(vf a, vf b) { return _mm_castps_si128(_mm_cmpgt_ps(a, b)); }
inline vi v_bits(vf a) { return _mm_castps_si128(a); }
inline vf v_from_bits(vi a) { return _mm_castsi128_ps(a); }
inline vi v_round_to_int(vf a) { return _mm_cvtps_epi32(a); }
inline vf v_from_int(vi a) { return _mm_cvtepi32_ps(a); }
inline vf v_select(vi m, vf a, vf b) { return _mm_blendv_ps(b, a, _mm_castsi128_ps(m)); }
inline vf v_select_gt(vf a, vf b, vf x, vf y) { return v_select(v_gt(a, b), x, y); }
inline bool vi_any(vi m) { return _mm_movemask_ps(_mm_castsi128_ps(m)) != 0; }

inline vi vi_load_u16(const uint16_t* p) {
  return _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void vi_store_u16(uint16_t* p, vi x) {  // keeps the low 16 bits
  const __m128i low = _mm_and_si128(x, _mm_set1_epi32(0xffff));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, low));
}
inline vi vi_load_s8(const int8_t* p) {
  int word;
  __builtin_memcpy(&word, p, 4);
  return _mm_cvtepi8_epi32(_mm_cvtsi32_si128(word));
}
inline vi vi_load_u8(const uint8_t* p) {
  int word;
  __builtin_memcpy(&word, p, 4);
  return _mm_cvtepu8_epi32(_mm_cvtsi32_si128(word));
}
inline void vi_store_s8(int8_t* p, vi x) {  // values in [-128, 127]
  const __m128i words = _mm_packs_epi32(x, x);
  const int word = _mm_cvtsi128_si32(_mm_packs_epi16(words, words));
  __builtin_memcpy(p, &word, 4);
}

// Half to float, exact: place exponent and mantissa, then multiply by 2^112 to move the bias, which also
// makes half subnormals normal. Infinities and NaNs get the float's all-ones exponent; NaNs become quiet.
inline vf v_load_f16(const uint16_t* p) {
  const vi h = vi_load_u16(p);
  const vi sign = vi_shl<16>(vi_and(h, vi_set1(0x8000)));
  const vi magnitude = vi_and(h, vi_set1(0x7fff));
  const vf finite = v_mul(v_from_bits(vi_shl<13>(magnitude)), v_set1(0x1p112f));
  const vi quiet = vi_and(vi_gt(magnitude, vi_set1(0x7c00)), vi_set1(0x00400000));
  const vi special = vi_or(vi_or(vi_shl<13>(magnitude), vi_set1(0x7f800000)), quiet);
  const vf value = v_select(vi_gt(magnitude, vi_set1(0x7bff)), v_from_bits(special), finite);
  return v_from_bits(vi_or(v_bits(value), sign));
}
// Float to half, to nearest even, as VCVTPS2PH does.
inline void v_store_f16(uint16_t* p, vf x) {
  const vi bits = v_bits(x);
  const vi sign = vi_shr<16>(vi_and(bits, vi_set1(static_cast<int>(0x80000000u))));
  const vi magnitude = vi_and(bits, vi_set1(0x7fffffff));
  // Normal halves: round the 13 dropped bits to even, then move the exponent's bias from 127 to 15.
  const vi odd = vi_and(vi_shr<13>(magnitude), vi_set1(1));
  const vi rounded = vi_add(magnitude, vi_add(odd, vi_set1(0x0fff)));
  const vi normal = vi_shr<13>(vi_sub(rounded, vi_set1(112 << 23)));
  // Below 2^-14: adding 0.5 leaves the value, in units of 2^-24 and rounded to even, in the low mantissa
  // bits.
  const vi subnormal = vi_sub(v_bits(v_add(v_from_bits(magnitude), v_set1(0.5f))), v_bits(v_set1(0.5f)));
  const vi small = vi_gt(vi_set1(113 << 23), magnitude);
  vi half = vi_or(vi_and(small, subnormal), vi_andnot(small, normal));
  const vi large = vi_gt(magnitude, vi_set1(0x477fefff));  // rounds to 65536 or more
  half = vi_or(vi_and(large, vi_set1(0x7c00)), vi_andnot(large, half));
  const vi nan = vi_gt(magnitude, vi_set1(0x7f800000));
  const vi payload = vi_or(vi_set1(0x7e00), vi_and(vi_shr<13>(magnitude), vi_set1(0x3ff)));
  half = vi_or(vi_and(nan, payload), vi_andnot(nan, half));
  vi_store_u16(p, vi_or(half, sign));
}

// Lane i takes lane i ^ n.
template <int n>
inline vf v_swap(vf x) {
  if constexpr (n == 2) return _mm_shuffle_ps(x, x, 0x4e);
  return _mm_shuffle_ps(x, x, 0xb1);
}

// Lane sums in the one tree of vec.h: the parts are halves until one lane is left.
inline float v_reduce_add4(__m128 x) {
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float v_reduce_max4(__m128 x) {
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float v_reduce_add(const vf* x) {
  return v_reduce_add4(_mm_add_ps(_mm_add_ps(x[0], x[2]), _mm_add_ps(x[1], x[3])));
}
inline float v_reduce_max(const vf* x) {
  return v_reduce_max4(_mm_max_ps(_mm_max_ps(x[0], x[2]), _mm_max_ps(x[1], x[3])));
}

inline vb vb_load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline void vb_store(uint8_t* p, vb x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }
inline vb vb_set1(int x) { return _mm_set1_epi8(static_cast<char>(x)); }
inline vb vb_and(vb a, vb b) { return _mm_and_si128(a, b); }
inline vb vb_or(vb a, vb b) { return _mm_or_si128(a, b); }
template <int n>  // shifts of 16-bit units: mask afterwards
inline vb vb_shr(vb a) {
  return _mm_srli_epi16(a, n);
}
template <int n>
inline vb vb_shl(vb a) {
  return _mm_slli_epi16(a, n);
}
inline vb vb_load_table(const uint8_t* p) { return vb_load(p); }
inline vb vb_lookup(vb table, vb index) { return _mm_shuffle_epi8(table, index); }

// pmaddubsw saturates its 16-bit pair sums; see avx2.h for why these are exact.
constexpr int kU8Bias = 128;
inline vi widen_pairs(vi acc, vi pairs) {
  return _mm_add_epi32(acc, _mm_madd_epi16(pairs, _mm_set1_epi16(1)));
}
inline vi dot_u8(vi acc, vb w, vi a) {
  const vi s = _mm_xor_si128(w, _mm_set1_epi8(static_cast<char>(0x80)));
  return widen_pairs(acc, _mm_maddubs_epi16(_mm_abs_epi8(s), _mm_sign_epi8(a, s)));
}
inline vi dot_u7(vi acc, vi p, vb v) { return widen_pairs(acc, _mm_maddubs_epi16(p, v)); }
inline vi dot_s16(vi acc, vi a, vi b) { return _mm_add_epi32(acc, _mm_madd_epi16(a, b)); }
inline vi dot_word(vi acc, vb w, const int8_t* q) { return dot_u8(acc, w, vi_set1(load_word(q))); }
template <int bits>
inline vi dot16(vi acc, const vb* w, const int8_t* q) {
  if constexpr (bits == 8) {
    return dot_word(dot_word(dot_word(dot_word(acc, w[0], q), w[1], q + 4), w[2], q + 8), w[3], q + 12);
  } else {
    const vi a[4] = {vi_set1(load_word(q)), vi_set1(load_word(q + 4)), vi_set1(load_word(q + 8)),
                     vi_set1(load_word(q + 12))};
    const vi low = _mm_add_epi16(_mm_maddubs_epi16(w[0], a[0]), _mm_maddubs_epi16(w[1], a[1]));
    const vi high = _mm_add_epi16(_mm_maddubs_epi16(w[2], a[2]), _mm_maddubs_epi16(w[3], a[3]));
    if constexpr (bits <= 5) return widen_pairs(acc, _mm_add_epi16(low, high));
    return widen_pairs(widen_pairs(acc, low), high);
  }
}

// The steps of vec.h's fold over many groups: 2 shuffles and 1 operation make one vector of two.
template <typename Op>
inline vi vi_quad(const vi* x, Op op) {
  const vi ab = op(_mm_unpacklo_epi32(x[0], x[1]), _mm_unpackhi_epi32(x[0], x[1]));
  const vi cd = op(_mm_unpacklo_epi32(x[2], x[3]), _mm_unpackhi_epi32(x[2], x[3]));
  return op(_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd));
}
// A vector is one block: nothing is left to fold.
inline vi vi_even_blocks(vi a, vi) { return a; }
inline vi vi_odd_blocks(vi, vi b) { return b; }
inline vi vi_store_s8_sum_quad(int8_t* p, const vi* x) {
  vi sums[4];
  for (int g = 0; g < 4; ++g) {
    const vi* v = x + 4 * g;
    const vi packed = _mm_packs_epi16(_mm_packs_epi32(v[0], v[1]), _mm_packs_epi32(v[2], v[3]));
    vi_store(p + 16 * g, packed);
    sums[g] = dot_u7(vi_set1(0), vb_set1(1), packed);
  }
  return vi_quad(sums, vi_add);
}

}  // namespace
}  // namespace fastllm
