// The decoders of GGUF's block formats and the table of them.
//
// The byte layouts are those of the `gguf` package's quants.py, which tests/test_packed.py takes as the
// oracle. Letters in the comments: d scale, m minimum, q codes. Multi-byte fields are little-endian.
#include "quant/ggml_blocks.h"

#include <bit>
#include <cstring>

#include "core/argument_error.h"

namespace fastllm {
namespace {

static_assert(std::endian::native == std::endian::little, "file fields are copied as they lie");

using Byte = std::uint8_t;

std::uint16_t load16(const Byte* p) {
  std::uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

std::uint16_t negated(std::uint16_t half) { return half ^ 0x8000u; }

// n bytes become 2n codes: first the low nibbles, then the high ones.
void nibbles(const Byte* q, int n, Byte* codes) {
  for (int i = 0; i < n; ++i) codes[i] = q[i] & 15;
  for (int i = 0; i < n; ++i) codes[n + i] = q[i] >> 4;
}

// Sets bit 4 of codes[i] to bit i of the 4 bytes `high`, i < 32.
void add_fifth_bits(const Byte* high, Byte* codes) {
  for (int i = 0; i < 4; ++i) {
    // Byte b of `spread` is 1 << b or 0; adding 0x7f moves "not 0" into bit 7.
    const std::uint64_t spread = (high[i] * 0x0101010101010101u) & 0x8040201008040201u;
    std::uint64_t eight;
    std::memcpy(&eight, codes + 8 * i, 8);
    eight |= ((spread + 0x7f7f7f7f7f7f7f7fu) & 0x8080808080808080u) >> 3;
    std::memcpy(codes + 8 * i, &eight, 8);
  }
}

// ---- blocks of 32 columns ---------------------------------------------------------------------------------

void decode_q4_0(const Byte* p, Block* out) {  // d, q[16]; IQ4_NL differs by its codebook alone
  out->scale = load16(p);
  nibbles(p + 2, 16, out->codes);
}

void decode_q4_1(const Byte* p, Block* out) {  // d, m, q[16]
  out->scale = load16(p);
  out->min = load16(p + 2);
  nibbles(p + 4, 16, out->codes);
}

void decode_q5_0(const Byte* p, Block* out) {  // d, fifth bits[4], q[16]
  out->scale = load16(p);
  nibbles(p + 6, 16, out->codes);
  add_fifth_bits(p + 2, out->codes);
}

void decode_q5_1(const Byte* p, Block* out) {  // d, m, fifth bits[4], q[16]
  out->scale = load16(p);
  out->min = load16(p + 2);
  nibbles(p + 8, 16, out->codes);
  add_fifth_bits(p + 4, out->codes);
}

void decode_q8_0(const Byte* p, Block* out) {  // d, signed q[32]; flipping the top bit adds 128
  out->scale = load16(p);
  for (int i = 0; i < 32; ++i) out->codes[i] = p[2 + i] ^ 0x80;
}

// ---- superblocks of 256 columns ---------------------------------------------------------------------------

// 64 bytes become 256 two-bit codes: bits 2j of byte 32h + i belong to column 128h + 32j + i.
void two_bits(const Byte* q, Byte* codes) {
  for (int h = 0; h < 2; ++h)
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 32; ++i) codes[128 * h + 32 * j + i] = (q[32 * h + i] >> (2 * j)) & 3;
}

// Eight 6-bit scales and eight 6-bit minimums in 12 bytes. Bytes 0-3: scales 0-3 and, on top, bits 4-5 of
// scales 4-7; bytes 4-7: the same of the minimums; bytes 8-11: low nibbles of scales 4-7, high ones of
// minimums 4-7.
void six_bit_scales(const Byte* s, Block* out) {
  for (int j = 0; j < 4; ++j) {
    out->subscales[j] = static_cast<std::int8_t>(s[j] & 63);
    out->submins[j] = s[4 + j] & 63;
    out->subscales[4 + j] = static_cast<std::int8_t>((s[8 + j] & 15) | ((s[j] >> 2) & 48));
    out->submins[4 + j] = static_cast<Byte>((s[8 + j] >> 4) | ((s[4 + j] >> 2) & 48));
  }
}

void decode_q2_k(const Byte* p, Block* out) {  // (scale | min << 4)[16], q[64], d, dmin
  for (int g = 0; g < 16; ++g) {
    out->subscales[g] = p[g] & 15;
    out->submins[g] = p[g] >> 4;
  }
  two_bits(p + 16, out->codes);
  out->scale = load16(p + 80);
  out->min = negated(load16(p + 82));
}

void decode_q3_k(const Byte* p, Block* out) {  // third bits[32], q[64], scales[12], d
  two_bits(p + 32, out->codes);
  for (int b = 0; b < 8; ++b)  // bit b of byte i belongs to column 32b + i
    for (int i = 0; i < 32; ++i) out->codes[32 * b + i] |= ((p[i] >> b) & 1) << 2;
  const Byte* s = p + 96;  // 16 low nibbles in 8 bytes, then 16 high pairs in 4; a scale is 6 bits less 32
  for (int g = 0; g < 16; ++g) {
    const int low = (s[g % 8] >> (g < 8 ? 0 : 4)) & 15;
    const int high = (s[8 + g % 4] >> (2 * (g / 4))) & 3;
    out->subscales[g] = static_cast<std::int8_t>((low | high << 4) - 32);
  }
  out->scale = load16(p + 108);
}

void decode_q4_k(const Byte* p, Block* out) {  // d, dmin, scales and mins[12], q[128]
  out->scale = load16(p);
  out->min = negated(load16(p + 2));
  six_bit_scales(p + 4, out);
  for (int c = 0; c < 4; ++c) nibbles(p + 16 + 32 * c, 32, out->codes + 64 * c);
}

void decode_q5_k(const Byte* p, Block* out) {  // d, dmin, scales and mins[12], fifth bits[32], q[128]
  out->scale = load16(p);
  out->min = negated(load16(p + 2));
  six_bit_scales(p + 4, out);
  for (int c = 0; c < 4; ++c) nibbles(p + 48 + 32 * c, 32, out->codes + 64 * c);
  for (int b = 0; b < 8; ++b)  // bit b of byte i belongs to column 32b + i
    for (int i = 0; i < 32; ++i) out->codes[32 * b + i] |= ((p[16 + i] >> b) & 1) << 4;
}

void decode_q6_k(const Byte* p, Block* out) {  // low nibbles[128], high pairs[64], signed scales[16], d
  for (int h = 0; h < 2; ++h) {
    nibbles(p + 64 * h, 64, out->codes + 128 * h);
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 32; ++i)
        out->codes[128 * h + 32 * j + i] |= ((p[128 + 32 * h + i] >> (2 * j)) & 3) << 4;
  }
  std::memcpy(out->subscales, p + 192, 16);
  out->scale = load16(p + 208);
}

void decode_iq4_xs(const Byte* p, Block* out) {  // d, high pairs of 8 scales[2], low nibbles[4], q[128]
  out->scale = load16(p);
  const unsigned high = load16(p + 2);
  for (int g = 0; g < 8; ++g) {
    const unsigned low = (p[4 + g / 2] >> (4 * (g % 2))) & 15u;
    out->subscales[g] = static_cast<std::int8_t>(static_cast<int>(low | ((high >> (2 * g)) & 3u) << 4) - 32);
  }
  for (int g = 0; g < 8; ++g) nibbles(p + 8 + 16 * g, 16, out->codes + 32 * g);
}

// ---- the table --------------------------------------------------------------------------------------------

constexpr std::int8_t kIq4Codebook[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};

// clang-format off
constexpr BlockFormat kFormats[] = {
    // name    columns  bytes  kind         group  zero  subscales  mins   codebook      decoder
    {"F32",    1,       4,     Codes::f32,  0,     0,    false,     false, nullptr,      nullptr},
    {"F16",    1,       2,     Codes::f16,  0,     0,    false,     false, nullptr,      nullptr},
    {"BF16",   1,       2,     Codes::bf16, 0,     0,    false,     false, nullptr,      nullptr},
    {"Q4_0",   32,      18,    Codes::u4,   32,    8,    false,     false, nullptr,      decode_q4_0},
    {"Q4_1",   32,      20,    Codes::u4,   32,    0,    false,     true,  nullptr,      decode_q4_1},
    {"Q5_0",   32,      22,    Codes::u5,   32,    16,   false,     false, nullptr,      decode_q5_0},
    {"Q5_1",   32,      24,    Codes::u5,   32,    0,    false,     true,  nullptr,      decode_q5_1},
    {"Q8_0",   32,      34,    Codes::u8,   32,    128,  false,     false, nullptr,      decode_q8_0},
    {"Q2_K",   256,     84,    Codes::u4,   16,    0,    true,      true,  nullptr,      decode_q2_k},
    {"Q3_K",   256,     110,   Codes::u4,   16,    4,    true,      false, nullptr,      decode_q3_k},
    {"Q4_K",   256,     144,   Codes::u4,   32,    0,    true,      true,  nullptr,      decode_q4_k},
    {"Q5_K",   256,     176,   Codes::u5,   32,    0,    true,      true,  nullptr,      decode_q5_k},
    {"Q6_K",   256,     210,   Codes::u6,   16,    32,   true,      false, nullptr,      decode_q6_k},
    {"IQ4_NL", 32,      18,    Codes::u4,   32,    0,    false,     false, kIq4Codebook, decode_q4_0},
    {"IQ4_XS", 256,     136,   Codes::u4,   32,    0,    true,      false, kIq4Codebook, decode_iq4_xs},
};
// clang-format on

}  // namespace

const BlockFormat& find_format(const std::string& name) {
  for (const BlockFormat& format : kFormats)
    if (name == format.name) return format;
  std::string known = "one of";
  for (const BlockFormat& format : kFormats)
    known += std::string(known == "one of" ? " " : ", ") + format.name;
  throw ArgumentError("dtype", name, known);
}

}  // namespace fastllm
