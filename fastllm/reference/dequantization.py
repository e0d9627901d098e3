"""The block formats of GGUF files, decoded in float32, bit for bit as their definition has it.

A quantized row is a run of blocks; a block holds `BLOCK_SIZES[dtype][0]` values in `BLOCK_SIZES[dtype][1]`
bytes. Every decoder below takes the bytes of n blocks, (n, bytes) uint8, and gives (n, values) float32.
Layouts are those of ggml's `ggml-common.h`; d, m are fp16, multi-byte integers little-endian. "low" and
"high" are the nibbles of a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Float32: TypeAlias = npt.NDArray[np.float32]

_IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)


def dequantize(dtype: str, data: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Float32:
    """The values of a tensor.

    Args:
        dtype: ggml name: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS.
        data: its bytes, flat.
        shape: row-major; the last axis is a whole number of blocks.

    Returns:
        float32 of that shape.

    Raises:
        KeyError: an unknown dtype.
    """
    values, size = BLOCK_SIZES[dtype]
    blocks = np.ascontiguousarray(data).reshape(-1, size)
    decoded = _DECODERS[dtype](blocks)
    assert decoded.shape == (blocks.shape[0], values)
    assert decoded.dtype == np.float32
    return decoded.reshape(shape)


def _half(blocks: Bytes, offset: int) -> Float32:
    """The fp16 at a byte offset of every block, (n, 1)."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16).astype(np.float32)


def _bit(values: npt.NDArray[np.uint8], position: int, width: int = 1) -> npt.NDArray[np.int32]:
    """`width` bits of every byte from `position` up."""
    return (values.astype(np.int32) >> position) & ((1 << width) - 1)


def _joined(parts: list[Float32]) -> Float32:
    return np.concatenate(parts, axis=1)


def _f32(blocks: Bytes) -> Float32:
    return blocks.view(np.float32)


def _f16(blocks: Bytes) -> Float32:
    return blocks.view(np.float16).astype(np.float32)


def _bf16(blocks: Bytes) -> Float32:
    """The upper half of a float32."""
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _nibbles(qs: Bytes) -> npt.NDArray[np.int32]:
    """The low nibbles of a run of bytes, then the high ones."""
    return np.concatenate([_bit(qs, 0, 4), _bit(qs, 4, 4)], axis=1)


def _fifth_bits(qh: Bytes) -> npt.NDArray[np.int32]:
    """32 single bits, least significant of the first byte first."""
    return np.stack([_bit(qh[:, i // 8], i % 8) for i in range(32)], axis=1)


def _q4_0(blocks: Bytes) -> Float32:
    """d, 16 bytes: d * (nibble - 8)."""
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:18]) - 8).astype(np.float32)


def _q4_1(blocks: Bytes) -> Float32:
    """d, m, 16 bytes: d * nibble + m."""
    return _half(blocks, 0) * _nibbles(blocks[:, 4:20]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Float32:
    """d, 32 fifth bits, 16 bytes: d * (nibble + 16 * bit - 16)."""
    q = _nibbles(blocks[:, 6:22]) + 16 * _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (q - 16).astype(np.float32)


def _q5_1(blocks: Bytes) -> Float32:
    """d, m, 32 fifth bits, 16 bytes: d * (nibble + 16 * bit) + m."""
    q = _nibbles(blocks[:, 8:24]) + 16 * _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Float32:
    """d, 32 signed bytes: d * byte."""
    return _half(blocks, 0) * blocks[:, 2:34].view(np.int8).astype(np.float32)


def _q2_k(blocks: Bytes) -> Float32:
    """16 bytes (low: scale, high: minimum), 64 bytes of 2-bit codes, d, m.

    Sub-block j of 16 values: (d * scale_j) * code - (m * minimum_j). Byte 32 h + i holds, from its low bits
    up, the codes of values 128 h + i, 128 h + 32 + i, 128 h + 64 + i, 128 h + 96 + i.
    """
    scales, qs = blocks[:, 0:16], blocks[:, 16:80]
    d, m = _half(blocks, 80), _half(blocks, 82)
    parts = []
    for j in range(16):
        half, plane, first = j // 8, (j % 8) // 2, 16 * (j % 2)
        code = _bit(qs[:, 32 * half + first : 32 * half + first + 16], 2 * plane, 2)
        scale = d * _bit(scales[:, j : j + 1], 0, 4).astype(np.float32)
        minimum = m * _bit(scales[:, j : j + 1], 4, 4).astype(np.float32)
        parts.append(scale * code.astype(np.float32) - minimum)
    return _joined(parts)


def _q3_k(blocks: Bytes) -> Float32:
    """32 bytes of high bits, 64 bytes of 2-bit codes, 12 bytes of 6-bit scales, d.

    Sub-block j of 16 values: (d * (scale_j - 32)) * (code - 4 * (1 - bit)). Codes lie as in Q2_K; bit b of
    byte i is the high bit of value 32 b + i. The low 4 bits of scale j are a nibble of byte j % 8 (low for j
    < 8), its high 2 bits are bits 2 (j // 4) of byte 8 + j % 4.
    """
    high, qs, packed = blocks[:, 0:32], blocks[:, 32:96], blocks[:, 96:108]
    d = _half(blocks, 108)
    parts = []
    for j in range(16):
        half, plane, first = j // 8, (j % 8) // 2, 16 * (j % 2)
        code = _bit(qs[:, 32 * half + first : 32 * half + first + 16], 2 * plane, 2)
        bit = _bit(high[:, first : first + 16], j // 2)
        low_bits = _bit(packed[:, j % 8 : j % 8 + 1], 4 * (j // 8), 4)
        high_bits = _bit(packed[:, 8 + j % 4 : 9 + j % 4], 2 * (j // 4), 2)
        scale = d * (low_bits + 16 * high_bits - 32).astype(np.float32)
        parts.append(scale * (code - 4 * (1 - bit)).astype(np.float32))
    return _joined(parts)


def _six_bit_scale(packed: Bytes, j: int) -> tuple[Float32, Float32]:
    """Scale j and minimum j (j < 8) of Q4_K and Q5_K out of 12 bytes, each (n, 1).

    For j < 4 the low six bits of bytes j and 4 + j; for j >= 4 the nibbles of byte 4 + j, with the two high
    bits of bytes j - 4 and j above them.
    """
    if j < 4:
        scale, minimum = _bit(packed[:, j : j + 1], 0, 6), _bit(packed[:, j + 4 : j + 5], 0, 6)
    else:
        low = packed[:, j + 4 : j + 5]
        scale = _bit(low, 0, 4) + 16 * _bit(packed[:, j - 4 : j - 3], 6, 2)
        minimum = _bit(low, 4, 4) + 16 * _bit(packed[:, j : j + 1], 6, 2)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _q4_k(blocks: Bytes) -> Float32:
    """d, m, 12 bytes of scales and minimums, 128 bytes.

    Sub-block j of 32 values: (d * scale_j) * nibble - (m * minimum_j), the low (j even) or high (j odd)
    nibbles of bytes 32 (j // 2) and on.
    """
    return _k_with_minimum(blocks, blocks[:, 16:144], None)


def _q5_k(blocks: Bytes) -> Float32:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit j of byte i belongs to value 32 j + i."""
    return _k_with_minimum(blocks, blocks[:, 48:176], blocks[:, 16:48])


def _k_with_minimum(blocks: Bytes, qs: Bytes, fifth: Bytes | None) -> Float32:
    d, m = _half(blocks, 0), _half(blocks, 2)
    parts = []
    for j in range(8):
        first = 32 * (j // 2)
        code = _bit(qs[:, first : first + 32], 4 * (j % 2), 4)
        if fifth is not None:
            code = code + 16 * _bit(fifth, j)
        scale, minimum = _six_bit_scale(blocks[:, 4:16], j)
        parts.append((d * scale) * code.astype(np.float32) - m * minimum)
    return _joined(parts)


def _q6_k(blocks: Bytes) -> Float32:
    """128 bytes of low nibbles, 64 bytes of high bits, 16 signed scales, d.

    Sub-block j of 16 values: (d * scale_j) * (nibble + 16 * bits - 32). Of each half of 128 values, value 32
    p + i (p < 4, i < 32) has nibble p // 2 of byte 64 h + 32 (p % 2) + i and bits 2 p of byte 32 h + i.
    """
    low, high = blocks[:, 0:128], blocks[:, 128:192]
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    d = _half(blocks, 208)
    parts = []
    for j in range(16):
        half, plane, first = j // 8, (j % 8) // 2, 16 * (j % 2)
        start = 64 * half + 32 * (plane % 2) + first
        code = _bit(low[:, start : start + 16], 4 * (plane // 2), 4)
        start = 32 * half + first
        code = code + 16 * _bit(high[:, start : start + 16], 2 * plane, 2)
        parts.append((d * scales[:, j : j + 1]) * (code - 32).astype(np.float32))
    return _joined(parts)


def _iq4_nl(blocks: Bytes) -> Float32:
    """d, 16 bytes: d * table[nibble]."""
    return _half(blocks, 0) * _IQ4_VALUES[_nibbles(blocks[:, 2:18])]


def _iq4_xs(blocks: Bytes) -> Float32:
    """d, 16 bits of high scale bits, 4 bytes of low ones, 128 bytes.

    Sub-block j of 32 values: (d * (scale_j - 32)) * table[nibble], low nibbles then high ones of 16 bytes.
    scale_j is nibble j % 2 of byte j // 2, with bits 2 j of the 16 above it.
    """
    d = _half(blocks, 0)
    parts = []
    for j in range(8):
        low_bits = _bit(blocks[:, 4 + j // 2 : 5 + j // 2], 4 * (j % 2), 4)
        high_bits = _bit(blocks[:, 2 + j // 4 : 3 + j // 4], 2 * (j % 4), 2)
        scale = d * (low_bits + 16 * high_bits - 32).astype(np.float32)
        parts.append(scale * _IQ4_VALUES[_nibbles(blocks[:, 8 + 16 * j : 24 + 16 * j])])
    return _joined(parts)


BLOCK_SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "F32": (1, 4),
        "F16": (1, 2),
        "BF16": (1, 2),
        "Q4_0": (32, 18),
        "Q4_1": (32, 20),
        "Q5_0": (32, 22),
        "Q5_1": (32, 24),
        "Q8_0": (32, 34),
        "Q2_K": (256, 84),
        "Q3_K": (256, 110),
        "Q4_K": (256, 144),
        "Q5_K": (256, 176),
        "Q6_K": (256, 210),
        "IQ4_NL": (32, 18),
        "IQ4_XS": (256, 136),
    }
)
"""dtype -> (values, bytes) of a block."""

_DECODERS: Mapping[str, Callable[[Bytes], Float32]] = MappingProxyType(
    {
        "F32": _f32,
        "F16": _f16,
        "BF16": _bf16,
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
        "IQ4_NL": _iq4_nl,
        "IQ4_XS": _iq4_xs,
    }
)
