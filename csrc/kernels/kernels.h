// The one table of kernels that every instruction set exports, and the plain structs its functions take.
//
// Everything here is raw pointers and sizes: no allocation, no C++ standard containers, no Python. Shapes and
// ranges were checked by the caller (csrc/bindings/). Every function gives the same bits on every instruction
// set; see "One answer" in ARCHITECTURE.md for the rules that make it so.
//
// Letters: M rows of activations, N rows of a weight matrix (outputs), K its columns (inputs), kp = K rounded
// up to 32. A panel is 16 consecutive outputs.
#pragma once

#include <stdint.h>

namespace fastllm {

constexpr int kPanel = 16;            // outputs in a panel = lanes of f32x16
constexpr int kActivationGroup = 16;  // columns that share one activation scale
constexpr int kSuper = 256;           // columns that share one fp16 super-scale
constexpr int kHeadDimMax = 512;
constexpr int kKvTile = 64;  // positions in one tile of the attention fold, aligned at position 0

// How the codes of a quantized matrix, or the values of a floating-point one, lie in memory.
// Integer codes c in [0, 2^bits) stand for scale * (c - zero) + min, or scale * codebook[c] + min.
//   u4   codes: (panels, kp/8, 64): byte 4*n+j of line l holds, in its low nibble, column n's code for
//        k = 8*l + j, in its high nibble the one for k = 8*l + 4 + j (n < 16, j < 4).
//   u5   as u4, plus extra: (panels, kp/32, 64): bit q of byte 4*n+j of line l is bit 4 of the code for
//        k = 32*l + 4*q + j (q < 8).
//   u6   as u4, plus extra: (panels, kp/16, 64): bits 2q, 2q+1 of byte 4*n+j of line l are bits 4, 5 of the
//   code
//        for k = 16*l + 4*q + j (q < 4).
//   u8   codes: (panels, kp/4, 64): byte 4*n+j of line l is column n's code for k = 4*l + j. A signed byte w
//   is
//        stored as w + 128 with zero = 128.
//   f16, bf16, f32   codes: (panels, K, 16) values of that type.
enum class Codes : uint8_t { u4, u5, u6, u8, f16, bf16, f32 };

// A packed matrix as the kernels see it. Padding columns and padding outputs have scale 0 and min 0.
//   scales     fp16 (panels, ceil(kp/group), 16); with a super-scale (panels, ceil(K/256), 16)
//   subscales  int8 (panels, ceil(kp/group), 16), or null: then the scale of a group is scales alone, else
//              float(scales[.., k/256, n]) * float(subscales[.., k/group, n]), rounded to fp32
//   mins       fp16, shaped as scales, or null
//   submins    uint8, shaped as subscales, or null; likewise float(mins) * float(submins)
// A matrix with minimums has zero = 0.
struct PackedView {
  const uint8_t* codes;
  const uint8_t* extra;
  const uint16_t* scales;
  const int8_t* subscales;
  const uint16_t* mins;
  const uint8_t* submins;
  const int8_t* codebook;  // 16 entries, or null; only with u4; entries > -128
  int64_t rows;            // N
  int64_t cols;            // K
  int64_t kp;              // K rounded up to 32
  int32_t group;           // columns per scale: 16, 32, 64, 128, or kp (one per channel)
  int32_t zero;            // subtracted from a code before scaling; 0 with a codebook
  Codes kind;
};

// Quantized activations: x[m, k] ~ scale[m, k/16] * q[m, k]. A group that holds a NaN or an infinity has
// scale NaN and codes 0, so that it stays visible.
struct QuantizedRows {
  int8_t* q;      // (M, kp), in [-127, 127], 0 past K
  float* scale;   // (M, kp/16)
  int32_t* sums;  // (M, kp/16): minus the sum of q over the group
  float* fsums;   // (M, kp/16): scale * sum of q, what a minimum is multiplied by
  int64_t kp;

  // Inlined by force, as the function below is static: no instruction set's copy may stand in for another's.
  __attribute__((always_inline)) QuantizedRows from_row(int64_t m) const {
    const int64_t group = m * (kp / kActivationGroup);
    return {q + m * kp, scale + group, sums + group, fsums + group, kp};
  }
};

enum class KvType : uint8_t { f32, f16, bf16, i16, i8 };

static inline int64_t kv_value_bytes(KvType type) {
  return type == KvType::f32 ? 4 : type == KvType::i8 ? 1 : 2;
}
// Integers, with a scale per position and head.
static inline bool kv_has_scales(KvType type) { return type == KvType::i16 || type == KvType::i8; }

// One layer of the paged KV cache. A block holds block_size positions (a multiple of 16, at most 64). Of each
// kBlocksTogether blocks, a group, a head's stand together, see kv_block(): where a sequence has neighbouring
// blocks, reading one head of them is a stream of some pages. All layers' blocks of a group stand before
// those of the next, so that memory is taken as blocks are used.
//   k  (kv_block, block_size/16, head_dim, 16): position innermost, so that 16 scores are one vector
//   v  (kv_block, block_size, head_dim)
// The integer types have scales and words of four bytes for the integer dot products, two i16 or four i8
// codes (w of them) of neighbouring columns (k) or positions (v):
//   k  (kv_block, block_size/16, head_dim/w, 16, w); of i8 code + 128
//   v  (kv_block, block_size/w, head_dim, w)
//   k_scale, v_scale  fp32 (kv_block, block_size)
// A head is scale * codes, codes up to 8191 in k and 4095 in v; for i8 it is H (scale * codes), codes up to
// 127, H its Hadamard matrix (hadamard.h).
struct KvView {
  void* k;
  void* v;
  float* k_scale;
  float* v_scale;
  int64_t group_stride;  // from one group of blocks to the next, in blocks of one head
  int32_t kv_heads;
  int32_t head_dim;  // a multiple of 16 up to kHeadDimMax
  int32_t block_size;
  KvType type;
};

// Where block `block` of head `head` stands, in blocks of one head.
constexpr int64_t kBlocksTogether = 16;
static inline int64_t kv_block(const KvView* kv, int64_t head, int64_t block) {
  return block / kBlocksTogether * kv->group_stride + head * kBlocksTogether + block % kBlocksTogether;
}
// From one group to the next, where `planes` of K and V stand side by side.
static inline int64_t kv_group_stride(int64_t planes, int64_t kv_heads) {
  return planes * kv_heads * kBlocksTogether;
}

// Blocks of the KV cache that will be read soon: a kernel that has time to wait for memory asks for them, the
// blocks of each run from all planes, and moves on as it does.
struct BlockRun {
  int64_t first, count;  // as kv_block() counts
};
struct ReadAhead {
  const uint8_t* at;  // of the stretch that is being asked for
  const uint8_t* stop;
  const BlockRun* run;  // whose `plane` comes next
  const BlockRun* end;
  int plane;
  int plane_count;
  const uint8_t* planes[4];  // k, v and, of an integer cache, their scales
  int64_t block_bytes[4];    // of one block of one head
};

// What attention computes for a run of queries of one sequence that share a KV head.
//   q    (queries, q_stride): the heads of the group start at q + h * head_dim, h < group
//   out  likewise with out_stride; must not overlap q: it holds the state of the fold
//   Query i stands at position first_position + i and sees positions
//   [max(0, p - window + 1), p], or [0, p] when window is 0.
struct AttentionTask {
  const float* q;
  float* out;
  int64_t q_stride;  // floats between two queries
  int64_t out_stride;
  const int32_t* block_table;
  int32_t queries;
  int32_t group;  // query heads per KV head
  int32_t kv_head;
  int32_t first_position;
  int32_t window;
  float scale;    // of the scores, before the soft-cap
  float softcap;  // 0: none; else s -> softcap * tanh(s / softcap)
};

// Partial result of one tile for one query head: maximum, sum, output[head_dim]; see attention.cpp.
// attention_tiles writes (tile_end - tile_begin) * queries * group records of (2 + head_dim) floats each,
// ordered (tile, query, head); attention_merge folds them, ascending, into out, for all of the queries or a
// run of them: `partials` is their first record, `tile_floats` how far the next tile's is. attention does
// both without storing.

struct Kernels {
  const char* name;

  // q = round(x * 127 / amax) per row and group of 16; zero rows give scale 0. x: (rows, ldx).
  void (*quantize_rows)(const float* x, int64_t ldx, int64_t rows, int64_t k, const QuantizedRows* out);

  // y[m, n] (+)= sum_k w[n, k] x[m, k] for the panels [panel_begin, panel_end); y: (rows, ldy), column n at
  // y[n]. `scratch` holds at least matmul_scratch_bytes(w), 64-byte aligned. accumulate: add to what y holds.
  // `ahead`, or null: what is to be asked for meanwhile.
  void (*matmul_q)(const PackedView* w, const QuantizedRows* x, int64_t rows, int64_t panel_begin,
                   int64_t panel_end, float* y, int64_t ldy, int accumulate, void* scratch, ReadAhead* ahead);
  void (*matmul_f)(const PackedView* w, const float* x, int64_t ldx, int64_t rows, int64_t panel_begin,
                   int64_t panel_end, float* y, int64_t ldy, int accumulate);

  // y[m, r] = scale * sum_k a[r, k] x[m, k]. a: (rank, k); x: (rows, ldx); y: (rows, ldy).
  void (*low_rank)(const float* a, int64_t rank, const float* x, int64_t ldx, int64_t rows, int64_t k,
                   float scale, float* y, int64_t ldy);

  // out[k] = w[row, k], the row of an embedding table, exactly as the disk format decodes it.
  void (*unpack_row)(const PackedView* w, int64_t row, float* out);

  // y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
  void (*rms_norm)(const float* x, int64_t ldx, const float* weight, float eps, int64_t rows, int64_t dim,
                   float* y, int64_t ldy);
  // y = (x - mean) / sqrt(var + eps) * weight + bias; bias may be null; y may be x.
  void (*layer_norm)(const float* x, int64_t ldx, const float* weight, const float* bias, float eps,
                     int64_t rows, int64_t dim, float* y, int64_t ldy);
  // Rotates, in place, `heads` heads of head_dim in each row: pairs (i, i + rotary/2), i < rotary/2.
  // cos, sin: (rows, rotary/2). x: (rows, ldx).
  void (*rope)(float* x, int64_t ldx, int64_t rows, int64_t heads, int64_t head_dim, int64_t rotary,
               const float* cos, const float* sin);
  // y = act(gate) * up, elementwise; y may be gate.
  void (*silu_mul)(const float* gate, const float* up, float* y, int64_t n);
  void (*gelu_tanh_mul)(const float* gate, const float* up, float* y, int64_t n);
  void (*add)(const float* x, const float* y, float* out, int64_t n);  // out may be x
  void (*softcap)(float* x, float cap, int64_t n);                     // x = cap * tanh(x / cap)
  void (*exp)(const float* x, float* y, int64_t n);
  // y = H x for each row of n values, a multiple of 16; see hadamard.h. y may be x.
  void (*hadamard)(const float* x, int64_t rows, int64_t n, float* y);

  // Stores K and V rows (kv_heads * head_dim floats each, strides ldk, ldv) of `rows` tokens into slots
  // (block * block_size + offset).
  void (*kv_write)(const KvView* kv, const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t rows,
                   const int32_t* slots);
  void (*attention)(const KvView* kv, const AttentionTask* task, float* scratch);
  void (*attention_tiles)(const KvView* kv, const AttentionTask* task, int64_t tile_begin, int64_t tile_end,
                          float* partials, float* scratch);
  void (*attention_merge)(const KvView* kv, const AttentionTask* task, int64_t tiles, int64_t tile_floats,
                          const float* partials);

  // Sampler parts over one row of logits (n values).
  float (*max_value)(const float* x, int64_t n);
  double (*exp_sum)(const float* x, float max, int64_t n);  // sum of exp(x - max) in one fixed order
  int64_t (*argmax)(const float* x, int64_t n);             // the lowest index among equals; NaN never wins
};

constexpr int kMatmulRowsAtOnce = 192;  // rows that share one unpacking of a panel

// Bytes of scratch that one thread of matmul_q needs: a panel unpacked to bytes, its scales and mins in fp32,
// two words for each row and step of 16 columns.
static inline int64_t matmul_scratch_bytes(const PackedView* w) {
  const int64_t steps = w->kp / kActivationGroup;
  return w->kp * kPanel + 2 * steps * kPanel * 4 + kMatmulRowsAtOnce * steps * 8;
}

}  // namespace fastllm
