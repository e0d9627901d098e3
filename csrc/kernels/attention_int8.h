// Attention over one KV tile of an int8 cache, in integers:
//   scores   s[r, t] = sum_d qcode[r, d] kcode[t, d]                      exact
//   weights  w[t] = exp(x[t] - max x) vscale[t],  P[t] = round(w[t] * 16256 / max w)   in [0, 16256]
//   outputs  o[r, d] = (sum_t P[t] vcode[t, d]) * (max w / 16256)          the sum exact
//
// Numerics: heads of q, K and V are rotated (hadamard.h) before they become int8, with one scale each;
// outputs are rotated back at the end of the fold. Weights keep 14 bits: P = 128 hi + lo with hi, lo < 128,
// two products with the same line of V. 64 * 16256 * 128 < 2^31. The error of an output is at most 64 * 0.5 /
// 16256 of max w times 127. Hidden positions have P = 0, so that what stands in their slots has no influence.
// Integers are exact: any number of rows, any instruction set, the same bits.
//
// Cost on AVX-512 VNNI per (row, 16 positions): head_dim / 4 vpdpbusd for the scores, head_dim / 2 for the
// outputs (fp32: head_dim FMAs each), about 45 instructions for softmax and rounding. Lines of K and V are
// shared by R rows, a broadcast by 4 or 2 columns: 24 accumulators of 32 registers at R = 6.
#pragma once

#include "kernels/attention_tile.h"
#include "kernels/hadamard.h"
#include "kernels/simd/math.h"

namespace fastllm {
namespace {

constexpr int kWeightOne = 127 * 128;  // the code of a tile's greatest weight

// A query row, rotated (hadamard.h), in int8: H x ~ scale * q.
struct QueryCodes {
  int8_t* q;       // (rows, head_dim)
  float* scale;    // (rows): times the scale of the scores; NaN when the row holds a NaN or an infinity
  int32_t* start;  // (rows): what takes the bias of the stored K away
};

// amax / 127 and 127 / amax of n values (a multiple of 16). A row with a NaN or an infinity gives (NaN, 0);
// amax below 2^-120, whose inverse is not finite, gives (amax / 127, 0).
struct Int8Scale {
  float scale;
  float inverse;
};
FASTLLM_INLINE Int8Scale int8_scale(const float* x, int64_t n) {
  i32x16 broken = set1_i32(0);
  f32x16 top = zero_f32();
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load(x + i);
    broken = bit_or(broken, not_finite(v));
    top = max(from_bits(magnitude(v)), top);
  }
  if (any(broken)) return {__builtin_nanf(""), 0.0f};
  const float amax = reduce_max(top);
  return {amax / 127.0f, amax > 0x1p-120f ? 127.0f / amax : 0.0f};
}
// 16 codes. Without an inverse they are 0 even where x is not finite.
FASTLLM_INLINE i32x16 int8_codes(f32x16 x, float inverse) {
  return bit_and(round_to_int(mul(x, set1(inverse))), set1_i32(inverse > 0.0f ? -1 : 0));
}

FASTLLM_INLINE void quantize_query(const float* x, int64_t head_dim, float scale, int64_t row,
                                   const QueryCodes& out) {
  alignas(64) float q[kHeadDimMax];
  hadamard(x, head_dim, q);
  const Int8Scale by = int8_scale(q, head_dim);
  i32x16 sum = set1_i32(0);
  for (int64_t d = 0; d < head_dim; d += 16) {
    const i32x16 code = int8_codes(load(q + d), by.inverse);
    store_s8(out.q + row * head_dim + d, code);
    sum = add(sum, code);
  }
  out.scale[row] = by.scale * scale;
  out.start[row] = (kU8Bias - 128) * reduce_add_small(sum);
}

// Runs [run, run + J) of the tile's scores as integers, native part `part` of each.
template <int R, int J>
FASTLLM_INLINE void score_codes_part(const QueryCodes& query, int64_t row, const Tile& tile, int64_t head_dim,
                                     int run, int part, float* s) {
  vi acc[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) acc[r][j] = vi_set1(query.start[row + r]);
  }
  const int8_t* q = query.q + row * head_dim;
  for (int64_t d = 0; d < head_dim; d += 4) {
    vb line[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j)
      line[j] = vb_load(static_cast<const uint8_t*>(tile.k[run + j]) + d * 16 + part * kLineBytes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vi a = broadcast_quad(q + r * head_dim + d);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) acc[r][j] = dot_u8(acc[r][j], line[j], a);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j)
      v_store(s + r * kKvTile + (run + j) * 16 + part * kLanes, v_from_int(acc[r][j]));
  }
}

// s: (R, kKvTile). Runs out of sight get meaningless scores or none.
template <int R>
void score_codes(const QueryCodes& query, int64_t row, const Tile& tile, int64_t head_dim, float* s) {
  int run = tile.first / 16;
  const int end = tile.last / 16 + 1;
  if constexpr (kParts == 1) {
    if (end - run >= 3) {
      score_codes_part<R, 4>(query, row, tile, head_dim, 0, 0, s);
      return;
    }
  }
  for (; run < end; ++run) {
    for (int part = 0; part < kParts; ++part)
      score_codes_part<R, 1>(query, row, tile, head_dim, run, part, s);
  }
}

// C native columns of the outputs from column d on, over runs [begin, end).
template <int R, int C>
FASTLLM_INLINE void weigh_codes_part(const int8_t* high, const int8_t* low, const float* factor,
                                     const Tile& tile, int begin, int end, int64_t head_dim, int64_t d,
                                     float* o) {
  vi upper[R][C], lower[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) upper[r][c] = lower[r][c] = vi_set1(0);
  }
  for (int run = begin; run < end; ++run) {
    const uint8_t* v = static_cast<const uint8_t*>(tile.v[run]) + d * 4;
    for (int t = 0; t < 16; t += 4, v += head_dim * 4) {
      vb line[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) line[c] = vb_load(v + c * kLineBytes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vi h = broadcast_quad(high + r * kKvTile + run * 16 + t);
        const vi l = broadcast_quad(low + r * kKvTile + run * 16 + t);
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
          upper[r][c] = dot_u7(upper[r][c], h, line[c]);
          lower[r][c] = dot_u7(lower[r][c], l, line[c]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const vi sum = vi_add(vi_shl<7>(upper[r][c]), lower[r][c]);
      v_store(o + r * head_dim + d + c * kLanes, v_mul(v_from_int(sum), v_set1(factor[r])));
    }
  }
}

// o: (R, head_dim); high, low: (R, kKvTile) codes of the weights.
template <int R>
void weigh_codes(const int8_t* high, const int8_t* low, const float* factor, const Tile& tile, int begin,
                 int end, int64_t head_dim, float* o) {
  int64_t d = 0;
  if constexpr (kParts == 1) {
    for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes)
      weigh_codes_part<R, 2>(high, low, factor, tile, begin, end, head_dim, d, o);
  }
  for (; d < head_dim; d += kLanes)
    weigh_codes_part<R, 1>(high, low, factor, tile, begin, end, head_dim, d, o);
}

// By number of rows.
struct CodeOps {
  void (*score[kAttentionTileRows])(const QueryCodes& query, int64_t row, const Tile& tile, int64_t head_dim,
                                    float* s);
  void (*weigh[kAttentionTileRows])(const int8_t* high, const int8_t* low, const float* factor,
                                    const Tile& tile, int begin, int end, int64_t head_dim, float* o);
};

constexpr CodeOps kCodeOps = {
    {score_codes<1>, score_codes<2>, score_codes<3>, score_codes<4>, score_codes<5>, score_codes<6>},
    {weigh_codes<1>, weigh_codes<2>, weigh_codes<3>, weigh_codes<4>, weigh_codes<5>, weigh_codes<6>}};

}  // namespace
}  // namespace fastllm
