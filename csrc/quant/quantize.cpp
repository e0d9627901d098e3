// Our own quantizer: fp32 weights to 4-bit codes with an fp16 scale and minimum per group, or to 8-bit codes
// with an fp16 scale.
//
// 16 rows are laid side by side, so that a group of one row is a lane and every sum runs down its columns in
// order: the same bits whatever the vector width, the thread count, or the split of the panels. Lanes come
// four at a time as a compiler vector, the width of the oldest instruction set (this file is compiled once).
//
// 4 bits. The values of a group are scale * c + min, c in 0..15; wanted are the fp16 scale and min of least
// squared error. Given the codes, that is a line fit; given the line, the codes are the nearest levels. From
// nine starts (the range of the group, and ranges clipped at either end, since one extreme value should not
// coarsen all others) both steps alternate; every line is rounded to fp16 before it is judged by the values
// that it decodes to, and the best line seen wins: about 0.8 of the squared error of plain rounding, 0.03
// more than a search of 225 starts reaches.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/argument_error.h"
#include "quant/half.h"
#include "quant/packed.h"
#include "quant/panels.h"

namespace fastllm {
namespace {

constexpr int kWidth = 4;  // lanes in a vector
constexpr float kHalfMax = 65504.0f;

typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
typedef std::int32_t Ints __attribute__((vector_size(kWidth * sizeof(std::int32_t))));

Floats all(float value) { return Floats{} + value; }
Floats load(const float* p) {
  Floats value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
Floats lowest(Floats a, Floats b) { return a < b ? a : b; }
Floats highest(Floats a, Floats b) { return a > b ? a : b; }

// The nearest fp16 value, ties to even, for |x| <= 65504.
Floats round_to_half(Floats x) {
  const Ints bits = std::bit_cast<Ints>(x);
  const Ints sign = bits & std::numeric_limits<std::int32_t>::min();
  const Ints magnitude = bits ^ sign;
  const Ints normal = (magnitude + 0xfff + ((magnitude >> 13) & 1)) & ~0x1fff;
  // Below 2^-14 fp16 values are the multiples of 2^-24, the spacing of fp32 just above 0.5.
  const Ints denormal = std::bit_cast<Ints>((std::bit_cast<Floats>(magnitude) + 0.5f) - 0.5f);
  return std::bit_cast<Floats>((magnitude < 0x38800000 ? denormal : normal) | sign);
}

struct Line {
  Floats scale, min;
};

// The nearest level of each value, as a float.
Floats nearest_level(Floats x, const Line& line, Floats inverse) {
  const Floats level = highest(lowest((x - line.min) * inverse, all(15.0f)), Floats{});
  return __builtin_convertvector(__builtin_convertvector(level + 0.5f, Ints), Floats);
}

Floats inverse_or_zero(Floats scale) { return scale > 0.0f ? 1.0f / scale : Floats{}; }

// The fp16 line of least squared error found for four groups of `count` values; x: (count, 16), 4 lanes of
// it.
Line fit_line(const float* x, int count) {
  Floats low = load(x), high = low, sum{};
  for (int i = 0; i < count; ++i) {
    const Floats v = load(x + i * kPanel);
    low = lowest(low, v);
    high = highest(high, v);
    sum += v;
  }
  const Floats middle = 0.5f * (low + high);
  const Floats range = high - low;

  // A constant is the line to beat: right for equal values, and for those too close together for any fp16
  // scale.
  const auto rounded_min = [](Floats min) {
    return round_to_half(lowest(highest(min, all(-kHalfMax)), all(kHalfMax)));
  };
  Line best{Floats{}, rounded_min(middle)};
  Floats best_error{};
  for (int i = 0; i < count; ++i) {
    const Floats e = load(x + i * kPanel) - best.min;
    best_error += e * e;
  }

  constexpr float kParts[] = {1.0f, 0.93f, 0.86f};  // of the range, kept below and above its middle
  constexpr int kStarts = 9, kFits = 2;
  for (int start = 0; start < kStarts; ++start) {
    const float below = kParts[start / 3], above = kParts[start % 3];
    Floats scale = range * (below + above) / 30.0f;
    Floats min = low + range * (0.5f * (1.0f - below));
    for (int fit = 0; fit < kFits; ++fit) {
      const Line line{round_to_half(scale), rounded_min(min)};
      const Floats inverse = inverse_or_zero(line.scale);
      Floats error{}, c_sum{}, cc_sum{}, cx_sum{};
      for (int i = 0; i < count; ++i) {
        const Floats v = load(x + i * kPanel);
        const Floats c = nearest_level(v, line, inverse);
        const Floats e = v - (line.scale * c + line.min);
        error += e * e;
        c_sum += c;
        cc_sum += c * c;
        cx_sum += c * (v - middle);  // centred, so that a large common offset costs no precision
      }
      const Ints better = error < best_error;
      best_error = better ? error : best_error;
      best.scale = better ? line.scale : best.scale;
      best.min = better ? line.min : best.min;

      const float n = static_cast<float>(count);
      const Floats x_sum = sum - n * middle;
      const Floats det = n * cc_sum - c_sum * c_sum;
      scale = det > 0.0f ? highest((n * cx_sum - c_sum * x_sum) / det, Floats{}) : line.scale;
      min = middle + (x_sum - round_to_half(scale) * c_sum) / n;
    }
  }
  return best;
}

// The fp16 scale of symmetric 8-bit codes: amax / 127, one step up where rounding down would cut the largest
// value by more than half a level (fp16 denormals only).
float symmetric_scale(float amax) {
  const std::uint16_t half = float_to_half(amax / 127.0f);
  const float scale = half_to_float(half);
  return amax > 127.5f * scale ? half_to_float(static_cast<std::uint16_t>(half + 1)) : scale;
}

std::uint8_t symmetric_code(float x, float scale) {  // round to nearest even by way of 2^23 + 2^22
  if (scale == 0.0f) return 128;
  const float level = std::min(std::max(x / scale, -127.0f), 127.0f);
  return static_cast<std::uint8_t>(static_cast<int>((level + 0x1.8p23f) - 0x1.8p23f) + 128);
}

[[noreturn]] void refuse(float value, std::int64_t row, std::int64_t col, float limit) {
  throw ArgumentError("weights[row " + std::to_string(row) + ", column " + std::to_string(col) + "]",
                      format_value(value),
                      "a finite value of magnitude at most " + std::to_string(static_cast<int>(limit)));
}

// Lays up to 16 rows side by side: x[k][n], padded with zeros to kp columns and 16 rows. Refuses |value| >
// limit.
void transpose(const FloatRows& w, std::int64_t first_row, float limit, float* x) {
  const std::int64_t rows = std::min<std::int64_t>(kPanel, w.rows - first_row);
  for (std::int64_t n = 0; n < rows; ++n) {
    const std::int64_t at = (first_row + n) * w.cols;
    const auto* wide = static_cast<const float*>(w.data) + (w.type == Codes::f32 ? at : 0);
    const auto* narrow = static_cast<const std::uint16_t*>(w.data) + (w.type == Codes::f32 ? 0 : at);
    for (std::int64_t k = 0; k < w.cols; ++k) {
      const float value = w.type == Codes::f32   ? wide[k]
                          : w.type == Codes::f16 ? half_to_float(narrow[k])
                                                 : bf16_to_float(narrow[k]);
      if (!(std::fabs(value) <= limit)) refuse(value, first_row + n, k, limit);
      x[k * kPanel + n] = value;
    }
  }
}

// Codes, scales and minimums of one group of 16 rows; codes[n] receives `count` bytes.
void quantize_group4(const float* x, int count, std::uint8_t* const codes[kPanel], std::uint16_t* scales,
                     std::uint16_t* mins) {
  for (int lane = 0; lane < kPanel; lane += kWidth) {
    const Line line = fit_line(x + lane, count);
    const Floats inverse = inverse_or_zero(line.scale);
    for (int i = 0; i < count; ++i) {
      const Floats c = nearest_level(load(x + i * kPanel + lane), line, inverse);
      for (int j = 0; j < kWidth; ++j) codes[lane + j][i] = static_cast<std::uint8_t>(static_cast<int>(c[j]));
    }
    for (int j = 0; j < kWidth; ++j) {
      scales[lane + j] = float_to_half(line.scale[j]);
      mins[lane + j] = float_to_half(line.min[j]);
    }
  }
}

void quantize_group8(const float* x, int count, std::uint8_t* const codes[kPanel], std::uint16_t* scales) {
  float amax[kPanel] = {};
  for (int i = 0; i < count; ++i)
    for (int n = 0; n < kPanel; ++n) amax[n] = std::max(amax[n], std::fabs(x[i * kPanel + n]));
  for (int n = 0; n < kPanel; ++n) {
    const float scale = symmetric_scale(amax[n]);
    scales[n] = float_to_half(scale);
    for (int i = 0; i < count; ++i) codes[n][i] = symmetric_code(x[i * kPanel + n], scale);
  }
}

}  // namespace

PackedMatrix allocate_quantized(std::int64_t rows, std::int64_t cols, int bits, int group) {
  if (bits != 4 && bits != 8) throw ArgumentError("bits", std::to_string(bits), "4 or 8");
  if (bits == 8 && group == 0) {  // a scale per row
    check_shape(rows, cols);
    group = static_cast<int>((cols + 31) / 32 * 32);
  } else if (group != 16 && group != 32 && group != 64 && group != 128) {
    throw ArgumentError("group", std::to_string(group),
                        bits == 8 ? "16, 32, 64, 128 or 0" : "16, 32, 64 or 128");
  }
  if (bits == 4) return allocate_integers(rows, cols, {Codes::u4, group, 0, false, true, nullptr});
  return allocate_integers(rows, cols, {Codes::u8, group, 128, false, false, nullptr});
}

void quantize_panels(const FloatRows& w, std::int64_t panel_begin, std::int64_t panel_end,
                     PackedMatrix* out) {
  check_floats(*out, w);
  check_panels(*out, panel_begin, panel_end);
  const bool symmetric = out->kind == Codes::u8;
  const float limit = symmetric ? 127.0f * kHalfMax : kHalfMax;
  const std::int64_t kp = out->kp();
  std::vector<float> x(static_cast<std::size_t>(kp * kPanel));
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(kp * kPanel));
  std::uint8_t* rows[kPanel];
  for (int n = 0; n < kPanel; ++n) rows[n] = bytes.data() + n * kp;

  for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
    std::fill(x.begin(), x.end(), 0.0f);  // the rows that this panel may lack
    transpose(w, panel * kPanel, limit, x.data());
    for (std::int64_t k = 0; k < out->cols; k += out->group) {
      const int count = static_cast<int>(std::min<std::int64_t>(out->group, out->cols - k));
      const std::int64_t at = (panel * out->groups() + k / out->group) * kPanel;
      std::uint8_t* codes[kPanel];
      for (int n = 0; n < kPanel; ++n) codes[n] = rows[n] + k;
      if (symmetric)
        quantize_group8(x.data() + k * kPanel, count, codes, out->scales.as<std::uint16_t>() + at);
      else
        quantize_group4(x.data() + k * kPanel, count, codes, out->scales.as<std::uint16_t>() + at,
                        out->mins.as<std::uint16_t>() + at);
    }
    for (std::int64_t n = out->rows - panel * kPanel; n < kPanel; ++n)  // outputs that the panel lacks
      std::fill_n(rows[n], kp, std::uint8_t{0});
    store_codes(out, panel, 0, kp, rows);
  }
}

PackedMatrix quantize(const FloatRows& w, int bits, int group) {
  PackedMatrix out = allocate_quantized(w.rows, w.cols, bits, group);
  quantize_panels(w, 0, out.panels(), &out);
  return out;
}

PackedMatrix quantize(const float* w, std::int64_t rows, std::int64_t cols, int bits, int group) {
  return quantize(FloatRows{Codes::f32, w, rows, cols}, bits, group);
}

}  // namespace fastllm
