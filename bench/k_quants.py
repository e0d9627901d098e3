"""Q4_K, Q5_K and Q6_K blocks from values, for which the gguf package has no quantizer.

Plain rounding: a sub-block's scale and minimum come from its largest and smallest value, without llama.cpp's
search for better ones. The files are valid and cost what others of their type cost; the values in them are a
little further from the original.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

TYPES = ("Q4_K", "Q5_K", "Q6_K")
BLOCK = 256


def quantize(values: Floats, kind: str) -> Bytes:
    """(rows, columns), a multiple of 256 columns -> the blocks' bytes (rows, bytes)."""
    blocks = values.reshape(-1, BLOCK)
    packed = _q6_k(blocks) if kind == "Q6_K" else _q4_or_q5_k(blocks, 4 if kind == "Q4_K" else 5)
    return packed.reshape(len(values), -1)


def _q4_or_q5_k(blocks: Floats, bits: int) -> Bytes:
    """value = d * scale * code - dmin * minimum; 8 sub-blocks of 32, scales and minimums of 6 bits."""
    sub = blocks.reshape(-1, 8, 32)
    lowest = np.minimum(sub.min(-1), 0)
    d, scales = _super((sub.max(-1).clip(0) - lowest) / (2**bits - 1))
    dmin, minimums = _super(-lowest)
    steps = (_widened(d) * scales)[..., None]
    offsets = (_widened(dmin) * minimums)[..., None]
    codes = np.rint((sub + offsets) * _inverse(steps)).clip(0, 2**bits - 1).astype(np.uint8)

    sixes = np.empty((len(sub), 12), np.uint8)
    sixes[:, 0:4] = scales[:, :4] | scales[:, 4:] >> 4 << 6
    sixes[:, 4:8] = minimums[:, :4] | minimums[:, 4:] >> 4 << 6
    sixes[:, 8:] = scales[:, 4:] & 15 | minimums[:, 4:] << 4
    nibbles = codes & 15
    parts = [_bytes(d), _bytes(dmin), sixes]
    if bits == 5:  # bit i of byte l: the fifth bit of sub-block i's code l
        parts.append(np.bitwise_or.reduce(codes >> 4 << np.arange(8, dtype=np.uint8)[:, None], axis=1))
    parts.append((nibbles[:, 0::2] | nibbles[:, 1::2] << 4).reshape(-1, 128))
    return np.concatenate(parts, axis=1)


def _q6_k(blocks: Floats) -> Bytes:
    """value = d * scale * (code - 32); 16 sub-blocks of 16, signed scales of 8 bits."""
    sub = blocks.reshape(-1, 16, 16)
    scales = np.abs(sub).max(-1) / 31
    d = (scales.max(-1) / 127).astype(np.float16)
    bytes_of_scales = np.rint(scales * _inverse(_widened(d))).clip(0, 127).astype(np.int8)
    steps = (_widened(d) * bytes_of_scales)[..., None]
    codes = (np.rint(sub * _inverse(steps)).clip(-32, 31) + 32).astype(np.uint8)

    halves = codes.reshape(-1, 2, 4, 32)  # half of the block, quarter of the half
    low, high = halves & 15, halves >> 4
    ql = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    qh = np.bitwise_or.reduce(high << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=2).reshape(-1, 64)
    return np.concatenate([ql, qh, bytes_of_scales.view(np.uint8), _bytes(d)], axis=1)


def _super(values: Floats) -> tuple[npt.NDArray[np.float16], Bytes]:
    """Values of sub-blocks (B, 8), none negative, as an fp16 factor (B,) times 6-bit integers (B, 8)."""
    factor = (values.max(-1) / 63).astype(np.float16)
    return factor, np.rint(values * _inverse(_widened(factor))).clip(0, 63).astype(np.uint8)


def _widened(factor: npt.NDArray[np.float16]) -> Floats:
    return factor.astype(np.float32)[:, None]


def _inverse(values: Floats) -> Floats:
    return np.divide(1, values, out=np.zeros_like(values), where=values != 0)


def _bytes(factor: npt.NDArray[np.float16]) -> npt.NDArray[Any]:
    return factor[:, None].view(np.uint8)
