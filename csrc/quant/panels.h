// Writing the packed layouts: allocating the planes of a matrix and storing 16 rows of codes and scales into
// them.
//
// Shared by every maker of packed matrices (pack.cpp, quantize.cpp). The layouts themselves are described in
// kernels/kernels.h; unpack.cpp reads them by that description, one code at a time.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "quant/packed.h"

namespace fastllm {

// What distinguishes one integer layout from another.
struct IntegerLayout {
  Codes kind;
  std::int32_t group;
  std::int32_t zero;
  bool subscales;
  bool mins;
  const std::int8_t* codebook;  // or null
};

// Checks the shape, then allocates all planes, zeroed.
PackedMatrix allocate_integers(std::int64_t rows, std::int64_t cols, const IntegerLayout& layout);

// Stores codes[n][i], the code of column k + i of the panel's output n, for i < columns. k and columns are
// multiples of 32.
void store_codes(PackedMatrix* out, std::int64_t panel, std::int64_t k, std::int64_t columns,
                 const std::uint8_t* const codes[kPanel]);

// Throws ArgumentError for a bad shape, or one whose element count overflows.
void check_shape(std::int64_t rows, std::int64_t cols);

// Throws ArgumentError unless [begin, end) are panels of the matrix.
void check_panels(const PackedMatrix& matrix, std::int64_t begin, std::int64_t end);

// Throws ArgumentError unless w holds floats, as many as the matrix it is packed into.
void check_floats(const PackedMatrix& matrix, const FloatRows& w);

// A float as errors show it.
inline std::string format_value(float value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", static_cast<double>(value));
  return text;
}

}  // namespace fastllm
