// The CPU decoder: a DecoderSpec's sizes, its packed weights, the paged KV cache, and one call per step.
//
// What it computes stands in fastllm/models/spec.py. A step takes one flat batch (prefill chunks and decodes
// together) and yields, for the rows asked for, a sampled token or log-probabilities. All buffers grow to the
// largest batch seen and stay; a step in the steady state allocates little but its plan (step_plan.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "model/adapter.h"
#include "model/batch.h"
#include "model/profile.h"
#include "model/sampler.h"
#include "model/step_plan.h"
#include "quant/packed.h"

namespace fastllm {

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
  // Bytes of one block of the cache that is allocated; 0 without one.
  std::size_t block_bytes() const {
    return kv_blocks_ ? kv_bytes_per_block(config_, block_size_, kv_type_) : 0;
  }
  // Copies whole blocks out of the cache and into it, (count, block_bytes()); each below kv_blocks(). Not
  // while a step runs. See kv_blocks.cpp.
  void read_blocks(const std::int32_t* blocks, std::int64_t count, std::uint8_t* out);
  void write_blocks(const std::int32_t* blocks, std::int64_t count, const std::uint8_t* data);
  std::size_t weight_bytes() const;

  // Makes sequences of StepInput::adapter == index use it, in place of what was there. Throws ArgumentError
  // for an index out of range and for matrices of another shape than the decoder's; nothing changed then.
  void load_adapter(std::int64_t index, std::shared_ptr<const Adapter> adapter);
  // Forgets it; an index that has none is ignored.
  void unload_adapter(std::int64_t index);
  bool has_adapter(std::int64_t index) const {
    return index >= 0 && index < static_cast<std::int64_t>(adapters_.size()) &&
           adapters_[static_cast<std::size_t>(index)] != nullptr;
  }

  void step(const StepInput& in, const StepOutput& out);

  // Times of the phases of all steps since it was enabled.
  Profile& profile() { return profile_; }

  // Frees cache and activations; until allocate_kv there are no steps.
  void release_kv();
  // Frees weights too; they can be set anew.
  void release_weights();
  // Frees everything; only the sizes remain.
  void close();

 private:
  using Vector = AlignedBuffer;
  using Matrix = std::shared_ptr<const PackedMatrix>;
  struct Layer {
    Matrix q, k, v, o, gate, up, down;
    Vector attn_norm, attn_norm_bias, ffn_norm, ffn_norm_bias, attn_post_norm, ffn_post_norm, q_norm, k_norm;
    Vector q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias;
  };
  // One product of a phase: y (+)= w x, the x being the phase's; y of the first row.
  struct Product {
    const PackedMatrix* w;
    float* y;
    std::int64_t ldy;
  };
  struct ThreadState {
    AlignedBuffer scratch;
    SampleWorkspace sampler;
    ReadAhead ahead;  // of the KV cache, while products are computed
  };

  Vector* find_vector(const std::string& slot, std::int64_t layer, std::int64_t* size);
  Matrix* find_matrix(const std::string& slot, std::int64_t layer, std::int64_t* rows, std::int64_t* cols);
  void reserve(const StepInput& in);
  KvView kv_view(std::int64_t layer);
  QuantizedRows quantized(const Part& part, std::int64_t cols);
  std::int64_t quantized_row_bytes() const;

  void copy_blocks(Team& team, const StepInput& in);

  // What every thread walks through; `worker` is the thread, at its part.
  void run_layer(const Worker& worker, const StepInput& in, std::int64_t number);
  void embed(const Worker& worker, const StepInput& in);
  void normalize(const Worker& worker, const Vector& weight, const Vector& bias, bool quantize);
  void quantize_rows(const Worker& worker, const float* x, std::int64_t cols);
  void multiply(const Worker& worker, const float* x, std::int64_t ldx, std::int64_t rows,
                const Product* products, int count, bool accumulate);
  void add_adapters(const Worker& worker, std::int64_t layer, int first, const float* x, std::int64_t ldx,
                    const Product* products, int count);
  const Adapter& adapter_of(const AdapterRun& run) const {
    return *adapters_[static_cast<std::size_t>(run.adapter)];
  }
  void prepare_heads(const Worker& worker, const StepInput& in, const Layer& layer, const KvView& kv,
                     bool sliding);
  void attend(const Worker& worker, const StepInput& in, std::int64_t layer, const KvView& kv);
  void read_ahead(const Worker& worker, std::int64_t layer);
  void activate(const Worker& worker, const Layer& layer);
  void add_residual(const Worker& worker, const Vector& bias, const Vector& post_norm);
  void final_norm(const float* x, float* h) const;
  void pool_rows(const Worker& worker, const StepInput& in, const StepOutput& out);
  void yield_rows(const Worker& worker, const StepInput& in, const StepOutput& out);
  void mark(const Worker& worker, Phase phase) {
    if (worker.index == 0) profile_.mark(phase);
  }

  DecoderConfig config_;
  const Kernels& kernels_;
  ThreadPool pool_;
  std::vector<ThreadState> thread_state_;
  Profile profile_;

  Matrix embed_, head_;  // head_ null: tied
  Vector final_norm_, final_norm_bias_;
  std::vector<Layer> layers_;

  std::vector<std::shared_ptr<const Adapter>> adapters_;  // by index; null: free

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
  AlignedBuffer low_;                                    // (T, 3 products, low_stride_), of adapters
  std::int64_t low_stride_ = 0;
  AlignedBuffer quantized_;  // int8 rows of the widest input, see quantized()
  AlignedBuffer logits_;     // (rows at a time, vocab_size)
  StepPlan plan_;
  std::vector<std::int32_t> last_tokens_;  // what the previous step sampled
};

}  // namespace fastllm
