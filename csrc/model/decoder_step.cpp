// One step of the decoder: buffers, the plan of its attention, and the phases that every thread walks
// through.
#include <algorithm>
#include <cstring>

#include "core/math.h"
#include "kernels/attention.h"
#include "model/decoder.h"

namespace fastllm {
namespace {

constexpr std::int64_t kRowsAtOnce = 32;          // rows of logits in memory at a time
constexpr std::int32_t kQueriesPerItem = 16;      // queries that one attention item folds together
constexpr std::int64_t kTokensThatLeaveTime = 8;  // products of fewer are bound by memory themselves
constexpr std::int64_t kReadAheadBytes = std::int64_t{8} << 20;  // of a layer, at most
constexpr std::int64_t kTilesWorthSplitting = 4;  // a decode shorter than this stays with one thread

// How a product's panels are handed out: to every thread a long stretch of its own first, which its cache may
// still hold from the step before and which begins with a wait for memory once, then short ones that even out
// a slow neighbour. All but the last are whole pairs, which the kernels compute together.
class Stretches {
 public:
  Stretches(std::int64_t panels, int threads)
      : panels_(panels), threads_(threads), long_(panels * 9 / 10 / threads / 2 * 2) {
    rest_ = panels - long_ * threads_;
    short_ = 2 * std::max<std::int64_t>(1, ceil_div(rest_, threads_ * 4));
  }
  std::int64_t count() const { return threads_ + ceil_div(rest_, short_); }
  std::int64_t begin(std::int64_t i) const {
    return i < threads_ ? i * long_ : std::min(panels_, long_ * threads_ + (i - threads_) * short_);
  }

 private:
  std::int64_t panels_, threads_, long_, rest_, short_;
};

}  // namespace

// ---- buffers and plan of a step --------------------------------------------------------------------------

QuantizedRows Decoder::quantized(std::int64_t cols) {
  const std::int64_t kp = ceil_div(cols, 32) * 32;
  const auto rows = static_cast<std::size_t>(quantized_rows_);
  const auto wide = static_cast<std::size_t>(kp);
  std::uint8_t* p = quantized_.as<std::uint8_t>();
  QuantizedRows out{};
  out.kp = kp;
  out.q = reinterpret_cast<std::int8_t*>(p);
  p += rows * wide;
  out.scale = reinterpret_cast<float*>(p);
  p += rows * wide / kActivationGroup * 4;
  out.sums = reinterpret_cast<std::int32_t*>(p);
  p += rows * wide / kActivationGroup * 4;
  out.fsums = reinterpret_cast<float*>(p);
  return out;
}

void Decoder::reserve(const StepInput& in) {
  const DecoderConfig& c = config_;
  const auto floats = [](std::int64_t n) { return static_cast<std::size_t>(n) * sizeof(float); };
  const std::int64_t rows = std::max(in.tokens, std::min(in.rows, kRowsAtOnce));
  const std::int64_t heads = c.num_heads * c.head_dim;
  const std::int64_t kv_heads = c.num_kv_heads * c.head_dim;
  x_.reserve(floats(in.tokens * c.dim));
  h_.reserve(floats(rows * c.dim));
  q_.reserve(floats(in.tokens * heads));
  a_.reserve(floats(in.tokens * heads));
  k_.reserve(floats(in.tokens * kv_heads));
  v_.reserve(floats(in.tokens * kv_heads));
  gate_.reserve(floats(in.tokens * c.ffn_dim));
  up_.reserve(floats(in.tokens * c.ffn_dim));
  for (AlignedBuffer* table : {&cos_, &sin_, &cos_sliding_, &sin_sliding_})
    table->reserve(floats(in.tokens * c.rotary_dim / 2));
  // Per column a code, per group three words.
  const std::int64_t widest = ceil_div(std::max({c.dim, heads, c.ffn_dim}), 32) * 32;
  quantized_rows_ = rows;
  quantized_.reserve(static_cast<std::size_t>(rows * (widest + widest / kActivationGroup * 12)));
  logits_.reserve(floats(std::min(in.rows, kRowsAtOnce) * c.vocab_size));

  std::int64_t scratch = static_cast<std::int64_t>(
      floats(attention_scratch_floats(static_cast<std::int32_t>(c.num_heads / c.num_kv_heads),
                                      static_cast<std::int32_t>(c.head_dim), kQueriesPerItem)));
  PackedView widest_weights{};
  widest_weights.kp = widest;
  widest_weights.group = 16;
  scratch = std::max(scratch, matmul_scratch_bytes(&widest_weights));
  for (ThreadState& state : thread_state_) state.scratch.reserve(static_cast<std::size_t>(scratch));
  last_tokens_.reserve(static_cast<std::size_t>(in.rows));
}

// Items for one KV head and up to kQueriesPerItem queries each. When there are too few to keep the threads
// busy, long decodes are split between tiles; the fold is the same either way.
void Decoder::plan_attention(const StepInput& in) {
  items_.clear();
  merges_.clear();
  const auto kv_heads = static_cast<std::int32_t>(config_.num_kv_heads);
  const std::int64_t group = config_.num_heads / config_.num_kv_heads;
  for (std::int32_t s = 0; s < in.sequences; ++s) {
    const std::int32_t begin = in.query_start[s];
    const std::int32_t end = in.query_start[s + 1];
    for (std::int32_t head = 0; head < kv_heads; ++head)
      for (std::int32_t query = begin; query < end; query += kQueriesPerItem)
        items_.push_back({s, head, query, std::min(kQueriesPerItem, end - query), 0, 0, nullptr});
  }
  const auto wanted = static_cast<std::size_t>(pool_.size()) * 3;
  if (pool_.size() == 1 || items_.size() >= wanted) return;

  std::int64_t total = 0;
  const auto tiles_of = [&](const AttentionItem& item) {
    return ceil_div(in.positions[item.query_begin] + item.queries, kKvTile);
  };
  for (const AttentionItem& item : items_) total += tiles_of(item);
  const std::int64_t piece =
      std::max(kTilesWorthSplitting, ceil_div(total, static_cast<std::int64_t>(wanted)));
  std::vector<AttentionItem> split;
  std::int64_t records = 0;
  for (const AttentionItem& item : items_) {
    const std::int64_t tiles = tiles_of(item);
    if (item.queries > 1 || tiles <= piece) {
      split.push_back(item);
      continue;
    }
    for (std::int64_t tile = 0; tile < tiles; tile += piece) {
      AttentionItem part = item;
      part.tile_begin = tile;
      part.tile_end = std::min(tile + piece, tiles);
      split.push_back(part);
    }
    merges_.push_back({item.sequence, item.kv_head, item.query_begin, tiles, nullptr});
    records += tiles * group;
  }
  if (merges_.empty()) return;
  items_ = std::move(split);
  const std::int64_t record = 2 + config_.head_dim;
  partials_.reserve(static_cast<std::size_t>(records * record) * sizeof(float));
  // Pieces of one decode stand one behind the other, in the order of the merges.
  float* next = partials_.as<float>();
  std::size_t at = 0;
  for (AttentionMerge& merge : merges_) {
    merge.partials = next;
    while (items_[at].tile_end == 0) ++at;
    for (; at < items_.size() && items_[at].tile_end != 0; ++at) {
      items_[at].partials = next + items_[at].tile_begin * group * record;
      if (items_[at].tile_end == merge.tiles) {
        ++at;
        break;
      }
    }
    next += merge.tiles * group * record;
  }
}

// Most of the items by their cost to every thread, as with products: what a thread reads is then a stream.
void Decoder::cut_attention(const StepInput& in) {
  const auto cost_of = [&](const AttentionItem& item) {
    const std::int64_t end = in.positions[item.query_begin] + item.queries;
    const std::int64_t tiles = item.tile_end != 0 ? item.tile_end - item.tile_begin : ceil_div(end, kKvTile);
    return tiles * item.queries;
  };
  std::int64_t total = 0, before = 0;
  for (const AttentionItem& item : items_) total += cost_of(item);
  item_cuts_.assign(1, 0);
  for (std::size_t i = 0; i < items_.size(); ++i) {
    const auto threads = static_cast<std::int64_t>(pool_.size());
    while (static_cast<std::int64_t>(item_cuts_.size()) <= threads &&
           before * 10 * threads >= total * 9 * static_cast<std::int64_t>(item_cuts_.size()))
      item_cuts_.push_back(static_cast<std::int64_t>(i));
    before += cost_of(items_[i]);
  }
  item_cuts_.resize(static_cast<std::size_t>(pool_.size()) + 1, static_cast<std::int64_t>(items_.size()));
}

// The blocks that attention reads, up to kReadAheadBytes of a layer.
void Decoder::plan_read_ahead(const StepInput& in) {
  block_runs_.clear();
  longest_ = 0;
  if (in.tokens < kTokensThatLeaveTime) return;
  const KvView kv = kv_view(0);
  const std::int64_t bytes = 2 * block_size_ * config_.head_dim * kv_value_bytes(kv_type_);
  std::int64_t left = kReadAheadBytes / bytes;
  for (std::int32_t s = 0; s < in.sequences; ++s) {
    const std::int32_t* table = in.block_tables + s * in.max_blocks;
    const std::int64_t blocks = ceil_div(in.seq_lens[s], block_size_);
    longest_ = std::max(longest_, in.seq_lens[s]);
    for (std::int64_t head = 0; head < config_.num_kv_heads; ++head) {
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
}

// Points `thread` at its share of what attention will read of `layer`: nothing where a window hides most of
// it.
void Decoder::read_ahead(int thread, std::int64_t layer) {
  ReadAhead& ahead = thread_state_[static_cast<std::size_t>(thread)].ahead;
  ahead = {};
  if (layer >= config_.num_layers) return;
  const std::int32_t window = config_.windows[static_cast<std::size_t>(layer)];
  if (window > 0 && window < longest_) return;
  const KvView kv = kv_view(layer);
  const auto runs = static_cast<std::int64_t>(block_runs_.size());
  ahead.run = block_runs_.data() + runs * thread / pool_.size();
  ahead.end = block_runs_.data() + runs * (thread + 1) / pool_.size();
  ahead.plane_count = kv_has_scales(kv_type_) ? 4 : 2;
  const void* planes[] = {kv.k, kv.v, kv.k_scale, kv.v_scale};
  for (int i = 0; i < 4; ++i) {
    ahead.planes[i] = static_cast<const std::uint8_t*>(planes[i]);
    ahead.block_bytes[i] = block_size_ * (i < 2 ? config_.head_dim * kv_value_bytes(kv_type_) : 4);
  }
}

// ---- phases ----------------------------------------------------------------------------------------------

void Decoder::embed(Team& team, const StepInput& in) {
  const DecoderConfig& c = config_;
  const PackedView table = embed_->view();
  const std::int64_t half = c.rotary_dim / 2;
  team.for_each(in.tokens, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int32_t id = in.token_ids[t];
      const std::int32_t token = id >= 0 ? id : last_tokens_[static_cast<std::size_t>(-1 - id)];
      float* x = x_.as<float>() + t * c.dim;
      kernels_.unpack_row(&table, token, x);
      if (c.embedding_scale != 1.0f)
        for (std::int64_t i = 0; i < c.dim; ++i) x[i] *= c.embedding_scale;
      for (std::int64_t i = 0; i < half; ++i) {
        const auto at = static_cast<std::size_t>(i);
        double s, co;
        sincos_double(in.positions[t] * c.inv_freq[at], &s, &co);
        cos_.as<float>()[t * half + i] = static_cast<float>(co);
        sin_.as<float>()[t * half + i] = static_cast<float>(s);
        if (c.inv_freq_sliding.empty()) continue;
        sincos_double(in.positions[t] * c.inv_freq_sliding[at], &s, &co);
        cos_sliding_.as<float>()[t * half + i] = static_cast<float>(co);
        sin_sliding_.as<float>()[t * half + i] = static_cast<float>(s);
      }
    }
  });
}

// h = norm(x), and its int8 form when a quantized matrix reads it.
void Decoder::normalize(Team& team, const float* x, const Vector& weight, const Vector& bias,
                        std::int64_t rows, bool quantize) {
  const std::int64_t dim = config_.dim;
  const QuantizedRows out = quantized(dim);
  team.for_each(rows, 4, [&](std::int64_t begin, std::int64_t end) {
    float* h = h_.as<float>() + begin * dim;
    if (config_.norm == NormKind::rms) {
      kernels_.rms_norm(x + begin * dim, dim, weight.as<float>(), config_.norm_eps, end - begin, dim, h, dim);
    } else {
      kernels_.layer_norm(x + begin * dim, dim, weight.as<float>(), bias.as<float>(), config_.norm_eps,
                          end - begin, dim, h, dim);
    }
    if (quantize) {
      const QuantizedRows part = out.from_row(begin);
      kernels_.quantize_rows(h, dim, end - begin, dim, &part);
    }
  });
}

void Decoder::quantize_rows(Team& team, const float* x, std::int64_t rows, std::int64_t cols) {
  const QuantizedRows out = quantized(cols);
  team.for_each(rows, 4, [&](std::int64_t begin, std::int64_t end) {
    const QuantizedRows part = out.from_row(begin);
    kernels_.quantize_rows(x + begin * cols, cols, end - begin, cols, &part);
  });
}

// The products of one phase share their input; their panels are handed out as one sequence.
void Decoder::multiply(Team& team, int thread, const float* x, std::int64_t ldx, std::int64_t rows,
                       const Product* products, int count, bool accumulate) {
  std::int64_t panels = 0;
  for (int i = 0; i < count; ++i) panels += products[i].w->panels();
  const QuantizedRows q = quantized(products[0].w->cols);
  ThreadState& state = thread_state_[static_cast<std::size_t>(thread)];
  void* scratch = state.scratch.as<void>();
  ReadAhead* ahead = &state.ahead;
  const Stretches stretches(panels, team.size());
  team.for_each_from_own(thread, stretches.count(), [&](std::int64_t stretch) {
    const std::int64_t begin = stretches.begin(stretch), end = stretches.begin(stretch + 1);
    std::int64_t first = 0;
    for (int i = 0; i < count; ++i) {
      const Product& p = products[i];
      const std::int64_t from = std::max<std::int64_t>(begin - first, 0);
      const std::int64_t to = std::min(end - first, p.w->panels());
      first += p.w->panels();
      if (from >= to) continue;
      const PackedView w = p.w->view();
      if (p.w->quantized()) {
        kernels_.matmul_q(&w, &q, rows, from, to, p.y, p.ldy, accumulate, scratch, ahead);
      } else {
        kernels_.matmul_f(&w, x, ldx, rows, from, to, p.y, p.ldy, accumulate);
      }
    }
  });
}

// Biases, q and k norms, rope, and K and V into the cache.
void Decoder::prepare_heads(Team& team, const StepInput& in, const Layer& layer, const KvView& kv,
                            bool sliding) {
  const DecoderConfig& c = config_;
  const std::int64_t q_dim = c.num_heads * c.head_dim;
  const std::int64_t kv_dim = c.num_kv_heads * c.head_dim;
  const std::int64_t half = c.rotary_dim / 2;
  const bool other_base = sliding && !c.inv_freq_sliding.empty();
  const float* cos = (other_base ? cos_sliding_ : cos_).as<float>();
  const float* sin = (other_base ? sin_sliding_ : sin_).as<float>();
  team.for_each(in.tokens, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* q = q_.as<float>() + t * q_dim;
      float* k = k_.as<float>() + t * kv_dim;
      float* v = v_.as<float>() + t * kv_dim;
      if (layer.q_bias) kernels_.add(q, layer.q_bias.as<float>(), q, q_dim);
      if (layer.k_bias) kernels_.add(k, layer.k_bias.as<float>(), k, kv_dim);
      if (layer.v_bias) kernels_.add(v, layer.v_bias.as<float>(), v, kv_dim);
      const std::int64_t d = c.head_dim;
      if (layer.q_norm) {
        kernels_.rms_norm(q, d, layer.q_norm.as<float>(), c.norm_eps, c.num_heads, d, q, d);
        kernels_.rms_norm(k, d, layer.k_norm.as<float>(), c.norm_eps, c.num_kv_heads, d, k, d);
      }
      if (half > 0) {
        kernels_.rope(q, q_dim, 1, c.num_heads, d, c.rotary_dim, cos + t * half, sin + t * half);
        kernels_.rope(k, kv_dim, 1, c.num_kv_heads, d, c.rotary_dim, cos + t * half, sin + t * half);
      }
    }
    kernels_.kv_write(&kv, k_.as<float>() + begin * kv_dim, kv_dim, v_.as<float>() + begin * kv_dim, kv_dim,
                      end - begin, in.slot_mapping + begin);
  });
}

void Decoder::attend(Team& team, int thread, const StepInput& in, std::int64_t layer, const KvView& kv) {
  const DecoderConfig& c = config_;
  const std::int64_t stride = c.num_heads * c.head_dim;
  const std::int64_t group = c.num_heads / c.num_kv_heads;
  float* scratch = thread_state_[static_cast<std::size_t>(thread)].scratch.as<float>();
  const auto task_of = [&](std::int32_t sequence, std::int32_t kv_head, std::int32_t query,
                           std::int32_t queries) {
    AttentionTask task{};
    const std::int64_t at = query * stride + kv_head * group * c.head_dim;
    task.q = q_.as<float>() + at;
    task.out = a_.as<float>() + at;
    task.q_stride = task.out_stride = stride;
    task.block_table = in.block_tables + sequence * in.max_blocks;
    task.queries = queries;
    task.group = static_cast<std::int32_t>(group);
    task.kv_head = kv_head;
    task.first_position = in.positions[query];
    task.window = c.windows[static_cast<std::size_t>(layer)];
    task.scale = c.attention_scale;
    task.softcap = c.attn_softcap;
    return task;
  };
  const std::int64_t threads = team.size(), rest = item_cuts_.back();
  const auto count = static_cast<std::int64_t>(items_.size());
  team.for_each_from_own(thread, threads + count - rest, [&](std::int64_t i) {
    const bool own = i < threads;
    const std::int64_t begin = own ? item_cuts_[static_cast<std::size_t>(i)] : rest + i - threads;
    const std::int64_t end = own ? item_cuts_[static_cast<std::size_t>(i) + 1] : begin + 1;
    for (std::int64_t at = begin; at < end; ++at) {
      const AttentionItem& item = items_[static_cast<std::size_t>(at)];
      const AttentionTask task = task_of(item.sequence, item.kv_head, item.query_begin, item.queries);
      if (item.partials == nullptr) {
        kernels_.attention(&kv, &task, scratch);
      } else {
        kernels_.attention_tiles(&kv, &task, item.tile_begin, item.tile_end, item.partials, scratch);
      }
    }
  });
  if (merges_.empty()) return;
  team.for_each(static_cast<std::int64_t>(merges_.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const AttentionMerge& merge = merges_[static_cast<std::size_t>(i)];
      const AttentionTask task = task_of(merge.sequence, merge.kv_head, merge.query, 1);
      kernels_.attention_merge(&kv, &task, merge.tiles, merge.partials);
    }
  });
}

// x += post_norm(y + bias)
void Decoder::add_residual(Team& team, const float* y, const Vector& bias, const Vector& post_norm,
                           std::int64_t rows) {
  const std::int64_t dim = config_.dim;
  team.for_each(rows, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* value = const_cast<float*>(y) + t * dim;
      float* x = x_.as<float>() + t * dim;
      if (bias) kernels_.add(value, bias.as<float>(), value, dim);
      if (post_norm) {
        if (config_.norm == NormKind::rms) {
          kernels_.rms_norm(value, dim, post_norm.as<float>(), config_.norm_eps, 1, dim, value, dim);
        } else {
          kernels_.layer_norm(value, dim, post_norm.as<float>(), nullptr, config_.norm_eps, 1, dim, value,
                              dim);
        }
      }
      kernels_.add(x, value, x, dim);
    }
  });
}

// Final norm, head and sampler for the rows asked for, kRowsAtOnce at a time.
void Decoder::yield_rows(Team& team, int thread, const StepInput& in, const StepOutput& out) {
  const DecoderConfig& c = config_;
  const PackedMatrix& head = head_ ? *head_ : *embed_;
  for (std::int64_t first = 0; first < in.rows; first += kRowsAtOnce) {
    const std::int64_t rows = std::min(kRowsAtOnce, in.rows - first);
    const QuantizedRows quantized_rows = quantized(c.dim);
    team.for_each(rows, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const float* x = x_.as<float>() + in.row_token[first + r] * c.dim;
        float* h = h_.as<float>() + r * c.dim;
        if (c.norm == NormKind::rms) {
          kernels_.rms_norm(x, c.dim, final_norm_.as<float>(), c.norm_eps, 1, c.dim, h, c.dim);
        } else {
          kernels_.layer_norm(x, c.dim, final_norm_.as<float>(), final_norm_bias_.as<float>(), c.norm_eps, 1,
                              c.dim, h, c.dim);
        }
        if (head.quantized()) {
          const QuantizedRows part = quantized_rows.from_row(r);
          kernels_.quantize_rows(h, c.dim, 1, c.dim, &part);
        }
      }
    });
    float* logits = logits_.as<float>();
    const Product product{&head, logits, c.vocab_size};
    multiply(team, thread, h_.as<float>(), c.dim, rows, &product, 1, false);
    if (thread == 0) profile_.mark(Phase::head);
    team.for_each(rows, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        float* row = logits + r * c.vocab_size;
        if (c.final_softcap > 0) kernels_.softcap(row, c.final_softcap, c.vocab_size);
        const std::int64_t at = first + r;
        if (out.logits != nullptr)
          std::memcpy(out.logits + at * c.vocab_size, row,
                      static_cast<std::size_t>(c.vocab_size) * sizeof(float));
        SampleOut sampled{};
        sampled.top_ids = out.top_ids + at * out.max_logprobs;
        sampled.top_logprobs = out.top_logprobs + at * out.max_logprobs;
        sample_row(kernels_, row, c.vocab_size, in.sample[at],
                   thread_state_[static_cast<std::size_t>(thread)].sampler, sampled);
        out.tokens[at] = sampled.token;
        out.logprob[at] = sampled.logprob;
        out.rank[at] = sampled.rank;
      }
    });
    if (thread == 0) profile_.mark(Phase::sample);
  }
}

// ---- the step --------------------------------------------------------------------------------------------

void Decoder::step(const StepInput& in, const StepOutput& out) {
  profile_.start();
  reserve(in);
  plan_attention(in);
  cut_attention(in);
  plan_read_ahead(in);
  const DecoderConfig& c = config_;
  const std::int64_t tokens = in.tokens;
  const std::int64_t q_dim = c.num_heads * c.head_dim;
  const std::int64_t kv_dim = c.num_kv_heads * c.head_dim;
  const auto mlp = c.activation == Activation::silu ? kernels_.silu_mul : kernels_.gelu_tanh_mul;

  pool_.run([&](Team& team, int thread) {
    const auto done = [&](Phase phase) {
      if (thread == 0) profile_.mark(phase);
    };
    done(Phase::prepare);
    if (in.copies > 0) {
      team.for_each(c.num_layers, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t layer = begin; layer < end; ++layer) {
          const KvView kv = kv_view(layer);
          const auto bytes = static_cast<std::size_t>(block_size_ * c.head_dim * kv_value_bytes(kv_type_));
          const auto scales = static_cast<std::size_t>(block_size_);
          for (std::int64_t i = 0; i < in.copies * c.num_kv_heads; ++i) {
            const std::int32_t* copy = in.copy_blocks + i / c.num_kv_heads * 2;
            const std::int64_t head = i % c.num_kv_heads;
            const auto from = static_cast<std::size_t>(kv_block(&kv, head, copy[0]));
            const auto to = static_cast<std::size_t>(kv_block(&kv, head, copy[1]));
            for (void* plane : {kv.k, kv.v}) {
              auto* base = static_cast<std::uint8_t*>(plane);
              std::memcpy(base + to * bytes, base + from * bytes, bytes);
            }
            if (!kv_has_scales(kv_type_)) continue;
            for (float* plane : {kv.k_scale, kv.v_scale})
              std::memcpy(plane + to * scales, plane + from * scales, scales * sizeof(float));
          }
        }
      });
    }
    embed(team, in);
    done(Phase::embed);
    read_ahead(thread, 0);
    for (std::int64_t i = 0; i < c.num_layers; ++i) {
      const Layer& l = layers_[static_cast<std::size_t>(i)];
      const KvView kv = kv_view(i);
      float* x = x_.as<float>();
      float* h = h_.as<float>();

      normalize(team, x, l.attn_norm, l.attn_norm_bias, tokens,
                l.q->quantized() || l.k->quantized() || l.v->quantized());
      done(Phase::norm);
      const Product qkv[] = {{l.q.get(), q_.as<float>(), q_dim},
                             {l.k.get(), k_.as<float>(), kv_dim},
                             {l.v.get(), v_.as<float>(), kv_dim}};
      multiply(team, thread, h, c.dim, tokens, qkv, 3, false);
      done(Phase::qkv);
      prepare_heads(team, in, l, kv, c.windows[static_cast<std::size_t>(i)] > 0);
      done(Phase::rope_kv);
      attend(team, thread, in, i, kv);
      done(Phase::attention);
      read_ahead(thread, i + 1);

      // Without a bias or a norm in between, the product lands on the residual at once.
      const bool plain_o = !l.o_bias && !l.attn_post_norm;
      if (l.o->quantized()) quantize_rows(team, a_.as<float>(), tokens, q_dim);
      const Product o{l.o.get(), plain_o ? x : h, c.dim};
      multiply(team, thread, a_.as<float>(), q_dim, tokens, &o, 1, plain_o);
      if (!plain_o) add_residual(team, h, l.o_bias, l.attn_post_norm, tokens);
      done(Phase::output);

      normalize(team, x, l.ffn_norm, l.ffn_norm_bias, tokens, l.gate->quantized() || l.up->quantized());
      done(Phase::norm);
      float* gate = gate_.as<float>();
      float* up = up_.as<float>();
      const Product gate_up[] = {{l.gate.get(), gate, c.ffn_dim}, {l.up.get(), up, c.ffn_dim}};
      multiply(team, thread, h, c.dim, tokens, gate_up, 2, false);
      done(Phase::gate_up);
      const QuantizedRows quantized_gate = quantized(c.ffn_dim);
      team.for_each(tokens, 4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) {
          float* g = gate + t * c.ffn_dim;
          float* u = up + t * c.ffn_dim;
          if (l.gate_bias) kernels_.add(g, l.gate_bias.as<float>(), g, c.ffn_dim);
          if (l.up_bias) kernels_.add(u, l.up_bias.as<float>(), u, c.ffn_dim);
          mlp(g, u, g, c.ffn_dim);
          if (l.down->quantized()) {
            const QuantizedRows part = quantized_gate.from_row(t);
            kernels_.quantize_rows(g, c.ffn_dim, 1, c.ffn_dim, &part);
          }
        }
      });
      done(Phase::activation);
      const bool plain_down = !l.down_bias && !l.ffn_post_norm;
      const Product down{l.down.get(), plain_down ? x : h, c.dim};
      multiply(team, thread, gate, c.ffn_dim, tokens, &down, 1, plain_down);
      if (!plain_down) add_residual(team, h, l.down_bias, l.ffn_post_norm, tokens);
      done(Phase::down);
    }
    yield_rows(team, thread, in, out);
  });
  last_tokens_.assign(out.tokens, out.tokens + in.rows);
  // A row without a number has no token; who goes on from it all the same must not read outside the table.
  for (std::int32_t& token : last_tokens_) token = std::max(token, 0);
}

}  // namespace fastllm
