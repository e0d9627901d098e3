// A low-rank adapter (LoRA): for some projections of some layers two small matrices, which add
//   y += scale * (x A^T) B^T
// to what the projection makes of the same fp32 input row.
//
// Everything is fp32; B is packed like a weight, A lies row by row.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/memory.h"
#include "quant/packed.h"

namespace fastllm {

constexpr std::int64_t kAdapterRankMax = 256;
constexpr std::int64_t kAdapterLayersMax = 1024;
constexpr std::int64_t kAdaptersMax = 256;  // in a decoder at a time

// A layer's projections by their slots, in the order in which a layer computes them.
enum Projection : int { kQ, kK, kV, kO, kGate, kUp, kDown };
constexpr std::array<const char*, 7> kProjectionSlots = {"q", "k", "v", "o", "gate", "up", "down"};

struct AdapterMatrices {
  std::int64_t rank = 0;  // 0: the adapter leaves this projection alone
  std::int64_t cols = 0;
  float scale = 0;
  AlignedBuffer a;                        // (rank, cols)
  std::shared_ptr<const PackedMatrix> b;  // (rows, rank)
};

class Adapter {
 public:
  // Throws ArgumentError: an unknown slot, a layer or rank out of range, or matrices that do not fit each
  // other. Whether they fit a decoder is seen when it takes the adapter.
  void set(const std::string& slot, std::int64_t layer, const float* a, std::int64_t rank, std::int64_t cols,
           std::shared_ptr<const PackedMatrix> b, float scale);

  // Nothing can be set any more: a decoder has it.
  void seal() { sealed_ = true; }

  // Layers from 0 to the last that has something.
  std::int64_t layers() const { return static_cast<std::int64_t>(layers_.size()); }
  // Null where the adapter has nothing.
  const AdapterMatrices* find(std::int64_t layer, int projection) const {
    if (layer >= layers()) return nullptr;
    const AdapterMatrices& m = layers_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(projection)];
    return m.rank > 0 ? &m : nullptr;
  }
  std::int64_t rank() const { return rank_; }  // the largest
  std::size_t nbytes() const { return nbytes_; }

 private:
  std::vector<std::array<AdapterMatrices, kProjectionSlots.size()>> layers_;
  std::int64_t rank_ = 0;
  std::size_t nbytes_ = 0;
  bool sealed_ = false;
};

}  // namespace fastllm
