// Paged attention: out[i, h] = sum_t softmax_t(softcap(scale * q[i, h] . K[t])) V[t] over the positions t
// that query i sees.
//
// One query of one head is a fold over KV tiles of 64 positions, aligned at position 0. A tile gives
//   s[t] = softcap(scale * (sum_d q[d] K[d, t]) [* k_scale[t]])     m' = max_t s[t]
//   p[t] = exp(s[t] - m')    l' = sum_t p[t]    o'[d] = sum_t (p[t] [* v_scale[t]]) V[t, d]
// (an int16 or int8 cache: in integers, see attention_codes.h)
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
// (15 instructions) and about 10 for mask, maximum and sum; per (row, tile): 5 * head_dim / 16 for the merge
// (x 2 on AVX2).
#include "kernels/attention.h"

#include "kernels/attention_codes.h"
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
  float* weights;     // (kAttentionTileRows, kKvTile) scores, then p
  float* outputs;     // (kAttentionTileRows, head_dim) o'
  float* k_tile;      // (4 runs, head_dim, 16)
  float* v_tile;      // (4 runs, 16, head_dim)
  WeightCodes codes;  // of p, integer caches only
  QueryCodes query;   // the rows of a block
  float* maximums;    // (rows of a block) m
  float* sums;        // (rows of a block) l
};

Scratch divide_scratch(float* memory, int64_t head_dim, int64_t rows) {
  float* p = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  Scratch s;
  s.weights = p;
  s.outputs = s.weights + kAttentionTileRows * kKvTile;
  s.k_tile = s.outputs + kAttentionTileRows * head_dim;
  s.v_tile = s.k_tile + kKvTile * head_dim;
  s.codes.plane[0] = reinterpret_cast<uint8_t*>(s.v_tile + kKvTile * head_dim);
  s.codes.plane[1] = s.codes.plane[0] + kAttentionTileRows * kKvTile;  // int16 takes both
  s.query.q = s.codes.plane[1] + kAttentionTileRows * kKvTile;
  s.query.scale = reinterpret_cast<float*>(s.query.q + rows * head_dim * 2);
  s.query.start = reinterpret_cast<int32_t*>(s.query.scale + rows);
  s.maximums = reinterpret_cast<float*>(s.query.start + rows);
  s.sums = s.maximums + rows;
  return s;
}

// Which positions of tile `index` queries [begin, end) see together, and where they lie.
Tile find_tile(const KvView* kv, const AttentionTask* task, int64_t index, int64_t begin, int64_t end) {
  const int64_t start = index * kKvTile;
  Tile tile;
  tile.first = static_cast<int>(max_of(attention_first_position(task, begin) - start, 0));
  tile.last = static_cast<int>(min_of(task->first_position + end - 1 - start, kKvTile - 1));
  const int64_t bytes = kv_value_bytes(kv->type);
  const int64_t in_sight = tile.first / 16;
  for (int64_t run = 0; run < kRunsPerTile; ++run) {
    // Runs out of sight may have no block: point at one that has.
    const bool seen = run >= in_sight && run <= tile.last / 16;
    const int64_t position = start + 16 * (seen ? run : in_sight);
    const int64_t offset = position % kv->block_size;
    const int64_t block = kv_block(kv, task->kv_head, task->block_table[position / kv->block_size]);
    const int64_t slot = block * kv->block_size + offset;
    tile.k[run] = static_cast<const char*>(kv->k) + slot * kv->head_dim * bytes;
    tile.v[run] = static_cast<const char*>(kv->v) + slot * kv->head_dim * bytes;
    tile.k_scale[run] = kv_has_scales(kv->type) ? kv->k_scale + slot : nullptr;
    tile.v_scale[run] = kv_has_scales(kv->type) ? kv->v_scale + slot : nullptr;
    tile.next_k[run] = static_cast<const char*>(tile.k[run]);
    tile.next_v[run] = static_cast<const char*>(tile.v[run]);
  }
  return tile;
}

template <KvType T>
void convert(const void* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) store(to + i, load_values<T>(from, i));
}

// The places of tile `index`, whose K and V will be asked for while `tile` is computed.
void read_next(const KvView* kv, const AttentionTask* task, int64_t index, Tile* tile) {
  const Tile next = find_tile(kv, task, index, 0, task->queries);
  for (int run = 0; run < kRunsPerTile; ++run) {
    tile->next_k[run] = static_cast<const char*>(next.k[run]);
    tile->next_v[run] = static_cast<const char*>(next.v[run]);
  }
}

// Asks for all of it at once, for the floating-point caches.
void prefetch_tile(const KvView* kv, const AttentionTask* task, int64_t index) {
  const Tile tile = find_tile(kv, task, index, 0, task->queries);
  const int64_t bytes = 16 * kv->head_dim * kv_value_bytes(kv->type);
  for (int run = tile.first / 16; run <= tile.last / 16; ++run) {
    for (int64_t at = 0; at < bytes; at += 64) {
      prefetch_to_l2(static_cast<const char*>(tile.k[run]) + at);
      prefetch_to_l2(static_cast<const char*>(tile.v[run]) + at);
    }
  }
}

// The tile's runs in sight as fp32.
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

// What a row sees of a tile: positions [first, last].
struct Sight {
  int first, last;
  bool partial() const { return first > 0 || last < kKvTile - 1; }
  // All ones in the lanes of a run that are hidden.
  FASTLLM_INLINE i32x16 hidden(int run) const {
    const i32x16 t = add(load_i32(kLaneIndex), set1_i32(16 * run));
    return bit_or(greater(set1_i32(first), t), greater(t, set1_i32(last)));
  }
};

Sight sight_of(const AttentionTask* task, int64_t index, int64_t query) {
  const int64_t start = index * kKvTile;
  return {static_cast<int>(max_of(attention_first_position(task, query) - start, 0)),
          static_cast<int>(min_of(task->first_position + query - start, kKvTile - 1))};
}

// What the softmax of one row over one tile gives.
struct RowWeights {
  float maximum;  // m'
  float sum;      // l'
  float factor;   // codes only: what a code stands for
};

// Where the codes of a row's weights go: row `row` of `to`, for runs [begin, end), those that any row
// computed with it sees.
struct CodesOut {
  WeightCodes to;
  int row;
  int begin, end;
};

// Stands for a floating-point cache where code is shared with the integer ones.
struct NoCodes {
  static constexpr int kWeightOne = 1;
};

// The row sees something of runs [from, to), and nothing of others. Literal bounds keep everything in
// registers.
template <typename KvCodes>
FASTLLM_INLINE RowWeights weights_of_runs(const AttentionTask* task, const Tile& tile, const Sight& sight,
                                          float scale, int from, int to, float* s, const CodesOut& codes) {
  constexpr bool coded = !__is_same(KvCodes, NoCodes);
  const f32x16 factor = set1(scale), cap = set1(task->softcap);
  const bool partial = sight.partial();
  RowWeights out{};
  f32x16 x[kRunsPerTile];
  f32x16 top = set1(kLowest);
#pragma GCC unroll 4
  for (int run = from; run < to; ++run) {
    x[run] = load(s + 16 * run);
    if constexpr (coded) x[run] = mul(x[run], load(tile.k_scale[run]));
    x[run] = mul(x[run], factor);
    if (task->softcap != 0.0f) x[run] = mul(tanh(div(x[run], cap)), cap);
    if (partial) x[run] = select(sight.hidden(run), set1(-kInfinity), x[run]);
    top = max(top, x[run]);
  }
  out.maximum = reduce_max(top);
  const f32x16 center = set1(out.maximum);
  f32x16 total = zero_f32(), total_w = zero_f32();
  top = zero_f32();
#pragma GCC unroll 4
  for (int run = from; run < to; ++run) {
    x[run] = exp_negative(sub(x[run], center));
    total = add(total, x[run]);
    if constexpr (coded) {
      x[run] = mul(x[run], load(tile.v_scale[run]));
      if (partial) x[run] = select(sight.hidden(run), zero_f32(), x[run]);  // an unused scale may be NaN
      top = max(x[run], top);
      total_w = add(total_w, x[run]);
    } else {
      store(s + 16 * run, x[run]);
    }
  }
  out.sum = reduce_add(total);
  if constexpr (coded) {
    const float greatest = reduce_max(top), sum_w = reduce_add(total_w);
    const bool broken = sum_w != sum_w;  // the scale of a V that was not finite
    constexpr float kOne = static_cast<float>(KvCodes::kWeightOne);
    out.factor = broken ? sum_w : greatest / kOne;
    const float inverse = !broken && greatest > 0x1p-100f ? kOne / greatest : 0.0f;
    const i32x16 keep = set1_i32(inverse > 0.0f ? -1 : 0);
#pragma GCC unroll 4
    for (int run = from; run < to; ++run) {
      const i32x16 code = bit_and(round_to_int(mul(x[run], set1(inverse))), keep);
      store_weights<KvCodes>(codes.to, codes.row, run, code);
    }
  }
  return out;
}

// Raw scores of one row to weights: in place, or as codes.
template <typename KvCodes>
RowWeights softmax_row(const AttentionTask* task, const Tile& tile, const Sight& sight, float scale, float* s,
                       const CodesOut& codes) {
  const int from = sight.first / 16, to = sight.last / 16 + 1;
  if (from == 0 && to == kRunsPerTile)
    return weights_of_runs<KvCodes>(task, tile, sight, scale, 0, kRunsPerTile, s, codes);
  if constexpr (!__is_same(KvCodes, NoCodes)) {
    for (int run = codes.begin; run < codes.end; ++run)
      store_weights<KvCodes>(codes.to, codes.row, run, set1_i32(0));
  }
  return weights_of_runs<KvCodes>(task, tile, sight, scale, from, to, s, codes);
}

// A group of rows [row, row + count), count <= 6, all of which see something of a tile. Row r is head r %
// group of query r / group.
struct TileRows {
  int64_t row;
  int count;
  Sight sight[kAttentionTileRows];
};

TileRows tile_rows(const AttentionTask* task, int64_t index, int64_t row, int count) {
  TileRows rows;
  rows.row = row;
  rows.count = count;
  for (int r = 0; r < count; ++r) rows.sight[r] = sight_of(task, index, (row + r) / task->group);
  return rows;
}

// m', l' and o' over a floating-point cache. `values` are the same positions as the tile's, ready for `ops`.
void compute_rows(const KvView* kv, const AttentionTask* task, const TileRows& rows, const Tile& values,
                  const TileOps& ops, const Scratch& scratch, float* maximums, float* sums) {
  const int64_t head_dim = kv->head_dim;
  const int count = rows.count;
  const float* q[kAttentionTileRows] = {};
  for (int r = 0; r < count; ++r) {
    const int64_t row = rows.row + r;
    q[r] = task->q + row / task->group * task->q_stride + row % task->group * head_dim;
  }
  ops.score[count - 1](q, values, head_dim, scratch.weights);
  for (int r = 0; r < count; ++r) {
    float* s = scratch.weights + r * kKvTile;
    const RowWeights weights = softmax_row<NoCodes>(task, values, rows.sight[r], task->scale, s, {});
    maximums[r] = weights.maximum;
    sums[r] = weights.sum;
  }
  // Later rows see from later positions, and up to later ones. What all see is computed together; what only
  // some see, before and after it, row by row: the chain over t stays ascending and meets no hidden position.
  const Sight* sight = rows.sight;
  float* o = scratch.outputs;
  const int begin = sight[count - 1].first, end = sight[0].last + 1;
  if (begin == sight[0].first && end == sight[count - 1].last + 1) {
    ops.weigh[count - 1](scratch.weights, values, begin, end, head_dim, false, o);
    return;
  }
  for (int64_t i = 0; i < count * head_dim; i += 16) store(o + i, zero_f32());
  const bool together = begin < end;
  for (int r = 0; r < count; ++r) {
    const int stop = together ? begin : sight[r].last + 1;
    if (sight[r].first < stop)
      ops.weigh[0](scratch.weights + r * kKvTile, values, sight[r].first, stop, head_dim, true,
                   o + r * head_dim);
  }
  if (!together) return;
  ops.weigh[count - 1](scratch.weights, values, begin, end, head_dim, true, o);
  for (int r = 0; r < count; ++r) {
    if (end < sight[r].last + 1)
      ops.weigh[0](scratch.weights + r * kKvTile, values, end, sight[r].last + 1, head_dim, true,
                   o + r * head_dim);
  }
}

// The same over an integer cache; the block of rows whose codes stand in scratch begins at row `first_row`.
template <typename KvCodes>
void compute_rows_coded(const KvView* kv, const AttentionTask* task, const TileRows& rows, int64_t first_row,
                        const Tile& tile, const Scratch& scratch, float* maximums, float* sums) {
  const int count = rows.count;
  const int64_t at = rows.row - first_row;
  kCodeOps<KvCodes>.score[count - 1](scratch.query, at, tile, kv->head_dim, scratch.weights);
  const int begin = rows.sight[0].first / 16, end = rows.sight[count - 1].last / 16 + 1;
  float factors[kAttentionTileRows];
  for (int r = 0; r < count; ++r) {
    const CodesOut codes{scratch.codes, r, begin, end};
    const RowWeights weights = softmax_row<KvCodes>(task, tile, rows.sight[r], scratch.query.scale[at + r],
                                                    scratch.weights + r * kKvTile, codes);
    maximums[r] = weights.maximum;
    sums[r] = weights.sum;
    factors[r] = weights.factor;
  }
  kCodeOps<KvCodes>.weigh[count - 1](scratch.codes, factors, tile, begin, end, kv->head_dim, scratch.outputs);
}

// The codes of the queries of a block.
template <typename KvCodes>
void quantize_queries(const KvView* kv, const AttentionTask* task, int64_t begin, int64_t end,
                      const Scratch& scratch) {
  for (int64_t row = begin * task->group; row < end * task->group; ++row) {
    const float* q = task->q + row / task->group * task->q_stride + row % task->group * kv->head_dim;
    quantize_query<KvCodes>(q, kv->head_dim, task->scale, row - begin * task->group, scratch.query);
  }
}
void quantize_block(const KvView* kv, const AttentionTask* task, int64_t begin, int64_t end,
                    const Scratch& scratch) {
  if (kv->type == KvType::i16) quantize_queries<Codes16>(kv, task, begin, end, scratch);
  if (kv->type == KvType::i8) quantize_queries<Codes8>(kv, task, begin, end, scratch);
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
  store(factors, exp_negative(load(factors)));
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
FASTLLM_INLINE void compute_tile(const KvView* kv, const AttentionTask* task, int64_t index, int64_t next,
                                 int64_t begin, int64_t end, const Scratch& scratch, Sink sink) {
  const int64_t first_row = begin * task->group;
  queries_in_sight(task, index, &begin, &end);
  if (begin >= end) return;
  Tile tile = find_tile(kv, task, index, begin, end);
  if (next >= 0 && kv_has_scales(kv->type)) read_next(kv, task, next, &tile);
  const int64_t rows = (end - begin) * task->group;
  const TileOps* ops = kv_has_scales(kv->type) ? nullptr : &kTileOps[static_cast<int>(kv->type)];
  Tile values = tile;
  if (rows > 2 * kAttentionTileRows && (kv->type == KvType::f16 || kv->type == KvType::bf16)) {
    values = kv->type == KvType::f16 ? convert_tile<KvType::f16>(tile, kv->head_dim, scratch)
                                     : convert_tile<KvType::bf16>(tile, kv->head_dim, scratch);
    ops = &kTileOps[static_cast<int>(KvType::f32)];
  }
  const int64_t parts = (rows + kAttentionTileRows - 1) / kAttentionTileRows;  // of nearly equal size
  int64_t row = begin * task->group;
  for (int64_t part = 0; part < parts; ++part) {
    const int count = static_cast<int>(rows / parts + (part < rows % parts ? 1 : 0));
    const TileRows group = tile_rows(task, index, row, count);
    float maximums[kAttentionTileRows], sums[kAttentionTileRows];
    if (kv->type == KvType::i16) {
      compute_rows_coded<Codes16>(kv, task, group, first_row, tile, scratch, maximums, sums);
    } else if (kv->type == KvType::i8) {
      compute_rows_coded<Codes8>(kv, task, group, first_row, tile, scratch, maximums, sums);
    } else {
      compute_rows(kv, task, group, values, *ops, scratch, maximums, sums);
    }
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

void finish(const KvView* kv, float* o, float sum) {
  const f32x16 l = set1(sum);
  for (int64_t d = 0; d < kv->head_dim; d += 16) store(o + d, div(load(o + d), l));
  if (kv->type == KvType::i8) hadamard(o, kv->head_dim, o);
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
    quantize_block(kv, task, begin, end, scratch);
    for (int64_t r = 0; r < rows; ++r) {
      scratch.maximums[r] = -kInfinity;
      scratch.sums[r] = 0.0f;
      clear(output_of(task, head_dim, first_row + r), head_dim);
    }
    const int64_t tiles = (task->first_position + end - 1) / kKvTile + 1;
    for (int64_t index = attention_first_position(task, begin) / kKvTile; index < tiles; ++index) {
      const int64_t next = index + 1 < tiles ? index + 1 : -1;
      if (next >= 0 && !kv_has_scales(kv->type)) prefetch_tile(kv, task, next);
      compute_tile(kv, task, index, next, begin, end, scratch,
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
    for (int64_t r = 0; r < rows; ++r) finish(kv, output_of(task, head_dim, first_row + r), scratch.sums[r]);
  }
}

void attention_tiles(const KvView* kv, const AttentionTask* task, int64_t tile_begin, int64_t tile_end,
                     float* partials, float* scratch_memory) {
  const int64_t head_dim = kv->head_dim;
  const int64_t step = block_queries(task);
  const Scratch scratch = divide_scratch(scratch_memory, head_dim, step * task->group);
  const int64_t rows = static_cast<int64_t>(task->queries) * task->group;
  const int64_t record = attention_record_floats(head_dim);
  for (int64_t tile = 0; tile < tile_end - tile_begin; ++tile) {
    for (int64_t r = 0; r < rows; ++r)
      partials[(tile * rows + r) * record + 1] = 0.0f;  // sum 0: takes no part
  }
  for (int64_t begin = 0; begin < task->queries; begin += step) {
    const int64_t end = min_of(begin + step, task->queries);
    quantize_block(kv, task, begin, end, scratch);
    for (int64_t index = tile_begin; index < tile_end; ++index) {
      const int64_t next = index + 1 < tile_end ? index + 1 : -1;
      if (next >= 0 && !kv_has_scales(kv->type)) prefetch_tile(kv, task, next);
      float* records = partials + (index - tile_begin) * rows * record;
      compute_tile(kv, task, index, next, begin, end, scratch,
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

void attention_merge(const KvView* kv, const AttentionTask* task, int64_t tiles, int64_t tile_floats,
                     const float* partials) {
  const int64_t head_dim = kv->head_dim;
  const int64_t rows = static_cast<int64_t>(task->queries) * task->group;
  const int64_t record = attention_record_floats(head_dim);
  for (int64_t first = 0; first < rows; first += kAttentionTileRows) {
    const int count = static_cast<int>(min_of(rows - first, kAttentionTileRows));
    float maximums[kAttentionTileRows], sums[kAttentionTileRows];
    float* out[kAttentionTileRows];
    for (int r = 0; r < count; ++r) {
      maximums[r] = -kInfinity;
      sums[r] = 0.0f;
      out[r] = output_of(task, head_dim, first + r);
      clear(out[r], head_dim);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      float tile_maximums[kAttentionTileRows], tile_sums[kAttentionTileRows];
      const float* tile_out[kAttentionTileRows];
      for (int r = 0; r < count; ++r) {
        const float* from = partials + tile * tile_floats + (first + r) * record;
        tile_maximums[r] = from[0];
        tile_sums[r] = from[1];
        tile_out[r] = from + 2;
      }
      merge_rows(count, head_dim, tile_maximums, tile_sums, tile_out, maximums, sums, out);
    }
    for (int r = 0; r < count; ++r) finish(kv, out[r], sums[r]);
  }
}

}  // namespace fastllm::FASTLLM_ISA
