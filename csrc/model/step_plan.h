// Who computes what in a step: parts of the batch, attention's items, and what is read ahead of the cache.
//
// A large batch is cut into parts of whole sequences, and the threads among them. Parts share the weights and
// nothing else: their threads walk through the layers without ever waiting for each other, and what a thread
// wrote stays in its cache. A small batch, one that does not divide evenly, or one in which a sequence reads
// what another writes, is one part of all threads, whose products are cut by outputs instead. No result
// depends on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "model/batch.h"

namespace fastllm {

constexpr std::int64_t kRowsAtOnce = 32;  // rows of logits in memory at a time, of all parts

// A run of queries of one sequence and KV head, and the tiles of the cache that one thread folds.
struct AttentionItem {
  std::int32_t sequence, kv_head, query_begin, queries;
  std::int64_t tile_begin, tile_end;
  float* partials;  // null: fold at once
};
// What the threads have folded of `queries` neighbouring ones: the first one's record of each tile.
struct AttentionMerge {
  std::int32_t sequence, kv_head, query, queries;
  std::int64_t tiles, tile_floats;
  const float* partials;
};

// [begin, end)
struct Range {
  std::int64_t begin = 0, end = 0;
  std::int64_t size() const { return end - begin; }
};

// Tokens of neighbouring sequences that have one adapter.
struct AdapterRun {
  std::int32_t adapter;
  Range tokens;
};

// Some of the batch's sequences, and the threads that compute them.
struct Part {
  Range threads;  // of the pool
  Range sequences, tokens, rows;
  Range head_rows;  // of StepPlan::head_rows
  Range pool_rows;  // of StepPlan::pool_rows
  Range items;
  // Thread t takes items [cuts[t], cuts[t + 1]) first, then those that remain.
  std::vector<std::int64_t> cuts;
  Range runs;                               // of blocks to read ahead
  Range adapter_runs, adapter_chunks;       // both empty where no sequence has an adapter
  std::int32_t longest = 0;                 // sequence
  std::int64_t rows_at_once = kRowsAtOnce;  // of logits
  std::int64_t logits_at = 0;               // the first of them
  std::unique_ptr<Team> team;               // null: the pool's own
};

// Rows of h and of its int8 form that a part keeps: of its tokens, or those that it brings to the head at a
// time.
inline std::int64_t rows_in_memory(const Part& part) {
  return std::max(part.tokens.size(), std::min(part.head_rows.size(), part.rows_at_once));
}

// One thread at work on a part.
struct Worker {
  const Part& part;
  Team& team;
  int thread;  // within the team
  int index;   // within the pool

  // Calls f(begin, end) for chunks of the part's tokens, as Team::for_each.
  template <typename F>
  void for_tokens(F&& f) const {
    const std::int64_t first = part.tokens.begin;
    team.for_each(part.tokens.size(), kTokensInChunk,
                  [&](std::int64_t begin, std::int64_t end) { f(first + begin, first + end); });
  }

 private:
  static constexpr std::int64_t kTokensInChunk = 4;
};

class StepPlan {
 public:
  // kv: any layer's.
  void make(const StepInput& in, const DecoderConfig& config, const KvView& kv, int threads);

  const std::vector<Part>& parts() const { return parts_; }
  const Part& part_of(int thread) const;
  const std::vector<AttentionItem>& items() const { return items_; }
  const std::vector<AttentionMerge>& merges() const { return merges_; }  // of the only part
  const std::vector<BlockRun>& block_runs() const { return block_runs_; }
  // The same tokens twice: as long as they are, and in pieces for the threads to share.
  const std::vector<AdapterRun>& adapter_runs() const { return adapter_runs_; }
  const std::vector<AdapterRun>& adapter_chunks() const { return adapter_chunks_; }

  std::int64_t rows_of_logits() const { return rows_of_logits_; }

  // Places among the batch's rows, ascending: of those that the head's product is computed for, and of those
  // that yield their hidden state instead.
  const std::vector<std::int64_t>& head_rows() const { return head_rows_; }
  const std::vector<std::int64_t>& pool_rows() const { return pool_rows_; }

  static constexpr std::int32_t kQueriesPerItem = 16;  // queries that one attention item folds together

 private:
  void cut_batch(const StepInput& in, const DecoderConfig& config, std::int32_t block_size, int threads);
  bool parts_meet(const StepInput& in, std::int32_t block_size);
  bool cut_sequences(const StepInput& in, const DecoderConfig& config, std::int64_t count);
  void set_parts(std::int64_t count, int threads);
  void split_rows(const StepInput& in, Part& part);
  void plan_attention(const StepInput& in, const DecoderConfig& config, Part& part);
  void split_items(const StepInput& in, const DecoderConfig& config, std::int64_t threads);
  void cut_items(const StepInput& in, Part& part);
  void plan_read_ahead(const StepInput& in, const KvView& kv, Part& part);
  void plan_adapters(const StepInput& in, Part& part);

  std::vector<Part> parts_;
  std::vector<std::int32_t> writers_;  // by block, the part that writes it; -1: none
  std::vector<std::int64_t> head_rows_, pool_rows_;
  std::int64_t rows_of_logits_ = 0;
  std::vector<AttentionItem> items_;
  std::vector<AttentionMerge> merges_;
  AlignedBuffer partials_;            // of the merges
  std::vector<BlockRun> block_runs_;  // what attention reads of a layer, in the order of the items
  std::vector<AdapterRun> adapter_runs_, adapter_chunks_;
};

}  // namespace fastllm
