// Paged attention over one sequence and one KV head: the functions behind the kernel table, and the sizes and
// tile ranges that their callers need. What they compute stands in attention.cpp.
#pragma once

#include "kernels/kernels.h"

namespace fastllm {

constexpr int kAttentionTileRows = 6;    // rows (query x head) of one register tile
constexpr int kAttentionBlockRows = 96;  // rows that share one conversion of a KV tile to fp32
constexpr int kRunsPerTile = kKvTile / 16;

// These are static: an inline function would be emitted by every instruction set's object and merged by the
// linker.

// First position that query i sees.
static inline int64_t attention_first_position(const AttentionTask* task, int64_t i) {
  const int64_t first = static_cast<int64_t>(task->first_position) + i - task->window + 1;
  return task->window == 0 || first < 0 ? 0 : first;
}

// The tiles [begin, end) of the fold that at least one query of the task sees.
static inline int64_t attention_tile_begin(const AttentionTask* task) {
  return attention_first_position(task, 0) / kKvTile;
}
static inline int64_t attention_tile_end(const AttentionTask* task) {
  return (static_cast<int64_t>(task->first_position) + task->queries - 1) / kKvTile + 1;
}

// Floats of one record of attention_tiles: maximum, sum, output.
static inline int64_t attention_record_floats(int64_t head_dim) { return 2 + head_dim; }

// Floats of scratch that one call of attention or attention_tiles needs: weights and outputs of a register
// tile, a KV tile in fp32, codes of weights and of a block's queries, four words for each row of a block; 15
// for alignment. About 13,000 for head_dim 64.
static inline int64_t attention_scratch_floats(int64_t group, int64_t head_dim, int64_t queries) {
  const int64_t rows = group > kAttentionBlockRows ? group : kAttentionBlockRows;
  const int64_t used = group * queries < rows ? group * queries : rows;
  return kAttentionTileRows * (kKvTile + head_dim) + 2 * kKvTile * head_dim +
         kAttentionTileRows * kKvTile / 2 + used * head_dim / 2 + 4 * used + 15;
}

}  // namespace fastllm

#ifdef FASTLLM_ISA
namespace fastllm::FASTLLM_ISA {

void kv_write(const KvView* kv, const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t rows,
              const int32_t* slots);
void attention(const KvView* kv, const AttentionTask* task, float* scratch);
void attention_tiles(const KvView* kv, const AttentionTask* task, int64_t tile_begin, int64_t tile_end,
                     float* partials, float* scratch);
void attention_merge(const KvView* kv, const AttentionTask* task, int64_t tiles, int64_t tile_floats,
                     const float* partials);

}  // namespace fastllm::FASTLLM_ISA
#endif
