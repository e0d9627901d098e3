"""Random quantized tensors as GGUF files store them; apart from `tiny`, since this needs no torch."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

# Where a block keeps its fp16 scale and minimum, and the minimum (in scales) that centres random codes on
# zero.
_SCALE_OFFSETS: dict[str, tuple[int, int | None, float]] = {
    "Q4_0": (0, None, 0.0),
    "Q4_1": (0, 2, -7.5),
    "Q5_0": (0, None, 0.0),
    "Q5_1": (0, 2, -15.5),
    "Q8_0": (0, None, 0.0),
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0.0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0.0),
    "IQ4_NL": (0, None, 0.0),
    "IQ4_XS": (0, None, 0.0),
}
QUANTIZED = list(_SCALE_OFFSETS)


def random_blocks(
    dtype: str, rows: int, columns: int, *, rng: np.random.Generator, std: float = 1.0
) -> npt.NDArray[np.uint8]:
    """Random blocks of a quantized type, (rows, bytes): every code and sub-scale, and scales such that the
    decoded values have about this standard deviation."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    blocks = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    scale_at, minimum_at, minimum = _SCALE_OFFSETS[dtype]

    def put(offset: int, values: npt.NDArray[np.float64]) -> None:
        blocks[..., offset : offset + 2] = values.astype(np.float16)[..., None].view(np.uint8)

    scales = rng.uniform(0.5, 1.5, blocks.shape[:2])
    put(scale_at, scales)
    if minimum_at is not None:
        put(minimum_at, minimum * scales)
    flat = blocks.reshape(rows, -1)
    scales *= std / gguf.quants.dequantize(flat, gguf.GGMLQuantizationType[dtype]).std()
    put(scale_at, scales)
    if minimum_at is not None:
        put(minimum_at, minimum * scales)
    return flat
