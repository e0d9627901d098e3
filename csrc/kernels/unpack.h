// Packed codes to lines of plain bytes: 16 outputs x 4 columns per 64-byte line, the u8 operand of the dot
// products.
//
// Lines<kind>::get(panel, k4) gives line k4 (columns 4*k4 .. 4*k4+3) of a panel whose code plane starts at
// `codes` and whose extra plane at `extra`. Cost per line: u4 one load per two lines, one `and`, and a shift
// for the odd one; a codebook adds one shuffle; u5 and u6 add a load, a shift, an `and` and an `or`; u8 one
// load.
#pragma once

#include "kernels/kernels.h"
#include "kernels/simd/vec.h"

namespace fastllm {
namespace {

// What the kernels tell apart: the codes' kinds, and u4 with a codebook.
enum class Unpack { u4, codebook, u5, u6, u8 };

// Codes up to 63 take the cheap dot product, whole bytes the exact one.
constexpr bool is_wide(Unpack kind) { return kind == Unpack::u8 || kind == Unpack::codebook; }

struct PanelCodes {
  const uint8_t* codes;
  const uint8_t* extra;
  u8x64 table;  // codebook entries + 128

  PanelCodes(const PackedView* w, int64_t panel) : codes(nullptr), extra(nullptr), table(set1_u8(0)) {
    const int64_t whole = w->kind == Codes::u8 ? w->kp * 16 : w->kp * 8;
    const int64_t more = w->kind == Codes::u5 ? w->kp * 2 : w->kp * 4;
    codes = w->codes + panel * whole;
    if (w->extra != nullptr) extra = w->extra + panel * more;
    if (w->codebook != nullptr) {
      alignas(16) uint8_t entries[16];
      for (int i = 0; i < 16; ++i) entries[i] = static_cast<uint8_t>(w->codebook[i] + 128);
      table = load_table(entries);
    }
  }

  // Line `first + quad` for a `first` that is a multiple of 8 (of 4 for u6) and a constant quad below 8.
  template <Unpack kind, int quad>
  FASTLLM_INLINE u8x64 line(int64_t first) const {
    if constexpr (kind == Unpack::u8) {
      return load_line(codes + (first + quad) * 64);
    } else {
      const u8x64 pair = load_line(codes + (first + quad) / 2 * 64);
      u8x64 low = bit_and(shift<(quad % 2) * 4>(pair), set1_u8(15));
      if constexpr (kind == Unpack::codebook) low = lookup(table, low);
      if constexpr (kind == Unpack::u5) {
        const u8x64 high = load_line(extra + (first + quad) / 8 * 64);
        low = bit_or(low, bit_and(shift<(quad % 8) - 4>(high), set1_u8(16)));
      }
      if constexpr (kind == Unpack::u6) {
        const u8x64 high = load_line(extra + (first + quad) / 4 * 64);
        low = bit_or(low, bit_and(shift<(quad % 4) * 2 - 4>(high), set1_u8(48)));
      }
      return low;
    }
  }
};

// The scales (or minimums) of one panel: fp16 per group, or an fp16 super-scale times integer sub-scales.
template <typename Sub>
struct PanelScales {
  const uint16_t* base;
  const Sub* sub;
  int64_t group;

  PanelScales(const uint16_t* scales, const Sub* subscales, const PackedView* w, int64_t panel)
      : base(nullptr), sub(nullptr), group(w->group) {
    const int64_t groups = (w->kp + w->group - 1) / w->group;
    const int64_t supers = (w->cols + kSuper - 1) / kSuper;
    if (scales != nullptr) base = scales + panel * (subscales != nullptr ? supers : groups) * kPanel;
    if (subscales != nullptr) sub = subscales + panel * groups * kPanel;
  }

  // For the group that holds column k.
  FASTLLM_INLINE f32x16 at(int64_t k) const {
    if (sub == nullptr) return load_f16(base + k / group * kPanel);
    return mul(load_f16(base + k / kSuper * kPanel), to_float(load_sub(sub + k / group * kPanel)));
  }

  static FASTLLM_INLINE i32x16 load_sub(const int8_t* p) { return load_s8(p); }
  static FASTLLM_INLINE i32x16 load_sub(const uint8_t* p) { return load_u8(p); }
};

}  // namespace
}  // namespace fastllm
