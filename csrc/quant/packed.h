// A weight matrix in one of the packed layouts (see PackedView in kernels/kernels.h), and how it is made.
//
// Every format on disk becomes one of these; nothing of the file's precision is lost, so unpack() gives
// exactly the floats that the format's own decoder gives. Kernels know these layouts only.
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
  // Entries per row of subscales, and of scales without them; a ceiling, for the last group may be short.
  std::int64_t groups() const { return group == 0 ? 0 : (kp() + group - 1) / group; }
  std::int64_t supers() const { return (cols + kSuper - 1) / kSuper; }
  bool quantized() const { return kind < Codes::f16; }
  std::size_t nbytes() const {
    return codes.size() + extra.size() + scales.size() + subscales.size() + mins.size() + submins.size();
  }
  PackedView view() const;
  std::string layout() const;  // e.g. "u4 g32 fp16 scale, fp16 min"
};

// ---- making one --------------------------------------------------------------------------------------
//
// Every maker exists whole, and in two steps for threads to share: allocate_*() checks every argument and
// allocates; *_panels() then fills the panels [panel_begin, panel_end). Disjoint ranges touch disjoint
// memory, and the result does not depend on how the panels were split. All throw ArgumentError (a
// std::invalid_argument), and std::bad_alloc.

// Packs `rows` x `cols` values of a GGUF tensor type ("F32", "Q4_1", "Q6_K", ...). data: the file's bytes,
// whole rows. row_order: null, or rows entries; packed row i is the file's row row_order[i]. Throws
// std::invalid_argument for an unknown type, cols that are not whole blocks, or a wrong byte count.
PackedMatrix pack_ggml(const std::string& type, const std::uint8_t* data, std::size_t nbytes,
                       std::int64_t rows, std::int64_t cols, const std::int32_t* row_order);
PackedMatrix allocate_ggml(const std::string& type, std::size_t nbytes, std::int64_t rows, std::int64_t cols,
                           const std::int32_t* row_order);
void pack_ggml_panels(const std::string& type, const std::uint8_t* data, const std::int32_t* row_order,
                      std::int64_t panel_begin, std::int64_t panel_end, PackedMatrix* out);

// The checks of allocate_ggml alone, row_order aside.
void check_ggml(const std::string& type, std::size_t nbytes, std::int64_t rows, std::int64_t cols);

// Decodes GGUF data to floats exactly as the format defines it, without packing. out: (rows, cols).
void dequantize_ggml(const std::string& type, const std::uint8_t* data, std::size_t nbytes, std::int64_t rows,
                     std::int64_t cols, float* out);

// Floating-point values in memory, (rows, cols): f32, f16 or bf16.
struct FloatRows {
  Codes type;
  const void* data;
  std::int64_t rows, cols;
};

// Panels of type `target`, each value rounded to nearest even. A finite value that fp16 cannot hold is
// refused.
PackedMatrix pack_float(const FloatRows& w, Codes target);
PackedMatrix allocate_float(std::int64_t rows, std::int64_t cols, Codes target);
void pack_float_panels(const FloatRows& w, std::int64_t panel_begin, std::int64_t panel_end,
                       PackedMatrix* out);

// Quantizes fp32 w (rows, cols): bits 4 (unsigned codes with an fp16 scale and an fp16 min per group) or 8
// (symmetric, fp16 scale per group). group: 16, 32, 64 or 128 columns, or 0 with 8 bits: a scale per row;
// cols need not divide by it. Refuses values that are not finite or whose scale fp16 cannot hold: |w| above
// 65504 (4 bits), 127 * 65504 (8).
PackedMatrix quantize(const float* w, std::int64_t rows, std::int64_t cols, int bits, int group);
PackedMatrix quantize(const FloatRows& w, int bits, int group);
PackedMatrix allocate_quantized(std::int64_t rows, std::int64_t cols, int bits, int group);
void quantize_panels(const FloatRows& w, std::int64_t panel_begin, std::int64_t panel_end, PackedMatrix* out);

// ---- reading one back --------------------------------------------------------------------------------

// out: (rows, cols) floats.
void unpack(const PackedMatrix& matrix, float* out);

const char* codes_name(Codes kind);  // "u4", "bf16", ...

}  // namespace fastllm
