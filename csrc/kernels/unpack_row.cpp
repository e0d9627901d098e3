// A row of a packed matrix back to floats: the embedding's lookup.
#include "kernels/ops.h"
#include "kernels/unpack.h"

namespace fastllm::FASTLLM_ISA {

// One row back to floats: float(code - zero) * scale, rounded, plus the minimum, rounded; no FMA, as the disk
// formats define it.
void unpack_row(const PackedView* w, int64_t row, float* out) {
  const int64_t panel = row / kPanel;
  const int64_t n = row % kPanel;
  if (w->kind >= Codes::f16) {
    for (int64_t k = 0; k < w->cols; ++k) {
      alignas(64) float lanes[kPanel];
      const int64_t at = (panel * w->cols + k) * kPanel;
      if (w->kind == Codes::f32) {
        out[k] = reinterpret_cast<const float*>(w->codes)[at + n];
        continue;
      }
      const uint16_t* values = reinterpret_cast<const uint16_t*>(w->codes) + at;
      store(lanes, w->kind == Codes::f16 ? load_f16(values) : load_bf16(values));
      out[k] = lanes[n];
    }
    return;
  }
  const PanelCodes codes(w, panel);
  const PanelScales<int8_t> scales(w->scales, w->subscales, w, panel);
  const PanelScales<uint8_t> mins(w->mins, w->submins, w, panel);
  alignas(64) float scale[kPanel];
  alignas(64) float least[kPanel] = {};
  for (int64_t k = 0; k < w->cols; ++k) {
    if (k % 16 == 0) {
      for (int part = 0; part < kParts; ++part) {
        v_store(scale + part * kLanes, scales.at(k / w->group, part));
        if (w->mins != nullptr) v_store(least + part * kLanes, mins.at(k / w->group, part));
      }
    }
    const int64_t at = 4 * n + k % 4;
    int code;
    if (w->kind == Codes::u8) {
      code = codes.codes[k / 4 * 64 + at];
    } else {
      code = (codes.codes[k / 8 * 64 + at] >> (k / 4 % 2 * 4)) & 15;
      if (w->kind == Codes::u5) code |= ((codes.extra[k / 32 * 64 + at] >> (k / 4 % 8)) & 1) << 4;
      if (w->kind == Codes::u6) code |= ((codes.extra[k / 16 * 64 + at] >> (k / 4 % 4 * 2)) & 3) << 4;
    }
    const int value = w->codebook != nullptr ? w->codebook[code] : code - w->zero;
    float y = scale[n] * static_cast<float>(value);
    if (w->mins != nullptr) y += least[n];
    out[k] = y;
  }
}

}  // namespace fastllm::FASTLLM_ISA
