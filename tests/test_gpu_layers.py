"""The kernels between the products, against plain float64: norms, activations, embedding, heads, dense
products, adapters. In Triton's interpreter, or on a GPU where there is one.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are imported

from random_blocks import QUANTIZED, random_blocks  # noqa: E402

from fastllm import kernels, ops, reference  # noqa: E402
from fastllm.kernels.activation import activation  # noqa: E402
from fastllm.kernels.dense import dense  # noqa: E402
from fastllm.kernels.embedding import embedding  # noqa: E402
from fastllm.kernels.heads import LayerCache, prepare_heads  # noqa: E402
from fastllm.kernels.low_rank import add_low_rank  # noqa: E402
from fastllm.kernels.norm import norm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

Float64 = npt.NDArray[np.float64]
DEVICE = "cuda" if GPU else "cpu"
# What rounding the result leaves, relative to the largest value.
BOUNDS = {torch.float32: 3e-6, torch.float16: 1e-3} | ({torch.bfloat16: 8e-3} if GPU else {})
DTYPES = st.sampled_from(tuple(BOUNDS))
EXAMPLES = settings(max_examples=60 if GPU else 15)


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers, already rounded to the type."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def double(tensor: torch.Tensor) -> Float64:
    return tensor.double().cpu().numpy()


def check(got: torch.Tensor, expected: Float64, dtype: torch.dtype) -> None:
    assert tuple(got.shape) == expected.shape
    assert np.abs(double(got) - expected).max() <= BOUNDS[dtype] * max(np.abs(expected).max(), 1e-30)


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


@EXAMPLES
@given(DTYPES, st.integers(1, 4), st.integers(1, 300), st.booleans(), st.booleans(), st.booleans())
def test_norm(dtype: torch.dtype, m: int, k: int, layer: bool, biased: bool, joined: bool) -> None:
    x, weight = values(1, m, k + 3, dtype=dtype)[:, :k], values(2, k)
    bias = values(3, k) if biased else None
    residual = values(4, m, k, dtype=dtype) if joined else None
    wide = double(x)
    centred = wide - wide.mean(1, keepdims=True) if layer else wide
    expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * double(weight)
    expected = (
        expected + (0 if bias is None else double(bias)) + (0 if residual is None else double(residual))
    )
    check(norm(x, weight, bias, residual, 1e-5, layer=layer), expected, dtype)


@EXAMPLES
@given(DTYPES, st.sampled_from(("silu", "gelu", "gelu_tanh")), st.booleans(), st.integers(1, 70))
def test_activation(dtype: torch.dtype, kind: str, gated: bool, width: int) -> None:
    x = 4 * values(width, 3, 2 * width if gated else width, dtype=dtype)
    wide = double(x)
    gate = wide[:, 0::2] if gated else wide
    expected = getattr(reference, kind)(gate) * (wide[:, 1::2] if gated else 1.0)
    check(activation(x, kind, gated=gated), expected, dtype)


def test_activation_of_large_numbers_is_not_nan() -> None:
    x = torch.tensor([[-1e30, -3e4, 3e4, 1e30]], device=DEVICE)
    for kind in ("silu", "gelu", "gelu_tanh"):
        got = activation(x, kind, gated=False)
        torch.testing.assert_close(got, torch.where(x > 0, x, 0.0), rtol=1e-6, atol=1e-30)


@EXAMPLES
@given(st.sampled_from(("", *QUANTIZED)), st.integers(3, 40), st.booleans(), st.integers(0, 99))
def test_embedding(kind: str, rows: int, placed: bool, seed: int) -> None:
    cols = 256
    if kind:
        blocks = random_blocks(kind, rows, cols, rng=np.random.default_rng(seed), std=0.05)
        packed = ops.from_ggml(kind, blocks.reshape(-1), rows, cols)
        matrix, exact = kernels.from_packed(packed, DEVICE), ops.dequantize(packed).astype(np.float64)
    else:
        cols = 100
        matrix = values(seed, rows, cols)
        exact = double(matrix)
    places = values(seed + 1, 9, cols) if placed else None
    ids, sampled, positions = ints(2, 0, -2, rows - 1, -1), ints(1, -1, 2), ints(0, 3, 8, 1, 1)
    expected = exact[[2, 0, 0, rows - 1, 1]] * 1.5
    if places is not None:
        expected = expected + double(places)[positions.cpu()]
    check(embedding(ids, sampled, positions, matrix, places, 1.5, torch.float32), expected, torch.float32)


def rotated(x: Float64, weight: Float64 | None, cos: Float64, sin: Float64) -> Float64:
    """Heads (T, H, D) after norm and rope."""
    if weight is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
    half = cos.shape[1]
    c, s = cos[:, None], sin[:, None]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * c - b * s, b * c + a * s, x[..., 2 * half :]], axis=-1)


@EXAMPLES
@given(
    DTYPES, st.integers(1, 3), st.integers(1, 5), st.sampled_from((16, 20, 64)), st.booleans(), st.booleans(),
    st.sampled_from((0, 8, 16)), st.integers(1, 7),
)  # fmt: skip
def test_heads(
    dtype: torch.dtype, kv_heads: int, group: int, d: int, normed: bool, int8: bool, rotary: int, tokens: int
) -> None:
    heads, size = kv_heads * group, 16
    qkv = values(0, tokens, (heads + 2 * kv_heads) * d, dtype=dtype)
    before = double(qkv).reshape(tokens, -1, d)
    q_norm, k_norm = (values(1, d), values(2, d)) if normed else (None, None)
    cos, sin = values(3, 50, rotary // 2), values(4, 50, rotary // 2)
    positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE) * 7
    slots = ints(*[37, 5, -1, 20, 0, 47, 16][:tokens])
    kind = torch.int8 if int8 else dtype
    shape = (3, kv_heads, size)
    scales = [torch.zeros(shape, device=DEVICE) if int8 else None for _ in range(2)]
    cache = LayerCache(*(torch.full((*shape, d), 99, dtype=kind, device=DEVICE) for _ in range(2)), *scales)
    prepare_heads(qkv, q_norm, k_norm, cos, sin, positions, slots, cache, 1e-6, heads)

    place = positions.cpu().numpy()
    turned = [
        rotated(part, None if weight is None else double(weight), double(cos)[place], double(sin)[place])
        for part, weight in ((before[:, :heads], q_norm), (before[:, heads : heads + kv_heads], k_norm))
    ]
    real = [t for t in range(tokens) if slots[t] >= 0]
    after = qkv.view(tokens, -1, d)
    check(after[real, :heads], turned[0][real], dtype)
    written = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    for values_of, scale, expected in (
        (cache.keys, cache.key_scales, turned[1]),
        (cache.values, cache.value_scales, before[:, heads + kv_heads :]),
    ):
        for t in real:
            block, offset = divmod(int(slots[t]), size)
            written[block, :, offset] = True
            got = double(values_of[block, :, offset])
            bound = BOUNDS[dtype] * np.abs(expected[t]).max()
            if scale is not None:
                steps = double(scale[block, :, offset])[:, None]
                np.testing.assert_allclose(steps[:, 0], np.abs(expected[t]).max(1) / 127, rtol=1e-3)
                got, bound = got * steps, bound + 0.51 * steps
            assert (np.abs(got - expected[t]) <= bound).all()
        assert (values_of[~written] == 99).all()


def test_int8_heads_that_are_not_finite_stay_visible() -> None:
    qkv = torch.zeros(3, 3 * 16, device=DEVICE)
    qkv[0, 20], qkv[1, 40] = float("nan"), float("inf")
    cache = LayerCache(
        *(torch.zeros(1, 1, 16, 16, dtype=torch.int8, device=DEVICE) for _ in range(2)),
        *(torch.zeros(1, 1, 16, device=DEVICE) for _ in range(2)),
    )
    none = torch.zeros(1, 0, device=DEVICE)
    prepare_heads(qkv, None, None, none, none, ints(0, 0, 0), ints(0, 1, 2), cache, 1e-6, 1)
    assert cache.key_scales is not None
    assert cache.value_scales is not None
    assert cache.key_scales[0, 0, :3].isnan().tolist() == [True, False, False]
    assert cache.value_scales[0, 0, :3].isnan().tolist() == [False, True, False]
    assert not cache.keys.any()
    assert not cache.values.any()


@EXAMPLES
@given(
    DTYPES, st.integers(1, 40), st.integers(1, 90), st.integers(1, 200), st.booleans(), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_dense(
    dtype: torch.dtype, m: int, n: int, k: int, biased: bool, joined: bool, deterministic: bool
) -> None:
    x, w = values(1, m, k, dtype=dtype), values(2, n, k, dtype=dtype)
    bias = values(3, n, dtype=dtype) if biased else None
    residual = values(4, m, n, dtype=dtype) if joined else None
    expected = double(x) @ double(w).T
    expected = (
        expected + (0 if bias is None else double(bias)) + (0 if residual is None else double(residual))
    )
    out = torch.empty(m, n + 5, device=DEVICE)[:, :n]
    got = dense(x, w, bias, residual, deterministic=deterministic, out=out)
    assert np.abs(double(got) - expected).max() <= 3e-6 * k**0.5 * max(np.abs(expected).max(), 1.0)
    check(dense(x, w, bias, residual, deterministic=deterministic), double(got), dtype)


def test_dense_rows_do_not_depend_on_their_number() -> None:
    x, w = values(1, 70, 200), values(2, 40, 200)
    whole = dense(x, w, deterministic=True)
    for rows in (slice(0, 1), slice(3, 40), slice(69, 70)):
        assert torch.equal(dense(x[rows], w, deterministic=True), whole[rows])


@EXAMPLES
@given(
    DTYPES, st.lists(st.integers(-1, 3), min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 140),
    st.sampled_from((16, 128)),
)  # fmt: skip
def test_low_rank(dtype: torch.dtype, adapter: list[int], k: int, n: int, rank: int) -> None:
    tokens = len(adapter)
    x, a = values(1, tokens, k, dtype=dtype), values(2, 4, rank, k, dtype=dtype)
    b, y = values(3, 4, n, rank, dtype=dtype), values(4, tokens, n + 3, dtype=dtype)
    scales = torch.tensor([1.0, 0.5, 0.0, 2.0], device=DEVICE)
    expected = double(y)
    for t, which in enumerate(adapter):
        if which >= 0:
            low = double(scales)[which] * (double(a)[which] @ double(x)[t])
            expected[t, 1 : 1 + n] += double(b)[which] @ low
    untouched = [t for t, which in enumerate(adapter) if which < 0]
    before = y.clone()
    # 4 and 5 are adapters without this projection.
    which = ints(*(4 + t % 2 if which < 0 and t % 3 else which for t, which in enumerate(adapter)))
    add_low_rank(x, which, a, b, scales, y[:, 1 : 1 + n])
    check(y, expected, torch.float16 if dtype == torch.float16 else dtype)
    assert torch.equal(y[untouched], before[untouched])
