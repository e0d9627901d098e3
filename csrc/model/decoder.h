// The CPU decoder: a DecoderSpec's sizes, its packed weights, the paged KV cache, and one call per step.
//
// What it computes stands in fastllm/models/spec.py. A step takes one flat batch (prefill chunks and decodes
// together) and yields, for the rows asked for, a sampled token or log-probabilities. All buffers grow to the
// largest batch seen and stay; a step in the steady state allocates nothing but its list of attention items.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "model/profile.h"
#include "model/sampler.h"
#include "quant/packed.h"

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
  const std::int32_t* block_tables = nullptr;  // (S, max_blocks)
  const std::int32_t* copy_blocks = nullptr;   // (C, 2)
  const std::int32_t* row_token = nullptr;     // (R)
  const SampleRow* sample = nullptr;           // (R)
};

struct StepOutput {
  std::int32_t* tokens = nullptr;   // (R); -1 when the logits were not numbers
  float* logprob = nullptr;         // (R)
  std::int32_t* rank = nullptr;     // (R)
  std::int32_t* top_ids = nullptr;  // (R, L)
  float* top_logprobs = nullptr;    // (R, L)
  std::int64_t max_logprobs = 0;    // L
  float* logits = nullptr;          // (R, V), or null: raw logits are not wanted
};

class Decoder {
 public:
  // threads: 0 takes all available processors. Throws std::invalid_argument.
  Decoder(DecoderConfig config, int threads);

  const DecoderConfig& config() const { return config_; }
  int threads() const { return pool_.size(); }

  // layer -1 for "embed", "final_norm", "head". Throws std::invalid_argument for an unknown slot or a wrong
  // shape.
  void set_matrix(const std::string& slot, std::int64_t layer, std::shared_ptr<const PackedMatrix> matrix);
  void set_vector(const std::string& slot, std::int64_t layer, const float* values, std::int64_t n);
  // Throws std::invalid_argument naming a slot that is still missing.
  void check_complete() const;

  // Throws std::bad_alloc.
  void allocate_kv(std::int64_t blocks, std::int32_t block_size, KvType type);
  std::int64_t kv_blocks() const { return kv_blocks_; }
  std::int32_t block_size() const { return block_size_; }
  static std::size_t kv_bytes_per_block(const DecoderConfig& config, std::int32_t block_size, KvType type);
  std::size_t weight_bytes() const;

  void step(const StepInput& in, const StepOutput& out);

  // Times of the phases of all steps since it was enabled.
  Profile& profile() { return profile_; }

  // Frees weights, cache and activations; only the sizes remain.
  void close();

 private:
  using Vector = AlignedBuffer;
  using Matrix = std::shared_ptr<const PackedMatrix>;
  struct Layer {
    Matrix q, k, v, o, gate, up, down;
    Vector attn_norm, attn_norm_bias, ffn_norm, ffn_norm_bias, attn_post_norm, ffn_post_norm, q_norm, k_norm;
    Vector q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias;
  };
  // One product of a phase: y (+)= w x, the x being the phase's.
  struct Product {
    const PackedMatrix* w;
    float* y;
    std::int64_t ldy;
  };
  // A run of queries of one sequence and KV head, and the tiles of the cache that one thread folds.
  struct AttentionItem {
    std::int32_t sequence, kv_head, query_begin, queries;
    std::int64_t tile_begin, tile_end;
    float* partials;  // null: fold at once
  };
  struct AttentionMerge {
    std::int32_t sequence, kv_head, query;
    std::int64_t tiles;
    const float* partials;
  };
  struct ThreadState {
    AlignedBuffer scratch;
    SampleWorkspace sampler;
    ReadAhead ahead;  // of the KV cache, while products are computed
  };

  Vector* find_vector(const std::string& slot, std::int64_t layer, std::int64_t* size);
  Matrix* find_matrix(const std::string& slot, std::int64_t layer, std::int64_t* rows, std::int64_t* cols);
  void reserve(const StepInput& in);
  void plan_attention(const StepInput& in);
  void cut_attention(const StepInput& in);
  void plan_read_ahead(const StepInput& in);
  void read_ahead(int thread, std::int64_t layer);
  KvView kv_view(std::int64_t layer);
  QuantizedRows quantized(std::int64_t cols);

  // Phases; each is called by every thread of the team.
  void embed(Team& team, const StepInput& in);
  void normalize(Team& team, const float* x, const Vector& weight, const Vector& bias, std::int64_t rows,
                 bool quantize);
  void quantize_rows(Team& team, const float* x, std::int64_t rows, std::int64_t cols);
  void multiply(Team& team, int thread, const float* x, std::int64_t ldx, std::int64_t rows,
                const Product* products, int count, bool accumulate);
  void prepare_heads(Team& team, const StepInput& in, const Layer& layer, const KvView& kv, bool sliding);
  void attend(Team& team, int thread, const StepInput& in, std::int64_t layer, const KvView& kv);
  void add_residual(Team& team, const float* y, const Vector& bias, const Vector& post_norm,
                    std::int64_t rows);
  void yield_rows(Team& team, int thread, const StepInput& in, const StepOutput& out);

  DecoderConfig config_;
  const Kernels& kernels_;
  ThreadPool pool_;
  std::vector<ThreadState> thread_state_;
  Profile profile_;

  Matrix embed_, head_;  // head_ null: tied
  Vector final_norm_, final_norm_bias_;
  std::vector<Layer> layers_;

  AlignedBuffer kv_;
  std::int64_t kv_blocks_ = 0;
  std::int32_t block_size_ = 0;
  KvType kv_type_ = KvType::i16;

  // Activations of one step, fp32 unless said otherwise.
  AlignedBuffer x_;              // (T, dim): the residual
  AlignedBuffer h_;              // (T, dim): normalised, or a product on its way to the residual
  AlignedBuffer q_, k_, v_, a_;  // (T, heads * head_dim), a: attention's output
  AlignedBuffer gate_, up_;      // (T, ffn_dim)
  AlignedBuffer cos_, sin_, cos_sliding_, sin_sliding_;  // (T, rotary_dim / 2)
  AlignedBuffer quantized_;                              // int8 rows of the widest input, see quantized()
  AlignedBuffer logits_;                                 // (rows at a time, vocab_size)
  AlignedBuffer partials_;
  std::int64_t quantized_rows_ = 0;
  std::vector<AttentionItem> items_;
  std::vector<AttentionMerge> merges_;
  std::vector<std::int64_t> item_cuts_;    // between the items of one thread and the next; the rest is shared
  std::vector<BlockRun> block_runs_;       // what attention reads of a layer, in the order of the items
  std::int32_t longest_ = 0;               // sequence of the step
  std::vector<std::int32_t> last_tokens_;  // what the previous step sampled
};

}  // namespace fastllm
