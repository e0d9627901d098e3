// Attention over one KV tile of an integer cache, int16 or int8:
//   scores   s[r, t] = sum_d qcode[r, d] kcode[t, d]                   an exact int32 per 64 (int8: all)
//   columns weights  w[t] = exp(x[t] - max x) vscale[t],  P[t] = round(w[t] * W / max w)     in [0, W]
//   outputs  o[r, d] = (sum_t P[t] vcode[t, d]) * (max w / W)          the sum exact
//
// Greatest codes, one scale per row, or per position and head; no int32 can overflow over 64 positions or
// columns:
//         q      K      V      P
//   int16 4095   8191   4095   8191         8191 * 4095 * 64 < 2^31
//   int8  127    127    127    127 * 128    heads rotated before they become int8 (hadamard.h), outputs back
//                                           at the end of the fold; P = 128 hi + lo, hi and lo < 128, two
//                                           products with the same line of V: 64 * 16256 * 128 < 2^31
// The error of an output is at most 64 * 0.5 / W of max w times the greatest V. Hidden positions have P = 0,
// so that what stands in their slots has no influence. Integers are exact: any number of rows, any
// instruction set, the same bits. More than 64 columns of int16 are added in fp32, ascending.
//
// Both types share the layout's words of four bytes (KvView), and every loop over them: two int16 or four
// int8 codes of one position (K) or of one column (V).
//
// Cost on AVX-512 VNNI per (row, 16 positions): head_dim / 2 vpdpwssd for scores and outputs each (int8:
// head_dim / 4 and head_dim / 2 vpdpbusd; fp32: head_dim FMAs each), about 45 instructions for softmax and
// rounding. Lines of K and V are shared by R rows, a broadcast by 4 (int8's outputs: 2) columns: 24
// accumulators of 32 registers at R = 6.
#pragma once

#include "kernels/attention_tile.h"
#include "kernels/hadamard.h"
#include "kernels/simd/math.h"

namespace fastllm {
namespace {

struct Codes16 {
  using Code = int16_t;
  static constexpr int kQueryOne = 4095, kKeyOne = 8191, kValueOne = 4095, kWeightOne = 8191;
  static constexpr int64_t kColumnsAtOnce = 64;  // of exact int32 scores
  static constexpr bool kRotated = false;
  static constexpr int kBias = 0;          // of the stored K
  static constexpr int kWeightPlanes = 1;  // products per line of V
  static constexpr int kWideOutputs = 4;   // columns of a register tile with 32 registers

  FASTLLM_INLINE static vi dot_key(vi acc, vb key, vi q) { return dot_s16(acc, key, q); }
  FASTLLM_INLINE static vi dot_value(vi acc, vi p, vb value) { return dot_s16(acc, value, p); }
  FASTLLM_INLINE static void store_codes(int16_t* p, i32x16 x) { store_s16(p, x); }
};

struct Codes8 {
  using Code = int8_t;
  static constexpr int kQueryOne = 127, kKeyOne = 127, kValueOne = 127, kWeightOne = 127 * 128;
  static constexpr int64_t kColumnsAtOnce = kHeadDimMax;
  static constexpr bool kRotated = true;
  static constexpr int kBias = 128;
  static constexpr int kWeightPlanes = 2;
  static constexpr int kWideOutputs = 2;

  FASTLLM_INLINE static vi dot_key(vi acc, vb key, vi q) { return dot_u8(acc, key, q); }
  FASTLLM_INLINE static vi dot_value(vi acc, vi p, vb value) { return dot_u7(acc, p, value); }
  FASTLLM_INLINE static void store_codes(int8_t* p, i32x16 x) { store_s8(p, x); }
};

// Codes of one type in a word.
template <typename KvCodes>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(typename KvCodes::Code));

// ---- values to codes -------------------------------------------------------------------------------------

// amax / one and one / amax of n values (a multiple of 16). A row with a NaN or an infinity gives (NaN, 0);
// amax below 2^-110, whose inverse might not be finite, gives (amax / one, 0).
struct CodeScale {
  float scale;
  float inverse;
};
FASTLLM_INLINE CodeScale code_scale(const float* x, int64_t n, int one) {
  i32x16 broken = set1_i32(0);
  f32x16 top = zero_f32();
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load(x + i);
    broken = bit_or(broken, not_finite(v));
    top = max(from_bits(magnitude(v)), top);
  }
  if (any(broken)) return {__builtin_nanf(""), 0.0f};
  const float amax = reduce_max(top), most = static_cast<float>(one);
  return {amax / most, amax > 0x1p-110f ? most / amax : 0.0f};
}
// 16 codes. Without an inverse they are 0 even where x is not finite.
FASTLLM_INLINE i32x16 codes_of(f32x16 x, float inverse) {
  return bit_and(round_to_int(mul(x, set1(inverse))), set1_i32(inverse > 0.0f ? -1 : 0));
}

// Query rows as codes, rotated where the cache is: x ~ scale * code.
struct QueryCodes {
  uint8_t* q;      // (rows, head_dim) codes
  float* scale;    // (rows): times the scale of the scores; NaN when the row holds a NaN or an infinity
  int32_t* start;  // (rows): what takes the bias of the stored K away
};

template <typename KvCodes>
FASTLLM_INLINE void quantize_query(const float* x, int64_t head_dim, float scale, int64_t row,
                                   const QueryCodes& out) {
  alignas(64) float rotated[kHeadDimMax];
  if constexpr (KvCodes::kRotated) {
    hadamard(x, head_dim, rotated);
    x = rotated;
  }
  const CodeScale by = code_scale(x, head_dim, KvCodes::kQueryOne);
  auto* q = reinterpret_cast<typename KvCodes::Code*>(out.q) + row * head_dim;
  i32x16 sum = set1_i32(0);
  for (int64_t d = 0; d < head_dim; d += 16) {
    const i32x16 code = codes_of(load(x + d), by.inverse);
    KvCodes::store_codes(q + d, code);
    sum = add(sum, code);
  }
  out.scale[row] = by.scale * scale;
  out.start[row] = KvCodes::kBias == 0 ? 0 : (kU8Bias - KvCodes::kBias) * reduce_add_small(sum);
}

// Where the codes of the weights of up to kAttentionTileRows rows stand: planes of (rows, kKvTile), P in one
// plane of int16, or hi and lo in two of int8.
struct WeightCodes {
  uint8_t* plane[2];
};

// Codes of 16 weights, for positions 16 * run to + 15 of row r.
template <typename KvCodes>
FASTLLM_INLINE void store_weights(const WeightCodes& to, int r, int run, i32x16 code) {
  const int at = r * kKvTile + run * 16;
  if constexpr (KvCodes::kWeightPlanes == 1) {
    KvCodes::store_codes(reinterpret_cast<typename KvCodes::Code*>(to.plane[0]) + at, code);
  } else {
    KvCodes::store_codes(reinterpret_cast<typename KvCodes::Code*>(to.plane[0]) + at,
                         shift_right_arithmetic<7>(code));
    KvCodes::store_codes(reinterpret_cast<typename KvCodes::Code*>(to.plane[1]) + at,
                         bit_and(code, set1_i32(127)));
  }
}

// ---- scores ----------------------------------------------------------------------------------------------

// Runs [run, run + J) of the tile's scores, native part `part` of each.
template <typename KvCodes, int R, int J>
FASTLLM_INLINE void score_part(const QueryCodes& query, int64_t row, const Tile& tile, int64_t head_dim,
                               int run, int part, float* s) {
  constexpr int64_t kBytes = sizeof(typename KvCodes::Code);
  const int64_t row_bytes = head_dim * kBytes;
  const uint8_t* q = query.q + row * row_bytes;
  for (int64_t from = 0; from < row_bytes; from += KvCodes::kColumnsAtOnce * kBytes) {
    const int64_t left = row_bytes - from, most = KvCodes::kColumnsAtOnce * kBytes;
    const int64_t end = from + (left < most ? left : most);
    vi acc[R][J];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) acc[r][j] = vi_set1(KvCodes::kBias == 0 ? 0 : query.start[row + r]);
    }
    for (int64_t at = from; at < end; at += 4) {
      vb line[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        line[j] = vb_load(static_cast<const uint8_t*>(tile.k[run + j]) + at * 16 + part * kLineBytes);
        prefetch_to_l2(tile.next_k[run + j] + at * 16);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vi a = broadcast_word(q + r * row_bytes + at);
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) acc[r][j] = KvCodes::dot_key(acc[r][j], line[j], a);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        float* to = s + r * kKvTile + (run + j) * 16 + part * kLanes;
        vf sum = v_from_int(acc[r][j]);
        if (from > 0) sum = v_add(v_load(to), sum);
        v_store(to, sum);
      }
    }
  }
}

// s: (R, kKvTile). Runs out of sight get meaningless scores or none.
template <typename KvCodes, int R>
void score_codes(const QueryCodes& query, int64_t row, const Tile& tile, int64_t head_dim, float* s) {
  int run = tile.first / 16;
  const int end = tile.last / 16 + 1;
  if constexpr (kParts == 1) {
    if (end - run >= 3) {
      score_part<KvCodes, R, 4>(query, row, tile, head_dim, 0, 0, s);
      return;
    }
  }
  for (; run < end; ++run) {
    for (int part = 0; part < kParts; ++part)
      score_part<KvCodes, R, 1>(query, row, tile, head_dim, run, part, s);
  }
}

// ---- outputs ---------------------------------------------------------------------------------------------

// C native columns of the outputs from column d on, over runs [begin, end).
template <typename KvCodes, int R, int C>
FASTLLM_INLINE void weigh_part(const WeightCodes& weights, const float* factor, const Tile& tile, int begin,
                               int end, int64_t head_dim, int64_t d, float* o) {
  constexpr int kPlanes = KvCodes::kWeightPlanes;
  constexpr int64_t kBytes = sizeof(typename KvCodes::Code);
  vi acc[kPlanes][R][C];
#pragma GCC unroll 2
  for (int p = 0; p < kPlanes; ++p) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[p][r][c] = vi_set1(0);
    }
  }
  for (int run = begin; run < end; ++run) {
    const uint8_t* v = static_cast<const uint8_t*>(tile.v[run]) + d * 4;
    const char* next = tile.next_v[run] + d * 4;
    for (int64_t at = run * 16 * kBytes; at < (run + 1) * 16 * kBytes;
         at += 4, v += head_dim * 4, next += head_dim * 4) {
      vb line[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        line[c] = vb_load(v + c * kLineBytes);
        prefetch_to_l2(next + c * kLineBytes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int p = 0; p < kPlanes; ++p) {
          const vi w = broadcast_word(weights.plane[p] + r * kKvTile * kBytes + at);
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) acc[p][r][c] = KvCodes::dot_value(acc[p][r][c], w, line[c]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      vi sum = acc[0][r][c];
      if constexpr (kPlanes == 2) sum = vi_add(vi_shl<7>(sum), acc[1][r][c]);
      v_store(o + r * head_dim + d + c * kLanes, v_mul(v_from_int(sum), v_set1(factor[r])));
    }
  }
}

// o: (R, head_dim).
template <typename KvCodes, int R>
void weigh_codes(const WeightCodes& weights, const float* factor, const Tile& tile, int begin, int end,
                 int64_t head_dim, float* o) {
  int64_t d = 0;
  if constexpr (kParts == 1) {
    constexpr int kWide = KvCodes::kWideOutputs;
    for (; d + kWide * kLanes <= head_dim; d += kWide * kLanes)
      weigh_part<KvCodes, R, kWide>(weights, factor, tile, begin, end, head_dim, d, o);
  }
  for (; d < head_dim; d += kLanes)
    weigh_part<KvCodes, R, 1>(weights, factor, tile, begin, end, head_dim, d, o);
}

// By number of rows.
struct CodeOps {
  void (*score[kAttentionTileRows])(const QueryCodes& query, int64_t row, const Tile& tile, int64_t head_dim,
                                    float* s);
  void (*weigh[kAttentionTileRows])(const WeightCodes& weights, const float* factor, const Tile& tile,
                                    int begin, int end, int64_t head_dim, float* o);
};

template <typename C>
constexpr CodeOps kCodeOps = {{score_codes<C, 1>, score_codes<C, 2>, score_codes<C, 3>, score_codes<C, 4>,
                               score_codes<C, 5>, score_codes<C, 6>},
                              {weigh_codes<C, 1>, weigh_codes<C, 2>, weigh_codes<C, 3>, weigh_codes<C, 4>,
                               weigh_codes<C, 5>, weigh_codes<C, 6>}};

}  // namespace
}  // namespace fastllm
