// Packed codes to lines of plain bytes: 16 outputs x 4 columns per 64-byte line, the u8 operand of the dot
// products.
//
// PanelCodes::line<kind, quad>(block, part) gives native part `part` of the line of columns 32 * block + 4 *
// quad to + 3 of a panel. Cost per line and part: u4 one load per two lines, one `and`, and a shift for the
// odd one; a codebook adds one shuffle; u5 and u6 add a load, a shift, an `and` and an `or`; u8 one load.
#pragma once

#include "kernels/kernels.h"
#include "kernels/simd/vec.h"

namespace fastllm {
namespace {

// What the kernels tell apart: the codes' kinds, and u4 with a codebook.
enum class Unpack { u4, codebook, u5, u6, u8 };

// Bits of the bytes that lines consist of: what a dot product has to be exact for.
constexpr int line_bits(Unpack kind) {
  switch (kind) {
    case Unpack::u4:
      return 4;
    case Unpack::u5:
      return 5;
    case Unpack::u6:
      return 6;
    default:
      return 8;
  }
}

struct PanelCodes {
  const uint8_t* codes;
  const uint8_t* extra;
  vb table;  // codebook entries + 128

  PanelCodes(const PackedView* w, int64_t panel) : codes(nullptr), extra(nullptr), table(vb_set1(0)) {
    const int64_t whole = w->kind == Codes::u8 ? w->kp * 16 : w->kp * 8;
    const int64_t more = w->kind == Codes::u5 ? w->kp * 2 : w->kp * 4;
    codes = w->codes + panel * whole;
    if (w->extra != nullptr) extra = w->extra + panel * more;
    if (w->codebook != nullptr) {
      alignas(16) uint8_t entries[16];
      for (int i = 0; i < 16; ++i) entries[i] = static_cast<uint8_t>(w->codebook[i] + 128);
      table = vb_load_table(entries);
    }
  }

  // Line `quad` of the eight of columns 32 * block to + 31.
  template <Unpack kind, int quad>
  FASTLLM_INLINE vb line(int64_t block, int part) const {
    const int at = part * kLineBytes;
    if constexpr (kind == Unpack::u8) {
      return vb_load(codes + block * 512 + quad * 64 + at);
    } else {
      const vb pair = vb_load(codes + block * 256 + quad / 2 * 64 + at);
      vb low = vb_and(shift<(quad % 2) * 4>(pair), vb_set1(15));
      if constexpr (kind == Unpack::codebook) low = vb_lookup(table, low);
      if constexpr (kind == Unpack::u5) {
        const vb high = vb_load(extra + block * 64 + at);
        low = vb_or(low, vb_and(shift<quad - 4>(high), vb_set1(16)));
      }
      if constexpr (kind == Unpack::u6) {
        const vb high = vb_load(extra + block * 128 + quad / 4 * 64 + at);
        low = vb_or(low, vb_and(shift<(quad % 4) * 2 - 4>(high), vb_set1(48)));
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

  // Part `part` of the scales of group g.
  FASTLLM_INLINE vf at(int64_t g, int part) const {
    const int64_t lane = part * kLanes;
    if (sub == nullptr) return v_load_f16(base + g * kPanel + lane);
    const auto super = static_cast<int64_t>(static_cast<uint64_t>(g * group) / kSuper);
    return v_mul(v_load_f16(base + super * kPanel + lane), v_from_int(load_sub(sub + g * kPanel + lane)));
  }

  static FASTLLM_INLINE vi load_sub(const int8_t* p) { return vi_load_s8(p); }
  static FASTLLM_INLINE vi load_sub(const uint8_t* p) { return vi_load_u8(p); }
};

}  // namespace
}  // namespace fastllm
