// AVX-512 (F, BW, DQ, VL) with VNNI: a vector is one zmm. See vec.h for what each primitive promises.
#pragma once

// gcc 12's own headers start unused vectors as themselves and then warn about it wherever they are inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace fastllm {
namespace {

constexpr int kLanes = 16;
using vf = __m512;
using vi = __m512i;
using vb = __m512i;

inline vf v_load(const float* p) { return _mm512_loadu_ps(p); }
inline void v_store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf v_set1(float x) { return _mm512_set1_ps(x); }
inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }

inline vi vi_load(const void* p) { return _mm512_loadu_si512(p); }
inline void vi_store(void* p, vi x) { _mm512_storeu_si512(p, x); }
inline vi vi_set1(int x) { return _mm512_set1_epi32(x); }
inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
inline vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
inline vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
inline vi vi_andnot(vi m, vi b) { return _mm512_andnot_si512(m, b); }
template <int n>
inline vi vi_shl(vi a) {
  return _mm512_slli_epi32(a, n);
}
template <int n>
inline vi vi_shr(vi a) {
  return _mm512_srli_epi32(a, n);
}
template <int n>
inline vi vi_sar(vi a) {
  return _mm512_srai_epi32(a, n);
}
inline vi vi_gt(vi a, vi b) { return _mm512_movm_epi32(_mm512_cmpgt_epi32_mask(a, b)); }
inline vi vi_eq(vi a, vi b) { return _mm512_movm_epi32(_mm512_cmpeq_epi32_mask(a, b)); }
inline vi v_gt(vf a, vf b) { return _mm512_movm_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ)); }
inline vi v_bits(vf a) { return _mm512_castps_si512(a); }
inline vf v_from_bits(vi a) { return _mm512_castsi512_ps(a); }
inline vi v_round_to_int(vf a) { return _mm512_cvtps_epi32(a); }
inline vf v_from_int(vi a) { return _mm512_cvtepi32_ps(a); }
inline vf v_select(vi m, vf a, vf b) { return _mm512_mask_blend_ps(_mm512_movepi32_mask(m), b, a); }
// The comparison's mask register is the selection's: the two calls would move it through a vector.
inline vf v_select_gt(vf a, vf b, vf x, vf y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
inline bool vi_any(vi m) { return _mm512_movepi32_mask(m) != 0; }

inline vf v_load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void v_store_f16(uint16_t* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline vi vi_load_u16(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void vi_store_u16(uint16_t* p, vi x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
inline vi vi_load_s8(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline vi vi_load_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void vi_store_s8(int8_t* p, vi x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}

// Lane i takes lane i ^ n.
template <int n>
inline vf v_swap(vf x) {
  if constexpr (n == 8) return _mm512_shuffle_f32x4(x, x, 0x4e);
  if constexpr (n == 4) return _mm512_shuffle_f32x4(x, x, 0xb1);
  if constexpr (n == 2) return _mm512_permute_ps(x, 0x4e);
  return _mm512_permute_ps(x, 0xb1);
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
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x[0]), _mm512_extractf32x8_ps(x[0], 1));
  return v_reduce_add4(_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}
inline float v_reduce_max(const vf* x) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x[0]), _mm512_extractf32x8_ps(x[0], 1));
  return v_reduce_max4(_mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

inline vb vb_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void vb_store(uint8_t* p, vb x) { _mm512_storeu_si512(p, x); }
inline vb vb_set1(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
inline vb vb_and(vb a, vb b) { return _mm512_and_si512(a, b); }
inline vb vb_or(vb a, vb b) { return _mm512_or_si512(a, b); }
template <int n>  // shifts of 16-bit units: mask afterwards
inline vb vb_shr(vb a) {
  return _mm512_srli_epi16(a, n);
}
template <int n>
inline vb vb_shl(vb a) {
  return _mm512_slli_epi16(a, n);
}
inline vb vb_load_table(const uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline vb vb_lookup(vb table, vb index) { return _mm512_shuffle_epi8(table, index); }

// vpdpbusd: 1 instruction for 64 products; exact for any unsigned byte. Written out, since gcc copies the
// accumulator of its intrinsic twice in a loop.
constexpr int kU8Bias = 0;
inline vi dot_u8(vi acc, vb w, vi a) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
  return acc;
}
// The broadcast is part of the instruction: as one of its own it would cost 5 % of a product.
inline vi dot_word(vi acc, vb w, const int8_t* q) {
  typedef int32_t __attribute__((may_alias, aligned(1))) Word;
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const Word*>(q)));
  return acc;
}
inline vi dot_u7(vi acc, vi p, vb v) { return dot_u8(acc, p, v); }
inline vi dot_s16(vi acc, vi a, vi b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}
template <int bits>
inline vi dot16(vi acc, const vb* w, const int8_t* q) {
  return dot_word(dot_word(dot_word(dot_word(acc, w[0], q), w[1], q + 4), w[2], q + 8), w[3], q + 12);
}

// The steps of vec.h's fold over many groups: 2 shuffles and 1 operation make one vector of two.
template <typename Op>
inline vi vi_quad(const vi* x, Op op) {
  const vi ab = op(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
  const vi cd = op(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
  return op(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
inline vi vi_even_blocks(vi a, vi b) { return _mm512_shuffle_i32x4(a, b, 0x88); }
inline vi vi_odd_blocks(vi a, vi b) { return _mm512_shuffle_i32x4(a, b, 0xdd); }
// Packing leaves 4 values of group j in dword j of every block; a dot product with ones adds them up.
inline vi vi_store_s8_sum_quad(int8_t* p, const vi* x) {
  const vi packed = _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
  const vi order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  vi_store(p, _mm512_permutexvar_epi32(order, packed));
  return dot_u7(vi_set1(0), vb_set1(1), packed);
}

}  // namespace
}  // namespace fastllm
