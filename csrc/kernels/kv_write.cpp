// Stores K and V rows into the paged cache, in its storage type.
//   f16, bf16  rounded to nearest even
//   i16, i8    per token and head: scale = amax / one, code = round(x * (one / amax)), IEEE divisions, ties
//   to
//              even; one is 8191 in K and 4095 in V (i16), or 127, of heads rotated before (hadamard.h). amax
//              below 2^-110 (whose inverse might not be finite) gives codes 0; a NaN or infinity gives scale
//              NaN and codes 0, so that it stays visible.
// K is scattered with stride 16 (see KvView), V copied; of the integer types K goes a word of four bytes at a
// time, V a vector of words where the call has all positions of the word, and code by code where not.
#include "kernels/attention.h"
#include "kernels/attention_codes.h"
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
  const int64_t first = kv_block(kv, h, block) * kv->block_size;
  const int64_t at = first + offset, run = first + offset / 16 * 16;
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

// Rows of an integer cache: codes, and where they go.
template <typename KvCodes>
struct CodeWriter {
  using Code = typename KvCodes::Code;
  static constexpr int64_t kBytes = sizeof(Code), kWord = kPerWord<KvCodes>;
  const KvView* kv;

  // One head as it will be divided into codes.
  struct Head {
    const float* x;
    CodeScale by;
    alignas(64) float rotated[KvCodes::kRotated ? kHeadDimMax : 16];

    FASTLLM_INLINE void set(const float* from, int64_t head_dim, int one) {
      x = from;
      if constexpr (KvCodes::kRotated) {
        hadamard(from, head_dim, rotated);
        x = rotated;
      }
      by = code_scale(x, head_dim, one);
    }
  };

  int64_t first(int64_t slot, int64_t h) const {  // position of the block's head
    return kv_block(kv, h, slot / kv->block_size) * kv->block_size;
  }
  uint8_t* word_of_v(int64_t slot, int64_t h) const {
    const int64_t offset = slot % kv->block_size;
    return static_cast<uint8_t*>(kv->v) + (first(slot, h) + offset / kWord * kWord) * kv->head_dim * kBytes;
  }

  void write_k(const float* from, int64_t slot, int64_t h) const {
    const int64_t head_dim = kv->head_dim, offset = slot % kv->block_size, at = first(slot, h);
    Head key;
    key.set(from, head_dim, KvCodes::kKeyOne);
    kv->k_scale[at + offset] = key.by.scale;
    uint8_t* to =
        static_cast<uint8_t*>(kv->k) + (at + offset / 16 * 16) * head_dim * kBytes + offset % 16 * 4;
    for (int64_t d = 0; d < head_dim; d += 16) {
      alignas(64) Code codes[16];
      KvCodes::store_codes(codes, codes_of(load(key.x + d), key.by.inverse));
      for (int64_t i = 0; i < 16 / kWord; ++i) {
        uint32_t word;
        __builtin_memcpy(&word, codes + i * kWord, 4);
        word ^= KvCodes::kBias == 0 ? 0 : 0x80808080u;  // code + 128 as a byte: the sign bit flipped
        __builtin_memcpy(to + (d / kWord + i) * 64, &word, 4);
      }
    }
  }

  void write_v(const float* from, int64_t slot, int64_t h) const {
    Head value;
    value.set(from, kv->head_dim, KvCodes::kValueOne);
    kv->v_scale[first(slot, h) + slot % kv->block_size] = value.by.scale;
    uint8_t* to = word_of_v(slot, h) + slot % kWord * kBytes;
    for (int64_t d = 0; d < kv->head_dim; d += 16) {
      alignas(64) Code codes[16];
      KvCodes::store_codes(codes, codes_of(load(value.x + d), value.by.inverse));
      for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(to + (d + i) * 4, codes + i, kBytes);
    }
  }

  // Whole words: kWord rows from slot on, which begins one.
  void write_v_words(const float* from, int64_t ldv, int64_t slot, int64_t h) const {
    const int64_t at = first(slot, h) + slot % kv->block_size;
    Head values[kWord];
    for (int64_t i = 0; i < kWord; ++i) {
      values[i].set(from + i * ldv, kv->head_dim, KvCodes::kValueOne);
      kv->v_scale[at + i] = values[i].by.scale;
    }
    uint8_t* to = word_of_v(slot, h);
    for (int64_t d = 0; d < kv->head_dim; d += 16) {
      i32x16 word = set1_i32(0);
      for (int64_t i = kWord - 1; i >= 0; --i) {
        const i32x16 code = codes_of(load(values[i].x + d), values[i].by.inverse);
        word = bit_or(shift_left<8 * kBytes>(word), bit_and(code, set1_i32((1 << 8 * kBytes) - 1)));
      }
      store_i32(reinterpret_cast<int32_t*>(to + d * 4), word);
    }
  }
};

template <typename KvCodes>
void write_codes(const KvView* kv, const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t rows,
                 const int32_t* slots) {
  const CodeWriter<KvCodes> writer{kv};
  constexpr int64_t kWord = kPerWord<KvCodes>;
  for (int64_t m = 0, together = 1; m < rows; m += together) {
    together = slots[m] % kWord == 0 && m + kWord <= rows ? kWord : 1;
    for (int64_t i = 1; i < together; ++i) {
      if (slots[m + i] != slots[m] + i) together = 1;
    }
    for (int64_t h = 0; h < kv->kv_heads; ++h) {
      const int64_t at = h * kv->head_dim;
      for (int64_t i = 0; i < together; ++i) writer.write_k(k + (m + i) * ldk + at, slots[m + i], h);
      if (together > 1) {
        writer.write_v_words(v + m * ldv + at, ldv, slots[m], h);
      } else {
        writer.write_v(v + m * ldv + at, slots[m], h);
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
    case KvType::i16:
      return write_codes<Codes16>(kv, k, ldk, v, ldv, rows, slots);
    case KvType::i8:
      return write_codes<Codes8>(kv, k, ldk, v, ldv, rows, slots);
  }
}

}  // namespace fastllm::FASTLLM_ISA
