#include "model/step_plan.h"

#include <algorithm>

#include "core/math.h"

namespace fastllm {
namespace {

constexpr std::int64_t kTilesWorthSplitting = 4;  // what is shorter stays with one thread
constexpr std::int64_t kRowsInMerge = 6;        // queries of a group's heads, merged by one thread at a time
constexpr std::int64_t kTokensWorthAPart = 16;  // fewer would spend their time on reading the weights
constexpr std::int64_t kTokensThatLeaveTime = 8;  // products of fewer are bound by memory themselves
constexpr std::int64_t kReadAheadBytes = std::int64_t{8} << 20;  // of a layer, at most
constexpr std::int64_t kTokensInAdapterChunk = 16;
constexpr double kUneven = 1.05;        // the greatest part may be so much greater than their mean
constexpr double kAttentionCost = 5.0;  // of a multiply-add, in those of a product

// Multiply-adds of a sequence's tokens, those of attention as kAttentionCost.
double cost_of_sequence(const StepInput& in, const DecoderConfig& c, std::int64_t sequence) {
  const std::int64_t heads = c.num_heads * c.head_dim, kv_heads = c.num_kv_heads * c.head_dim;
  const double products = static_cast<double>(c.dim * (2 * heads + 2 * kv_heads + 3 * c.ffn_dim));
  const std::int32_t tokens = in.query_start[sequence + 1] - in.query_start[sequence];
  const double seen = in.seq_lens[sequence] - (tokens - 1) / 2.0;
  return tokens * (products + kAttentionCost * 2 * static_cast<double>(heads) * seen);
}

std::int64_t tiles_of(const StepInput& in, const AttentionItem& item) {
  return ceil_div(in.positions[item.query_begin] + item.queries, kKvTile);
}

std::int64_t cost_of_item(const StepInput& in, const AttentionItem& item) {
  const std::int64_t tiles = item.tile_end != 0 ? item.tile_end - item.tile_begin : tiles_of(in, item);
  return tiles * item.queries;
}

}  // namespace

void StepPlan::make(const StepInput& in, const DecoderConfig& config, const KvView& kv, int threads) {
  items_.clear();
  merges_.clear();
  block_runs_.clear();
  head_rows_.clear();
  pool_rows_.clear();
  adapter_runs_.clear();
  adapter_chunks_.clear();
  cut_batch(in, config, kv.block_size, threads);
  rows_of_logits_ = 0;
  for (Part& part : parts_) {
    split_rows(in, part);
    part.logits_at = rows_of_logits_;
    rows_of_logits_ += std::min(part.head_rows.size(), part.rows_at_once);
    plan_attention(in, config, part);
    if (parts_.size() == 1) split_items(in, config, part.threads.size());
    part.items.end = static_cast<std::int64_t>(items_.size());
    cut_items(in, part);
    plan_read_ahead(in, kv, part);
    plan_adapters(in, part);
  }
}

const Part& StepPlan::part_of(int thread) const {
  std::size_t i = 0;
  while (thread >= parts_[i].threads.end) ++i;
  return parts_[i];
}

// ---- parts -----------------------------------------------------------------------------------------------

void StepPlan::cut_batch(const StepInput& in, const DecoderConfig& config, std::int32_t block_size,
                         int threads) {
  for (std::int64_t count = threads; count > 1; --count) {
    if (threads % count != 0 || in.tokens < count * kTokensWorthAPart || in.sequences < count) continue;
    set_parts(count, threads);
    if (cut_sequences(in, config, count) && !parts_meet(in, block_size)) return;
  }
  set_parts(1, threads);
  parts_[0].sequences = {0, in.sequences};
  parts_[0].tokens = {0, in.tokens};
  parts_[0].rows = {0, in.rows};
}

void StepPlan::set_parts(std::int64_t count, int threads) {
  const std::int64_t each = threads / count;
  if (static_cast<std::int64_t>(parts_.size()) != count) {
    parts_.clear();
    for (std::int64_t i = 0; i < count; ++i) {
      Part& part = parts_.emplace_back();
      part.threads = {i * each, (i + 1) * each};
      if (count > 1) part.team = std::make_unique<Team>(static_cast<int>(each));
    }
  }
  // A few at least: the head's matrix is read anew for them.
  for (Part& part : parts_) part.rows_at_once = std::max<std::int64_t>(kRowsAtOnce / count, 16);
}

// Whole sequences to every part, at nearly the same cost; false where they do not divide so.
bool StepPlan::cut_sequences(const StepInput& in, const DecoderConfig& config, std::int64_t count) {
  double total = 0;
  for (std::int64_t s = 0; s < in.sequences; ++s) total += cost_of_sequence(in, config, s);
  const double mean = total / static_cast<double>(count);
  std::int64_t sequence = 0, row = 0;
  double before = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    Part& part = parts_[static_cast<std::size_t>(i)];
    part.sequences.begin = sequence;
    part.rows.begin = row;
    const double stop = mean * static_cast<double>(i + 1), start = before;
    while (sequence < in.sequences) {
      const double cost = cost_of_sequence(in, config, sequence);
      if (i + 1 < count && before + cost / 2 > stop) break;
      before += cost;
      ++sequence;
    }
    part.sequences.end = sequence;
    if (part.sequences.size() == 0 || before - start > mean * kUneven) return false;
    part.tokens = {in.query_start[part.sequences.begin], in.query_start[sequence]};
    for (; row < in.rows && in.row_token[row] < part.tokens.end; ++row)
      if (in.row_token[row] < part.tokens.begin) return false;  // not in the order of the tokens
    part.rows.end = row;
    if (part.rows.size() > part.tokens.size()) return false;  // a part's rows of h hold both
  }
  return row == in.rows;
}

// Parts and rows are both in the order of the tokens, so the lists are ascending.
void StepPlan::split_rows(const StepInput& in, Part& part) {
  part.head_rows.begin = static_cast<std::int64_t>(head_rows_.size());
  part.pool_rows.begin = static_cast<std::int64_t>(pool_rows_.size());
  for (std::int64_t row = part.rows.begin; row < part.rows.end; ++row)
    (in.sample[row].kind == SampleRow::kPool ? pool_rows_ : head_rows_).push_back(row);
  part.head_rows.end = static_cast<std::int64_t>(head_rows_.size());
  part.pool_rows.end = static_cast<std::int64_t>(pool_rows_.size());
}

// Whether a part reads or writes a block that another writes in this step: then all threads have to meet
// between the writing and the reading of every layer.
bool StepPlan::parts_meet(const StepInput& in, std::int32_t block_size) {
  writers_.clear();
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    for (std::int64_t t = parts_[i].tokens.begin; t < parts_[i].tokens.end; ++t) {
      const auto block = static_cast<std::size_t>(in.slot_mapping[t] / block_size);
      if (block >= writers_.size()) writers_.resize(block + 1, -1);
      if (writers_[block] >= 0 && writers_[block] != static_cast<std::int32_t>(i)) return true;
      writers_[block] = static_cast<std::int32_t>(i);
    }
  }
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    for (std::int64_t s = parts_[i].sequences.begin; s < parts_[i].sequences.end; ++s) {
      for (std::int64_t at = 0; at < ceil_div(in.seq_lens[s], block_size); ++at) {
        const auto block = static_cast<std::size_t>(in.block_tables[s * in.max_blocks + at]);
        if (block < writers_.size() && writers_[block] >= 0 &&
            writers_[block] != static_cast<std::int32_t>(i))
          return true;
      }
    }
  }
  return false;
}

// ---- attention -------------------------------------------------------------------------------------------

// Items for one KV head and up to kQueriesPerItem queries each.
void StepPlan::plan_attention(const StepInput& in, const DecoderConfig& config, Part& part) {
  part.items.begin = static_cast<std::int64_t>(items_.size());
  const auto kv_heads = static_cast<std::int32_t>(config.num_kv_heads);
  for (auto s = static_cast<std::int32_t>(part.sequences.begin); s < part.sequences.end; ++s) {
    const std::int32_t begin = in.query_start[s];
    const std::int32_t end = in.query_start[s + 1];
    for (std::int32_t head = 0; head < kv_heads; ++head)
      for (std::int32_t query = begin; query < end; query += kQueriesPerItem)
        items_.push_back({s, head, query, std::min(kQueriesPerItem, end - query), 0, 0, nullptr});
  }
}

// When there are too few items to keep the threads busy, long ones, decodes and drafts, are split between
// tiles; the fold is the same either way.
void StepPlan::split_items(const StepInput& in, const DecoderConfig& config, std::int64_t threads) {
  const std::int64_t wanted = threads * 3;
  if (threads == 1 || static_cast<std::int64_t>(items_.size()) >= wanted) return;
  const std::int64_t group = config.num_heads / config.num_kv_heads;
  std::int64_t total = 0, records = 0;
  for (const AttentionItem& item : items_) total += cost_of_item(in, item);
  const std::int64_t share = ceil_div(total, wanted);
  std::vector<AttentionItem> split;
  for (const AttentionItem& item : items_) {
    const std::int64_t tiles = tiles_of(in, item);
    const std::int64_t piece = std::max(kTilesWorthSplitting, ceil_div(share, item.queries));
    if (tiles <= piece) {
      split.push_back(item);
      continue;
    }
    for (std::int64_t tile = 0; tile < tiles; tile += piece) {
      AttentionItem some = item;
      some.tile_begin = tile;
      some.tile_end = std::min(tile + piece, tiles);
      split.push_back(some);
    }
    records += tiles * item.queries * group;
  }
  if (records == 0) return;
  items_ = std::move(split);
  const std::int64_t record = 2 + config.head_dim;
  partials_.reserve(static_cast<std::size_t>(records * record) * sizeof(float));
  const auto queries_at_once = static_cast<std::int32_t>(std::max<std::int64_t>(kRowsInMerge / group, 1));
  float* next = partials_.as<float>();
  for (AttentionItem& item : items_) {
    if (item.tile_end == 0) continue;
    const std::int64_t tile_floats = item.queries * group * record;
    item.partials = next;
    next += (item.tile_end - item.tile_begin) * tile_floats;
    const std::int64_t tiles = tiles_of(in, item);
    if (item.tile_end != tiles) continue;
    // Pieces of one item stand one behind the other, and so do their records.
    const float* first = next - tiles * tile_floats;
    for (std::int32_t i = 0; i < item.queries; i += queries_at_once)
      merges_.push_back({item.sequence, item.kv_head, item.query_begin + i,
                         std::min(queries_at_once, item.queries - i), tiles, tile_floats,
                         first + i * group * record});
  }
}

// Most of the items, by their cost, to every thread in one stretch, as with products: what it reads is a
// stream.
void StepPlan::cut_items(const StepInput& in, Part& part) {
  const auto cost_of = [&](std::int64_t i) { return cost_of_item(in, items_[static_cast<std::size_t>(i)]); };
  const std::int64_t threads = part.threads.size();
  std::int64_t total = 0, before = 0;
  for (std::int64_t i = part.items.begin; i < part.items.end; ++i) total += cost_of(i);
  part.cuts.assign(1, part.items.begin);
  for (std::int64_t i = part.items.begin; i < part.items.end && threads > 1; ++i) {
    while (static_cast<std::int64_t>(part.cuts.size()) <= threads &&
           before * 10 * threads >= total * 9 * static_cast<std::int64_t>(part.cuts.size()))
      part.cuts.push_back(i);
    before += cost_of(i);
  }
  part.cuts.resize(static_cast<std::size_t>(threads) + 1, part.items.end);
}

// The blocks that attention reads, up to kReadAheadBytes of a layer.
void StepPlan::plan_read_ahead(const StepInput& in, const KvView& kv, Part& part) {
  part.runs.begin = part.runs.end = static_cast<std::int64_t>(block_runs_.size());
  part.longest = 0;
  if (part.tokens.size() < kTokensThatLeaveTime) return;
  const std::int64_t bytes = 2 * kv.block_size * kv.head_dim * kv_value_bytes(kv.type);
  std::int64_t left = kReadAheadBytes / bytes / static_cast<std::int64_t>(parts_.size());
  for (std::int64_t s = part.sequences.begin; s < part.sequences.end; ++s) {
    const std::int32_t* table = in.block_tables + s * in.max_blocks;
    const std::int64_t blocks = ceil_div(in.seq_lens[s], kv.block_size);
    part.longest = std::max(part.longest, in.seq_lens[s]);
    for (std::int64_t head = 0; head < kv.kv_heads; ++head) {
      for (std::int64_t i = 0; i < blocks && left > 0; ++i, --left) {
        const std::int64_t block = kv_block(&kv, head, table[i]);
        if (i > 0 && block_runs_.back().first + block_runs_.back().count == block) {
          ++block_runs_.back().count;
        } else {
          block_runs_.push_back({block, 1});
        }
      }
    }
  }
  part.runs.end = static_cast<std::int64_t>(block_runs_.size());
}

// ---- adapters --------------------------------------------------------------------------------------------

void StepPlan::plan_adapters(const StepInput& in, Part& part) {
  const auto first = static_cast<std::int64_t>(adapter_runs_.size());
  part.adapter_runs = {first, first};
  part.adapter_chunks.begin = part.adapter_chunks.end = static_cast<std::int64_t>(adapter_chunks_.size());
  if (in.adapter == nullptr) return;
  for (std::int64_t s = part.sequences.begin; s < part.sequences.end; ++s) {
    const std::int32_t adapter = in.adapter[s];
    const std::int32_t begin = in.query_start[s], end = in.query_start[s + 1];
    if (adapter < 0 || begin == end) continue;
    const bool goes_on = static_cast<std::int64_t>(adapter_runs_.size()) > first &&
                         adapter_runs_.back().adapter == adapter && adapter_runs_.back().tokens.end == begin;
    if (goes_on) {
      adapter_runs_.back().tokens.end = end;
    } else {
      adapter_runs_.push_back({adapter, {begin, end}});
    }
  }
  part.adapter_runs.end = static_cast<std::int64_t>(adapter_runs_.size());
  for (std::int64_t i = first; i < part.adapter_runs.end; ++i) {
    const AdapterRun& run = adapter_runs_[static_cast<std::size_t>(i)];
    for (std::int64_t t = run.tokens.begin; t < run.tokens.end; t += kTokensInAdapterChunk)
      adapter_chunks_.push_back({run.adapter, {t, std::min(t + kTokensInAdapterChunk, run.tokens.end)}});
  }
  part.adapter_chunks.end = static_cast<std::int64_t>(adapter_chunks_.size());
}

}  // namespace fastllm
