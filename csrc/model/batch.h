// A decoder's sizes, and one step's batch as plain pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "model/sampler.h"

namespace fastllm {

enum class NormKind { rms, layer };
enum class Activation { silu, gelu_tanh };

struct DecoderConfig {
  std::int64_t vocab_size = 0;
  std::int64_t dim = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;  // a multiple of 16
  std::int64_t ffn_dim = 0;
  NormKind norm = NormKind::rms;
  float norm_eps = 1e-5f;
  bool post_norms = false;
  Activation activation = Activation::silu;
  std::int64_t rotary_dim = 0;           // 0: no rope
  std::vector<double> inv_freq;          // rotary_dim / 2
  std::vector<double> inv_freq_sliding;  // for layers with a window; empty: the same
  std::vector<std::int32_t> windows;     // per layer, 0: none
  float attention_scale = 0;
  float attn_softcap = 0;
  float final_softcap = 0;
  float embedding_scale = 1;
};

// One step's batch; StepBatch of the engine as plain pointers. All were checked by the binding.
struct StepInput {
  std::int64_t tokens = 0, sequences = 0, rows = 0, max_blocks = 0, copies = 0;
  const std::int32_t* token_ids = nullptr;     // (T); -1 - r: what row r of the previous step sampled
  const std::int32_t* positions = nullptr;     // (T)
  const std::int32_t* slot_mapping = nullptr;  // (T)
  const std::int32_t* query_start = nullptr;   // (S + 1)
  const std::int32_t* seq_lens = nullptr;      // (S)
  const std::int32_t* adapter = nullptr;       // (S) index of a loaded adapter, -1: none; null: none at all
  const std::int32_t* block_tables = nullptr;  // (S, max_blocks)
  const std::int32_t* copy_blocks = nullptr;   // (C, 2)
  const std::int32_t* row_token = nullptr;     // (R)
  const SampleRow* sample = nullptr;           // (R)
};

struct StepOutput {
  std::int32_t* tokens = nullptr;   // (R); -1 when the logits were not numbers; 0 in rows that pool, -1
                                    // when their hidden state is not
  float* logprob = nullptr;         // (R)
  std::int32_t* rank = nullptr;     // (R)
  std::int32_t* top_ids = nullptr;  // (R, L)
  float* top_logprobs = nullptr;    // (R, L)
  std::int64_t max_logprobs = 0;    // L
  float* logits = nullptr;          // (R, V), or null: raw logits are not wanted; 0 in rows that pool
  float* hidden = nullptr;          // (P, dim): the final norm's output, a line for each row that pools
};

}  // namespace fastllm
