// Stores K and V rows into the paged cache, in its storage type.
//   f16, bf16  rounded to nearest even
//   i8         per token and head: scale = amax / 127, code = round(x * (127 / amax)), IEEE divisions, ties
//              to even. amax below 2^-120 (whose inverse is not finite) gives codes 0; a NaN or infinity
//              gives scale NaN and codes 0, so that it stays visible.
// V is copied; K is scattered with stride 16 (see KvView): head_dim narrow stores per token and head, once
// per token and layer.
#include "kernels/attention.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Where head h of a slot lies: K at k[d * 16], V at v[d].
template <typename V>
struct Place {
  V* k;
  V* v;
  int64_t scale;  // index into k_scale and v_scale
};

template <typename V>
Place<V> place(const KvView* kv, int64_t slot, int64_t h) {
  const int64_t block = slot / kv->block_size, offset = slot % kv->block_size;
  const int64_t head = block * kv->kv_heads + h;
  const int64_t at = head * kv->block_size + offset;
  const int64_t run = head * kv->block_size + offset / 16 * 16;
  return {static_cast<V*>(kv->k) + run * kv->head_dim + offset % 16,
          static_cast<V*>(kv->v) + at * kv->head_dim, at};
}

// store16(V* p, f32x16 x) writes 16 consecutive values in the storage type.
template <typename V, typename Store>
FASTLLM_INLINE void write_head(const float* k, const float* v, int64_t head_dim, const Place<V>& to,
                               Store store16) {
  for (int64_t d = 0; d < head_dim; d += 16) {
    alignas(64) V line[16];
    store16(line, load(k + d), 0);
    for (int64_t i = 0; i < 16; ++i) to.k[(d + i) * 16] = line[i];
    store16(to.v + d, load(v + d), 1);
  }
}

template <typename V, typename Store>
FASTLLM_INLINE void write_rows(const KvView* kv, const float* k, int64_t ldk, const float* v, int64_t ldv,
                               int64_t rows, const int32_t* slots, Store store16) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t h = 0; h < kv->kv_heads; ++h) {
      const Place<V> to = place<V>(kv, slots[m], h);
      write_head<V>(k + m * ldk + h * kv->head_dim, v + m * ldv + h * kv->head_dim, kv->head_dim, to,
                    store16);
    }
  }
}

struct Int8Scale {
  float scale;
  float inverse;
};

Int8Scale int8_scale(const float* x, int64_t n) {
  const i32x16 magnitude = set1_i32(0x7fffffff), largest_finite = set1_i32(0x7f7fffff);
  i32x16 broken = set1_i32(0);
  f32x16 top = zero_f32();
  for (int64_t i = 0; i < n; i += 16) {
    const i32x16 a = bit_and(bits(load(x + i)), magnitude);
    broken = bit_or(broken, greater(a, largest_finite));
    top = max(from_bits(a), top);
  }
  if (reduce_max(from_bits(bit_and(broken, bits(set1(1.0f))))) > 0.0f) return {__builtin_nanf(""), 0.0f};
  const float amax = reduce_max(top);
  return {amax / 127.0f, amax > 0x1p-120f ? 127.0f / amax : 0.0f};
}

void write_int8(const KvView* kv, const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t rows,
                const int32_t* slots) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t h = 0; h < kv->kv_heads; ++h) {
      const Place<int8_t> to = place<int8_t>(kv, slots[m], h);
      const float* key = k + m * ldk + h * kv->head_dim;
      const float* value = v + m * ldv + h * kv->head_dim;
      const Int8Scale ks = int8_scale(key, kv->head_dim), vs = int8_scale(value, kv->head_dim);
      kv->k_scale[to.scale] = ks.scale;
      kv->v_scale[to.scale] = vs.scale;
      const f32x16 inverse[2] = {set1(ks.inverse), set1(vs.inverse)};
      // Without an inverse the code is 0 even where x is not finite.
      const i32x16 keep[2] = {set1_i32(ks.inverse > 0.0f ? -1 : 0), set1_i32(vs.inverse > 0.0f ? -1 : 0)};
      write_head<int8_t>(key, value, kv->head_dim, to,
                         [&](int8_t* p, f32x16 x, int which) __attribute__((always_inline)) {
                           store_s8(p, bit_and(round_to_int(mul(x, inverse[which])), keep[which]));
                         });
    }
  }
}

}  // namespace

void kv_write(const KvView* kv, const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t rows,
              const int32_t* slots) {
  switch (kv->type) {
    case KvType::f32:
      return write_rows<float>(kv, k, ldk, v, ldv, rows, slots,
                               [](float* p, f32x16 x, int) __attribute__((always_inline)) { store(p, x); });
    case KvType::f16:
      return write_rows<uint16_t>(kv, k, ldk, v, ldv, rows, slots,
                                  [](uint16_t* p, f32x16 x, int)
                                      __attribute__((always_inline)) { store_f16(p, x); });
    case KvType::bf16:
      return write_rows<uint16_t>(kv, k, ldk, v, ldv, rows, slots,
                                  [](uint16_t* p, f32x16 x, int)
                                      __attribute__((always_inline)) { store_bf16(p, x); });
    case KvType::i8:
      return write_int8(kv, k, ldk, v, ldv, rows, slots);
  }
}

}  // namespace fastllm::FASTLLM_ISA
