// Reading packed matrices back, one code at a time, by the words of kernels/kernels.h.
//
// Deliberately not the inverse of the word-wise writer in panels.cpp: both follow the same description, so
// that a slip in either shows as a difference in tests/test_packed.py. The order of the float operations
// (scale, times level, plus minimum, each rounded) is that of the disk formats.
#include <string>

#include "quant/half.h"
#include "quant/packed.h"

namespace fastllm {
namespace {

int code_at(const PackedView& w, std::int64_t panel, int n, std::int64_t k) {
  const auto byte = [&](const std::uint8_t* plane,
                        std::int64_t columns) {  // of a plane with that many a line
    return static_cast<int>(plane[(panel * (w.kp / columns) + k / columns) * 64 + 4 * n + k % 4]);
  };
  if (w.kind == Codes::u8) return byte(w.codes, 4);
  const int low = (byte(w.codes, 8) >> (k % 8 < 4 ? 0 : 4)) & 15;
  if (w.kind == Codes::u5) return low | ((byte(w.extra, 32) >> (k % 32 / 4)) & 1) << 4;
  if (w.kind == Codes::u6) return low | ((byte(w.extra, 16) >> (2 * (k % 16 / 4))) & 3) << 4;
  return low;
}

// fp16 (panels, groups, 16), or fp16 (panels, ceil(cols / 256), 16) times integers (panels, groups, 16).
template <typename Sub>
float scale_at(const PackedMatrix& m, const AlignedBuffer& scales, const AlignedBuffer& subs,
               std::int64_t panel, std::int64_t k, int n) {
  const auto* half = scales.as<std::uint16_t>();
  const std::int64_t group = panel * m.groups() + k / m.group;
  if (!subs) return half_to_float(half[group * kPanel + n]);
  const std::int64_t super = panel * m.supers() + k / kSuper;
  return half_to_float(half[super * kPanel + n]) * static_cast<float>(subs.as<Sub>()[group * kPanel + n]);
}

void unpack_integers(const PackedMatrix& m, std::int64_t row, float* out) {
  const PackedView w = m.view();
  const std::int64_t panel = row / kPanel;
  const int n = static_cast<int>(row % kPanel);
  for (std::int64_t first = 0; first < m.cols; first += m.group) {
    const float scale = scale_at<std::int8_t>(m, m.scales, m.subscales, panel, first, n);
    const float min = m.mins ? scale_at<std::uint8_t>(m, m.mins, m.submins, panel, first, n) : 0.0f;
    for (std::int64_t k = first; k < first + m.group && k < m.cols; ++k) {
      const int code = code_at(w, panel, n, k);
      const int level = m.has_codebook ? m.codebook[code] : code - m.zero;
      const float value = scale * static_cast<float>(level);
      out[k] = m.mins ? value + min : value;
    }
  }
}

void unpack_floats(const PackedMatrix& m, std::int64_t row, float* out) {
  for (std::int64_t k = 0; k < m.cols; ++k) {
    const std::int64_t at = (row / kPanel * m.cols + k) * kPanel + row % kPanel;
    if (m.kind == Codes::f32)
      out[k] = m.codes.as<float>()[at];
    else if (m.kind == Codes::f16)
      out[k] = half_to_float(m.codes.as<std::uint16_t>()[at]);
    else
      out[k] = bf16_to_float(m.codes.as<std::uint16_t>()[at]);
  }
}

}  // namespace

const char* codes_name(Codes kind) {
  switch (kind) {
    case Codes::u4:
      return "u4";
    case Codes::u5:
      return "u5";
    case Codes::u6:
      return "u6";
    case Codes::u8:
      return "u8";
    case Codes::f16:
      return "f16";
    case Codes::bf16:
      return "bf16";
    case Codes::f32:
      return "f32";
  }
  return "?";
}

PackedView PackedMatrix::view() const {
  return PackedView{
      .codes = codes.as<std::uint8_t>(),
      .extra = extra.as<std::uint8_t>(),
      .scales = scales.as<std::uint16_t>(),
      .subscales = subscales.as<std::int8_t>(),
      .mins = mins.as<std::uint16_t>(),
      .submins = submins.as<std::uint8_t>(),
      .codebook = has_codebook ? codebook : nullptr,
      .rows = rows,
      .cols = cols,
      .kp = kp(),
      .group = group,
      .zero = zero,
      .kind = kind,
  };
}

std::string PackedMatrix::layout() const {
  std::string text = codes_name(kind);
  if (!quantized()) return text;
  if (has_codebook) text += " codebook";
  text += " g" + std::to_string(group) + (subscales ? " fp16 x int8 scale" : " fp16 scale");
  if (mins) text += submins ? ", fp16 x uint8 min" : ", fp16 min";
  if (zero) text += ", zero " + std::to_string(zero);
  return text;
}

void unpack(const PackedMatrix& matrix, float* out) {
  for (std::int64_t row = 0; row < matrix.rows; ++row) {
    if (matrix.quantized())
      unpack_integers(matrix, row, out + row * matrix.cols);
    else
      unpack_floats(matrix, row, out + row * matrix.cols);
  }
}

}  // namespace fastllm
