// Packing of GGUF tensors and of plain floats, and the plain dequantizer.
//
// 16 rows go side by side, block by block: the file is read in 16 ascending streams and every plane of the
// result is written once, ascending, so neither side needs more than the first-level cache.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "core/argument_error.h"
#include "quant/ggml_blocks.h"
#include "quant/half.h"
#include "quant/packed.h"
#include "quant/panels.h"

namespace fastllm {
namespace {

// Throws unless the shape is valid, cols whole blocks, and nbytes exactly rows of them.
void check_source(const BlockFormat& format, std::size_t nbytes, std::int64_t rows, std::int64_t cols) {
  check_shape(rows, cols);
  if (cols % format.columns != 0)
    throw ArgumentError("cols", std::to_string(cols),
                        "a multiple of " + std::to_string(format.columns) + " for " + format.name);
  const std::int64_t row_bytes = cols / format.columns * format.bytes;  // no overflow: cols is below 2^31
  std::int64_t all;
  if (__builtin_mul_overflow(rows, row_bytes, &all) || static_cast<std::uint64_t>(all) != nbytes)
    throw ArgumentError("data", std::to_string(nbytes) + " bytes",
                        std::to_string(rows) + " rows of " + std::to_string(row_bytes) + " bytes (" +
                            format.name + ", " + std::to_string(cols) + " columns)");
}

// The file's row that becomes packed row `row`.
std::int64_t source_row(const std::int32_t* row_order, std::int64_t row) {
  return row_order ? row_order[row] : row;
}

// Rows of the panel that exist; the others are padding.
int rows_in_panel(const PackedMatrix& matrix, std::int64_t panel) {
  const std::int64_t left = matrix.rows - panel * kPanel;
  return left < kPanel ? static_cast<int>(left) : kPanel;
}

void store_scales(PackedMatrix* out, std::int64_t panel, std::int64_t k, std::int64_t columns,
                  const Block blocks[kPanel]) {
  const bool super = static_cast<bool>(out->subscales);
  const std::int64_t at = super ? panel * out->supers() + k / kSuper : panel * out->groups() + k / out->group;
  std::uint16_t* scales = out->scales.as<std::uint16_t>() + at * kPanel;
  for (int n = 0; n < kPanel; ++n) scales[n] = blocks[n].scale;
  if (out->mins) {
    std::uint16_t* mins = out->mins.as<std::uint16_t>() + at * kPanel;
    for (int n = 0; n < kPanel; ++n) mins[n] = blocks[n].min;
  }
  if (!super) return;
  const std::int64_t first = panel * out->groups() + k / out->group;
  for (std::int64_t g = 0; g < columns / out->group; ++g) {
    std::int8_t* subscales = out->subscales.as<std::int8_t>() + (first + g) * kPanel;
    for (int n = 0; n < kPanel; ++n) subscales[n] = blocks[n].subscales[g];
    if (!out->submins) continue;
    std::uint8_t* submins = out->submins.as<std::uint8_t>() + (first + g) * kPanel;
    for (int n = 0; n < kPanel; ++n) submins[n] = blocks[n].submins[g];
  }
}

void pack_blocks(const BlockFormat& format, const std::uint8_t* data, const std::int32_t* row_order,
                 std::int64_t panel_begin, std::int64_t panel_end, PackedMatrix* out) {
  const std::int64_t row_blocks = out->cols / format.columns;
  const std::int64_t row_bytes = row_blocks * format.bytes;
  const std::vector<Block> zeros(kPanel);
  std::vector<Block> blocks(zeros);
  const std::uint8_t* codes[kPanel];
  for (int n = 0; n < kPanel; ++n) codes[n] = blocks[n].codes;

  for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int rows = rows_in_panel(*out, panel);
    const std::uint8_t* source[kPanel];
    for (int n = 0; n < rows; ++n) source[n] = data + source_row(row_order, panel * kPanel + n) * row_bytes;
    for (int n = rows; n < kPanel; ++n) blocks[n] = zeros[n];
    for (std::int64_t b = 0; b < row_blocks; ++b) {
      for (int n = 0; n < rows; ++n) format.decode(source[n] + b * format.bytes, &blocks[n]);
      store_codes(out, panel, b * format.columns, format.columns, codes);
      store_scales(out, panel, b * format.columns, format.columns, blocks.data());
    }
  }
}

// ---- floating point ---------------------------------------------------------------------------------------

template <typename T>
T load(const std::uint8_t* p) {  // file data need not be aligned
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Puts values of 16 rows side by side: out[k][n] = convert(row n, column k).
template <typename From, typename To, typename Convert>
void interleave(const std::uint8_t* data, const std::int32_t* row_order, std::int64_t panel_begin,
                std::int64_t panel_end, PackedMatrix* out, Convert convert) {
  const std::int64_t cols = out->cols;
  for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int rows = rows_in_panel(*out, panel);
    const std::uint8_t* source[kPanel];
    for (int n = 0; n < rows; ++n)
      source[n] =
          data + source_row(row_order, panel * kPanel + n) * cols * static_cast<std::int64_t>(sizeof(From));
    To* target = out->codes.as<To>() + panel * cols * kPanel;
    for (std::int64_t k = 0; k < cols; ++k)
      for (int n = 0; n < rows; ++n)
        target[k * kPanel + n] = convert(load<From>(source[n] + k * static_cast<std::int64_t>(sizeof(From))),
                                         panel * kPanel + n, k);
  }
}

void interleave_as_is(const std::uint8_t* data, const std::int32_t* row_order, std::int64_t panel_begin,
                      std::int64_t panel_end, PackedMatrix* out) {
  const auto keep = [](auto value, std::int64_t, std::int64_t) { return value; };
  if (out->kind == Codes::f32)
    interleave<std::uint32_t, std::uint32_t>(data, row_order, panel_begin, panel_end, out, keep);
  else
    interleave<std::uint16_t, std::uint16_t>(data, row_order, panel_begin, panel_end, out, keep);
}

std::uint16_t checked_half(float value, std::int64_t row, std::int64_t col) {
  const std::uint16_t half = float_to_half(value);
  if ((half & 0x7fff) == 0x7c00 && std::isfinite(value))
    throw ArgumentError("array[" + std::to_string(row) + ", " + std::to_string(col) + "]",
                        format_value(value), "a value that fp16 holds (up to 65504)");
  return half;
}

}  // namespace

void check_ggml(const std::string& type, std::size_t nbytes, std::int64_t rows, std::int64_t cols) {
  check_source(find_format(type), nbytes, rows, cols);
}

PackedMatrix allocate_ggml(const std::string& type, std::size_t nbytes, std::int64_t rows, std::int64_t cols,
                           const std::int32_t* row_order) {
  const BlockFormat& format = find_format(type);
  check_source(format, nbytes, rows, cols);
  for (std::int64_t i = 0; row_order && i < rows; ++i)
    if (row_order[i] < 0 || row_order[i] >= rows)
      throw ArgumentError("row_order[" + std::to_string(i) + "]", std::to_string(row_order[i]),
                          "a row, 0 to " + std::to_string(rows - 1));
  if (!format.decode) return allocate_float(rows, cols, format.kind);
  return allocate_integers(
      rows, cols, {format.kind, format.group, format.zero, format.subscales, format.mins, format.codebook});
}

void pack_ggml_panels(const std::string& type, const std::uint8_t* data, const std::int32_t* row_order,
                      std::int64_t panel_begin, std::int64_t panel_end, PackedMatrix* out) {
  check_panels(*out, panel_begin, panel_end);
  const BlockFormat& format = find_format(type);
  if (format.decode)
    pack_blocks(format, data, row_order, panel_begin, panel_end, out);
  else
    interleave_as_is(data, row_order, panel_begin, panel_end, out);
}

PackedMatrix pack_ggml(const std::string& type, const std::uint8_t* data, std::size_t nbytes,
                       std::int64_t rows, std::int64_t cols, const std::int32_t* row_order) {
  PackedMatrix out = allocate_ggml(type, nbytes, rows, cols, row_order);
  pack_ggml_panels(type, data, row_order, 0, out.panels(), &out);
  return out;
}

void dequantize_ggml(const std::string& type, const std::uint8_t* data, std::size_t nbytes, std::int64_t rows,
                     std::int64_t cols, float* out) {
  const BlockFormat& format = find_format(type);
  check_source(format, nbytes, rows, cols);
  if (format.kind == Codes::f32) {
    std::memcpy(out, data, nbytes);
    return;
  }
  if (!format.decode) {
    const auto convert = format.kind == Codes::f16 ? half_to_float : bf16_to_float;
    for (std::int64_t i = 0; i < rows * cols; ++i) out[i] = convert(load<std::uint16_t>(data + 2 * i));
    return;
  }
  Block block;
  for (std::int64_t b = 0; b < rows * (cols / format.columns); ++b) {
    format.decode(data + b * format.bytes, &block);
    for (int g = 0; g < format.columns / format.group; ++g) {
      float scale = half_to_float(block.scale);
      if (format.subscales) scale *= static_cast<float>(block.subscales[g]);
      float min = format.mins ? half_to_float(block.min) : 0.0f;
      if (format.mins && format.subscales) min *= static_cast<float>(block.submins[g]);
      for (int i = 0; i < format.group; ++i) {
        const int code = block.codes[g * format.group + i];
        const int level = format.codebook ? format.codebook[code] : code - format.zero;
        const float value = scale * static_cast<float>(level);
        *out++ = format.mins ? value + min : value;  // without a minimum -0.0 stays -0.0
      }
    }
  }
}

PackedMatrix allocate_float(std::int64_t rows, std::int64_t cols, Codes target) {
  check_shape(rows, cols);
  if (target < Codes::f16) throw ArgumentError("dtype", codes_name(target), "f32, f16 or bf16");
  PackedMatrix out;
  out.kind = target;
  out.rows = rows;
  out.cols = cols;
  const std::int64_t width = target == Codes::f32 ? 4 : 2;
  out.codes = AlignedBuffer::carve(static_cast<std::size_t>(out.panels() * cols * kPanel * width));
  return out;
}

void pack_float_panels(const FloatRows& w, std::int64_t panel_begin, std::int64_t panel_end,
                       PackedMatrix* out) {
  check_floats(*out, w);
  check_panels(*out, panel_begin, panel_end);
  const auto* data = static_cast<const std::uint8_t*>(w.data);
  if (w.type == out->kind) return interleave_as_is(data, nullptr, panel_begin, panel_end, out);

  const auto convert_from = [&]<typename From>(From, auto widen) {
    if (out->kind == Codes::f32)
      interleave<From, float>(data, nullptr, panel_begin, panel_end, out,
                              [&](From v, std::int64_t, std::int64_t) { return widen(v); });
    else if (out->kind == Codes::f16)
      interleave<From, std::uint16_t>(
          data, nullptr, panel_begin, panel_end, out,
          [&](From v, std::int64_t row, std::int64_t k) { return checked_half(widen(v), row, k); });
    else
      interleave<From, std::uint16_t>(
          data, nullptr, panel_begin, panel_end, out,
          [&](From v, std::int64_t, std::int64_t) { return float_to_bf16(widen(v)); });
  };
  if (w.type == Codes::f32)
    convert_from(float{}, [](float v) { return v; });
  else if (w.type == Codes::f16)
    convert_from(std::uint16_t{}, half_to_float);
  else
    convert_from(std::uint16_t{}, bf16_to_float);
}

PackedMatrix pack_float(const FloatRows& w, Codes target) {
  PackedMatrix out = allocate_float(w.rows, w.cols, target);
  pack_float_panels(w, 0, out.panels(), &out);
  return out;
}

}  // namespace fastllm
