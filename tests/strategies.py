"""Hypothesis strategies that tests of kernels, formats and engine share.

Sizes are drawn as exponents with one more or less, so that vector widths, blocks and their tails all occur
and shrinking ends at small powers of two. Arrays are drawn as a pattern and a seed, not element by element:
fast, and a failing example prints as one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from random_blocks import random_blocks

from fastllm.models.spec import DecoderSpec

Float32 = npt.NDArray[np.float32]

LANES = 16
"""Lanes of the kernels' logical vector."""

QUANTIZED_TYPES = (
    "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()  # noqa: SIM905
)
FLOAT_TYPES = ("F32", "F16", "BF16")


def seeds() -> st.SearchStrategy[int]:
    """Seeds for `numpy.random.default_rng`."""
    return st.integers(0, 2**32 - 1)


@st.composite
def sizes(draw: st.DrawFn, low: int = 1, high: int = 512) -> int:
    """A size in [low, high]: a power of two or a small multiple of the vector width, or one beside it."""
    exponents = st.integers(0, max(high, 1).bit_length()).map(lambda e: 1 << e)
    lanes = st.integers(1, 5).map(lambda n: n * LANES)
    size = draw(st.one_of(exponents, lanes)) + draw(st.sampled_from((0, -1, 1)))
    return min(max(size, low), high)


def multiples(unit: int, most: int) -> st.SearchStrategy[int]:
    """Multiples of `unit`, from one to `most` units."""
    return st.integers(1, most).map(lambda n: n * unit)


PATTERNS = ("normal", "uniform", "outliers", "constant", "zeros", "alternating", "wide", "sparse")


def make_floats(shape: tuple[int, ...], pattern: str, seed: int, scale: float = 1.0) -> Float32:
    """Finite float32 values; `scale` is their typical size.

    Patterns: normal; uniform; normal with a few values 50 times as large; one constant; zeros; +-scale in
    turn; ten powers of ten of magnitudes; nine tenths zero.
    """
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    if pattern == "uniform":
        values = rng.uniform(-1.0, 1.0, shape)
    elif pattern == "outliers":
        values = np.where(rng.random(shape) < 0.05, 50.0 * values, values)
    elif pattern == "constant":
        values = np.full(shape, rng.standard_normal())
    elif pattern == "zeros":
        values = np.zeros(shape)
    elif pattern == "alternating":
        values = np.where(np.arange(values.size) % 2, -1.0, 1.0).reshape(shape)
    elif pattern == "wide":
        values = values * 10.0 ** rng.uniform(-8.0, 2.0, shape)
    elif pattern == "sparse":
        values = np.where(rng.random(shape) < 0.9, 0.0, values)
    return (scale * values).astype(np.float32)


def floats(
    *shape: int, scale: float = 1.0, patterns: tuple[str, ...] = PATTERNS
) -> st.SearchStrategy[Float32]:
    """Float32 arrays of a shape, see `make_floats`."""
    return st.builds(make_floats, st.just(shape), st.sampled_from(patterns), seeds(), st.just(scale))


@dataclass(frozen=True)
class QuantizedMatrix:
    """Random blocks of a ggml type: `data` uint8 (rows, bytes), `values` what the `gguf` package decodes."""

    dtype: str
    rows: int
    columns: int
    data: npt.NDArray[np.uint8]
    values: Float32

    def __repr__(self) -> str:
        return f"QuantizedMatrix({self.dtype}, {self.rows} x {self.columns})"


def make_quantized(dtype: str, rows: int, blocks: int, seed: int) -> QuantizedMatrix:
    """A matrix of a ggml type, `blocks` blocks wide (groups of 32 columns for floating-point types)."""
    rng = np.random.default_rng(seed)
    kind = gguf.GGMLQuantizationType[dtype]
    columns = blocks * (32 if dtype in FLOAT_TYPES else gguf.GGML_QUANT_SIZES[kind][0])
    if dtype in FLOAT_TYPES:
        data = gguf.quants.quantize(rng.standard_normal((rows, columns)).astype(np.float32), kind)
    else:
        data = random_blocks(dtype, rows, columns, rng=rng)
    data = data.reshape(rows, -1).view(np.uint8)
    values = gguf.quants.dequantize(data, kind).reshape(rows, columns)
    return QuantizedMatrix(dtype, rows, columns, data, values)


@st.composite
def quantized_matrices(
    draw: st.DrawFn,
    dtypes: tuple[str, ...] = (*QUANTIZED_TYPES, *FLOAT_TYPES),
    *,
    rows: int = 40,
    blocks: int = 3,
) -> QuantizedMatrix:
    """Matrices of at most `rows` x `blocks` blocks."""
    dtype = draw(st.sampled_from(dtypes))
    return make_quantized(dtype, draw(sizes(1, rows)), draw(st.integers(1, blocks)), draw(seeds()))


@dataclass(frozen=True)
class PagedBatch:
    """A flat batch over a paged cache, as `StepBatch` describes one.

    q (T, heads, head_dim); k, v (blocks, block_size, kv_heads, head_dim), float32; query_start (S + 1,),
    seq_lens (S,), block_tables (S, max_blocks), slot_mapping (T,), positions (T,), int32.
    """

    q: Float32
    k: Float32
    v: Float32
    query_start: npt.NDArray[np.int32]
    seq_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]
    slot_mapping: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    window: int

    def __repr__(self) -> str:
        chunks = np.diff(self.query_start).tolist()
        return (
            f"PagedBatch(chunks={chunks}, seq_lens={self.seq_lens.tolist()}, q={self.q.shape}, "
            f"k={self.k.shape}, window={self.window})"
        )


@st.composite
def paged_batches(
    draw: st.DrawFn,
    *,
    max_seqs: int = 4,
    max_len: int = 150,
    head_dims: tuple[int, ...] = (16, 32, 64),
    block_sizes: tuple[int, ...] = (16, 32, 64),
) -> PagedBatch:
    """Decodes, chunks and whole prompts side by side, their blocks scattered over the cache."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 3, 4)))
    head_dim, block_size = draw(st.sampled_from(head_dims)), draw(st.sampled_from(block_sizes))
    lengths = draw(st.lists(sizes(1, max_len), min_size=1, max_size=max_seqs))
    chunks = [min(draw(sizes(1, 40)), length) for length in lengths]
    window = draw(st.sampled_from((0, 0, 1, 7, 16, 100)))
    rng = np.random.default_rng(draw(seeds()))

    needed = [-(-length // block_size) for length in lengths]
    blocks = sum(needed) + 2
    scattered = rng.permutation(blocks)
    tables = np.zeros((len(lengths), max(needed) + 1), dtype=np.int32)
    positions, slots, taken = [], [], 0
    for s, (length, chunk) in enumerate(zip(lengths, chunks, strict=True)):
        tables[s, : needed[s]] = scattered[taken : taken + needed[s]]
        taken += needed[s]
        for position in range(length - chunk, length):
            positions.append(position)
            slots.append(tables[s, position // block_size] * block_size + position % block_size)

    def normal(*shape: int) -> Float32:
        return rng.standard_normal(shape).astype(np.float32)

    return PagedBatch(
        q=normal(sum(chunks), kv_heads * group, head_dim),
        k=normal(blocks, block_size, kv_heads, head_dim),
        v=normal(blocks, block_size, kv_heads, head_dim),
        query_start=np.cumsum([0, *chunks]).astype(np.int32),
        seq_lens=np.array(lengths, dtype=np.int32),
        block_tables=tables,
        slot_mapping=np.array(slots, dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        window=window,
    )


def make_logits(vocab_size: int, seed: int, spread: float) -> Float32:
    """Distinct finite logits with a standard deviation of about `spread`, in random order."""
    rng = np.random.default_rng(seed)
    values = np.unique(rng.normal(0.0, spread, 2 * vocab_size).astype(np.float32))
    return rng.permutation(values)[:vocab_size]


def logits(low: int = 2, high: int = 300) -> st.SearchStrategy[Float32]:
    """Distinct logits (V,), from nearly uniform to nearly one-hot."""
    return st.builds(make_logits, sizes(low, high), seeds(), st.sampled_from((0.1, 1.0, 3.0, 10.0)))


def truncations() -> st.SearchStrategy[dict[str, Any]]:
    """temperature, top_k, top_p, min_p as keyword arguments; each often off."""
    return st.fixed_dictionaries(
        {
            "temperature": st.sampled_from((1.0, 0.3, 0.7, 1.5, 5.0)),
            "top_k": st.sampled_from((0, 1, 2, 5, 40, 1000)),
            "top_p": st.sampled_from((1.0, 0.05, 0.5, 0.9, 0.99)),
            "min_p": st.sampled_from((0.0, 0.01, 0.1, 0.5, 1.0)),
        }
    )


@st.composite
def decoder_specs(draw: st.DrawFn) -> DecoderSpec:
    """Decoders that no registered architecture has: every combination that the core accepts."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    head_dim, layers = draw(st.sampled_from((16, 32, 48))), draw(st.integers(1, 3))
    window = draw(st.sampled_from((0, 1, 9, 70)))
    norm = draw(st.sampled_from(("rms", "layer")))
    rotary = draw(st.sampled_from((0, 2, head_dim // 2, head_dim)))
    post_norms = draw(st.booleans())
    return DecoderSpec(
        architecture="drawn",
        vocab_size=draw(sizes(20, 90)),
        dim=draw(sizes(16, 100)),
        num_layers=layers,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=draw(sizes(8, 120)),
        context_length=256,
        norm=norm,
        norm_eps=1e-5,
        norm_bias=norm == "layer" and not post_norms and draw(st.booleans()),
        post_norms=post_norms,
        qk_norm=norm == "rms" and draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        rope_style="half" if rotary else "none",
        rope_base=draw(st.sampled_from((100.0, 10000.0))),
        rope_base_sliding=draw(st.sampled_from((0.0, 50.0))),
        rotary_dim=rotary,
        rope_linear_factor=draw(st.sampled_from((1.0, 4.0))),
        rope_factors=tuple(float(1 + i) for i in range(rotary // 2)) if draw(st.booleans()) else (),
        attn_softcap=draw(st.sampled_from((0.0, 3.0))),
        sliding_window=window,
        sliding_layers=tuple(draw(st.booleans()) for _ in range(layers)) if window else (),
        activation=draw(st.sampled_from(("silu", "gelu_tanh"))),
        embedding_scale=draw(st.sampled_from((1.0, 8.0))),
        final_softcap=draw(st.sampled_from((0.0, 5.0))),
        tied_head=draw(st.booleans()),
    )
