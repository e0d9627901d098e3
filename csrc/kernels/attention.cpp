// Paged attention: out[i, h] = sum_t softmax_t(softcap(scale * q[i, h] . K[t])) V[t] over the positions t
// that query i sees.
//
// One query of one head is a fold over KV tiles of 64 positions, aligned at position 0. A tile gives
//   s[t] = softcap(scale * (sum_d q[d] K[d, t]) [* k_scale[t]])     m' = max_t s[t]
//   p[t] = exp(s[t] - m')    l' = sum_t p[t]    o'[d] = sum_t (p[t] [* v_scale[t]]) V[t, d]
// over the positions in sight only, and is merged, tiles ascending, from m = -inf, l = 0, o = 0:
//   n = max(m, m')   a = exp(m - n)   b = exp(m' - n)   l = fma(l', b, l a)   o = fma(o', b, o a)   m = n
// The end is o / l. This is the only order of operations: prefill and decode, any number of queries or heads
// together and any cut of the tiles between attention_tiles and attention_merge give the same bits. Tiles
// that a query does not see take no part. Masked scores are replaced, and V rows out of sight are never
// multiplied, so that what stands in unused slots (NaN too) has no influence. A tile whose scores are all
// -inf has l' = 0 and takes no part.
//
// Sums: a score and an output are one FMA chain each; l' adds the runs lane by lane, then by vec.h's tree.
//
// The rows (query x head of the group) that see a tile are computed up to six at a time (attention_tile.h).
// When more than twelve share a tile, it is converted to fp32 once for all of them: the same values, so the
// same bits. Cost per (row, 16 positions): head_dim FMAs for the scores, head_dim for the outputs, one exp
// (18 instructions) and about 10 for mask, maximum and sum; per (row, tile): 5 * head_dim / 16 for the merge
// (x 2 on AVX2).
#include "kernels/attention.h"

#include "kernels/attention_tile.h"
#include "kernels/simd/math.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr float kLowest = -3.402823466e38f;
constexpr float kInfinity = __builtin_inff();

alignas(64) const int32_t kLaneIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct Scratch {
  float* weights;   // (kAttentionTileRows, kKvTile) scores, then p
  float* outputs;   // (kAttentionTileRows, head_dim) o'
  float* k_tile;    // (4 runs, head_dim, 16)
  float* v_tile;    // (4 runs, 16, head_dim)
  float* maximums;  // (rows of a block) m
  float* sums;      // (rows of a block) l
};

Scratch divide_scratch(float* memory, int64_t head_dim, int64_t rows) {
  float* p = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  Scratch s;
  s.weights = p;
  s.outputs = s.weights + kAttentionTileRows * kKvTile;
  s.k_tile = s.outputs + kAttentionTileRows * head_dim;
  s.v_tile = s.k_tile + kKvTile * head_dim;
  s.maximums = s.v_tile + kKvTile * head_dim;
  s.sums = s.maximums + rows;
  return s;
}

constexpr int64_t value_bytes(KvType type) { return type == KvType::f32 ? 4 : type == KvType::i8 ? 1 : 2; }

// Which positions of tile `index` queries [begin, end) see together, and where they lie.
Tile find_tile(const KvView* kv, const AttentionTask* task, int64_t index, int64_t begin, int64_t end) {
  const int64_t start = index * kKvTile;
  Tile tile;
  tile.first = static_cast<int>(max_of(attention_first_position(task, begin) - start, 0));
  tile.last = static_cast<int>(min_of(task->first_position + end - 1 - start, kKvTile - 1));
  const int64_t bytes = value_bytes(kv->type);
  const int64_t in_sight = tile.first / 16;
  for (int64_t run = 0; run < kRunsPerTile; ++run) {
    // Runs out of sight may have no block: point at one that has.
    const bool seen = run >= in_sight && run <= tile.last / 16;
    const int64_t position = start + 16 * (seen ? run : in_sight);
    const int64_t offset = position % kv->block_size;
    const int64_t head =
        static_cast<int64_t>(task->block_table[position / kv->block_size]) * kv->kv_heads + task->kv_head;
    const int64_t slot = head * kv->block_size + offset;
    tile.k[run] = static_cast<const char*>(kv->k) + slot * kv->head_dim * bytes;
    tile.v[run] = static_cast<const char*>(kv->v) + slot * kv->head_dim * bytes;
    tile.k_scale[run] = kv->type == KvType::i8 ? kv->k_scale + slot : nullptr;
    tile.v_scale[run] = kv->type == KvType::i8 ? kv->v_scale + slot : nullptr;
  }
  return tile;
}

template <KvType T>
void convert(const void* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) store(to + i, load_values<T>(from, i));
}

// The tile's runs in sight as fp32, int8 codes unscaled.
template <KvType T>
Tile convert_tile(const Tile& tile, int64_t head_dim, const Scratch& scratch) {
  Tile out = tile;
  const int begin = tile.first / 16, end = tile.last / 16 + 1;
  for (int run = begin; run < end; ++run) {
    float* k = scratch.k_tile + run * 16 * head_dim;
    float* v = scratch.v_tile + run * 16 * head_dim;
    convert<T>(tile.k[run], 16 * head_dim, k);
    convert<T>(tile.v[run], 16 * head_dim, v);
    out.k[run] = k;
    out.v[run] = v;
  }
  for (int run = 0; run < kRunsPerTile; ++run) {
    if (run < begin || run >= end) out.k[run] = out.v[run] = out.k[begin];
  }
  return out;
}

// Scores of one row to weights, in place; positions [first, last] are in sight. Returns m' and l'.
template <bool kScaled>
FASTLLM_INLINE void softmax_row(const AttentionTask* task, const Tile& tile, int first, int last, float* s,
                                float* maximum, float* sum) {
  const f32x16 scale = set1(task->scale);
  const f32x16 cap = set1(task->softcap);
  const bool partial = first > 0 || last < kKvTile - 1;
  const i32x16 below = set1_i32(first), above = set1_i32(last);
  f32x16 top = set1(kLowest);
  for (int run = first / 16; run <= last / 16; ++run) {
    f32x16 x = load(s + 16 * run);
    if constexpr (kScaled) x = mul(x, load(tile.k_scale[run]));
    x = mul(x, scale);
    if (task->softcap != 0.0f) x = mul(tanh(div(x, cap)), cap);
    if (partial) {
      const i32x16 t = add(load_i32(kLaneIndex), set1_i32(16 * run));
      const i32x16 hidden = bit_or(greater(below, t), greater(t, above));
      x = select(hidden, set1(-kInfinity), x);
    }
    store(s + 16 * run, x);
    top = max(top, x);
  }
  *maximum = reduce_max(top);
  const f32x16 center = set1(*maximum);
  f32x16 total = zero_f32();
  for (int run = first / 16; run <= last / 16; ++run) {
    f32x16 p = exp(sub(load(s + 16 * run), center));
    total = add(total, p);
    if constexpr (kScaled) p = mul(p, load(tile.v_scale[run]));
    store(s + 16 * run, p);
  }
  *sum = reduce_add(total);
}

// m', l' and o' of rows [row, row + count), count <= 6, all of which see something of the tile. Row r is head
// r % group of query r / group. `values` are the same positions as `tile`, ready for `ops`.
void compute_rows(const KvView* kv, const AttentionTask* task, int64_t index, int64_t row, int count,
                  const Tile& tile, const Tile& values, const TileOps& ops, const Scratch& scratch,
                  float* maximums, float* sums) {
  const int64_t head_dim = kv->head_dim;
  const float* q[kAttentionTileRows] = {};
  int first[kAttentionTileRows], last[kAttentionTileRows];
  for (int r = 0; r < count; ++r) {
    const int64_t query = (row + r) / task->group;
    q[r] = task->q + query * task->q_stride + (row + r) % task->group * head_dim;
    const int64_t start = index * kKvTile;
    first[r] = static_cast<int>(max_of(attention_first_position(task, query) - start, 0));
    last[r] = static_cast<int>(min_of(task->first_position + query - start, kKvTile - 1));
  }
  ops.score[count - 1](q, values, head_dim, scratch.weights);
  for (int r = 0; r < count; ++r) {
    float* s = scratch.weights + r * kKvTile;
    if (kv->type == KvType::i8) {
      softmax_row<true>(task, tile, first[r], last[r], s, maximums + r, sums + r);
    } else {
      softmax_row<false>(task, tile, first[r], last[r], s, maximums + r, sums + r);
    }
  }
  // Later rows see from later positions, and up to later ones. What all see is computed together; what only
  // some see, before and after it, row by row: the chain over t stays ascending and meets no hidden position.
  float* o = scratch.outputs;
  const int begin = first[count - 1], end = last[0] + 1;
  if (begin == first[0] && end == last[count - 1] + 1) {
    ops.weigh[count - 1](scratch.weights, values, begin, end, head_dim, false, o);
    return;
  }
  for (int64_t i = 0; i < count * head_dim; i += 16) store(o + i, zero_f32());
  const bool together = begin < end;
  for (int r = 0; r < count; ++r) {
    const int stop = together ? begin : last[r] + 1;
    if (first[r] < stop)
      ops.weigh[0](scratch.weights + r * kKvTile, values, first[r], stop, head_dim, true, o + r * head_dim);
  }
  if (!together) return;
  ops.weigh[count - 1](scratch.weights, values, begin, end, head_dim, true, o);
  for (int r = 0; r < count; ++r) {
    if (end < last[r] + 1)
      ops.weigh[0](scratch.weights + r * kKvTile, values, end, last[r] + 1, head_dim, true, o + r * head_dim);
  }
}

// One step of the fold: (m, l, o) of `count` <= 8 rows with what their tile gave.
FASTLLM_INLINE void merge_rows(int count, int64_t head_dim, const float* tile_maximums,
                               const float* tile_sums, const float* const* tile_outputs, float* maximums,
                               float* sums, float* const* outputs) {
  alignas(64) float factors[16] = {};  // the exponents of a in lanes 0-7, of b in lanes 8-15
  for (int r = 0; r < count; ++r) {
    if (tile_sums[r] == 0.0f) continue;
    const float top = maximums[r] > tile_maximums[r] ? maximums[r] : tile_maximums[r];
    factors[r] = maximums[r] - top;
    factors[8 + r] = tile_maximums[r] - top;
    maximums[r] = top;
  }
  store(factors, exp(load(factors)));
  for (int r = 0; r < count; ++r) {
    if (tile_sums[r] == 0.0f) continue;
    const f32x16 a = set1(factors[r]), b = set1(factors[8 + r]);
    alignas(64) float lanes[16];
    store(lanes, fma(set1(tile_sums[r]), b, mul(set1(sums[r]), a)));
    sums[r] = lanes[0];
    for (int64_t d = 0; d < head_dim; d += 16) {
      float* o = outputs[r] + d;
      store(o, fma(load(tile_outputs[r] + d), b, mul(load(o), a)));
    }
  }
}

// The queries of [begin, end) that see something of a tile: those at or after its start whose window reaches
// it.
void queries_in_sight(const AttentionTask* task, int64_t index, int64_t* begin, int64_t* end) {
  const int64_t start = index * kKvTile - task->first_position;
  *begin = max_of(*begin, start);
  if (task->window != 0) *end = min_of(*end, start + kKvTile - 1 + task->window);
}

// Calls sink(row, count, maximums, sums) for the rows of queries [begin, end) that see tile `index`; their o'
// stand in scratch.outputs.
template <typename Sink>
FASTLLM_INLINE void compute_tile(const KvView* kv, const AttentionTask* task, int64_t index, int64_t begin,
                                 int64_t end, const Scratch& scratch, Sink sink) {
  queries_in_sight(task, index, &begin, &end);
  if (begin >= end) return;
  const Tile tile = find_tile(kv, task, index, begin, end);
  const int64_t rows = (end - begin) * task->group;
  const TileOps* ops = &kTileOps[static_cast<int>(kv->type)];
  Tile values = tile;
  if (rows > 2 * kAttentionTileRows && kv->type != KvType::f32) {
    if (kv->type == KvType::f16) {
      values = convert_tile<KvType::f16>(tile, kv->head_dim, scratch);
    } else if (kv->type == KvType::bf16) {
      values = convert_tile<KvType::bf16>(tile, kv->head_dim, scratch);
    } else {
      values = convert_tile<KvType::i8>(tile, kv->head_dim, scratch);
    }
    ops = &kTileOps[static_cast<int>(KvType::f32)];
  }
  const int64_t parts = (rows + kAttentionTileRows - 1) / kAttentionTileRows;  // of nearly equal size
  int64_t row = begin * task->group;
  for (int64_t part = 0; part < parts; ++part) {
    const int count = static_cast<int>(rows / parts + (part < rows % parts ? 1 : 0));
    float maximums[kAttentionTileRows], sums[kAttentionTileRows];
    compute_rows(kv, task, index, row, count, tile, values, *ops, scratch, maximums, sums);
    sink(row, count, maximums, sums);
    row += count;
  }
}

int64_t block_queries(const AttentionTask* task) {
  return min_of(max_of(kAttentionBlockRows / task->group, 1), task->queries);
}

float* output_of(const AttentionTask* task, int64_t head_dim, int64_t row) {
  return task->out + row / task->group * task->out_stride + row % task->group * head_dim;
}

void clear(float* o, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += 16) store(o + d, zero_f32());
}

void finish(float* o, int64_t head_dim, float sum) {
  const f32x16 l = set1(sum);
  for (int64_t d = 0; d < head_dim; d += 16) store(o + d, div(load(o + d), l));
}

}  // namespace

void attention(const KvView* kv, const AttentionTask* task, float* scratch_memory) {
  const int64_t head_dim = kv->head_dim;
  const int64_t step = block_queries(task);
  const Scratch scratch = divide_scratch(scratch_memory, head_dim, step * task->group);
  for (int64_t begin = 0; begin < task->queries; begin += step) {
    const int64_t end = min_of(begin + step, task->queries);
    const int64_t first_row = begin * task->group;
    const int64_t rows = (end - begin) * task->group;
    for (int64_t r = 0; r < rows; ++r) {
      scratch.maximums[r] = -kInfinity;
      scratch.sums[r] = 0.0f;
      clear(output_of(task, head_dim, first_row + r), head_dim);
    }
    const int64_t tiles = (task->first_position + end - 1) / kKvTile + 1;
    for (int64_t index = attention_first_position(task, begin) / kKvTile; index < tiles; ++index) {
      compute_tile(kv, task, index, begin, end, scratch,
                   [&](int64_t row, int count, const float* maximums, const float* sums)
                       __attribute__((always_inline)) {
                         const float* from[kAttentionTileRows];
                         float* to[kAttentionTileRows];
                         for (int r = 0; r < count; ++r) {
                           from[r] = scratch.outputs + r * head_dim;
                           to[r] = output_of(task, head_dim, row + r);
                         }
                         const int64_t at = row - first_row;
                         merge_rows(count, head_dim, maximums, sums, from, scratch.maximums + at,
                                    scratch.sums + at, to);
                       });
    }
    for (int64_t r = 0; r < rows; ++r)
      finish(output_of(task, head_dim, first_row + r), head_dim, scratch.sums[r]);
  }
}

void attention_tiles(const KvView* kv, const AttentionTask* task, int64_t tile_begin, int64_t tile_end,
                     float* partials, float* scratch_memory) {
  const int64_t head_dim = kv->head_dim;
  const int64_t step = block_queries(task);
  const Scratch scratch = divide_scratch(scratch_memory, head_dim, step * task->group);
  const int64_t rows = static_cast<int64_t>(task->queries) * task->group;
  const int64_t record = attention_record_floats(head_dim);
  for (int64_t index = tile_begin; index < tile_end; ++index) {
    float* records = partials + (index - tile_begin) * rows * record;
    for (int64_t r = 0; r < rows; ++r) records[r * record + 1] = 0.0f;  // sum 0: takes no part
    for (int64_t begin = 0; begin < task->queries; begin += step) {
      compute_tile(kv, task, index, begin, min_of(begin + step, task->queries), scratch,
                   [&](int64_t row, int count, const float* maximums, const float* sums)
                       __attribute__((always_inline)) {
                         for (int r = 0; r < count; ++r) {
                           float* to = records + (row + r) * record;
                           to[0] = maximums[r];
                           to[1] = sums[r];
                           const float* o = scratch.outputs + r * head_dim;
                           for (int64_t d = 0; d < head_dim; d += 16) store(to + 2 + d, load(o + d));
                         }
                       });
    }
  }
}

void attention_merge(const KvView* kv, const AttentionTask* task, int64_t tiles, const float* partials) {
  const int64_t head_dim = kv->head_dim;
  const int64_t rows = static_cast<int64_t>(task->queries) * task->group;
  const int64_t record = attention_record_floats(head_dim);
  for (int64_t row = 0; row < rows; ++row) {
    float* o = output_of(task, head_dim, row);
    clear(o, head_dim);
    float maximum = -kInfinity, sum = 0.0f;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* from = partials + (tile * rows + row) * record;
      const float* tile_o = from + 2;
      merge_rows(1, head_dim, from, from + 1, &tile_o, &maximum, &sum, &o);
    }
    finish(o, head_dim, sum);
  }
}

}  // namespace fastllm::FASTLLM_ISA
