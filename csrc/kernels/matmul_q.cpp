// y[m, n] = sum over groups g, ascending, of  scale[n, g] * xscale[m, g] * sum_{k in g} (code[n, k] - zero)
// xq[m, k]
//           + sum over groups g, ascending, of  min[n, g] * xscale[m, g] * sum_{k in g} xq[m, k]
// for weights in packed codes and activations in int8.
//
// Numerics: the inner sum is an exact int32 (|sum| <= 16 * 255 * 127). Each step of 16 columns, the group of
// the activations, ends in one fp32 FMA per output, acc = fma(float(sum), scale * xscale, acc); minimums have
// an accumulator of their own, added once at the end. An output's sequence of operations is thus the same for
// any number of rows, any tile and any instruction set.
//
// Two paths, same arithmetic:
//   direct   up to kDirectRows rows: codes are unpacked in registers as they stream by
//   panel    more rows: a panel's codes, scales and minimums are unpacked once into scratch (L1 or L2), then
//   tiles of
//            up to kTileRows rows run over it
// Cost on AVX-512 VNNI per row, 16 outputs and 16 columns: 4 vpdpbusd with 4 broadcasting loads of the
// activation quad, 1 multiplication for the zero point, 1 conversion, 1 multiplication by the scales, 1 FMA;
// per panel and 16 columns 4 loads (panel path) or 2 loads and 6 logic operations (direct path), shared by
// the tile's rows. The tile keeps two registers a row; at 12 rows no vector leaves the registers inside the
// loop, the row pointers partly do. With 16 ymm (AVX2, where two make a vector) 4 rows spill some
// accumulators once per step; vpmaddubsw takes 3 instructions for what vpdpbusd does in one.
#include "kernels/ops.h"
#include "kernels/unpack.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int kStep = kActivationGroup;
static_assert(kStep == 16, "a step is four lines of four columns");

#if defined(FASTLLM_ISA_avx512vnni)
constexpr int kTileRows = 12;
constexpr int kDirectRows = 4;
#else
constexpr int kTileRows = 4;
constexpr int kDirectRows = 2;
#endif

// ---- what both paths share: the steps of one tile of R rows
// ------------------------------------------------

// Integer sums of `quads` lines starting at line `first`, for R rows. Lines come from `line(index constant)`.
template <bool wide, int R>
struct Sums {
  i32x16 value[R];

  FASTLLM_INLINE void start(const int32_t* const* minus_sums, int64_t at, i32x16 zero) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) value[r] = mul(set1_i32(minus_sums[r][at]), zero);
  }
  FASTLLM_INLINE void add_line(u8x64 w, const int8_t* const* q, int64_t k) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const i32x16 a = broadcast_quad(q[r] + k);
      value[r] = wide ? dot_u8(value[r], w, a) : dot_small(value[r], w, a);
    }
  }
};

// Pointers to R rows of activations.
template <int R>
struct Rows {
  const int8_t* q[R];
  const float* scale[R];
  const int32_t* sums[R];
  const float* fsums[R];

  Rows(const QuantizedRows* x, int64_t m) {
    for (int r = 0; r < R; ++r) {
      const QuantizedRows row = x->from_row(m + r);
      q[r] = row.q;
      scale[r] = row.scale;
      sums[r] = row.sums;
      fsums[r] = row.fsums;
    }
  }
};

struct Output {
  float* y;  // of the tile's first row and the panel's first column
  int64_t ldy;
  int64_t lanes;
  int accumulate;

  FASTLLM_INLINE void put(int r, f32x16 value) const {
    float* p = y + r * ldy;
    if (accumulate) value = add(load_first(p, lanes, 0.0f), value);
    store_first(p, value, lanes);
  }
};

// ---- direct ----------------------------------------------------------------------------------------------

// The step at column k, whose lines are `quad` to `quad + 3` of the eight of its 32 columns.
template <Unpack kind, int R, int quad>
FASTLLM_INLINE void direct_step(const PanelCodes& codes, const PanelScales<int8_t>& scales,
                                const Rows<R>& rows, int64_t k, i32x16 zero, f32x16* acc) {
  const int64_t step = k / kStep;
  const int64_t first = k / 4 - quad;
  Sums<is_wide(kind), R> sums;
  sums.start(rows.sums, step, zero);
  sums.add_line(codes.line<kind, quad>(first), rows.q, k);
  sums.add_line(codes.line<kind, quad + 1>(first), rows.q, k + 4);
  sums.add_line(codes.line<kind, quad + 2>(first), rows.q, k + 8);
  sums.add_line(codes.line<kind, quad + 3>(first), rows.q, k + 12);
  const f32x16 scale = scales.at(k);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    acc[r] = fma(to_float(sums.value[r]), mul(scale, set1(rows.scale[r][step])), acc[r]);
}

template <Unpack kind, int R>
FASTLLM_INLINE void direct_tile(const PackedView* w, int64_t panel, const QuantizedRows* x, int64_t m,
                                i32x16 zero, Output out) {
  const PanelCodes codes(w, panel);
  const PanelScales<int8_t> scales(w->scales, w->subscales, w, panel);
  const Rows<R> rows(x, m);
  f32x16 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = zero_f32();
  for (int64_t k = 0; k < w->kp; k += 2 * kStep) {  // two steps: the lines that share an extra plane's line
    direct_step<kind, R, 0>(codes, scales, rows, k, zero, acc);
    direct_step<kind, R, 4>(codes, scales, rows, k + kStep, zero, acc);
  }
  if (w->mins != nullptr) {
    const PanelScales<uint8_t> mins(w->mins, w->submins, w, panel);
    f32x16 low[R];
    for (int r = 0; r < R; ++r) low[r] = zero_f32();
    for (int64_t k = 0, step = 0; k < w->kp; k += kStep, ++step) {
      const f32x16 least = mins.at(k);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) low[r] = fma(least, set1(rows.fsums[r][step]), low[r]);
    }
    for (int r = 0; r < R; ++r) acc[r] = add(acc[r], low[r]);
  }
  for (int r = 0; r < R; ++r) out.put(r, acc[r]);
}

// ---- panel -----------------------------------------------------------------------------------------------

// A panel unpacked: bytes (kp/4, 64), scales and minimums (kp/step, 16) in fp32.
struct Unpacked {
  const uint8_t* bytes;
  const float* scales;
  const float* mins;  // or null
  int64_t kp;
};

template <Unpack kind>
void unpack_codes(const PackedView* w, int64_t panel, uint8_t* bytes) {
  const PanelCodes codes(w, panel);
  for (int64_t first = 0; first < w->kp / 4; first += 8) {
    store_line(bytes + (first + 0) * 64, codes.line<kind, 0>(first));
    store_line(bytes + (first + 1) * 64, codes.line<kind, 1>(first));
    store_line(bytes + (first + 2) * 64, codes.line<kind, 2>(first));
    store_line(bytes + (first + 3) * 64, codes.line<kind, 3>(first));
    store_line(bytes + (first + 4) * 64, codes.line<kind, 4>(first));
    store_line(bytes + (first + 5) * 64, codes.line<kind, 5>(first));
    store_line(bytes + (first + 6) * 64, codes.line<kind, 6>(first));
    store_line(bytes + (first + 7) * 64, codes.line<kind, 7>(first));
  }
}

template <typename Sub>
void unpack_scales(const PanelScales<Sub>& scales, int64_t kp, int step, float* out) {
  for (int64_t k = 0; k < kp; k += step, out += kPanel) store(out, scales.at(k));
}

template <bool wide, int R>
void panel_tile(const Unpacked& panel, const QuantizedRows* x, int64_t m, i32x16 zero, Output out) {
  const Rows<R> rows(x, m);
  f32x16 acc[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r] = zero_f32();
  const uint8_t* line = panel.bytes;
  for (int64_t k = 0, step = 0; k < panel.kp; k += kStep, ++step) {
    Sums<wide, R> sums;
    sums.start(rows.sums, step, zero);
#pragma GCC unroll 8
    for (int quad = 0; quad < kStep / 4; ++quad, line += 64)
      sums.add_line(load_line(line), rows.q, k + 4 * quad);
    const f32x16 scale = load(panel.scales + step * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      acc[r] = fma(to_float(sums.value[r]), mul(scale, set1(rows.scale[r][step])), acc[r]);
  }
  if (panel.mins != nullptr) {
    f32x16 low[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) low[r] = zero_f32();
    for (int64_t step = 0; step < panel.kp / kStep; ++step) {
      const f32x16 least = load(panel.mins + step * kPanel);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) low[r] = fma(least, set1(rows.fsums[r][step]), low[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r] = add(acc[r], low[r]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) out.put(r, acc[r]);
}

// ---- choosing --------------------------------------------------------------------------------------------

using PanelTile = void (*)(const Unpacked&, const QuantizedRows*, int64_t, i32x16, Output);

template <bool wide>
PanelTile panel_tile_of(int rows) {
  switch (rows) {
    case 1:
      return panel_tile<wide, 1>;
    case 2:
      return panel_tile<wide, 2>;
    case 3:
      return panel_tile<wide, 3>;
    case 4:
      return panel_tile<wide, 4>;
#if defined(FASTLLM_ISA_avx512vnni)
    case 5:
      return panel_tile<wide, 5>;
    case 6:
      return panel_tile<wide, 6>;
    case 7:
      return panel_tile<wide, 7>;
    case 8:
      return panel_tile<wide, 8>;
    case 9:
      return panel_tile<wide, 9>;
    case 10:
      return panel_tile<wide, 10>;
    case 11:
      return panel_tile<wide, 11>;
    case 12:
      return panel_tile<wide, 12>;
#endif
    default:
      return nullptr;
  }
}

template <Unpack kind>
void direct_panels(const PackedView* w, const QuantizedRows* x, int64_t rows, int64_t panel_begin,
                   int64_t panel_end, i32x16 zero, float* y, int64_t ldy, int accumulate) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t n = panel * kPanel;
    const Output out{y + n, ldy, w->rows - n < kPanel ? w->rows - n : kPanel, accumulate};
    switch (rows) {
      case 1:
        direct_tile<kind, 1>(w, panel, x, 0, zero, out);
        break;
      case 2:
        direct_tile<kind, 2>(w, panel, x, 0, zero, out);
        break;
#if defined(FASTLLM_ISA_avx512vnni)
      case 3:
        direct_tile<kind, 3>(w, panel, x, 0, zero, out);
        break;
      case 4:
        direct_tile<kind, 4>(w, panel, x, 0, zero, out);
        break;
#endif
      default:
        break;
    }
  }
}

template <Unpack kind>
void matmul(const PackedView* w, const QuantizedRows* x, int64_t rows, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t ldy, int accumulate, void* scratch) {
  const int bias =
      kind == Unpack::codebook ? 128 - kU8Bias : (kind == Unpack::u8 ? w->zero - kU8Bias : w->zero);
  const i32x16 zero = set1_i32(bias);
  if (rows <= kDirectRows) {
    direct_panels<kind>(w, x, rows, panel_begin, panel_end, zero, y, ldy, accumulate);
    return;
  }
  uint8_t* bytes = static_cast<uint8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(bytes + w->kp * kPanel);
  float* mins = scales + w->kp / kStep * kPanel;
  // Tiles of nearly equal size: 13 rows run as 7 and 6, not as 12 and 1.
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    Unpacked unpacked{bytes, scales, nullptr, w->kp};
    if constexpr (kind == Unpack::u8) {
      unpacked.bytes = w->codes + panel * w->kp * kPanel;
    } else {
      unpack_codes<kind>(w, panel, bytes);
    }
    unpack_scales(PanelScales<int8_t>(w->scales, w->subscales, w, panel), w->kp, kStep, scales);
    if (w->mins != nullptr) {
      unpack_scales(PanelScales<uint8_t>(w->mins, w->submins, w, panel), w->kp, kStep, mins);
      unpacked.mins = mins;
    }
    const int64_t n = panel * kPanel;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = rows * t / tiles;
      const int64_t end = rows * (t + 1) / tiles;
      const Output out{y + begin * ldy + n, ldy, w->rows - n < kPanel ? w->rows - n : kPanel, accumulate};
      panel_tile_of<is_wide(kind)>(static_cast<int>(end - begin))(unpacked, x, begin, zero, out);
    }
  }
}

}  // namespace

void matmul_q(const PackedView* w, const QuantizedRows* x, int64_t rows, int64_t panel_begin,
              int64_t panel_end, float* y, int64_t ldy, int accumulate, void* scratch) {
  switch (w->kind) {
    case Codes::u4:
      if (w->codebook != nullptr) {
        matmul<Unpack::codebook>(w, x, rows, panel_begin, panel_end, y, ldy, accumulate, scratch);
      } else {
        matmul<Unpack::u4>(w, x, rows, panel_begin, panel_end, y, ldy, accumulate, scratch);
      }
      break;
    case Codes::u5:
      matmul<Unpack::u5>(w, x, rows, panel_begin, panel_end, y, ldy, accumulate, scratch);
      break;
    case Codes::u6:
      matmul<Unpack::u6>(w, x, rows, panel_begin, panel_end, y, ldy, accumulate, scratch);
      break;
    case Codes::u8:
      matmul<Unpack::u8>(w, x, rows, panel_begin, panel_end, y, ldy, accumulate, scratch);
      break;
    default:
      break;
  }
}

}  // namespace fastllm::FASTLLM_ISA
