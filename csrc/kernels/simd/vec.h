// The logical 16-lane vectors that kernels are written on: f32x16 and i32x16.
//
// Each instruction set's header gives a native vector (vf floats, vi int32, vb bytes) of kLanes floats and
// its primitives; this file composes kParts = 16 / kLanes of them. Promises, equal on every instruction set:
//   fma       a * b + c, rounded once
//   max, min  (a > b ? a : b), (a < b ? a : b): the second operand when one is NaN, and for equal zeros
//   reduce    one tree: lanes i and i+8, then i and i+4, i+2, i+1
//   round_to_int  nearest, ties to even (the workers' rounding mode is set to nearest)
//   f16       loads are exact, stores round to nearest even; bf16 likewise
//   dot_u8       acc += sum over the 4 bytes of a lane of (w - kU8Bias) * a, exact, for any bytes w and
//                activations a in [-127, 127]
//   dot_word     dot_u8 with the same 4 activations, those at q, in every lane
//   dot_u7       acc += sum of p * v, exact, for p < 128 and any signed bytes v
//   dot_s16      acc += sum over the 2 signed words of a lane of a * b, exact but for overflow of the sum
//   dot16<bits>  acc += sum over the 4 lines w and their 4 bytes of a lane of w * a, exact, for the 16
//                activations in [-127, 127] at q; below 8 bits the bytes are w < 2^bits, with 8 bits w stands
//                for w - kU8Bias
//   vi_quad, vi_even_blocks, vi_odd_blocks, vi_store_s8_sum_quad  the steps of "many groups at once", below:
//                four vectors into a quad; the even, or odd, 128-bit blocks of a, then those of b
// A kernel whose lanes never meet (the quantized matmul) is written on the native vectors, a part at a time.
// Loops over parts unroll entirely: -O3 leaves no array in memory.
#pragma once

#include <stdint.h>

#define FASTLLM_INLINE inline __attribute__((always_inline))

namespace fastllm {
namespace {

FASTLLM_INLINE int32_t load_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}

}  // namespace
}  // namespace fastllm

#include FASTLLM_ISA_HEADER  // "kernels/simd/<name>.h", from CMakeLists.txt

namespace fastllm {
namespace {

constexpr int kParts = 16 / kLanes;
constexpr int kLineBytes = 4 * kLanes;  // bytes of a native vector

struct f32x16 {
  vf part[kParts];
};
struct i32x16 {
  vi part[kParts];
};

#define FASTLLM_EACH _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i)

// ---- f32x16 ---------------------------------------------------------------------------------------------
FASTLLM_INLINE f32x16 load(const float* p) {
  f32x16 r;
  FASTLLM_EACH r.part[i] = v_load(p + i * kLanes);
  return r;
}
FASTLLM_INLINE void store(float* p, f32x16 x) { FASTLLM_EACH v_store(p + i * kLanes, x.part[i]); }
FASTLLM_INLINE f32x16 set1(float x) {
  f32x16 r;
  FASTLLM_EACH r.part[i] = v_set1(x);
  return r;
}
FASTLLM_INLINE f32x16 zero_f32() { return set1(0.0f); }
// The first n lanes of p, the others `fill`; n in [0, 16].
FASTLLM_INLINE f32x16 load_first(const float* p, int64_t n, float fill) {
  if (n == 16) return load(p);
  alignas(64) float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
}
FASTLLM_INLINE void store_first(float* p, f32x16 x, int64_t n) {
  if (n == 16) return store(p, x);
  alignas(64) float lanes[16];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// f(i, n) for n values from i on: whole vectors, then what is left. Inlined, n is a constant 16 but for the
// last, and the loads and stores of the first n lanes need no masks.
template <typename F>
FASTLLM_INLINE void for_vectors(int64_t count, F f) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) f(i, 16);
  if (i < count) f(i, count - i);
}

#define FASTLLM_BINARY(name, type, native)                 \
  FASTLLM_INLINE type name(type a, type b) {               \
    type r;                                                \
    FASTLLM_EACH r.part[i] = native(a.part[i], b.part[i]); \
    return r;                                              \
  }
FASTLLM_BINARY(add, f32x16, v_add)
FASTLLM_BINARY(sub, f32x16, v_sub)
FASTLLM_BINARY(mul, f32x16, v_mul)
FASTLLM_BINARY(div, f32x16, v_div)
FASTLLM_BINARY(max, f32x16, v_max)
FASTLLM_BINARY(min, f32x16, v_min)
FASTLLM_BINARY(add, i32x16, vi_add)
FASTLLM_BINARY(sub, i32x16, vi_sub)
FASTLLM_BINARY(mul, i32x16, vi_mul)
FASTLLM_BINARY(bit_and, i32x16, vi_and)
FASTLLM_BINARY(bit_or, i32x16, vi_or)
FASTLLM_BINARY(bit_andnot, i32x16, vi_andnot)  // ~a & b
FASTLLM_BINARY(greater, i32x16, vi_gt)
FASTLLM_BINARY(equal, i32x16, vi_eq)
#undef FASTLLM_BINARY

FASTLLM_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  f32x16 r;
  FASTLLM_EACH r.part[i] = v_fma(a.part[i], b.part[i], c.part[i]);
  return r;
}
FASTLLM_INLINE f32x16 sqrt(f32x16 a) {
  f32x16 r;
  FASTLLM_EACH r.part[i] = v_sqrt(a.part[i]);
  return r;
}
// Lane i takes lane i ^ n; n is 1, 2, 4 or 8.
template <int n>
FASTLLM_INLINE f32x16 swap_lanes(f32x16 x) {
  f32x16 r;
  if constexpr (n >= kLanes) {
    FASTLLM_EACH r.part[i] = x.part[i ^ (n / kLanes)];
  } else {
    FASTLLM_EACH r.part[i] = v_swap<n>(x.part[i]);
  }
  return r;
}
FASTLLM_INLINE float reduce_add(f32x16 x) { return v_reduce_add(x.part); }
FASTLLM_INLINE float reduce_max(f32x16 x) { return v_reduce_max(x.part); }
// All ones in the lanes where a > b (false for NaN).
FASTLLM_INLINE i32x16 greater(f32x16 a, f32x16 b) {
  i32x16 r;
  FASTLLM_EACH r.part[i] = v_gt(a.part[i], b.part[i]);
  return r;
}
FASTLLM_INLINE f32x16 select(i32x16 mask, f32x16 a, f32x16 b) {
  f32x16 r;
  FASTLLM_EACH r.part[i] = v_select(mask.part[i], a.part[i], b.part[i]);
  return r;
}
// x where a > b, else y.
FASTLLM_INLINE f32x16 select_greater(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  f32x16 r;
  FASTLLM_EACH r.part[i] = v_select_gt(a.part[i], b.part[i], x.part[i], y.part[i]);
  return r;
}
FASTLLM_INLINE i32x16 bits(f32x16 x) {
  i32x16 r;
  FASTLLM_EACH r.part[i] = v_bits(x.part[i]);
  return r;
}
FASTLLM_INLINE f32x16 from_bits(i32x16 x) {
  f32x16 r;
  FASTLLM_EACH r.part[i] = v_from_bits(x.part[i]);
  return r;
}
FASTLLM_INLINE i32x16 round_to_int(f32x16 x) {
  i32x16 r;
  FASTLLM_EACH r.part[i] = v_round_to_int(x.part[i]);
  return r;
}
FASTLLM_INLINE f32x16 to_float(i32x16 x) {
  f32x16 r;
  FASTLLM_EACH r.part[i] = v_from_int(x.part[i]);
  return r;
}
FASTLLM_INLINE f32x16 load_f16(const uint16_t* p) {
  f32x16 r;
  FASTLLM_EACH r.part[i] = v_load_f16(p + i * kLanes);
  return r;
}
FASTLLM_INLINE void store_f16(uint16_t* p, f32x16 x) { FASTLLM_EACH v_store_f16(p + i * kLanes, x.part[i]); }
FASTLLM_INLINE f32x16 load_bf16(const uint16_t* p) {
  f32x16 r;
  FASTLLM_EACH r.part[i] = v_from_bits(vi_shl<16>(vi_load_u16(p + i * kLanes)));
  return r;
}
// To nearest even in integers, never the hardware's conversion; NaNs become quiet.
FASTLLM_INLINE void store_bf16(uint16_t* p, f32x16 x) {
  FASTLLM_EACH {
    const vi b = v_bits(x.part[i]);
    const vi odd = vi_and(vi_shr<16>(b), vi_set1(1));
    const vi rounded = vi_shr<16>(vi_add(b, vi_add(odd, vi_set1(0x7fff))));
    const vi nan = vi_gt(vi_and(b, vi_set1(0x7fffffff)), vi_set1(0x7f800000));
    const vi quiet = vi_or(vi_shr<16>(b), vi_set1(0x40));
    vi_store_u16(p + i * kLanes, vi_or(vi_and(nan, quiet), vi_andnot(nan, rounded)));
  }
}

// ---- i32x16 ---------------------------------------------------------------------------------------------
FASTLLM_INLINE i32x16 set1_i32(int x) {
  i32x16 r;
  FASTLLM_EACH r.part[i] = vi_set1(x);
  return r;
}
FASTLLM_INLINE i32x16 load_i32(const int32_t* p) {
  i32x16 r;
  FASTLLM_EACH r.part[i] = vi_load(p + i * kLanes);
  return r;
}
FASTLLM_INLINE void store_i32(int32_t* p, i32x16 x) { FASTLLM_EACH vi_store(p + i * kLanes, x.part[i]); }
FASTLLM_INLINE i32x16 load_s8(const int8_t* p) {
  i32x16 r;
  FASTLLM_EACH r.part[i] = vi_load_s8(p + i * kLanes);
  return r;
}
FASTLLM_INLINE i32x16 load_u8(const uint8_t* p) {
  i32x16 r;
  FASTLLM_EACH r.part[i] = vi_load_u8(p + i * kLanes);
  return r;
}
FASTLLM_INLINE int32_t reduce_add_small(i32x16 x) {  // of values whose sum is below 2^24
  return static_cast<int32_t>(reduce_add(to_float(x)));
}
FASTLLM_INLINE void store_s16(int16_t* p, i32x16 x) {  // values that fit
  FASTLLM_EACH vi_store_u16(reinterpret_cast<uint16_t*>(p) + i * kLanes, x.part[i]);
}
FASTLLM_INLINE void store_s8(int8_t* p, i32x16 x) { FASTLLM_EACH vi_store_s8(p + i * kLanes, x.part[i]); }
template <int n>
FASTLLM_INLINE i32x16 shift_left(i32x16 x) {
  i32x16 r;
  FASTLLM_EACH r.part[i] = vi_shl<n>(x.part[i]);
  return r;
}
template <int n>
FASTLLM_INLINE i32x16 shift_right_arithmetic(i32x16 x) {
  i32x16 r;
  FASTLLM_EACH r.part[i] = vi_sar<n>(x.part[i]);
  return r;
}

// ---- many groups at once ----------------------------------------------------------------------------------
// The maximum or the sum over each of 16 groups of 16 values, as lane g of one vector for group g. A quad is
// four groups in one native vector: dword j of each of its 128-bit blocks holds a part of group j's result.
// Four quads, folded over their blocks, are the 16 results. Two vectors become one with 2 shuffles and 1
// operation: 15 times for 16 groups, where each group on its own takes 4 of both.
FASTLLM_INLINE vi max_quad(const i32x16 (&x)[4]) {
  vi m[4];
  for (int j = 0; j < 4; ++j) {
    m[j] = x[j].part[0];
    for (int i = 1; i < kParts; ++i) m[j] = vi_max(m[j], x[j].part[i]);
  }
  return vi_quad(m, vi_max);
}
// Stores four groups of values in [-128, 127] as bytes and returns the quad of their sums.
FASTLLM_INLINE vi store_s8_sum_quad(int8_t* p, const i32x16 (&x)[4]) {
  vi parts[4 * kParts];
  for (int i = 0; i < 4 * kParts; ++i) parts[i] = x[i / kParts].part[i % kParts];
  return vi_store_s8_sum_quad(p, parts);
}
FASTLLM_INLINE i32x16 fold_quads(const vi (&quads)[4], vi (*op)(vi, vi)) {
  vi x[4] = {quads[0], quads[1], quads[2], quads[3]};
  for (int n = 4; n > kParts; n /= 2) {
    for (int i = 0; i < n / 2; ++i) {
      const vi a = x[2 * i], b = x[2 * i + 1];
      x[i] = op(vi_even_blocks(a, b), vi_odd_blocks(a, b));
    }
  }
  i32x16 r;
  FASTLLM_EACH r.part[i] = x[i];
  return r;
}

// ---- what is not a number ---------------------------------------------------------------------------------
FASTLLM_INLINE i32x16 magnitude(f32x16 x) { return bit_and(bits(x), set1_i32(0x7fffffff)); }
FASTLLM_INLINE i32x16 not_finite(f32x16 x) { return greater(magnitude(x), set1_i32(0x7f7fffff)); }
FASTLLM_INLINE bool any(i32x16 mask) {
  vi m = mask.part[0];
  for (int i = 1; i < kParts; ++i) m = vi_or(m, mask.part[i]);
  return vi_any(m);
}

// ---- bytes ----------------------------------------------------------------------------------------------
// n > 0: right, n < 0: left, in 16-bit units; the caller masks what crosses a byte.
template <int n>
FASTLLM_INLINE vb shift(vb x) {
  if constexpr (n == 0) {
    return x;
  } else if constexpr (n > 0) {
    return vb_shr<(n > 0 ? n : 0)>(x);
  } else {
    return vb_shl<(n < 0 ? -n : 0)>(x);
  }
}
// Four bytes, broadcast to every lane.
FASTLLM_INLINE vi broadcast_word(const void* p) { return vi_set1(load_word(p)); }

}  // namespace
}  // namespace fastllm
