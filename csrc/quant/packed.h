// A weight matrix in one of the packed layouts (see PackedView in kernels/kernels.h), and how it is made.
//
// Every format on disk becomes one of these; nothing of the file's precision is lost, so unpack() gives exactly the
// floats that the format's own decoder gives. Kernels know these layouts only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/memory.h"
#include "kernels/kernels.h"

namespace fastllm {

struct PackedMatrix {
  Codes kind = Codes::f32;
  std::int64_t rows = 0;   // N
  std::int64_t cols = 0;   // K
  std::int32_t group = 0;  // columns per scale; 0 for floating-point kinds
  std::int32_t zero = 0;
  bool has_codebook = false;
  std::int8_t codebook[16] = {};
  AlignedBuffer codes, extra, scales, subscales, mins, submins;

  std::int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  std::int64_t kp() const { return (cols + 31) / 32 * 32; }
  bool quantized() const { return kind < Codes::f16; }
  std::size_t nbytes() const {
    return codes.size() + extra.size() + scales.size() + subscales.size() + mins.size() + submins.size();
  }
  PackedView view() const;
  std::string layout() const;  // e.g. "u4 g32 fp16 scale, fp16 min"
};

// Packs `rows` x `cols` values of a GGUF tensor type ("F32", "Q4_1", "Q6_K", ...). data: the file's bytes, whole rows.
// row_order: null, or rows entries; packed row i is the file's row row_order[i].
// Throws std::invalid_argument for an unknown type, cols that are not whole blocks, or a wrong byte count.
PackedMatrix pack_ggml(const std::string& type, const std::uint8_t* data, std::size_t nbytes, std::int64_t rows,
                       std::int64_t cols, const std::int32_t* row_order);

// Decodes GGUF data to floats exactly as the format defines it, without packing. out: (rows, cols).
void dequantize_ggml(const std::string& type, const std::uint8_t* data, std::size_t nbytes, std::int64_t rows,
                     std::int64_t cols, float* out);

// Quantizes fp32 w (rows, cols): bits 4 (unsigned codes with an fp16 scale and an fp16 min per group) or 8
// (symmetric, fp16 scale per group). group: 16, 32, 64 or 128 columns; cols need not divide by it.
PackedMatrix quantize(const float* w, std::int64_t rows, std::int64_t cols, int bits, int group);

// out: (rows, cols) floats.
void unpack(const PackedMatrix& matrix, float* out);

}  // namespace fastllm
