"""`fastllm.ops`: shapes, dtypes and errors of the public functions.

What they compute exactly is tested with the kernels; here each is compared with its formula in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm import RequestError, ops

Float32 = npt.NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ints(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def close(got: npt.NDArray[Any], expected: npt.NDArray[Any], tolerance: float = 1e-5) -> None:
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


# ---- matrices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group", "most"), [(4, 16, 5.7), (4, 32, 5.1), (8, 32, 8.6), (8, 128, 8.2)])
def test_quantize_and_back(bits: int, group: int, most: float) -> None:
    w = normal(48, 256)
    packed = ops.quantize(w, bits, group)
    assert (packed.rows, packed.cols) == w.shape
    assert packed.nbytes * 8 / w.size <= most * 1.1
    grouped = w.reshape(48, -1, group)
    values = ops.dequantize(packed)
    step = (grouped.max(2) - grouped.min(2)) / 15 if bits == 4 else np.abs(grouped).max(2) / 127
    error = np.abs(values - w).reshape(grouped.shape).max(2)
    assert values.dtype == np.float32
    assert (error <= step * (1.5 if bits == 4 else 0.51)).all()


def test_matrices_come_in_three_float_types() -> None:
    w = normal(20, 40)
    bf16 = (w.view(np.uint32) >> 16).astype(np.uint16)
    assert (ops.dequantize(ops.from_float(w, "f32")) == w).all()
    assert (ops.dequantize(ops.from_float(w)) == w.astype(np.float16)).all()
    assert (ops.dequantize(ops.from_float(bf16, "bf16")).view(np.uint32) >> 16 == bf16).all()
    assert (ops.dequantize(ops.from_float(w.T, "f32")) == w.T).all()  # not contiguous
    close(ops.dequantize(ops.quantize(w.astype(np.float16), 8)), w, 0.02)


def test_a_matrix_of_a_gguf_file() -> None:
    # Two rows of one Q8_0 block: an fp16 scale and 32 codes.
    codes = np.arange(-32, 32, dtype=np.int8).reshape(2, 32)
    scales = np.array([[0.5], [2.0]], dtype=np.float16)
    data = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=1).reshape(-1)
    expected = codes * scales.astype(np.float32)
    assert (ops.dequantize_ggml("Q8_0", data, 2, 32) == expected).all()
    assert (ops.dequantize(ops.from_ggml("Q8_0", data, 2, 32)) == expected).all()
    apart = np.stack([data, data], axis=1)[:, 0]  # not contiguous
    assert (ops.dequantize_ggml("Q8_0", apart, 2, 32) == expected).all()
    assert (ops.dequantize(ops.from_ggml("Q8_0", apart, 2, 32)) == expected).all()
    swapped = ops.from_ggml("Q8_0", data, 2, 32, ints(1, 0))
    assert (ops.dequantize(swapped) == expected[::-1]).all()
    assert (ops.embedding(swapped, ints(1, 0, 1)) == expected[[0, 1, 0]]).all()


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 100), st.integers(0, 99), st.integers(0, 3))
def test_matmul_multiplies_the_values_that_it_stores(m: int, n: int, k: int, seed: int, threads: int) -> None:
    x, residual = normal(m, k, seed=seed), normal(m, n, seed=seed + 1)
    w = normal(n, k, seed=seed + 2)
    close(ops.matmul(x, ops.from_float(w, "f32")), x @ w.T, 1e-4)
    packed = ops.quantize(w, 8)
    q, scale = ops.quantize_rows(x)
    assert q.shape == (m, -(-k // 32) * 32)
    stored = (q.reshape(m, -1, 16) * scale[:, :, None]).reshape(m, -1)[:, :k]
    assert (np.abs(stored - x) <= np.abs(x).max() / 127 * 0.51).all()
    y = ops.matmul(x, packed, threads=threads)
    close(y, stored @ ops.dequantize(packed).T, 1e-4)
    close(ops.matmul(x, packed, residual), y + residual, 1e-4)
    # A row does not depend on the others, nor anything on the threads or the array's layout.
    assert (ops.matmul(x[:1], packed, threads=1) == y[:1]).all()
    assert (
        ops.matmul(np.asfortranarray(x), packed, np.asfortranarray(residual))
        == ops.matmul(x, packed, residual)
    ).all()


# ---- layers ------------------------------------------------------------------------------------------


shapes = st.lists(st.integers(1, 5), max_size=2).flatmap(
    lambda lead: st.integers(1, 70).map(lambda last: (*lead, last))
)


@given(shapes, st.integers(0, 99))
def test_norms_gates_and_caps(shape: tuple[int, ...], seed: int) -> None:
    x, up = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    weight, bias = normal(shape[-1], seed=seed + 2), normal(shape[-1], seed=seed + 3)
    exact = x.astype(np.float64)
    close(
        ops.rms_norm(x, weight, 1e-4),
        exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-4) * weight,
        1e-4,
    )
    centred = exact - exact.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * weight
    close(ops.layer_norm(x, weight, eps=1e-3), scaled, 1e-4)
    close(ops.layer_norm(x, weight, bias, 1e-3), scaled + bias, 1e-4)
    close(ops.silu_mul(x, up), exact / (1 + np.exp(-exact)) * up)
    gelu = exact / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)))
    close(ops.gelu_tanh_mul(x, up), gelu * up)
    before = x.copy()
    close(ops.softcap(x, 2.5), 2.5 * np.tanh(exact / 2.5))
    assert (x == before).all()
    assert ops.softcap(x[..., ::-1], 2.5).shape == shape


@given(
    st.lists(st.integers(0, 5000), max_size=12),
    st.integers(1, 3),
    st.sampled_from([(8, 8), (16, 8), (64, 64), (64, 2)]),
    st.booleans(),
)
def test_rope(places: list[int], heads: int, sizes: tuple[int, int], scaled: bool) -> None:
    dim, rotary = sizes
    positions = np.array(places, dtype=np.int32)
    x = normal(len(places), heads, dim)
    factors = np.linspace(1, 8, rotary // 2) if scaled else ()
    more: dict[str, Any] = {"base": 500.0, "linear_factor": 2.0, "factors": factors} if scaled else {}
    base, linear = (500.0, 2.0) if scaled else (10000.0, 1.0)
    frequencies = base ** (-2 * np.arange(rotary // 2) / rotary) / (
        linear * (np.array(factors) if scaled else 1)
    )
    angles = positions[:, None].astype(np.float64) * frequencies
    cos, sin = ops.rope_tables(positions, rotary, **more)
    close(cos, np.cos(angles), 1e-6)
    close(sin, np.sin(angles), 1e-6)
    low, high = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
    c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
    expected = np.concatenate([low * c - high * s, high * c + low * s, x[..., rotary:]], axis=2)
    turned = ops.rope(x, positions, rotary_dim=rotary, **more)
    close(turned, expected)
    assert (ops.rope(x, tables=(cos, sin)) == turned).all()
    if rotary == dim:
        assert (ops.rope(x, positions, **more) == turned).all()


# ---- attention ---------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 70)), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([0, 1, 20]),
    st.sampled_from([0.0, 3.0]),
    st.integers(0, 99),
)
def test_paged_attention(
    sequences: list[tuple[int, int]], heads: tuple[int, int], window: int, softcap: float, seed: int
) -> None:
    count, kv_heads = heads
    dim, block = 32, 16
    rng = np.random.default_rng(seed)
    lengths = [queries + past for queries, past in sequences]
    blocks = [-(-length // block) for length in lengths]
    cache = ops.KvCache(sum(blocks), kv_heads, dim, block)
    free = rng.permutation(sum(blocks)).astype(np.int32)
    tables = np.zeros((len(sequences), max(blocks)), np.int32)
    keys, values, wanted = [], [], []
    q = normal(sum(queries for queries, _ in sequences), count, dim, seed=seed)
    starts = np.cumsum([0, *(queries for queries, _ in sequences)], dtype=np.int32)
    for s, length in enumerate(lengths):
        tables[s, : blocks[s]], free = free[: blocks[s]], free[blocks[s] :]
        keys.append(normal(length, kv_heads, dim, seed=seed + s + 1))
        values.append(normal(length, kv_heads, dim, seed=seed + s + 50))
        positions = np.arange(length)
        slots = (tables[s][positions // block] * block + positions % block).astype(np.int32)
        cache.write(keys[s], values[s], slots)
    for s, (queries, past) in enumerate(sequences):
        for i in range(queries):
            place = past + i
            seen = slice(max(0, place - window + 1) if window else 0, place + 1)
            for h in range(count):
                group = h // (count // kv_heads)
                scores = keys[s][seen, group].astype(np.float64) @ q[starts[s] + i, h] * 0.3
                scores = softcap * np.tanh(scores / softcap) if softcap else scores
                share = np.exp(scores - scores.max())
                wanted.append(share / share.sum() @ values[s][seen, group])
    got = ops.paged_attention(
        cache, q, starts, np.array(lengths, np.int32), tables, scale=0.3, window=window, softcap=softcap
    )
    close(got, np.array(wanted).reshape(q.shape), 1e-4)
    default = ops.paged_attention(cache, q, starts, np.array(lengths, np.int32), tables)
    explicit = ops.paged_attention(cache, q, starts, np.array(lengths, np.int32), tables, scale=dim**-0.5)
    assert (default == explicit).all()


# ---- sampling ----------------------------------------------------------------------------------------


def test_greedy_sampling_and_what_the_logits_say() -> None:
    logits = normal(5, 100)
    result = ops.sample(logits, temperature=0, num_logprobs=3)
    assert (result.tokens == logits.argmax(1)).all()
    assert (result.ranks == 1).all()
    logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    close(result.logprobs, logprobs.max(1).astype(np.float32))
    assert (result.top_ids == np.argsort(-logits, axis=1)[:, :3]).all()
    close(result.top_logprobs, -np.sort(-logprobs, axis=1)[:, :3].astype(np.float32))


def test_a_draw_depends_on_its_key_alone() -> None:
    logits = np.repeat(normal(1, 50), 64, axis=0)
    many = ops.sample(logits, seed=range(64), position=7)
    alone = [ops.sample(logits[:1], seed=seed, position=7).tokens[0] for seed in range(64)]
    assert many.tokens.tolist() == alone
    assert len(set(alone)) > 10
    assert (
        ops.sample(logits, seed=2**64 - 1).tokens.tolist()
        == [ops.sample(logits[:1], seed=2**64 - 1).tokens[0]] * 64
    )
    for key in ({"position": range(64)}, {"sample_index": range(64)}):
        assert len(set(ops.sample(logits, **key).tokens.tolist())) > 10  # type: ignore[arg-type]


def test_what_may_be_sampled() -> None:
    logits = np.repeat(normal(1, 50), 200, axis=0)
    best = np.argsort(-logits[0])
    seeds = range(200)
    assert set(ops.sample(logits, seed=seeds, top_k=3).tokens) == set(best[:3])
    assert set(ops.sample(logits, seed=seeds, top_p=1e-6).tokens) == {best[0]}
    assert set(ops.sample(logits, seed=seeds, min_p=0.9999).tokens) == {best[0]}
    assert set(ops.sample(logits, seed=seeds, top_k=[1] * 100 + [2] * 100).tokens[:100]) == {best[0]}
    banned = [[int(best[0])]] * 200
    assert set(ops.sample(logits, seed=seeds, top_k=1, banned=banned).tokens) == {best[1]}
    allowed = [best[5:7].tolist()] * 100 + [None] * 100
    assert set(ops.sample(logits, seed=seeds, allowed=allowed).tokens[:100]) == set(best[5:7])
    assert set(ops.sample(logits, seed=seeds, top_k=1, allowed=allowed).tokens) == {best[5], best[0]}
    assert ops.sample(logits[:1], allowed=[[]]).tokens == [-1]
    bias = [{int(best[9]): 50.0}] * 200
    assert set(ops.sample(logits, seed=seeds, logit_bias=bias).tokens) == {best[9]}
    history = [[int(best[0])] * 3] * 200
    penalized = ops.sample(logits, temperature=0, frequency_penalty=2.0, history=history)
    assert set(penalized.tokens) == {best[1]}
    as_prompt = ops.sample(logits, temperature=0, frequency_penalty=2.0, history=history, prompt_len=3)
    assert set(as_prompt.tokens) == {best[0]}
    assert ops.sample(np.full((1, 4), np.nan, np.float32)).tokens.tolist() == [-1]


# ---- errors ------------------------------------------------------------------------------------------

W = ops.from_float(normal(8, 16), "f32")
CACHE = ops.KvCache(2, 1, 16)
WRONG: list[tuple[str, Callable[[], object]]] = [
    ("array", lambda: ops.quantize(normal(4, 4).astype(np.float64))),
    ("array", lambda: ops.from_float(normal(4))),
    ("bits", lambda: ops.quantize(normal(4, 32), 3)),
    ("group", lambda: ops.quantize(normal(4, 32), 4, 7)),
    ("dtype", lambda: ops.from_float(normal(4, 4), "f64")),
    ("data", lambda: ops.from_ggml("Q8_0", normal(4), 1, 32)),  # type: ignore[arg-type]
    ("quantize: array", lambda: ops.quantize([[1.0] * 32])),  # type: ignore[arg-type]
    ("quantize: array", lambda: ops.quantize(None)),  # type: ignore[arg-type]
    ("from_float: array", lambda: ops.from_float([[1.0]])),  # type: ignore[arg-type]
    ("from_ggml: data", lambda: ops.from_ggml("F32", bytes(8), 2, 1)),  # type: ignore[arg-type]
    ("from_ggml: row_order", lambda: ops.from_ggml("F32", np.zeros(8, np.uint8), 2, 1, [1, 0])),  # type: ignore[arg-type]
    ("dequantize_ggml: data", lambda: ops.dequantize_ggml("F32", bytes(8), 2, 1)),  # type: ignore[arg-type]
    ("dequantize: w", lambda: ops.dequantize(normal(4, 32))),  # type: ignore[arg-type]
    ("matmul: w", lambda: ops.matmul(normal(2, 16), normal(8, 16))),  # type: ignore[arg-type]
    ("embedding: w", lambda: ops.embedding(normal(8, 16), ints(0))),  # type: ignore[arg-type]
    ("row_order", lambda: ops.from_ggml("F32", np.zeros(8, np.uint8), 2, 1, np.zeros(2, np.int64))),
    ("quantize_rows: x", lambda: ops.quantize_rows(normal(4))),
    ("matmul: x", lambda: ops.matmul(normal(2, 16).astype(np.float64), W)),
    ("matmul: x", lambda: ops.matmul(normal(2, 15), W)),
    ("matmul: x", lambda: ops.matmul([[1.0] * 16], W)),  # type: ignore[arg-type]
    ("matmul: residual", lambda: ops.matmul(normal(2, 16), W, normal(2, 7))),
    ("threads", lambda: ops.matmul(normal(2, 16), W, threads=-1)),
    ("embedding: ids", lambda: ops.embedding(W, np.zeros(2, np.int64))),
    ("embedding: ids", lambda: ops.embedding(W, ints(8))),
    ("rms_norm: x", lambda: ops.rms_norm(np.float32(1), normal(1))),
    ("rms_norm: x", lambda: ops.rms_norm(normal(2, 3).astype(np.float16), normal(3))),
    ("rms_norm: weight", lambda: ops.rms_norm(normal(2, 3), normal(4))),
    ("layer_norm: bias", lambda: ops.layer_norm(normal(2, 3), normal(3), normal(2))),
    ("silu_mul: up", lambda: ops.silu_mul(normal(2, 3, 4), normal(6, 4))),
    ("gelu_tanh_mul: up", lambda: ops.gelu_tanh_mul(normal(3), normal(3).astype(np.float64))),
    ("softcap: x", lambda: ops.softcap(ints(1), 2.0)),  # type: ignore[arg-type]
    ("softcap: x", lambda: ops.softcap([1.0], 2.0)),  # type: ignore[arg-type]
    ("softcap: cap", lambda: ops.softcap(normal(1), 0.0)),
    ("rope: positions", lambda: ops.rope(normal(1, 1, 4))),
    ("rope: x", lambda: ops.rope(normal(1, 4), ints(0))),
    ("rope: x", lambda: ops.rope(normal(1, 1, 4).astype(np.float64), ints(0))),
    ("rope: cos", lambda: ops.rope(normal(2, 1, 4), ints(0))),
    ("rope_tables: positions", lambda: ops.rope_tables(np.zeros(2, np.int64), 4)),
    ("rope_tables: positions", lambda: ops.rope_tables(ints(-1), 4)),
    ("rope_inverse_frequencies: rotary", lambda: ops.rope_tables(ints(0), 3)),
    ("paged_attention: q", lambda: ops.paged_attention(CACHE, normal(1, 1, 8), ints(0, 1), ints(1), ints(0))),
    ("sample: logits", lambda: ops.sample(normal(4))),
    ("sample: logits", lambda: ops.sample(normal(2, 4).astype(np.float64))),
    ("sample: top_k", lambda: ops.sample(normal(2, 4), top_k=1.5)),  # type: ignore[arg-type]
    ("sample: top_k", lambda: ops.sample(normal(2, 4), top_k=2**40)),
    ("sample: seed", lambda: ops.sample(normal(2, 4), seed=-1)),
    ("sample: temperature", lambda: ops.sample(normal(2, 4), temperature=[1.0] * 3)),
    ("sample: temperature", lambda: ops.sample(normal(2, 4), temperature=-1.0)),
    ("sample: history", lambda: ops.sample(normal(2, 4), history=[[1]])),
    ("sample: banned", lambda: ops.sample(normal(2, 4), banned=[[1.5], []])),  # type: ignore[list-item]
    ("sample: allowed", lambda: ops.sample(normal(2, 4), allowed=[[4], None])),
    ("sample: allowed", lambda: ops.sample(normal(2, 4), allowed=[[0]])),
    ("sample: banned_ids", lambda: ops.sample(normal(2, 4), banned=[[4], []])),
]


@pytest.mark.parametrize(("field", "call"), WRONG, ids=[f"{i}-{field}" for i, (field, _) in enumerate(WRONG)])
def test_an_error_names_the_argument(field: str, call: Callable[[], object]) -> None:
    with pytest.raises(RequestError) as caught:
        call()
    assert field in caught.value.field


def test_no_rows_are_no_error() -> None:
    assert ops.matmul(normal(0, 16), W).shape == (0, 8)
    assert ops.rms_norm(normal(0, 16), normal(16)).shape == (0, 16)
    assert ops.silu_mul(normal(3, 0), normal(3, 0)).shape == (3, 0)
    assert ops.rope(normal(0, 2, 4), np.zeros(0, np.int32)).shape == (0, 2, 4)
    assert ops.sample(normal(0, 4)).tokens.shape == (0,)
    assert ops.embedding(W, np.zeros(0, np.int32)).shape == (0, 16)


def test_the_machine() -> None:
    assert ops.isa() in ops.supported_isas()
    assert "baseline" in ops.supported_isas()
    assert all(callable(getattr(ops, name)) and getattr(ops, name).__doc__ for name in ops.__all__)
