// The two register tiles of attention, as small matrix products over one KV tile of 64 positions:
//   scores   s[r, t] = sum_d q[r, d] K[d, t]      ascending d, lanes are 16 positions of one run
//   outputs  o[r, d] (+)= sum_t p[r, t] V[t, d]   ascending t, lanes are 16 columns
// Every output is one chain of fp32 FMAs, whatever the number of rows R that share the loads of K and V.
//
// Vectors in registers: R x J accumulators of kParts native vectors, one line of K or V, one broadcast. With
// 32 zmm, R = 6 and J = 4; with 16 ymm (two make a vector) J falls from 4 to 1 as R grows. Instructions per
// (row, 16 positions, 1 column of q): 1 FMA (AVX-512), 2 FMAs (AVX2); the load (and conversion) of a line is
// shared by R rows, a broadcast by J lines.
#pragma once

#include "kernels/attention.h"
#include "kernels/simd/vec.h"

namespace fastllm {
namespace {

// Vectors side by side in a tile of R rows.
constexpr int tile_width(int rows) { return kParts == 1 ? 4 : rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

// 16 stored values, from the one at `index`, as fp32.
template <KvType T>
FASTLLM_INLINE f32x16 load_values(const void* base, int64_t index) {
  if constexpr (T == KvType::f32) {
    return load(static_cast<const float*>(base) + index);
  } else if constexpr (T == KvType::f16) {
    return load_f16(static_cast<const uint16_t*>(base) + index);
  } else {
    return load_bf16(static_cast<const uint16_t*>(base) + index);
  }
}

// acc[r][j] += factor(r) * line(j). With 32 registers the lines stay and the factors pass; with 16, a line at
// a time.
template <int R, int J, typename Line, typename Factor>
FASTLLM_INLINE void multiply_add(f32x16 (&acc)[R][J], Line line, Factor factor) {
  if constexpr (kParts == 1) {
    f32x16 lines[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) lines[j] = line(j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const f32x16 x = factor(r);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) acc[r][j] = fma(x, lines[j], acc[r][j]);
    }
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      const f32x16 y = line(j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][j] = fma(factor(r), y, acc[r][j]);
    }
  }
}

// To the second level: a tile of K and V and the next one would drive each other out of the first.
FASTLLM_INLINE void prefetch_to_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// One KV tile: where its four runs of 16 positions start, and which of its positions anyone sees.
struct Tile {
  const void* k[kRunsPerTile];       // as KvView's k; runs out of sight point at one in sight
  const void* v[kRunsPerTile];       // as KvView's v
  const char* next_k[kRunsPerTile];  // the tile that will be read next, to be asked for; integer caches only
  const char* next_v[kRunsPerTile];
  const float* k_scale[kRunsPerTile];  // (16), integer caches only
  const float* v_scale[kRunsPerTile];
  int first, last;  // of the tile's positions 0..63, inclusive
};

// s: (R, kKvTile). Runs out of sight get meaningless scores or none.
template <int R, KvType T>
void score_tile(const float* const* q, const Tile& tile, int64_t head_dim, float* s) {
  constexpr int J = tile_width(R);
  for (int run = tile.first / 16 / J * J; run <= tile.last / 16; run += J) {
    f32x16 acc[R][J];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) acc[r][j] = zero_f32();
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      multiply_add<R, J>(
          acc, [&](int j) __attribute__((always_inline)) { return load_values<T>(tile.k[run + j], d * 16); },
          [&](int r) __attribute__((always_inline)) { return set1(q[r][d]); });
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) store(s + r * kKvTile + (run + j) * 16, acc[r][j]);
    }
  }
}

// J vectors of outputs from column d, positions [begin, end) of the tile.
template <int R, int J, KvType T>
FASTLLM_INLINE void weigh_columns(const float* p, const Tile& tile, int begin, int end, int64_t head_dim,
                                  int64_t d, bool accumulate, float* o) {
  f32x16 acc[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) acc[r][j] = accumulate ? load(o + r * head_dim + d + 16 * j) : zero_f32();
  }
  for (int run = begin / 16; run * 16 < end; ++run) {
    const int from = begin > run * 16 ? begin : run * 16;
    const int to = end < run * 16 + 16 ? end : run * 16 + 16;
    const void* v = tile.v[run];
    for (int t = from; t < to; ++t) {
      const int64_t at = (t - run * 16) * head_dim + d;
      multiply_add<R, J>(
          acc, [&](int j) __attribute__((always_inline)) { return load_values<T>(v, at + 16 * j); },
          [&](int r) __attribute__((always_inline)) { return set1(p[r * kKvTile + t]); });
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) store(o + r * head_dim + d + 16 * j, acc[r][j]);
  }
}

// o: (R, head_dim), continued when `accumulate`; p: (R, kKvTile). Positions outside [begin, end) are not
// touched.
template <int R, KvType T>
void weigh_tile(const float* p, const Tile& tile, int begin, int end, int64_t head_dim, bool accumulate,
                float* o) {
  constexpr int J = tile_width(R);
  int64_t d = 0;
  for (; d + 16 * J <= head_dim; d += 16 * J)
    weigh_columns<R, J, T>(p, tile, begin, end, head_dim, d, accumulate, o);
  if constexpr (J == 4) {
    for (; d + 32 <= head_dim; d += 32)
      weigh_columns<R, 2, T>(p, tile, begin, end, head_dim, d, accumulate, o);
  }
  if constexpr (J > 1) {
    for (; d < head_dim; d += 16) weigh_columns<R, 1, T>(p, tile, begin, end, head_dim, d, accumulate, o);
  }
}

// The tiles of one storage type, by number of rows.
struct TileOps {
  void (*score[kAttentionTileRows])(const float* const* q, const Tile& tile, int64_t head_dim, float* s);
  void (*weigh[kAttentionTileRows])(const float* p, const Tile& tile, int begin, int end, int64_t head_dim,
                                    bool accumulate, float* o);
};

template <KvType T>
constexpr TileOps tile_ops() {
  return {{score_tile<1, T>, score_tile<2, T>, score_tile<3, T>, score_tile<4, T>, score_tile<5, T>,
           score_tile<6, T>},
          {weigh_tile<1, T>, weigh_tile<2, T>, weigh_tile<3, T>, weigh_tile<4, T>, weigh_tile<5, T>,
           weigh_tile<6, T>}};
}

// By KvType; the integer ones have their own (attention_codes.h).
constexpr TileOps kTileOps[] = {tile_ops<KvType::f32>(), tile_ops<KvType::f16>(), tile_ops<KvType::bf16>()};

}  // namespace
}  // namespace fastllm
