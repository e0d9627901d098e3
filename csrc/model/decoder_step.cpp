// One step of the decoder: buffers, and the phases that every thread walks through.
#include <algorithm>
#include <cstring>

#include "core/math.h"
#include "kernels/attention.h"
#include "model/decoder.h"

namespace fastllm {
namespace {

// How a product's panels are handed out: to every thread a long stretch of its own first, which its cache may
// still hold from the step before and which begins with a wait for memory once, then short ones that even out
// a slow neighbour. All but the last are whole pairs, which the kernels compute together.
class Stretches {
 public:
  Stretches(std::int64_t panels, int threads)
      : panels_(panels), threads_(threads), long_(threads == 1 ? panels : panels * 9 / 10 / threads / 2 * 2) {
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

// The part's int8 rows of an input of `cols` columns; row 0 is its first token. Parts are in different phases
// at a time, so that each has its own stretch of the buffer, whatever the width.
QuantizedRows Decoder::quantized(const Part& part, std::int64_t cols) {
  const std::int64_t kp = ceil_div(cols, 32) * 32;
  const auto rows = static_cast<std::size_t>(rows_in_memory(part));
  const auto wide = static_cast<std::size_t>(kp);
  std::uint8_t* p = quantized_.as<std::uint8_t>() + part.tokens.begin * quantized_row_bytes();
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

// Of the widest input: per column a code, per group three words.
std::int64_t Decoder::quantized_row_bytes() const {
  const DecoderConfig& c = config_;
  const std::int64_t widest = ceil_div(std::max({c.dim, c.num_heads * c.head_dim, c.ffn_dim}), 32) * 32;
  return ceil_div(widest + widest / kActivationGroup * 12, 64) * 64;
}

void Decoder::reserve(const StepInput& in) {
  const DecoderConfig& c = config_;
  const auto floats = [](std::int64_t n) { return static_cast<std::size_t>(n) * sizeof(float); };
  std::int64_t rows = 0;
  for (const Part& part : plan_.parts()) rows += rows_in_memory(part);
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
  if (!plan_.adapter_runs().empty()) {
    low_stride_ = 0;
    for (const AdapterRun& run : plan_.adapter_runs())
      low_stride_ = std::max(low_stride_, adapter_of(run).rank());
    low_.reserve(floats(in.tokens * 3 * low_stride_));
  }
  quantized_.reserve(static_cast<std::size_t>(rows * quantized_row_bytes()));
  logits_.reserve(floats(plan_.rows_of_logits() * c.vocab_size));

  std::int64_t scratch = static_cast<std::int64_t>(
      floats(attention_scratch_floats(static_cast<std::int32_t>(c.num_heads / c.num_kv_heads),
                                      static_cast<std::int32_t>(c.head_dim), StepPlan::kQueriesPerItem)));
  PackedView widest_weights{};
  widest_weights.kp = ceil_div(std::max({c.dim, heads, c.ffn_dim}), 32) * 32;
  widest_weights.group = 16;
  scratch = std::max(scratch, matmul_scratch_bytes(&widest_weights));
  for (ThreadState& state : thread_state_) state.scratch.reserve(static_cast<std::size_t>(scratch));
  last_tokens_.reserve(static_cast<std::size_t>(in.rows));
}

// ---- phases ----------------------------------------------------------------------------------------------

void Decoder::embed(const Worker& worker, const StepInput& in) {
  const DecoderConfig& c = config_;
  const PackedView table = embed_->view();
  const std::int64_t half = c.rotary_dim / 2;
  worker.for_tokens([&](std::int64_t begin, std::int64_t end) {
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
void Decoder::normalize(const Worker& worker, const Vector& weight, const Vector& bias, bool quantize) {
  const std::int64_t dim = config_.dim;
  const float* x = x_.as<float>();
  const QuantizedRows out = quantized(worker.part, dim);
  worker.for_tokens([&](std::int64_t begin, std::int64_t end) {
    float* h = h_.as<float>() + begin * dim;
    if (config_.norm == NormKind::rms) {
      kernels_.rms_norm(x + begin * dim, dim, weight.as<float>(), config_.norm_eps, end - begin, dim, h, dim);
    } else {
      kernels_.layer_norm(x + begin * dim, dim, weight.as<float>(), bias.as<float>(), config_.norm_eps,
                          end - begin, dim, h, dim);
    }
    if (quantize) {
      const QuantizedRows part = out.from_row(begin - worker.part.tokens.begin);
      kernels_.quantize_rows(h, dim, end - begin, dim, &part);
    }
  });
}

void Decoder::quantize_rows(const Worker& worker, const float* x, std::int64_t cols) {
  const QuantizedRows out = quantized(worker.part, cols);
  worker.for_tokens([&](std::int64_t begin, std::int64_t end) {
    const QuantizedRows part = out.from_row(begin - worker.part.tokens.begin);
    kernels_.quantize_rows(x + begin * cols, cols, end - begin, cols, &part);
  });
}

// The products of one phase share their input, `rows` rows of x from the part's first on; their panels are
// handed out as one sequence.
void Decoder::multiply(const Worker& worker, const float* x, std::int64_t ldx, std::int64_t rows,
                       const Product* products, int count, bool accumulate) {
  std::int64_t panels = 0;
  for (int i = 0; i < count; ++i) panels += products[i].w->panels();
  const QuantizedRows q = quantized(worker.part, products[0].w->cols);
  x += worker.part.tokens.begin * ldx;
  ThreadState& state = thread_state_[static_cast<std::size_t>(worker.index)];
  const Stretches stretches(panels, worker.team.size());
  worker.team.for_each_from_own(worker.thread, stretches.count(), [&](std::int64_t stretch) {
    const std::int64_t begin = stretches.begin(stretch), end = stretches.begin(stretch + 1);
    std::int64_t before = 0;
    for (int i = 0; i < count; ++i) {
      const Product& p = products[i];
      const std::int64_t from = std::max<std::int64_t>(begin - before, 0);
      const std::int64_t to = std::min(end - before, p.w->panels());
      before += p.w->panels();
      if (from >= to) continue;
      const PackedView w = p.w->view();
      if (p.w->quantized()) {
        kernels_.matmul_q(&w, &q, rows, from, to, p.y, p.ldy, accumulate, state.scratch.as<void>(),
                          &state.ahead);
      } else {
        kernels_.matmul_f(&w, x, ldx, rows, from, to, p.y, p.ldy, accumulate);
      }
    }
  });
}

// y += scale * (x A^T) B^T for the part's tokens that have an adapter: of `count` products that read x, those
// of the projections from `first` on. Tokens without one are not touched.
void Decoder::add_adapters(const Worker& worker, std::int64_t layer, int first, const float* x,
                           std::int64_t ldx, const Product* products, int count) {
  const Part& part = worker.part;
  const AdapterRun* runs = plan_.adapter_runs().data() + part.adapter_runs.begin;
  const AdapterRun* chunks = plan_.adapter_chunks().data() + part.adapter_chunks.begin;
  bool any = false;  // the same on all threads
  for (std::int64_t i = 0; i < part.adapter_runs.size() && !any; ++i)
    for (int p = 0; p < count && !any; ++p) any = adapter_of(runs[i]).find(layer, first + p) != nullptr;
  if (!any) return;
  const auto low = [&](std::int64_t token, std::int64_t product) {
    return low_.as<float>() + (token * 3 + product) * low_stride_;
  };
  worker.team.for_each(part.adapter_chunks.size() * count, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const AdapterRun& chunk = chunks[i / count];
      const std::int64_t p = i % count, token = chunk.tokens.begin;
      const AdapterMatrices* m = adapter_of(chunk).find(layer, first + static_cast<int>(p));
      if (m == nullptr) continue;
      kernels_.low_rank(m->a.as<float>(), m->rank, x + token * ldx, ldx, chunk.tokens.size(), m->cols,
                        m->scale, low(token, p), 3 * low_stride_);
    }
  });
  // Some stretches of outputs for every thread, in whole tiles of the kernel.
  const std::int64_t stretches = worker.team.size() == 1 ? 1 : 4 * worker.team.size();
  const std::int64_t tasks = part.adapter_runs.size() * count * stretches;
  worker.team.for_each(tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const AdapterRun& run = runs[i / (count * stretches)];
      const std::int64_t p = i / stretches % count, stretch = i % stretches, token = run.tokens.begin;
      const AdapterMatrices* m = adapter_of(run).find(layer, first + static_cast<int>(p));
      if (m == nullptr) continue;
      const PackedView b = m->b->view();
      const std::int64_t panels = m->b->panels(), each = ceil_div(ceil_div(panels, stretches), 4) * 4;
      const std::int64_t from = std::min(panels, stretch * each), to = std::min(panels, from + each);
      if (from == to) continue;
      float* y = products[p].y + (token - part.tokens.begin) * products[p].ldy;
      kernels_.matmul_f(&b, low(token, p), 3 * low_stride_, run.tokens.size(), from, to, y, products[p].ldy,
                        1);
    }
  });
}

// Biases, q and k norms, rope, and K and V into the cache.
void Decoder::prepare_heads(const Worker& worker, const StepInput& in, const Layer& layer, const KvView& kv,
                            bool sliding) {
  const DecoderConfig& c = config_;
  const std::int64_t q_dim = c.num_heads * c.head_dim;
  const std::int64_t kv_dim = c.num_kv_heads * c.head_dim;
  const std::int64_t half = c.rotary_dim / 2;
  const bool other_base = sliding && !c.inv_freq_sliding.empty();
  const float* cos = (other_base ? cos_sliding_ : cos_).as<float>();
  const float* sin = (other_base ? sin_sliding_ : sin_).as<float>();
  worker.for_tokens([&](std::int64_t begin, std::int64_t end) {
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

void Decoder::attend(const Worker& worker, const StepInput& in, std::int64_t layer, const KvView& kv) {
  const DecoderConfig& c = config_;
  const std::int64_t stride = c.num_heads * c.head_dim;
  const std::int64_t group = c.num_heads / c.num_kv_heads;
  float* scratch = thread_state_[static_cast<std::size_t>(worker.index)].scratch.as<float>();
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
  const Part& part = worker.part;
  const std::int64_t threads = worker.team.size(), rest = part.cuts.back();
  worker.team.for_each_from_own(worker.thread, threads + part.items.end - rest, [&](std::int64_t i) {
    const bool own = i < threads;
    const std::int64_t begin = own ? part.cuts[static_cast<std::size_t>(i)] : rest + i - threads;
    const std::int64_t end = own ? part.cuts[static_cast<std::size_t>(i) + 1] : begin + 1;
    for (std::int64_t at = begin; at < end; ++at) {
      const AttentionItem& item = plan_.items()[static_cast<std::size_t>(at)];
      const AttentionTask task = task_of(item.sequence, item.kv_head, item.query_begin, item.queries);
      if (item.partials == nullptr) {
        kernels_.attention(&kv, &task, scratch);
      } else {
        kernels_.attention_tiles(&kv, &task, item.tile_begin, item.tile_end, item.partials, scratch);
      }
    }
  });
  const std::vector<AttentionMerge>& merges = plan_.merges();
  if (merges.empty()) return;
  const auto count = static_cast<std::int64_t>(merges.size());
  worker.team.for_each(count, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const AttentionMerge& merge = merges[static_cast<std::size_t>(i)];
      const AttentionTask task = task_of(merge.sequence, merge.kv_head, merge.query, merge.queries);
      kernels_.attention_merge(&kv, &task, merge.tiles, merge.tile_floats, merge.partials);
    }
  });
}

// Points the worker at its share of what attention will read of `layer`: nothing where a window hides most of
// it.
void Decoder::read_ahead(const Worker& worker, std::int64_t layer) {
  ReadAhead& ahead = thread_state_[static_cast<std::size_t>(worker.index)].ahead;
  ahead = {};
  if (layer >= config_.num_layers) return;
  const Part& part = worker.part;
  const std::int32_t window = config_.windows[static_cast<std::size_t>(layer)];
  if (window > 0 && window < part.longest) return;
  const KvView kv = kv_view(layer);
  const BlockRun* runs = plan_.block_runs().data() + part.runs.begin;
  ahead.run = runs + part.runs.size() * worker.thread / worker.team.size();
  ahead.end = runs + part.runs.size() * (worker.thread + 1) / worker.team.size();
  ahead.plane_count = kv_has_scales(kv_type_) ? 4 : 2;
  const void* planes[] = {kv.k, kv.v, kv.k_scale, kv.v_scale};
  for (int i = 0; i < 4; ++i) {
    ahead.planes[i] = static_cast<const std::uint8_t*>(planes[i]);
    ahead.block_bytes[i] = block_size_ * (i < 2 ? config_.head_dim * kv_value_bytes(kv_type_) : 4);
  }
}

// gate = act(gate) * up, and its int8 form when a quantized matrix reads it.
void Decoder::activate(const Worker& worker, const Layer& layer) {
  const std::int64_t dim = config_.ffn_dim;
  const auto act = config_.activation == Activation::silu ? kernels_.silu_mul : kernels_.gelu_tanh_mul;
  const QuantizedRows out = quantized(worker.part, dim);
  worker.for_tokens([&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* gate = gate_.as<float>() + t * dim;
      float* up = up_.as<float>() + t * dim;
      if (layer.gate_bias) kernels_.add(gate, layer.gate_bias.as<float>(), gate, dim);
      if (layer.up_bias) kernels_.add(up, layer.up_bias.as<float>(), up, dim);
      act(gate, up, gate, dim);
      if (layer.down->quantized()) {
        const QuantizedRows row = out.from_row(t - worker.part.tokens.begin);
        kernels_.quantize_rows(gate, dim, 1, dim, &row);
      }
    }
  });
}

// x += post_norm(h + bias)
void Decoder::add_residual(const Worker& worker, const Vector& bias, const Vector& post_norm) {
  const std::int64_t dim = config_.dim;
  worker.for_tokens([&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* value = h_.as<float>() + t * dim;
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

void Decoder::final_norm(const float* x, float* h) const {
  const DecoderConfig& c = config_;
  if (c.norm == NormKind::rms) {
    kernels_.rms_norm(x, c.dim, final_norm_.as<float>(), c.norm_eps, 1, c.dim, h, c.dim);
  } else {
    kernels_.layer_norm(x, c.dim, final_norm_.as<float>(), final_norm_bias_.as<float>(), c.norm_eps, 1, c.dim,
                        h, c.dim);
  }
}

// The final norm alone for the rows that pool, straight to where it is wanted.
void Decoder::pool_rows(const Worker& worker, const StepInput& in, const StepOutput& out) {
  const DecoderConfig& c = config_;
  const Range range = worker.part.pool_rows;
  if (range.size() == 0) return;
  worker.team.for_each(range.size(), 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t line = range.begin + begin; line < range.begin + end; ++line) {
      const std::int64_t at = plan_.pool_rows()[static_cast<std::size_t>(line)];
      float* h = out.hidden + line * c.dim;
      final_norm(x_.as<float>() + in.row_token[at] * c.dim, h);
      bool numbers = true;
      for (std::int64_t i = 0; i < c.dim; ++i) numbers = numbers && h[i] - h[i] == 0.0f;
      out.tokens[at] = numbers ? 0 : -1;
      out.logprob[at] = 0.0f;
      out.rank[at] = 0;
      if (out.logits != nullptr) std::fill_n(out.logits + at * c.vocab_size, c.vocab_size, 0.0f);
    }
  });
  mark(worker, Phase::norm);
}

// Final norm, head and sampler for the other rows, some at a time.
void Decoder::yield_rows(const Worker& worker, const StepInput& in, const StepOutput& out) {
  const DecoderConfig& c = config_;
  const Part& part = worker.part;
  const PackedMatrix& head = head_ ? *head_ : *embed_;
  const QuantizedRows quantized_rows = quantized(worker.part, c.dim);
  const std::int64_t at_h = part.tokens.begin;  // the rows stand where the part's tokens did
  float* logits = logits_.as<float>() + part.logits_at * c.vocab_size;
  for (std::int64_t first = part.head_rows.begin; first < part.head_rows.end; first += part.rows_at_once) {
    const std::int64_t rows = std::min(part.rows_at_once, part.head_rows.end - first);
    const std::int64_t* places = plan_.head_rows().data() + first;
    worker.team.for_each(rows, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        float* h = h_.as<float>() + (at_h + r) * c.dim;
        final_norm(x_.as<float>() + in.row_token[places[r]] * c.dim, h);
        if (head.quantized()) {
          const QuantizedRows row = quantized_rows.from_row(r);
          kernels_.quantize_rows(h, c.dim, 1, c.dim, &row);
        }
      }
    });
    const Product product{&head, logits, c.vocab_size};
    multiply(worker, h_.as<float>(), c.dim, rows, &product, 1, false);
    mark(worker, Phase::head);
    worker.team.for_each(rows, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        float* row = logits + r * c.vocab_size;
        if (c.final_softcap > 0) kernels_.softcap(row, c.final_softcap, c.vocab_size);
        const std::int64_t at = places[r];
        if (out.logits != nullptr)
          std::memcpy(out.logits + at * c.vocab_size, row,
                      static_cast<std::size_t>(c.vocab_size) * sizeof(float));
        SampleOut sampled{};
        sampled.top_ids = out.top_ids + at * out.max_logprobs;
        sampled.top_logprobs = out.top_logprobs + at * out.max_logprobs;
        sample_row(kernels_, row, c.vocab_size, in.sample[at],
                   thread_state_[static_cast<std::size_t>(worker.index)].sampler, sampled);
        out.tokens[at] = sampled.token;
        out.logprob[at] = sampled.logprob;
        out.rank[at] = sampled.rank;
      }
    });
    mark(worker, Phase::sample);
  }
}

// ---- the step --------------------------------------------------------------------------------------------

void Decoder::copy_blocks(Team& team, const StepInput& in) {
  const DecoderConfig& c = config_;
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

// One layer for the part's tokens; x_ goes in and comes out.
void Decoder::run_layer(const Worker& worker, const StepInput& in, std::int64_t number) {
  const DecoderConfig& c = config_;
  const Layer& l = layers_[static_cast<std::size_t>(number)];
  const KvView kv = kv_view(number);
  const std::int64_t q_dim = c.num_heads * c.head_dim;
  const std::int64_t kv_dim = c.num_kv_heads * c.head_dim;
  const std::int64_t first = worker.part.tokens.begin, tokens = worker.part.tokens.size();
  float* x = x_.as<float>() + first * c.dim;
  float* h = h_.as<float>() + first * c.dim;
  // The projections from `projection` on.
  const auto multiply_rows = [&](Projection projection, const AlignedBuffer& from, std::int64_t cols,
                                 const Product* products, int count, bool accumulate) {
    multiply(worker, from.as<float>(), cols, tokens, products, count, accumulate);
    if (worker.part.adapter_runs.size() > 0)
      add_adapters(worker, number, projection, from.as<float>(), cols, products, count);
  };

  normalize(worker, l.attn_norm, l.attn_norm_bias, l.q->quantized() || l.k->quantized() || l.v->quantized());
  mark(worker, Phase::norm);
  const Product qkv[] = {{l.q.get(), q_.as<float>() + first * q_dim, q_dim},
                         {l.k.get(), k_.as<float>() + first * kv_dim, kv_dim},
                         {l.v.get(), v_.as<float>() + first * kv_dim, kv_dim}};
  multiply_rows(kQ, h_, c.dim, qkv, 3, false);
  mark(worker, Phase::qkv);
  prepare_heads(worker, in, l, kv, c.windows[static_cast<std::size_t>(number)] > 0);
  mark(worker, Phase::rope_kv);
  attend(worker, in, number, kv);
  mark(worker, Phase::attention);
  read_ahead(worker, number + 1);

  // Without a bias or a norm in between, the product lands on the residual at once.
  const bool plain_o = !l.o_bias && !l.attn_post_norm;
  if (l.o->quantized()) quantize_rows(worker, a_.as<float>(), q_dim);
  const Product o{l.o.get(), plain_o ? x : h, c.dim};
  multiply_rows(kO, a_, q_dim, &o, 1, plain_o);
  if (!plain_o) add_residual(worker, l.o_bias, l.attn_post_norm);
  mark(worker, Phase::output);

  normalize(worker, l.ffn_norm, l.ffn_norm_bias, l.gate->quantized() || l.up->quantized());
  mark(worker, Phase::norm);
  const Product gate_up[] = {{l.gate.get(), gate_.as<float>() + first * c.ffn_dim, c.ffn_dim},
                             {l.up.get(), up_.as<float>() + first * c.ffn_dim, c.ffn_dim}};
  multiply_rows(kGate, h_, c.dim, gate_up, 2, false);
  mark(worker, Phase::gate_up);
  activate(worker, l);
  mark(worker, Phase::activation);
  const bool plain_down = !l.down_bias && !l.ffn_post_norm;
  const Product down{l.down.get(), plain_down ? x : h, c.dim};
  multiply_rows(kDown, gate_, c.ffn_dim, &down, 1, plain_down);
  if (!plain_down) add_residual(worker, l.down_bias, l.ffn_post_norm);
  mark(worker, Phase::down);
}

void Decoder::step(const StepInput& in, const StepOutput& out) {
  profile_.start();
  plan_.make(in, config_, kv_view(0), pool_.size());
  reserve(in);
  pool_.run([&](Team& team, int thread) {
    const Part& part = plan_.part_of(thread);
    const Worker worker{part, part.team ? *part.team : team, thread - static_cast<int>(part.threads.begin),
                        thread};
    mark(worker, Phase::prepare);
    if (in.copies > 0) copy_blocks(team, in);
    embed(worker, in);
    mark(worker, Phase::embed);
    read_ahead(worker, 0);
    for (std::int64_t i = 0; i < config_.num_layers; ++i) run_layer(worker, in, i);
    pool_rows(worker, in, out);
    yield_rows(worker, in, out);
  });
  profile_.mark(Phase::wait);
  last_tokens_.assign(out.tokens, out.tokens + in.rows);
  // A row without a number has no token; who goes on from it all the same must not read outside the table.
  for (std::int32_t& token : last_tokens_) token = std::max(token, 0);
}

}  // namespace fastllm
