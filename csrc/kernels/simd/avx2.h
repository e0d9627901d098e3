// AVX2 with FMA and F16C: a vector is one ymm, two make a logical f32x16. See vec.h for what each primitive
// promises.
#pragma once

#include <immintrin.h>

namespace fastllm {
namespace {

constexpr int kLanes = 8;
using vf = __m256;
using vi = __m256i;
using vb = __m256i;

inline vf v_load(const float* p) { return _mm256_loadu_ps(p); }
inline void v_store(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline vf v_set1(float x) { return _mm256_set1_ps(x); }
inline vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }

inline vi vi_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void vi_store(void* p, vi x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline vi vi_set1(int x) { return _mm256_set1_epi32(x); }
inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
inline vi vi_mul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
inline vi vi_max(vi a, vi b) { return _mm256_max_epi32(a, b); }
inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
inline vi vi_andnot(vi m, vi b) { return _mm256_andnot_si256(m, b); }
template <int n>
inline vi vi_shl(vi a) {
  return _mm256_slli_epi32(a, n);
}
template <int n>
inline vi vi_shr(vi a) {
  return _mm256_srli_epi32(a, n);
}
template <int n>
inline vi vi_sar(vi a) {
  return _mm256_srai_epi32(a, n);
}
inline vi vi_gt(vi a, vi b) { return _mm256_cmpgt_epi32(a, b); }
inline vi vi_eq(vi a, vi b) { return _mm256_cmpeq_epi32(a, b); }
inline vi v_gt(vf a, vf b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline vi v_bits(vf a) { return _mm256_castps_si256(a); }
inline vf v_from_bits(vi a) { return _mm256_castsi256_ps(a); }
inline vi v_round_to_int(vf a) { return _mm256_cvtps_epi32(a); }
inline vf v_from_int(vi a) { return _mm256_cvtepi32_ps(a); }
inline vf v_select(vi m, vf a, vf b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }
inline vf v_select_gt(vf a, vf b, vf x, vf y) { return v_select(v_gt(a, b), x, y); }
inline bool vi_any(vi m) { return _mm256_movemask_ps(_mm256_castsi256_ps(m)) != 0; }

inline vf v_load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void v_store_f16(uint16_t* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline vi vi_load_u16(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void vi_store_u16(uint16_t* p, vi x) {  // keeps the low 16 bits
  const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline vi vi_load_s8(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline vi vi_load_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void vi_store_s8(int8_t* p, vi x) {  // values in [-128, 127]
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

// Lane i takes lane i ^ n.
template <int n>
inline vf v_swap(vf x) {
  if constexpr (n == 4) return _mm256_permute2f128_ps(x, x, 1);
  if constexpr (n == 2) return _mm256_permute_ps(x, 0x4e);
  return _mm256_permute_ps(x, 0xb1);
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
  const __m256 eight = _mm256_add_ps(x[0], x[1]);
  return v_reduce_add4(_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}
inline float v_reduce_max(const vf* x) {
  const __m256 eight = _mm256_max_ps(x[0], x[1]);
  return v_reduce_max4(_mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

inline vb vb_load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void vb_store(uint8_t* p, vb x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline vb vb_set1(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
inline vb vb_and(vb a, vb b) { return _mm256_and_si256(a, b); }
inline vb vb_or(vb a, vb b) { return _mm256_or_si256(a, b); }
template <int n>  // shifts of 16-bit units: mask afterwards
inline vb vb_shr(vb a) {
  return _mm256_srli_epi16(a, n);
}
template <int n>
inline vb vb_shl(vb a) {
  return _mm256_slli_epi16(a, n);
}
inline vb vb_load_table(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline vb vb_lookup(vb table, vb index) { return _mm256_shuffle_epi8(table, index); }

#ifdef FASTLLM_ISA_avxvnni
// VEX-coded vpdpbusd: 1 instruction for 32 products; exact for any unsigned byte.
constexpr int kU8Bias = 0;
inline vi dot_u8(vi acc, vb w, vi a) { return _mm256_dpbusd_avx_epi32(acc, w, a); }
inline vi dot_u7(vi acc, vi p, vb v) { return _mm256_dpbusd_avx_epi32(acc, p, v); }
inline vi dot_s16(vi acc, vi a, vi b) { return _mm256_dpwssd_avx_epi32(acc, a, b); }
inline vi dot_word(vi acc, vb w, const int8_t* q) { return dot_u8(acc, w, vi_set1(load_word(q))); }
template <int bits>
inline vi dot16(vi acc, const vb* w, const int8_t* q) {
  return dot_word(dot_word(dot_word(dot_word(acc, w[0], q), w[1], q + 4), w[2], q + 8), w[3], q + 12);
}
#else
// vpmaddubsw saturates its 16-bit pair sums at 2^15, so products are added in 16 bits for as long as they
// fit: codes below 2^5 four lines (31 * 127 * 2 * 4 < 2^15), below 2^6 two (63 * 127 * 2 * 2 < 2^15); 9 or 10
// instructions for 4 lines. A full byte is made signed (c - 128), and its sign moved to the activation:
// |c - 128| <= 128 and 128 * 127 * 2 < 2^15 for one line, so that is exact too, 6 instructions a line. So is
// a code below 2^7 times any signed byte, 3 instructions.
constexpr int kU8Bias = 128;
inline vi widen_pairs(vi acc, vi pairs) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline vi dot_u8(vi acc, vb w, vi a) {
  const vi s = _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)));
  return widen_pairs(acc, _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(a, s)));
}
inline vi dot_u7(vi acc, vi p, vb v) { return widen_pairs(acc, _mm256_maddubs_epi16(p, v)); }
inline vi dot_s16(vi acc, vi a, vi b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
inline vi dot_word(vi acc, vb w, const int8_t* q) { return dot_u8(acc, w, vi_set1(load_word(q))); }
template <int bits>
inline vi dot16(vi acc, const vb* w, const int8_t* q) {
  if constexpr (bits == 8) {
    return dot_word(dot_word(dot_word(dot_word(acc, w[0], q), w[1], q + 4), w[2], q + 8), w[3], q + 12);
  } else {
    const vi a[4] = {vi_set1(load_word(q)), vi_set1(load_word(q + 4)), vi_set1(load_word(q + 8)),
                     vi_set1(load_word(q + 12))};
    const vi low = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], a[0]), _mm256_maddubs_epi16(w[1], a[1]));
    const vi high = _mm256_add_epi16(_mm256_maddubs_epi16(w[2], a[2]), _mm256_maddubs_epi16(w[3], a[3]));
    if constexpr (bits <= 5) return widen_pairs(acc, _mm256_add_epi16(low, high));
    return widen_pairs(widen_pairs(acc, low), high);
  }
}
#endif

// The steps of vec.h's fold over many groups: 2 shuffles and 1 operation make one vector of two.
template <typename Op>
inline vi vi_quad(const vi* x, Op op) {
  const vi ab = op(_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[0], x[1]));
  const vi cd = op(_mm256_unpacklo_epi32(x[2], x[3]), _mm256_unpackhi_epi32(x[2], x[3]));
  return op(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
inline vi vi_even_blocks(vi a, vi b) { return _mm256_permute2x128_si256(a, b, 0x20); }
inline vi vi_odd_blocks(vi a, vi b) { return _mm256_permute2x128_si256(a, b, 0x31); }
// Two groups a, b fill a vector. Packing leaves 4 values each of a, b, a, b in the dwords of a block; a dot
// product with ones adds them up.
inline vi vi_store_s8_two(int8_t* p, const vi* x) {
  const vi packed = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[2]), _mm256_packs_epi32(x[1], x[3]));
  vi_store(p, _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7)));
  return dot_u7(vi_set1(0), vb_set1(1), packed);
}
inline vi vi_store_s8_sum_quad(int8_t* p, const vi* x) {
  const vi ab = vi_store_s8_two(p, x), cd = vi_store_s8_two(p + 32, x + 4);
  return vi_add(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

}  // namespace
}  // namespace fastllm
