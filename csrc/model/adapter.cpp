#include "model/adapter.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/argument_error.h"

namespace fastllm {

void Adapter::set(const std::string& slot, std::int64_t layer, const float* a, std::int64_t rank,
                  std::int64_t cols, std::shared_ptr<const PackedMatrix> b, float scale) {
  if (sealed_) throw ArgumentError("adapter", "one that a decoder has", "one that no decoder has yet");
  const auto place = std::find(kProjectionSlots.begin(), kProjectionSlots.end(), slot);
  if (place == kProjectionSlots.end()) throw ArgumentError("slot", slot, "q, k, v, o, gate, up or down");
  if (layer < 0 || layer >= kAdapterLayersMax)
    throw ArgumentError("layer", std::to_string(layer), "0 to " + std::to_string(kAdapterLayersMax - 1));
  if (rank < 1 || rank > kAdapterRankMax)
    throw ArgumentError("a", std::to_string(rank) + " rows", "1 to " + std::to_string(kAdapterRankMax));
  if (cols < 1) throw ArgumentError("a", "no columns", "at least one");
  if (b->kind != Codes::f32 || b->cols != rank)
    throw ArgumentError("b", b->layout() + " with " + std::to_string(b->cols) + " columns",
                        "f32 with " + std::to_string(rank) + " columns, the rows of a");
  if (!std::isfinite(scale)) throw ArgumentError("scale", std::to_string(scale), "a finite number");
  if (layer >= layers()) layers_.resize(static_cast<std::size_t>(layer) + 1);
  AdapterMatrices& m =
      layers_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(place - kProjectionSlots.begin())];
  if (m.rank > 0) throw ArgumentError("slot", slot, "each slot of a layer once");
  const auto bytes = static_cast<std::size_t>(rank * cols) * sizeof(float);
  m.a = AlignedBuffer::carve(bytes);
  std::memcpy(m.a.as<float>(), a, bytes);
  m.b = std::move(b);
  m.rank = rank;
  m.cols = cols;
  m.scale = scale;
  rank_ = std::max(rank_, rank);
  nbytes_ += bytes + m.b->nbytes();
}

}  // namespace fastllm
