// Stores K and V rows into the paged cache, in its storage type.
//   f16, bf16  rounded to nearest even
//   i8         rotated (hadamard.h), then per token and head: scale = amax / 127,
//              code = round(x * (127 / amax)), IEEE divisions, ties to even. amax below 2^-120 (whose
//              inverse is not finite) gives codes 0; a NaN or infinity gives scale NaN and codes 0, so that
//              it stays visible.
// K is scattered with stride 16 (see KvView), V copied; of int8, K goes four bytes at a time and V is
// scattered with stride 4: head_dim narrow stores per token and head, once per token and layer.
#include "kernels/attention.h"
#include "kernels/attention_int8.h"
#include "kernels/simd/vec.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Where head h of a slot lies: K at k[d * 16], V at v[d].
template <typename V>
struct Place {
  V* k;
  V* v;
};

template <typename V>
Place<V> place(const KvView* kv, int64_t slot, int64_t h) {
  const int64_t block = slot / kv->block_size, offset = slot % kv->block_size;
  const int64_t head = block * kv->kv_heads + h;
  const int64_t at = head * kv->block_size + offset;
  const int64_t run = head * kv->block_size + offset / 16 * 16;
  return {static_cast<V*>(kv->k) + run * kv->head_dim + offset % 16,
          static_cast<V*>(kv->v) + at * kv->head_dim};
}

// store16(V* p, f32x16 x) writes 16 consecutive values in the storage type.
template <typename V, typename Store>
FASTLLM_INLINE void write_head(const float* k, const float* v, int64_t head_dim, const Place<V>& to,
                               Store store16) {
  for (int64_t d = 0; d < head_dim; d += 16) {
    alignas(64) V line[16];
    store16(line, load(k + d));
    for (int64_t i = 0; i < 16; ++i) to.k[(d + i) * 16] = line[i];
    store16(to.v + d, load(v + d));
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

void write_int8(const KvView* kv, const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t rows,
                const int32_t* slots) {
  const int64_t head_dim = kv->head_dim;
  alignas(16) uint8_t codes[16];
  alignas(64) float key[kHeadDimMax], value[kHeadDimMax];
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t block = slots[m] / kv->block_size, offset = slots[m] % kv->block_size;
    for (int64_t h = 0; h < kv->kv_heads; ++h) {
      const int64_t first = (block * kv->kv_heads + h) * kv->block_size;  // position of the block's head
      hadamard(k + m * ldk + h * head_dim, head_dim, key);
      hadamard(v + m * ldv + h * head_dim, head_dim, value);
      uint8_t* to_k = static_cast<uint8_t*>(kv->k) + (first + offset / 16 * 16) * head_dim + offset % 16 * 4;
      uint8_t* to_v = static_cast<uint8_t*>(kv->v) + (first + offset / 4 * 4) * head_dim + offset % 4;
      const Int8Scale ks = int8_scale(key, head_dim), vs = int8_scale(value, head_dim);
      kv->k_scale[first + offset] = ks.scale;
      kv->v_scale[first + offset] = vs.scale;
      for (int64_t d = 0; d < head_dim; d += 16) {
        // code + 128 as a byte: the sign bit flipped.
        store_s8(reinterpret_cast<int8_t*>(codes), int8_codes(load(key + d), ks.inverse));
        for (int i = 0; i < 16; ++i) codes[i] ^= 0x80;
        for (int i = 0; i < 4; ++i) __builtin_memcpy(to_k + (d / 4 + i) * 64, codes + 4 * i, 4);
        store_s8(reinterpret_cast<int8_t*>(codes), int8_codes(load(value + d), vs.inverse));
        for (int i = 0; i < 16; ++i) to_v[(d + i) * 4] = codes[i];
      }
    }
  }
}

}  // namespace

void kv_write(const KvView* kv, const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t rows,
              const int32_t* slots) {
  switch (kv->type) {
    case KvType::f32:
      return write_rows<float>(kv, k, ldk, v, ldv, rows, slots,
                               [](float* p, f32x16 x) __attribute__((always_inline)) { store(p, x); });
    case KvType::f16:
      return write_rows<uint16_t>(kv, k, ldk, v, ldv, rows, slots,
                                  [](uint16_t* p, f32x16 x)
                                      __attribute__((always_inline)) { store_f16(p, x); });
    case KvType::bf16:
      return write_rows<uint16_t>(kv, k, ldk, v, ldv, rows, slots,
                                  [](uint16_t* p, f32x16 x)
                                      __attribute__((always_inline)) { store_bf16(p, x); });
    case KvType::i8:
      return write_int8(kv, k, ldk, v, ldv, rows, slots);
  }
}

}  // namespace fastllm::FASTLLM_ISA
