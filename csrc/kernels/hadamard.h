// y = H x, H the orthonormal Hadamard matrix of order S = the greatest power of two that divides n, block by
// block; n a multiple of 16. H is its own inverse.
//
// An int8 row has one scale, set by its greatest value. Heads of K have a few large columns: rotated, their
// weight lies on all columns, and the scale is that of the rest. Scores do not change, (H q) . (H k) = q . k,
// and outputs are rotated back once a query. On the default model this takes a quarter of the variance of the
// cache's error away (docs/benchmarks/log.md).
//
// Numerics: x / sqrt(S) first, then butterflies of distance 8, 4, 2, 1, 16, 32, ...: one rounding each, in an
// order that is the same on every instruction set. Cost per 16 values: 1 multiplication, 4 shuffles, 4 FMAs,
// log2(S / 16) additions.
#pragma once

#include "kernels/simd/vec.h"

namespace fastllm {
namespace {

alignas(64) constexpr float kButterflySign[4][16] = {
    {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
    {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
    {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
    {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
};

// y may be x.
FASTLLM_INLINE void hadamard(const float* x, int64_t n, float* y) {
  int64_t order = 16;
  while (n % (2 * order) == 0) order *= 2;
  const f32x16 norm = set1(1.0f / __builtin_sqrtf(static_cast<float>(order)));
  for (int64_t i = 0; i < n; i += 16) {
    f32x16 v = mul(load(x + i), norm);
    v = fma(v, load(kButterflySign[0]), swap_lanes<8>(v));
    v = fma(v, load(kButterflySign[1]), swap_lanes<4>(v));
    v = fma(v, load(kButterflySign[2]), swap_lanes<2>(v));
    v = fma(v, load(kButterflySign[3]), swap_lanes<1>(v));
    store(y + i, v);
  }
  for (int64_t distance = 16; distance < order; distance *= 2) {
    for (int64_t block = 0; block < n; block += 2 * distance) {
      for (int64_t i = block; i < block + distance; i += 16) {
        const f32x16 a = load(y + i), b = load(y + i + distance);
        store(y + i, add(a, b));
        store(y + i + distance, sub(a, b));
      }
    }
  }
}

}  // namespace
}  // namespace fastllm
