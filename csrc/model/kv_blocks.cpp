// Whole blocks of the KV cache to and from bytes outside of it, for whoever keeps them elsewhere.
//
// A block outside is its parts end to end: of every layer the heads of K, those of V and, for the integer
// types, the scales of both in the same order. The parts are copied as they are, so a block that comes back,
// under whatever number, gives attention the same bits.
#include <cstring>

#include "model/decoder.h"

namespace fastllm {
namespace {

// Calls visit(part, bytes) for each part of a layer's block, in order.
template <typename Visit>
void visit_block(const KvView& kv, std::int64_t block, const Visit& visit) {
  const std::int64_t values = kv.block_size * kv.head_dim * kv_value_bytes(kv.type);  // bytes of a head's
  for (void* plane : {kv.k, kv.v})
    for (std::int64_t head = 0; head < kv.kv_heads; ++head)
      visit(static_cast<std::uint8_t*>(plane) + kv_block(&kv, head, block) * values, values);
  if (!kv_has_scales(kv.type)) return;
  for (float* plane : {kv.k_scale, kv.v_scale})
    for (std::int64_t head = 0; head < kv.kv_heads; ++head)
      visit(reinterpret_cast<std::uint8_t*>(plane + kv_block(&kv, head, block) * kv.block_size),
            kv.block_size * static_cast<std::int64_t>(sizeof(float)));
}

}  // namespace

void Decoder::read_blocks(const std::int32_t* blocks, std::int64_t count, std::uint8_t* out) {
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t layer = 0; layer < config_.num_layers; ++layer)
      visit_block(kv_view(layer), blocks[i], [&](const std::uint8_t* part, std::int64_t bytes) {
        std::memcpy(out, part, static_cast<std::size_t>(bytes));
        out += bytes;
      });
}

void Decoder::write_blocks(const std::int32_t* blocks, std::int64_t count, const std::uint8_t* data) {
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t layer = 0; layer < config_.num_layers; ++layer)
      visit_block(kv_view(layer), blocks[i], [&](std::uint8_t* part, std::int64_t bytes) {
        std::memcpy(part, data, static_cast<std::size_t>(bytes));
        data += bytes;
      });
}

}  // namespace fastllm
