// y[m, n] = sum over weight groups g, ascending, of  scale[n, g] * t[m, n, g]
//           + sum over weight groups g, ascending, of  min[n, g] * f[m, g]
//   t[m, n, g] = sum over steps s of g, ascending, of  xscale[m, s] * sum_{k in s} c[n, k] q[m, k]
//   f[m, g] = sum over steps s of g, ascending, of  xscale[m, s] * sum_{k in s} q[m, k]
// for weights in packed codes, c = code - zero, and activations in int8. A step is 16 columns, the group of
// the activations; a weight group is one step or several.
//
// Numerics: the inner sum over k is an exact int32 (|sum| <= 16 * 255 * 127). t begins with the product of
// its first step and takes one fp32 FMA for each further one, the output's accumulator one FMA per group;
// minimums have an accumulator of their own, added once at the end. An output's sequence of operations is
// thus the same for any number of rows, any tile and any instruction set. Lanes never meet, so everything is
// written on native vectors: a column is kLanes outputs.
//
// Two paths, same arithmetic:
//   direct   where it pays (direct_rows): a tile unpacks the codes in registers as they stream by, and asks
//            for those that come next
//   panel    else: a panel is unpacked once into scratch (L1 or L2), then tiles of R rows run over it
// Cost on AVX-512 VNNI per row, 16 outputs and 32 columns that share a scale: 8 vpdpbusd, 2 conversions, 3
// FMAs or multiplications, and one more with minimums: at one of these (conversions apart) a cycle 73 %, or
// 67 %, of the peak of vpdpbusd. Loads per row: 2 starts and 8 activation quads and 2 scales, which are
// operands of the instructions that use them (broadcasts of their own cost 5 %); per tile 8 lines and a
// scale. Live vectors at 16 rows: 16 accumulators, 8 lines, 2 scales, 4 dot products. Where a group is
// several blocks t is live as well, and a tile has 8 rows. With 16 ymm (AVX2) 4 rows: 4 accumulators, 4 t, 4
// lines.
#include "kernels/ops.h"
#include "kernels/unpack.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int kStep = kActivationGroup;
static_assert(kStep == 16, "a step is four lines of four columns");

constexpr int64_t kRowsAtOnce = kMatmulRowsAtOnce;  // rows whose starts and sums lie in scratch
constexpr int64_t kAhead = 2048;                    // bytes of codes asked for ahead, in the direct path
constexpr int kRowsALine = 4;  // of a tile, that leave time to ask for a line of a ReadAhead with each block

// How many columns share a scale: a step, a block of 32, or several blocks.
enum class Share { step, block, blocks };

#if defined(FASTLLM_ISA_avx512vnni)
constexpr bool kManyRegisters = true;
constexpr int tile_rows(Share share) { return share == Share::blocks ? 8 : 16; }
// As many rows as run faster when each tile unpacks the codes anew: nibbles always do, bytes need no
// unpacking.
constexpr int64_t direct_rows(Unpack kind, Share share) {
  return kind == Unpack::u4 ? kRowsAtOnce : kind == Unpack::u8 ? tile_rows(share) : 32;
}
#else
constexpr bool kManyRegisters = false;
constexpr int tile_rows(Share) { return 4; }
constexpr int64_t direct_rows(Unpack, Share) { return 4; }
#endif

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- activations -----------------------------------------------------------------------------------------

// A run of rows, with what depends on the weights' format.
struct Activations {
  const int8_t* q;        // (rows, kp)
  const float* scales;    // (rows, steps)
  const int32_t* starts;  // (rows, steps): -zero * sum of q over the step, where its dot product begins
  const float* sums;      // (rows, groups): f; with minimums only
  int64_t kp;
  int64_t steps;
  int64_t groups;
  int64_t blocks_per_group;  // of 32 columns; 0 when a group is a step

  FASTLLM_INLINE Activations from_row(int64_t m) const {
    return {q + m * kp, scales + m * steps, starts + m * steps, sums + m * groups, kp, steps,
            groups,     blocks_per_group};
  }
};

void multiply_by(const int32_t* values, int64_t n, int factor, int32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = values[i] * factor;
}

// f of one row.
void sum_groups(const float* steps, int64_t count, int64_t per_group, float* out) {
  if (per_group == 2) {  // the usual case, in vectors
    for (int64_t g = 0; g < count / 2; ++g) out[g] = steps[2 * g] + steps[2 * g + 1];
    return;
  }
  for (int64_t s = 0; s < count; s += per_group) {
    float total = steps[s];
    for (int64_t i = s + 1; i < min_of(s + per_group, count); ++i) total += steps[i];
    *out++ = total;
  }
}

Activations prepare(const PackedView* w, const QuantizedRows* x, int64_t first, int64_t rows, int zero,
                    int32_t* starts, float* sums) {
  const QuantizedRows from = x->from_row(first);
  const int64_t steps = x->kp / kStep, per_group = w->group / kStep;
  const int64_t groups = (steps + per_group - 1) / per_group;
  multiply_by(from.sums, rows * steps, zero, starts);
  if (w->mins != nullptr) {
    for (int64_t m = 0; m < rows; ++m)
      sum_groups(from.fsums + m * steps, steps, per_group, sums + m * groups);
  }
  return {from.q, from.scale, starts, sums, x->kp, steps, groups, w->group / (2 * kStep)};
}

// ---- what comes after this product -----------------------------------------------------------------------

// Points at the next run's blocks in one plane.
__attribute__((noinline)) void next_stretch(ReadAhead* ahead) {
  const BlockRun& run = *ahead->run;
  const int64_t bytes = ahead->block_bytes[ahead->plane];
  ahead->at = ahead->planes[ahead->plane] + run.first * bytes;
  ahead->stop = ahead->at + run.count * bytes;
  if (++ahead->plane < ahead->plane_count) return;
  ahead->plane = 0;
  ++ahead->run;
}

// Asks for some lines; called for every tile's every block of 32 columns.
template <int rows>
FASTLLM_INLINE void read_ahead(ReadAhead* ahead) {
  constexpr int kLines = rows < 2 * kRowsALine ? 2 : rows / kRowsALine;
  if (ahead->at >= ahead->stop) {
    if (ahead->run == ahead->end) return;
    next_stretch(ahead);
  }
#pragma GCC unroll 4
  for (int line = 0; line < kLines; ++line) __builtin_prefetch(ahead->at + 64 * line, 0, 2);
  ahead->at += 64 * kLines;
}

// ---- where a tile's weights come from --------------------------------------------------------------------

// Codes are asked for some way ahead, since at each page the hardware's prefetchers begin anew; block by
// block, or the loads would queue up. When several tiles read a panel, activations fill the first cache and
// codes wait in the second.
struct CodesAhead {
  const uint8_t* codes;  // of the panel
  const uint8_t* end;    // what comes there is another thread's
  bool several;

  template <int64_t bytes>
  FASTLLM_INLINE void ask(int64_t block) const {
    const uint8_t* next = codes + block * bytes + kAhead;
    if (next >= end) return;
#pragma GCC unroll 8
    for (int64_t at = 0; at < bytes; at += 64) {
      if (several) {
        __builtin_prefetch(next + at, 0, 2);
      } else {
        __builtin_prefetch(next + at);
      }
    }
  }
};

// One panel as it is stored, from native part `part` on.
template <Unpack kind>
struct Packed {
  static constexpr int kBits = line_bits(kind);
  PanelCodes codes;
  PanelScales<int8_t> scales;
  PanelScales<uint8_t> mins;
  int part;
  CodesAhead next;
  ReadAhead* ahead;

  // Line `quad` of the eight of columns 32 * block to + 31.
  template <int quad>
  FASTLLM_INLINE vb line(int64_t block) const {
    return codes.template line<kind, quad>(block, part);
  }
  template <int rows>
  FASTLLM_INLINE void prefetch(int64_t block) const {
    next.ask<kind == Unpack::u8 ? 512 : 256>(block);
    read_ahead<rows>(ahead);
  }
  // Asked for with the first of a panel's tiles.
  FASTLLM_INLINE void tile_done() { next.end = nullptr; }
  FASTLLM_INLINE vf scale(int64_t g) const { return scales.at(g, part); }
  FASTLLM_INLINE vf minimum(int64_t g) const { return mins.at(g, part); }
};

// A panel unpacked: bytes (kp/4, 64), scales and minimums (groups, 16) in fp32; native part `part` of it.
template <int bits>
struct Unpacked {
  static constexpr int kBits = bits;
  const uint8_t* bytes;
  const float* scales;
  const float* mins;
  int64_t kp;
  int part;
  const uint8_t* next;  // where the bytes are the codes, those that come after: half of them with every tile
  const uint8_t* end;   // of them
  ReadAhead* ahead;

  template <int quad>
  FASTLLM_INLINE vb line(int64_t block) const {
    return vb_load(bytes + block * 512 + quad * 64 + part * kLineBytes);
  }
  template <int rows>
  FASTLLM_INLINE void prefetch(int64_t block) const {
    const uint8_t* p = next + block * 256;
    if (p < end) {
#pragma GCC unroll 4
      for (int64_t at = 0; at < 256; at += 64) __builtin_prefetch(p + at, 0, 2);
    }
    read_ahead<rows>(ahead);
  }
  FASTLLM_INLINE void tile_done() { next += kp / 32 * 256; }
  FASTLLM_INLINE vf scale(int64_t g) const { return v_load(scales + g * kPanel + part * kLanes); }
  FASTLLM_INLINE vf minimum(int64_t g) const { return v_load(mins + g * kPanel + part * kLanes); }
};

// ---- a tile of R rows ------------------------------------------------------------------------------------

struct Output {
  float* y;  // of the tile's first row and first output
  int64_t ldy;
  int64_t outputs;  // from there to the end of the matrix
  int accumulate;

  FASTLLM_INLINE void put(int r, vf value) const {
    float* p = y + r * ldy;
    if (outputs >= kLanes) {
      if (accumulate) value = v_add(v_load(p), value);
      v_store(p, value);
      return;
    }
    alignas(64) float lanes[kLanes];
    v_store(lanes, value);
    for (int64_t i = 0; i < outputs; ++i) p[i] = accumulate ? p[i] + lanes[i] : lanes[i];
  }
};

template <int first, int count, typename Weights>
FASTLLM_INLINE void load_lines(const Weights& weights, int64_t block, vb* lines) {
  if constexpr (count > 0) {
    lines[0] = weights.template line<first>(block);
    load_lines<first + 1, count - 1>(weights, block, lines + 1);
  }
}

// One step of a block of 32 columns, whose lines are `quad` to `quad + 3` of the block's eight. fresh: t
// begins with it.
template <int R, int quad, bool fresh, typename Weights>
FASTLLM_INLINE void add_step(const Weights& weights, const Activations& x, int64_t block, vf (&t)[R]) {
  const int64_t step = 2 * block + quad / 4;
  vb w[4];
  load_lines<quad, 4>(weights, block, w);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int64_t at = r * x.steps + step;
    const vf dot = v_from_int(dot16<Weights::kBits>(vi_set1(x.starts[at]), w, x.q + r * x.kp + step * kStep));
    t[r] = fresh ? v_mul(dot, v_set1(x.scales[at])) : v_fma(dot, v_set1(x.scales[at]), t[r]);
  }
}

// acc = scale * t + acc at the end of group g.
template <int R, typename Weights>
FASTLLM_INLINE void end_group(const Weights& weights, int64_t g, const vf (&t)[R], vf (&acc)[R]) {
  const vf scale = weights.scale(g);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r] = v_fma(t[r], scale, acc[r]);
}

// A block whose groups end within it, where the registers hold all its lines: no t outlives a row, so that
// there can be twice as many rows. Two rows' dot products take turns, or each would wait for its own.
template <int R, Share share, typename Weights>
FASTLLM_INLINE void add_block(const Weights& weights, const Activations& x, int64_t block, vf (&acc)[R]) {
  constexpr int kTurns = R > 1 ? 2 : 1;
  vb w[8];
  load_lines<0, 8>(weights, block, w);
  const vf scale = weights.scale(share == Share::step ? 2 * block : block);
  const vf next_scale = share == Share::step ? weights.scale(2 * block + 1) : scale;
#pragma GCC unroll 16
  for (int r = 0; r < R; r += kTurns) {
    const int8_t* q = x.q + r * x.kp + block * 2 * kStep;
    const int64_t at = r * x.steps + 2 * block;
    vi first[kTurns], second[kTurns];
#pragma GCC unroll 2
    for (int i = 0; i < kTurns; ++i) {
      first[i] = vi_set1(x.starts[at + i * x.steps]);
      second[i] = vi_set1(x.starts[at + i * x.steps + 1]);
    }
#pragma GCC unroll 4
    for (int line = 0; line < 4; ++line) {
#pragma GCC unroll 2
      for (int i = 0; i < kTurns; ++i) first[i] = dot_word(first[i], w[line], q + i * x.kp + 4 * line);
    }
#pragma GCC unroll 4
    for (int line = 0; line < 4; ++line) {
#pragma GCC unroll 2
      for (int i = 0; i < kTurns; ++i)
        second[i] = dot_word(second[i], w[4 + line], q + i * x.kp + kStep + 4 * line);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kTurns; ++i) {
      const vf xscale = v_set1(x.scales[at + i * x.steps]);
      const vf next_xscale = v_set1(x.scales[at + i * x.steps + 1]);
      const vf t = v_mul(v_from_int(first[i]), xscale);
      const vf dot = v_from_int(second[i]);
      if constexpr (share == Share::step) {
        acc[r + i] = v_fma(v_mul(dot, next_xscale), next_scale, v_fma(t, scale, acc[r + i]));
      } else {
        acc[r + i] = v_fma(v_fma(dot, next_xscale, t), scale, acc[r + i]);
      }
    }
  }
}

// acc += what the minimums give, which has an accumulator of its own; at most eight rows at a time.
template <int R, int first, typename Weights>
FASTLLM_INLINE void add_minimums(const Weights& weights, const Activations& x, vf (&acc)[R]) {
  constexpr int kRows = R - first < 8 ? R - first : 8;
  vf sum[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r] = v_set1(0.0f);
  for (int64_t g = 0; g < x.groups; ++g) {
    const vf least = weights.minimum(g);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = v_fma(least, v_set1(x.sums[(first + r) * x.groups + g]), sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[first + r] = v_add(acc[first + r], sum[r]);
  if constexpr (first + kRows < R) add_minimums<R, first + kRows>(weights, x, acc);
}

template <int R, Share share, typename Weights>
__attribute__((noinline)) void tile(const Weights& weights, const Activations& x, bool mins,
                                    const Output& out) {
  vf acc[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r] = v_set1(0.0f);
  const int64_t blocks = x.steps / 2;
  if constexpr (share == Share::blocks) {
    for (int64_t block = 0, g = 0; block < blocks; ++g) {
      const int64_t end = min_of(block + x.blocks_per_group, blocks);
      vf t[R];
      weights.template prefetch<R>(block);
      add_step<R, 0, true>(weights, x, block, t);
      add_step<R, 4, false>(weights, x, block, t);
      while (++block < end) {
        weights.template prefetch<R>(block);
        add_step<R, 0, false>(weights, x, block, t);
        add_step<R, 4, false>(weights, x, block, t);
      }
      end_group(weights, g, t, acc);
    }
  } else {
    for (int64_t block = 0; block < blocks; ++block) {
      weights.template prefetch<R>(block);
      if constexpr (kManyRegisters) {
        add_block<R, share>(weights, x, block, acc);
      } else if constexpr (share == Share::block) {
        vf t[R];
        add_step<R, 0, true>(weights, x, block, t);
        add_step<R, 4, false>(weights, x, block, t);
        end_group(weights, block, t, acc);
      } else {
        vf t[R];
        add_step<R, 0, true>(weights, x, block, t);
        end_group(weights, 2 * block, t, acc);
        add_step<R, 4, true>(weights, x, block, t);
        end_group(weights, 2 * block + 1, t, acc);
      }
    }
  }
  if (mins) add_minimums<R, 0>(weights, x, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) out.put(r, acc[r]);
}

// Rows from `m` on in tiles of R, R / 2, ... that add up to them.
template <int R, Share share, typename Weights>
void tiles_of(Weights& weights, const Activations& x, int64_t m, int64_t rows, bool mins, const Output& out) {
  for (; m + R <= rows; m += R) {
    tile<R, share>(weights, x.from_row(m), mins, {out.y + m * out.ldy, out.ldy, out.outputs, out.accumulate});
    weights.tile_done();
  }
  if constexpr (R > 1) {
    if (m < rows) tiles_of<R / 2, share>(weights, x, m, rows, mins, out);
  }
}

// ---- paths -----------------------------------------------------------------------------------------------

// What one call of matmul_q computes, besides its activations.
struct Job {
  const PackedView* w;
  int64_t rows;
  int64_t panel_begin, panel_end;
  float* y;
  int64_t ldy;
  int accumulate;
  ReadAhead* ahead;

  Output output(int64_t panel, int part) const {
    const int64_t n = panel * kPanel + part * kLanes;
    return {y + n, ldy, w->rows - n, accumulate};
  }
};

template <Unpack kind, Share share>
void direct(const Job& job, const Activations& x) {
  const PackedView* w = job.w;
  const uint8_t* end = PanelCodes(w, job.panel_end).codes;
  for (int64_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
    const PanelCodes codes(w, panel);
    Packed<kind> weights{codes,
                         PanelScales<int8_t>(w->scales, w->subscales, w, panel),
                         PanelScales<uint8_t>(w->mins, w->submins, w, panel),
                         0,
                         {codes.codes, end, job.rows > tile_rows(share)},
                         job.ahead};
    for (; weights.part < kParts; ++weights.part)
      tiles_of<tile_rows(share), share>(weights, x, 0, job.rows, w->mins != nullptr,
                                        job.output(panel, weights.part));
  }
}

template <Unpack kind>
void unpack_codes(const PackedView* w, int64_t panel, uint8_t* bytes) {
  const PanelCodes codes(w, panel);
  for (int64_t block = 0; block < w->kp / 32; ++block) {
    for (int part = 0; part < kParts; ++part) {
      uint8_t* to = bytes + block * 512 + part * kLineBytes;
      vb_store(to + 0 * 64, codes.line<kind, 0>(block, part));
      vb_store(to + 1 * 64, codes.line<kind, 1>(block, part));
      vb_store(to + 2 * 64, codes.line<kind, 2>(block, part));
      vb_store(to + 3 * 64, codes.line<kind, 3>(block, part));
      vb_store(to + 4 * 64, codes.line<kind, 4>(block, part));
      vb_store(to + 5 * 64, codes.line<kind, 5>(block, part));
      vb_store(to + 6 * 64, codes.line<kind, 6>(block, part));
      vb_store(to + 7 * 64, codes.line<kind, 7>(block, part));
    }
  }
}

template <typename Sub>
void unpack_scales(const PanelScales<Sub>& scales, int64_t groups, float* out) {
  for (int64_t g = 0; g < groups; ++g) {
    for (int part = 0; part < kParts; ++part) v_store(out + g * kPanel + part * kLanes, scales.at(g, part));
  }
}

// Scratch of the panel path.
struct PanelScratch {
  uint8_t* bytes;
  float* scales;
  float* mins;
};

template <Unpack kind, Share share>
void unpacked(const Job& job, const Activations& x, const PanelScratch& scratch) {
  const PackedView* w = job.w;
  for (int64_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
    Unpacked<line_bits(kind)> weights{scratch.bytes, scratch.scales, scratch.mins, x.kp, 0,
                                      scratch.bytes, scratch.bytes,  job.ahead};
    if constexpr (kind == Unpack::u8) {
      weights.bytes = w->codes + panel * w->kp * kPanel;
      weights.next = weights.bytes + w->kp * kPanel;
      weights.end = panel + 1 < job.panel_end ? weights.next + w->kp * kPanel : weights.next;
    } else {
      unpack_codes<kind>(w, panel, scratch.bytes);
    }
    unpack_scales(PanelScales<int8_t>(w->scales, w->subscales, w, panel), x.groups, scratch.scales);
    if (w->mins != nullptr)
      unpack_scales(PanelScales<uint8_t>(w->mins, w->submins, w, panel), x.groups, scratch.mins);
    for (; weights.part < kParts; ++weights.part)
      tiles_of<tile_rows(share), share>(weights, x, 0, job.rows, w->mins != nullptr,
                                        job.output(panel, weights.part));
  }
}

template <Unpack kind, Share share>
void by_rows(const Job& job, const Activations& rows, const PanelScratch& scratch) {
  if (job.rows <= direct_rows(kind, share)) {
    direct<kind, share>(job, rows);
  } else {
    unpacked<kind, share>(job, rows, scratch);
  }
}

template <Unpack kind>
void matmul(const Job& all, const QuantizedRows* x, void* memory) {
  const PackedView* w = all.w;
  const int zero =
      kind == Unpack::codebook ? 128 - kU8Bias : (kind == Unpack::u8 ? w->zero - kU8Bias : w->zero);
  const int64_t steps = w->kp / kStep;
  PanelScratch scratch;
  scratch.bytes = static_cast<uint8_t*>(memory);
  scratch.scales = reinterpret_cast<float*>(scratch.bytes + w->kp * kPanel);
  scratch.mins = scratch.scales + steps * kPanel;
  float* sums = scratch.mins + steps * kPanel;
  int32_t* starts = reinterpret_cast<int32_t*>(sums + kRowsAtOnce * steps);
  for (int64_t m = 0; m < all.rows; m += kRowsAtOnce) {
    Job job = all;
    job.rows = min_of(kRowsAtOnce, all.rows - m);
    job.y += m * job.ldy;
    const Activations rows = prepare(w, x, m, job.rows, zero, starts, sums);
    if (w->group == kStep) {
      by_rows<kind, Share::step>(job, rows, scratch);
    } else if (w->group == 2 * kStep) {
      by_rows<kind, Share::block>(job, rows, scratch);
    } else {
      by_rows<kind, Share::blocks>(job, rows, scratch);
    }
  }
}

}  // namespace

void matmul_q(const PackedView* w, const QuantizedRows* x, int64_t rows, int64_t panel_begin,
              int64_t panel_end, float* y, int64_t ldy, int accumulate, void* scratch, ReadAhead* ahead) {
  ReadAhead nothing{};
  const Job job{w, rows, panel_begin, panel_end, y, ldy, accumulate, ahead != nullptr ? ahead : &nothing};
  switch (w->kind) {
    case Codes::u4:
      return w->codebook != nullptr ? matmul<Unpack::codebook>(job, x, scratch)
                                    : matmul<Unpack::u4>(job, x, scratch);
    case Codes::u5:
      return matmul<Unpack::u5>(job, x, scratch);
    case Codes::u6:
      return matmul<Unpack::u6>(job, x, scratch);
    case Codes::u8:
      return matmul<Unpack::u8>(job, x, scratch);
    default:
      return;
  }
}

}  // namespace fastllm::FASTLLM_ISA
