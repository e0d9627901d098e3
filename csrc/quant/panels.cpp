// Allocation of packed matrices and the interleaving of codes into panels; see panels.h.
#include "quant/panels.h"

#include <bit>
#include <cstring>
#include <limits>
#include <string>

#include "core/argument_error.h"

namespace fastllm {
namespace {

static_assert(std::endian::native == std::endian::little, "four codes are handled as one 32-bit word");

constexpr std::int64_t kMaxSide = std::numeric_limits<std::int32_t>::max();  // row orders and slots are int32

std::uint32_t load_word(const std::uint8_t* p) {
  std::uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

void store_word(std::uint8_t* p, std::uint32_t word) { std::memcpy(p, &word, sizeof word); }

// Each of these handles one output n of a panel; a word holds the codes of four consecutive columns, and
// words of consecutive lines are 64 bytes apart. `out` points at byte 4n of the first line.

void store_low_nibbles(const std::uint8_t* codes, std::int64_t columns, std::uint8_t* out) {
  for (std::int64_t l = 0; l < columns / 8; ++l) {
    const std::uint32_t low = load_word(codes + 8 * l) & 0x0f0f0f0fu;
    const std::uint32_t high = load_word(codes + 8 * l + 4) & 0x0f0f0f0fu;
    store_word(out + 64 * l, low | high << 4);
  }
}

void store_fifth_bits(const std::uint8_t* codes, std::int64_t columns, std::uint8_t* out) {
  for (std::int64_t l = 0; l < columns / 32; ++l) {
    std::uint32_t word = 0;
    for (int q = 0; q < 8; ++q) word |= (load_word(codes + 32 * l + 4 * q) >> 4 & 0x01010101u) << q;
    store_word(out + 64 * l, word);
  }
}

void store_high_pairs(const std::uint8_t* codes, std::int64_t columns, std::uint8_t* out) {
  for (std::int64_t l = 0; l < columns / 16; ++l) {
    std::uint32_t word = 0;
    for (int q = 0; q < 4; ++q) word |= (load_word(codes + 16 * l + 4 * q) >> 4 & 0x03030303u) << (2 * q);
    store_word(out + 64 * l, word);
  }
}

void store_bytes(const std::uint8_t* codes, std::int64_t columns, std::uint8_t* out) {
  for (std::int64_t l = 0; l < columns / 4; ++l) store_word(out + 64 * l, load_word(codes + 4 * l));
}

// Columns that one 64-byte line of the plane holds.
std::int64_t code_columns(Codes kind) { return kind == Codes::u8 ? 4 : 8; }
std::int64_t extra_columns(Codes kind) { return kind == Codes::u5 ? 32 : kind == Codes::u6 ? 16 : 0; }

}  // namespace

void check_shape(std::int64_t rows, std::int64_t cols) {
  const std::string limit = "1 to " + std::to_string(kMaxSide);
  if (rows < 1 || rows > kMaxSide) throw ArgumentError("rows", std::to_string(rows), limit);
  if (cols < 1 || cols > kMaxSide) throw ArgumentError("cols", std::to_string(cols), limit);
  // Padded to panels and to 32 columns, in fp32, the bytes must still be countable.
  const std::int64_t most = std::numeric_limits<std::int64_t>::max() / 4;
  if ((rows + kPanel) > most / (cols + 32))
    throw ArgumentError("rows * cols", std::to_string(rows) + " * " + std::to_string(cols),
                        "at most " + std::to_string(most) + " values");
}

void check_panels(const PackedMatrix& matrix, std::int64_t begin, std::int64_t end) {
  if (begin < 0 || begin > end || end > matrix.panels())
    throw ArgumentError("panels", std::to_string(begin) + ":" + std::to_string(end),
                        "a range within 0:" + std::to_string(matrix.panels()));
}

void check_floats(const PackedMatrix& matrix, const FloatRows& w) {
  if (w.type < Codes::f16) throw ArgumentError("array", codes_name(w.type), "f32, f16 or bf16");
  if (w.rows != matrix.rows || w.cols != matrix.cols)
    throw ArgumentError("array", std::to_string(w.rows) + " x " + std::to_string(w.cols),
                        std::to_string(matrix.rows) + " x " + std::to_string(matrix.cols) + " values");
}

PackedMatrix allocate_integers(std::int64_t rows, std::int64_t cols, const IntegerLayout& layout) {
  check_shape(rows, cols);
  PackedMatrix out;
  out.kind = layout.kind;
  out.rows = rows;
  out.cols = cols;
  out.group = layout.group;
  out.zero = layout.zero;
  out.has_codebook = layout.codebook != nullptr;
  if (layout.codebook) std::memcpy(out.codebook, layout.codebook, sizeof out.codebook);

  const auto plane = [&](std::int64_t per_panel) {
    return AlignedBuffer::carve(static_cast<std::size_t>(out.panels() * per_panel));
  };
  out.codes = plane(out.kp() / code_columns(out.kind) * 64);
  if (const std::int64_t columns = extra_columns(out.kind)) out.extra = plane(out.kp() / columns * 64);
  const std::int64_t scales = layout.subscales ? out.supers() : out.groups();
  out.scales = plane(scales * kPanel * 2);
  if (layout.mins) out.mins = plane(scales * kPanel * 2);
  if (layout.subscales) out.subscales = plane(out.groups() * kPanel);
  if (layout.subscales && layout.mins) out.submins = plane(out.groups() * kPanel);
  return out;
}

void store_codes(PackedMatrix* out, std::int64_t panel, std::int64_t k, std::int64_t columns,
                 const std::uint8_t* const codes[kPanel]) {
  const std::int64_t in_line = code_columns(out->kind);
  std::uint8_t* lines = out->codes.as<std::uint8_t>() + (panel * out->kp() + k) / in_line * 64;
  for (int n = 0; n < kPanel; ++n) {
    if (out->kind == Codes::u8)
      store_bytes(codes[n], columns, lines + 4 * n);
    else
      store_low_nibbles(codes[n], columns, lines + 4 * n);
  }
  if (!out->extra) return;
  std::uint8_t* extra =
      out->extra.as<std::uint8_t>() + (panel * out->kp() + k) / extra_columns(out->kind) * 64;
  for (int n = 0; n < kPanel; ++n) {
    if (out->kind == Codes::u5)
      store_fifth_bits(codes[n], columns, extra + 4 * n);
    else
      store_high_pairs(codes[n], columns, extra + 4 * n);
  }
}

}  // namespace fastllm
