// The block formats of GGUF files, one row of a table each.
//
// A format is described once: by its row in the table and by a decoder that turns the bytes of one block into
// integer codes, scales and minimums. The packer, the plain dequantizer and their tests are all driven by
// that. docs/add-a-disk-format.md says how to add one.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/kernels.h"

namespace fastllm {

// What one block of one row says: the columns of a group g stand for
//   scale * subscales[g] * (codes[k] - zero) + min * submins[g]
// where subscales and submins are left out (not 1) for formats without them, and likewise the minimum.
struct Block {
  std::uint8_t codes[kSuper];
  std::uint16_t scale;        // fp16
  std::uint16_t min;          // fp16; what the file subtracts is negated here, which is exact
  std::int8_t subscales[16];  // one per group of the block
  std::uint8_t submins[16];
};

struct BlockFormat {
  const char* name;
  std::int32_t columns;  // in a block
  std::int32_t bytes;    // of a block
  Codes kind;
  std::int32_t group;  // columns per scale, a divisor of `columns`; 0 for floating point
  std::int32_t zero;
  bool subscales;  // the block's scale and min are super-scales of its groups; then columns == kSuper
  bool mins;
  const std::int8_t* codebook;                           // 16 entries, or null
  void (*decode)(const std::uint8_t* data, Block* out);  // null for floating point
};

// Throws ArgumentError, naming the known formats, if there is none of that name.
const BlockFormat& find_format(const std::string& name);

}  // namespace fastllm
