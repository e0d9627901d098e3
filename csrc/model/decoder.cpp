// The decoder's weights and KV cache: what is set once. The step is decoder_step.cpp.
#include "model/decoder.h"

#include <cstring>
#include <stdexcept>

#include "core/argument_error.h"
#include "core/math.h"
#include "dispatch.h"

namespace fastllm {

Decoder::Decoder(DecoderConfig config, int threads)
    : config_(std::move(config)),
      kernels_(kernels()),
      pool_(threads > 0 ? threads : available_processors()),
      thread_state_(static_cast<std::size_t>(pool_.size())),
      layers_(static_cast<std::size_t>(config_.num_layers)) {
  const auto fail = [](const char* what) { throw std::invalid_argument(what); };
  if (config_.head_dim % 16 != 0 || config_.head_dim > 512)
    fail("head_dim: expected a multiple of 16 up to 512");
  if (config_.num_kv_heads < 1 || config_.num_heads % config_.num_kv_heads != 0)
    fail("num_heads: expected a multiple of num_kv_heads");
  if (config_.rotary_dim % 2 != 0 || config_.rotary_dim > config_.head_dim)
    fail("rotary_dim: expected an even number of at most head_dim");
  const auto pairs = static_cast<std::size_t>(config_.rotary_dim / 2);
  if (config_.inv_freq.size() != pairs) fail("inv_freq: expected rotary_dim / 2 values");
  if (!config_.inv_freq_sliding.empty() && config_.inv_freq_sliding.size() != pairs)
    fail("inv_freq_sliding: expected rotary_dim / 2 values");
  if (config_.windows.size() != layers_.size()) fail("windows: expected one value per layer");
}

// ---- weights ---------------------------------------------------------------------------------------------

Decoder::Matrix* Decoder::find_matrix(const std::string& slot, std::int64_t layer, std::int64_t* rows,
                                      std::int64_t* cols) {
  const DecoderConfig& c = config_;
  const std::int64_t q_rows = c.num_heads * c.head_dim;
  const std::int64_t kv_rows = c.num_kv_heads * c.head_dim;
  const auto shape = [&](std::int64_t n, std::int64_t k, Matrix* matrix) {
    *rows = n;
    *cols = k;
    return matrix;
  };
  if (layer < 0) {
    if (slot == "embed") return shape(c.vocab_size, c.dim, &embed_);
    if (slot == "head") return shape(c.vocab_size, c.dim, &head_);
    return nullptr;
  }
  if (layer >= static_cast<std::int64_t>(layers_.size())) return nullptr;  // none are left after close()
  Layer& l = layers_[static_cast<std::size_t>(layer)];
  if (slot == "q") return shape(q_rows, c.dim, &l.q);
  if (slot == "k") return shape(kv_rows, c.dim, &l.k);
  if (slot == "v") return shape(kv_rows, c.dim, &l.v);
  if (slot == "o") return shape(c.dim, q_rows, &l.o);
  if (slot == "gate") return shape(c.ffn_dim, c.dim, &l.gate);
  if (slot == "up") return shape(c.ffn_dim, c.dim, &l.up);
  if (slot == "down") return shape(c.dim, c.ffn_dim, &l.down);
  return nullptr;
}

Decoder::Vector* Decoder::find_vector(const std::string& slot, std::int64_t layer, std::int64_t* size) {
  const DecoderConfig& c = config_;
  const auto sized = [&](std::int64_t n, Vector* vector) {
    *size = n;
    return vector;
  };
  if (layer < 0) {
    if (slot == "final_norm") return sized(c.dim, &final_norm_);
    if (slot == "final_norm_bias") return sized(c.dim, &final_norm_bias_);
    return nullptr;
  }
  if (layer >= static_cast<std::int64_t>(layers_.size())) return nullptr;  // none are left after close()
  Layer& l = layers_[static_cast<std::size_t>(layer)];
  if (slot == "attn_norm") return sized(c.dim, &l.attn_norm);
  if (slot == "attn_norm_bias") return sized(c.dim, &l.attn_norm_bias);
  if (slot == "ffn_norm") return sized(c.dim, &l.ffn_norm);
  if (slot == "ffn_norm_bias") return sized(c.dim, &l.ffn_norm_bias);
  if (slot == "attn_post_norm") return sized(c.dim, &l.attn_post_norm);
  if (slot == "ffn_post_norm") return sized(c.dim, &l.ffn_post_norm);
  if (slot == "q_norm") return sized(c.head_dim, &l.q_norm);
  if (slot == "k_norm") return sized(c.head_dim, &l.k_norm);
  if (slot == "q_bias") return sized(c.num_heads * c.head_dim, &l.q_bias);
  if (slot == "k_bias") return sized(c.num_kv_heads * c.head_dim, &l.k_bias);
  if (slot == "v_bias") return sized(c.num_kv_heads * c.head_dim, &l.v_bias);
  if (slot == "o_bias") return sized(c.dim, &l.o_bias);
  if (slot == "gate_bias") return sized(c.ffn_dim, &l.gate_bias);
  if (slot == "up_bias") return sized(c.ffn_dim, &l.up_bias);
  if (slot == "down_bias") return sized(c.dim, &l.down_bias);
  return nullptr;
}

void Decoder::set_matrix(const std::string& slot, std::int64_t layer,
                         std::shared_ptr<const PackedMatrix> matrix) {
  std::int64_t rows = 0, cols = 0;
  Matrix* place = find_matrix(slot, layer, &rows, &cols);
  if (place == nullptr)
    throw std::invalid_argument("slot: no matrix " + slot + " in layer " + std::to_string(layer));
  if (matrix->rows != rows || matrix->cols != cols)
    throw std::invalid_argument(slot + ": expected shape (" + std::to_string(rows) + ", " +
                                std::to_string(cols) + "), got (" + std::to_string(matrix->rows) + ", " +
                                std::to_string(matrix->cols) + ")");
  *place = std::move(matrix);
}

void Decoder::set_vector(const std::string& slot, std::int64_t layer, const float* values, std::int64_t n) {
  std::int64_t size = 0;
  Vector* place = find_vector(slot, layer, &size);
  if (place == nullptr)
    throw std::invalid_argument("slot: no vector " + slot + " in layer " + std::to_string(layer));
  if (n != size)
    throw std::invalid_argument(slot + ": expected " + std::to_string(size) + " values, got " +
                                std::to_string(n));
  *place = Vector(static_cast<std::size_t>(n) * sizeof(float));
  std::memcpy(place->as<float>(), values, static_cast<std::size_t>(n) * sizeof(float));
}

void Decoder::check_complete() const {
  const auto need = [](bool present, const char* slot, std::size_t layer) {
    if (!present)
      throw std::invalid_argument(std::string(slot) + ": missing in layer " + std::to_string(layer));
  };
  if (!embed_) throw std::invalid_argument("embed: missing");
  if (!final_norm_) throw std::invalid_argument("final_norm: missing");
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const Layer& l = layers_[i];
    need(static_cast<bool>(l.q), "q", i);
    need(static_cast<bool>(l.k), "k", i);
    need(static_cast<bool>(l.v), "v", i);
    need(static_cast<bool>(l.o), "o", i);
    need(static_cast<bool>(l.gate), "gate", i);
    need(static_cast<bool>(l.up), "up", i);
    need(static_cast<bool>(l.down), "down", i);
    need(static_cast<bool>(l.attn_norm), "attn_norm", i);
    need(static_cast<bool>(l.ffn_norm), "ffn_norm", i);
    need(!config_.post_norms || l.attn_post_norm, "attn_post_norm", i);
    need(!config_.post_norms || l.ffn_post_norm, "ffn_post_norm", i);
    need(static_cast<bool>(l.q_norm) == static_cast<bool>(l.k_norm), "q_norm or k_norm", i);
  }
}

std::size_t Decoder::weight_bytes() const {
  std::size_t bytes = embed_ ? embed_->nbytes() : 0;
  if (head_) bytes += head_->nbytes();
  for (const Layer& l : layers_)
    for (const Matrix* m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down})
      if (*m) bytes += (*m)->nbytes();
  return bytes;
}

void Decoder::release_kv() {
  kv_ = AlignedBuffer();
  kv_blocks_ = 0;
  for (AlignedBuffer* buffer : {&x_, &h_, &q_, &k_, &v_, &a_, &gate_, &up_, &cos_, &sin_, &cos_sliding_,
                                &sin_sliding_, &low_, &quantized_, &logits_})
    *buffer = AlignedBuffer();
  plan_ = StepPlan();
  for (ThreadState& state : thread_state_) state = ThreadState{};
}

void Decoder::release_weights() {
  release_kv();
  embed_.reset();
  head_.reset();
  final_norm_ = Vector();
  final_norm_bias_ = Vector();
  for (Layer& layer : layers_) layer = Layer{};
}

void Decoder::close() {
  release_weights();
  layers_.clear();
  adapters_.clear();
}

// ---- adapters --------------------------------------------------------------------------------------------

void Decoder::load_adapter(std::int64_t index, std::shared_ptr<const Adapter> adapter) {
  if (index < 0 || index >= kAdaptersMax)
    throw ArgumentError("index", std::to_string(index), "0 to " + std::to_string(kAdaptersMax - 1));
  for (std::int64_t layer = 0; layer < adapter->layers(); ++layer) {
    for (std::size_t i = 0; i < kProjectionSlots.size(); ++i) {
      const AdapterMatrices* m = adapter->find(layer, static_cast<int>(i));
      if (m == nullptr) continue;
      const std::string name = std::string(kProjectionSlots[i]) + " of layer " + std::to_string(layer);
      std::int64_t rows = 0, cols = 0;
      if (find_matrix(kProjectionSlots[i], layer, &rows, &cols) == nullptr)
        throw ArgumentError("adapter", name, "layers below " + std::to_string(layers_.size()));
      if (m->b->rows != rows || m->cols != cols)
        throw ArgumentError("adapter",
                            name + " from " + std::to_string(m->cols) + " to " + std::to_string(m->b->rows),
                            "from " + std::to_string(cols) + " to " + std::to_string(rows));
    }
  }
  const auto at = static_cast<std::size_t>(index);
  if (at >= adapters_.size()) adapters_.resize(at + 1);
  adapters_[at] = std::move(adapter);
}

void Decoder::unload_adapter(std::int64_t index) {
  if (has_adapter(index)) adapters_[static_cast<std::size_t>(index)].reset();
}

// ---- the KV cache ----------------------------------------------------------------------------------------
// One buffer: for every group of blocks, K and V of layer after layer, as KvView says; then in the same
// order, for the integer types, their scales.

std::size_t Decoder::kv_bytes_per_block(const DecoderConfig& config, std::int32_t block_size, KvType type) {
  const auto positions = static_cast<std::size_t>(config.num_layers * config.num_kv_heads * block_size);
  const std::size_t scales = kv_has_scales(type) ? sizeof(float) : 0;
  const auto head = static_cast<std::size_t>(config.head_dim * kv_value_bytes(type));
  return 2 * positions * (head + scales);
}

void Decoder::allocate_kv(std::int64_t blocks, std::int32_t block_size, KvType type) {
  kv_ = AlignedBuffer();
  kv_blocks_ = 0;
  // Whole groups; what is never used is never touched.
  const std::int64_t whole = ceil_div(blocks, kBlocksTogether) * kBlocksTogether;
  kv_ = AlignedBuffer(static_cast<std::size_t>(whole) * kv_bytes_per_block(config_, block_size, type));
  kv_blocks_ = blocks;
  block_size_ = block_size;
  kv_type_ = type;
}

KvView Decoder::kv_view(std::int64_t layer) {
  const std::int64_t heads = config_.num_kv_heads, plane = kv_group_stride(1, heads);
  const std::int64_t block = block_size_ * config_.head_dim * kv_value_bytes(kv_type_);  // bytes of a head's
  std::uint8_t* values = kv_.as<std::uint8_t>();
  KvView view{};
  view.group_stride = kv_group_stride(2 * config_.num_layers, heads);
  view.k = values + 2 * layer * plane * block;
  view.v = values + (2 * layer + 1) * plane * block;
  if (kv_has_scales(kv_type_)) {
    const std::int64_t groups = ceil_div(kv_blocks_, kBlocksTogether);
    auto* scales = reinterpret_cast<float*>(values + groups * view.group_stride * block);
    view.k_scale = scales + 2 * layer * plane * block_size_;
    view.v_scale = scales + (2 * layer + 1) * plane * block_size_;
  }
  view.kv_heads = static_cast<std::int32_t>(heads);
  view.head_dim = static_cast<std::int32_t>(config_.head_dim);
  view.block_size = block_size_;
  view.type = kv_type_;
  return view;
}

}  // namespace fastllm
