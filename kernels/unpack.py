"""A tile of packed weights as floating-point numbers in registers, for all kernels that read `layout.py`.

A code becomes a number without a conversion: its bits under the exponent of 2^10 (fp16) or 2^7 (bf16) are
that power plus the code, and subtracting the power plus the zero is exact. For two codes in one register that
is a shift, a logical operation and a subtraction. A signed byte has more bits than bf16 holds under one
exponent, so it is made of two halves: (2048 + 16 high - 2304) + (128 + low), each step exact.

The scale is then applied in the activations' type. A weight is so rounded as in a matrix that was dequantized
before (bf16: scale and product to 2^-9 each; fp16: 2^-12; fp32, for tests: exact), sums are fp32.

Cost on sm_90 of 128 weights of a thread, two at a time: 64 LOP3, 48 shifts, 64 subtractions, 64
multiplications; no conversion, no permutation. Triton's interpreter has no inline assembly: with
NATIVE false plain conversions give the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _fields(magic: str, high_bits: int) -> str:
    """Assembly: two words to four pairs of codes under an exponent, plane by plane.

    $4: the words; $5: those of the extra bits; $6: at which bit of them this block's begin (in both halves).
    """
    lines = ["and.b32 a, $6, 15; shr.b32 extra, $5, a;"] if high_bits else []
    for p in range(4):
        source = "$4"
        if p:
            lines.append(f"shr.b32 a, $4, {4 * p};")
            source = "a"
        lines.append(f"lop3.b32 $%d, {source}, 0x000F000F, {magic}, 0xEA;" % p)  # a & b | c
        if high_bits:
            up = 4 - high_bits * p
            shift = f"shl.b32 b, extra, {up};" if up >= 0 else f"shr.b32 b, extra, {-up};"
            mask = "0x00100010" if high_bits == 1 else "0x00300030"
            lines += [shift, f"lop3.b32 ${p}, b, {mask}, ${p}, 0xEA;"]
    return "{ .reg .b32 a, b, extra; " + " ".join(lines) + " }"


def _bytes_fp16() -> str:
    """Assembly: two words of signed bytes to two pairs of fp16; a & b ^ c puts 1024 + 128 + code together."""
    return (
        "{ .reg .b32 a, z; mov.b32 z, 0x64806480;"
        " lop3.b32 $0, $2, 0x00FF00FF, z, 0x6A; sub.f16x2 $0, $0, z;"
        " shr.b32 a, $2, 8; lop3.b32 $1, a, 0x00FF00FF, z, 0x6A; sub.f16x2 $1, $1, z; }"
    )


def _bytes_bf16() -> str:
    """Assembly: two words of signed bytes to two pairs of bf16, from halves. (By fma: sm_80 has no add.)"""
    lines = ["{ .reg .b32 a, low, high, one, z; mov.b32 one, 0x3F803F80; mov.b32 z, 0xC510C510;"]  # 1, -2304
    for p in range(2):
        lines += [
            f"shr.b32 a, $2, {8 * p};",
            "lop3.b32 low, a, 0x000F000F, 0x43004300, 0xEA;",  # 128 + low
            f"shr.b32 a, $2, {8 * p + 4};",
            "lop3.b32 high, a, 0x000F000F, 0x45084508, 0x6A;",  # 2048 + 16 (high ^ 8)
            "fma.rn.bf16x2 high, high, one, z;",
            f"fma.rn.bf16x2 ${p}, high, one, low;",
        ]
    return " ".join(lines) + " }"


_FP16_4, _FP16_5, _FP16_6 = (tl.constexpr(_fields("0x64006400", bits)) for bits in range(3))
_BF16_4, _BF16_5, _BF16_6 = (tl.constexpr(_fields("0x43004300", bits)) for bits in range(3))
_FP16_8 = tl.constexpr(_bytes_fp16())
_BF16_8 = tl.constexpr(_bytes_bf16())


@triton.jit
def _concatenate(a, b, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WIDTH) twice to (ROWS, 2 WIDTH); a renaming of registers in the layouts that a dot asks for."""
    return tl.join(a, b).permute(0, 2, 1).reshape(ROWS, 2 * WIDTH)


@triton.jit
def _interleave_pairs(a, b, ROWS: tl.constexpr):
    """The two byte planes of i8, (ROWS, 64) each, in the order of columns."""
    a = a.reshape(ROWS, 4, 16)
    b = b.reshape(ROWS, 4, 16)
    return tl.join(a, b).permute(0, 1, 3, 2).reshape(ROWS, 128)


@triton.jit
def load_codes(codes, extra, rows, b, N, KIND: tl.constexpr):
    """Words of `rows` (R,) in block b, (R, 32 or 64); the extra bits' words, and where b's begin."""
    WIDTH: tl.constexpr = 64 if KIND == "i8" else 32
    c = tl.arange(0, WIDTH)[None, :]
    b = tl.cast(b, tl.int64)
    words = tl.load(codes + (b * N + rows)[:, None] * WIDTH + c, eviction_policy="evict_first")
    if KIND == "u5":
        high = tl.load(extra + (b // 4 * N + rows)[:, None] * WIDTH + c)
        shift = b % 4 * 4
    elif KIND == "u6":
        high = tl.load(extra + (b // 2 * N + rows)[:, None] * WIDTH + c)
        shift = b % 2 * 8
    else:
        high = words
        shift = b * 0
    return words, high, tl.full((1, 1), shift, tl.int16)


@triton.jit
def _unpack_bytes(words, ROWS: tl.constexpr, T: tl.constexpr, NATIVE: tl.constexpr):
    if NATIVE and tl.float16 == T:
        low, up = tl.inline_asm_elementwise(_FP16_8, "=&r,=&r,r", [words], (tl.float16, tl.float16), True, 2)
    elif NATIVE and tl.bfloat16 == T:
        low, up = tl.inline_asm_elementwise(
            _BF16_8, "=&r,=&r,r", [words], (tl.bfloat16, tl.bfloat16), True, 2
        )
    else:
        low = words.to(tl.int8).to(T)
        up = (words >> 8).to(T)
    return _interleave_pairs(low, up, ROWS)


@triton.jit
def _unpack_nibbles(
    words, high, shift,
    ROWS: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, T: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """BITS: how many a code has beyond four."""
    if NATIVE and tl.float16 == T:
        ASM: tl.constexpr = _FP16_4 if BITS == 0 else _FP16_5 if BITS == 1 else _FP16_6
        q0, q1, q2, q3 = tl.inline_asm_elementwise(
            ASM, "=&r,=&r,=&r,=&r,r,r,r", [words, high, shift],
            (tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
        OFFSET: tl.constexpr = 1024 + ZERO
    elif NATIVE and tl.bfloat16 == T:
        ASM: tl.constexpr = _BF16_4 if BITS == 0 else _BF16_5 if BITS == 1 else _BF16_6
        q0, q1, q2, q3 = tl.inline_asm_elementwise(
            ASM, "=&r,=&r,=&r,=&r,r,r,r", [words, high, shift],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
        )  # fmt: skip
        OFFSET: tl.constexpr = 128 + ZERO
    else:
        MASK: tl.constexpr = (1 << BITS) - 1
        high = high >> shift
        q0 = ((words & 15) | ((high & MASK) << 4)).to(T)
        q1 = (((words >> 4) & 15) | (((high >> BITS) & MASK) << 4)).to(T)
        q2 = (((words >> 8) & 15) | (((high >> 2 * BITS) & MASK) << 4)).to(T)
        q3 = (((words >> 12) & 15) | (((high >> 3 * BITS) & MASK) << 4)).to(T)
        OFFSET: tl.constexpr = ZERO
    code = _concatenate(_concatenate(q0, q1, ROWS, 32), _concatenate(q2, q3, ROWS, 32), ROWS, 64)
    return code - tl.full((), OFFSET, T)


@triton.jit
def unpack_codes(
    words, high, shift,
    ROWS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, T: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """(ROWS, 128) numbers code - zero of type T."""
    if KIND == "i8":
        numbers = _unpack_bytes(words, ROWS, T, NATIVE)
    else:
        BITS: tl.constexpr = 0 if KIND == "u4" else 1 if KIND == "u5" else 2
        numbers = _unpack_nibbles(words, high, shift, ROWS, BITS, ZERO, T, NATIVE)
    return numbers


@triton.jit
def load_groups(scales, subscales, rows, b, N, GROUP: tl.constexpr, SUB: tl.constexpr):
    """Scales (or minimums) of `rows` (R,) in block b as stored: (R, G), and sub-scales if SUB."""
    G: tl.constexpr = 128 // GROUP if GROUP else 1
    g = tl.arange(0, G)[None, :]
    row = rows[:, None]
    if SUB:
        fine = tl.load(subscales + row + (b * G + g) * N)
        coarse = tl.load(scales + row + (b // 2 + g * 0) * N)
    elif GROUP:
        coarse = tl.load(scales + row + (b * G + g) * N)
        fine = coarse
    else:
        coarse = tl.load(scales + row + g)
        fine = coarse
    return coarse, fine


@triton.jit
def spread_groups(coarse, fine, ROWS: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, T: tl.constexpr):
    """What `load_groups` gave as (ROWS, 128) of type T, a value for every column."""
    G: tl.constexpr = 128 // GROUP if GROUP else 1
    if SUB:
        value = (coarse.to(tl.float32) * fine.to(tl.float32)).to(T)
    else:
        value = coarse.to(T)
    return tl.broadcast_to(value[:, :, None], (ROWS, G, 128 // G)).reshape(ROWS, 128)
