"""The oracle against independent implementations: torch, transformers, gguf, and published vectors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import strategies as own
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastllm import reference
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.models.registry import spec_from_checkpoint

F = torch.nn.functional


def as_torch(x: npt.ArrayLike) -> torch.Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float64))


def assert_close(
    ours: npt.ArrayLike, theirs: torch.Tensor, relative: float = 1e-12, terms: npt.ArrayLike = 0.0
) -> None:
    """Equal up to float64 rounding, on the scale of the largest result or of the `terms` that it cancels
    from."""
    expected = theirs.numpy()
    scale = max(1e-300, float(np.abs(expected).max()), float(np.abs(terms).max()))
    np.testing.assert_allclose(ours, expected, rtol=relative, atol=relative * scale)


# Dense operations


@given(st.data(), own.sizes(1, 4), own.sizes(1, 200), st.sampled_from((1e-6, 1e-5, 0.1)))
def test_norms_are_torchs(data: st.DataObject, rows: int, columns: int, eps: float) -> None:
    x = data.draw(own.floats(rows, columns))
    weight, bias = data.draw(own.floats(columns)), data.draw(own.floats(columns))
    theirs = F.rms_norm(as_torch(x), (columns,), as_torch(weight), eps)
    assert_close(reference.rms_norm(x, weight, eps), theirs)
    theirs = F.layer_norm(as_torch(x), (columns,), as_torch(weight), as_torch(bias), eps)
    assert_close(reference.layer_norm(x, weight, bias, eps), theirs, 1e-9)  # the variance cancels
    theirs = F.layer_norm(as_torch(x), (columns,), as_torch(weight), None, eps)
    assert_close(reference.layer_norm(x, weight, None, eps), theirs, 1e-9)


@given(own.floats(64, scale=20.0), own.floats(64))
def test_activations_are_torchs(x: own.Float32, up: own.Float32) -> None:
    assert_close(reference.silu(x), F.silu(as_torch(x)))
    assert_close(reference.silu_mul(x, up), F.silu(as_torch(x)) * as_torch(up))
    assert_close(reference.gelu(x), F.gelu(as_torch(x)), terms=x)
    assert_close(reference.gelu_tanh(x), F.gelu(as_torch(x), approximate="tanh"), terms=x)
    assert_close(reference.softcap(x, 30.0), 30.0 * torch.tanh(as_torch(x) / 30.0))
    np.testing.assert_array_equal(reference.softcap(x, 0.0), x)


def test_silu_does_not_overflow() -> None:
    np.testing.assert_array_equal(reference.silu([-1e4, 1e4]), [-0.0, 1e4])


@given(own.floats(3, 50, scale=20.0))
def test_softmax_is_torchs(x: own.Float32) -> None:
    assert_close(reference.softmax(x), torch.softmax(as_torch(x), -1))
    assert_close(reference.log_softmax(x), torch.log_softmax(as_torch(x), -1), terms=x)
    masked = x.copy()
    masked[:, ::3] = -np.inf
    assert_close(reference.softmax(masked), torch.softmax(as_torch(masked), -1))


@given(st.data(), own.sizes(1, 5), own.sizes(1, 40), own.sizes(1, 100))
def test_matmul_is_torchs(data: st.DataObject, m: int, n: int, k: int) -> None:
    x, weight, bias = data.draw(own.floats(m, k)), data.draw(own.floats(n, k)), data.draw(own.floats(n))
    terms = np.abs(x).astype(np.float64) @ np.abs(weight).T + np.abs(bias)
    theirs = F.linear(as_torch(x), as_torch(weight), as_torch(bias))
    assert_close(reference.matmul(x, weight, bias), theirs, 1e-13, terms)
    assert_close(reference.matmul(x, weight), F.linear(as_torch(x), as_torch(weight)), 1e-13, terms)


@given(own.seeds(), st.sampled_from((2, 8, 64)), st.sampled_from((0, 4)))
def test_rope_is_llamas(seed: int, rotary_dim: int, rest: int) -> None:
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 5, 3, rotary_dim + rest))
    positions = rng.integers(0, 100_000, 5)
    angles = reference.rope_angles(positions, rotary_dim, 10000.0)
    cos, sin = (torch.from_numpy(np.tile(f(angles), 2))[None] for f in (np.cos, np.sin))
    turned = [torch.from_numpy(x[..., :rotary_dim])[None].transpose(1, 2) for x in (q, k)]
    for ours, x, theirs in zip(
        (reference.rope(q, angles), reference.rope(k, angles)),
        (q, k),
        apply_rotary_pos_emb(*turned, cos, sin),
        strict=True,
    ):
        assert_close(ours[..., :rotary_dim], theirs[0].transpose(0, 1))
        np.testing.assert_array_equal(ours[..., rotary_dim:], x[..., rotary_dim:])


def test_rope_angles_follow_their_formula() -> None:
    angles = reference.rope_angles([0, 3], 4, 10000.0, linear_factor=2.0, factors=(1.0, 4.0))
    np.testing.assert_allclose(angles, [[0.0, 0.0], [3 / 2, 3 / 100 / 2 / 4]], rtol=1e-15)


# Attention


@given(own.paged_batches(), st.sampled_from((0.0, 5.0)))
def test_paged_attention_is_torchs(batch: own.PagedBatch, cap: float) -> None:
    scale = 0.3
    ours = reference.paged_attention(
        batch.q,
        batch.k,
        batch.v,
        batch.block_tables,
        batch.query_start,
        batch.seq_lens,
        scale=scale,
        window=batch.window,
        cap=cap,
    )
    block_size, group = batch.k.shape[1], batch.q.shape[1] // batch.k.shape[2]
    for s, length in enumerate(batch.seq_lens.tolist()):
        rows = slice(batch.query_start[s], batch.query_start[s + 1])
        blocks = batch.block_tables[s, : -(-length // block_size)]
        k, v = (
            as_torch(cache[blocks].reshape(-1, *cache.shape[2:])[:length])
            .repeat_interleave(group, dim=1)
            .transpose(0, 1)
            for cache in (batch.k, batch.v)
        )
        q = as_torch(batch.q[rows]).transpose(0, 1)
        query, key = np.arange(length)[-q.shape[1] :, None], np.arange(length)[None, :]
        seen = torch.from_numpy((key <= query) & ((batch.window == 0) | (key > query - batch.window)))
        if cap:
            scores = cap * torch.tanh(scale * (q @ k.transpose(1, 2)) / cap)
            theirs = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v
        else:
            theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        assert_close(ours[rows], theirs.transpose(0, 1))


# Quantization


@given(own.quantized_matrices())
def test_dequantize_is_ggufs_bit_for_bit(matrix: own.QuantizedMatrix) -> None:
    ours = reference.dequantize(matrix.dtype, matrix.data.reshape(-1), (matrix.rows, matrix.columns))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), matrix.values.view(np.uint32))


@pytest.mark.parametrize("dtype", own.QUANTIZED_TYPES)
def test_block_sizes_are_ggufs(dtype: str) -> None:
    assert reference.BLOCK_SIZES[dtype] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]


@given(st.data(), own.sizes(1, 4), own.sizes(1, 130), st.sampled_from((16, 32, 64)))
def test_quantized_activations_are_the_nearest(
    data: st.DataObject, rows: int, columns: int, group: int
) -> None:
    x = data.draw(own.floats(rows, columns, scale=3.0))
    q, scale = reference.quantize_activations(x, group)
    assert q.dtype == np.int8
    assert scale.dtype == np.float32
    assert scale.shape == (rows, math.ceil(columns / group))
    assert np.abs(q.astype(np.int32)).max() <= 127
    error = np.abs(reference.dequantize_activations(q, scale, group) - x)
    for g in range(scale.shape[1]):
        part = slice(g * group, (g + 1) * group)
        amax = np.abs(x[:, part]).max(axis=1)
        np.testing.assert_array_equal(scale[:, g], (amax / np.float32(127)).astype(np.float32))
        # Half a step, and the rounding of 127 / amax, of the product and of the scale.
        assert np.all(error[:, part] <= (0.5 + 127 * 3 * 2.0**-24) * scale[:, g, None].astype(np.float64))
        reached = np.abs(q[:, part].astype(np.int32)).max(axis=1)
        np.testing.assert_array_equal(reached, np.where(amax > 0, 127, 0))


def test_quantized_activations_round_half_to_even() -> None:
    x = np.zeros(16, dtype=np.float32)
    x[:5] = 127.0, 0.5, 1.5, -0.5, -2.5
    q, scale = reference.quantize_activations(x)
    assert q[:5].tolist() == [127, 0, 2, 0, -2]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("amax", [0.0, 1e-45, 3.7e-37])
def test_groups_too_small_to_invert_become_zero(amax: float) -> None:
    q, scale = reference.quantize_activations(np.full(16, amax, dtype=np.float32))
    assert not q.any()
    assert scale.tolist() == [0.0]


@given(st.data(), own.sizes(1, 4), own.sizes(1, 20), own.sizes(1, 130), st.sampled_from((16, 32, 128)))
def test_integer_matmul_is_that_of_the_dequantized(
    data: st.DataObject, m: int, n: int, k: int, group: int
) -> None:
    q, q_scale = reference.quantize_activations(data.draw(own.floats(m, k)))
    rng = np.random.default_rng(data.draw(own.seeds()))
    codes = rng.integers(-128, 128, (n, k))
    scale, minimum = rng.standard_normal((2, n, math.ceil(k / group))).astype(np.float32)

    def spread(values: own.Float32) -> npt.NDArray[np.float64]:
        return np.repeat(values.astype(np.float64), group, axis=1)[:, :k]

    x = reference.dequantize_activations(q, q_scale)
    for minimums in (minimum, None):
        weight = spread(scale) * codes + (0.0 if minimums is None else spread(minimum))
        ours = reference.integer_matmul(q, q_scale, codes, scale, minimums, group=group)
        size = np.abs(x) @ (np.abs(spread(scale) * codes) + np.abs(spread(minimum))).T
        assert np.all(np.abs(ours - reference.matmul(x, weight)) <= 1e-13 * size + 1e-300)


# Sampling


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # from the known-answer file of Random123, the generator's own distribution
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    numbers = [[int(word, 16) for word in text.split()] for text in (counter, key, words)]
    assert reference.philox4x32_10(numbers[0], numbers[1]) == tuple(numbers[2])


def test_uniforms_depend_on_every_part_of_the_key() -> None:
    keys = [(seed, n, p) for seed in (0, 1, 1 << 32, 2**64 - 1) for n in (0, 1) for p in (0, 1, 7)]
    values = {key: reference.sample_uniform(*key) for key in keys}
    assert len(set(values.values())) == len(keys)
    assert all(0.0 <= u < 1.0 for u in values.values())


def test_uniforms_are_uniform() -> None:
    u = np.sort([reference.sample_uniform(42, 0, position) for position in range(4000)])
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
    assert np.abs(u - np.arange(4000) / 4000).max() < 1.95 / math.sqrt(4000)


@given(own.logits(), own.truncations())
def test_truncation_is_transformers(logits: own.Float32, how: dict[str, float]) -> None:
    warped = as_torch(logits)[None] / how["temperature"]
    if how["min_p"] > 0.0:
        warped = transformers.MinPLogitsWarper(min_p=how["min_p"])(None, warped)
    if how["top_k"]:
        warped = transformers.TopKLogitsWarper(top_k=int(how["top_k"]))(None, warped)
    if how["top_p"] < 1.0:
        warped = transformers.TopPLogitsWarper(top_p=how["top_p"])(None, warped)
    ours = reference.sampling_probabilities(logits, **how)
    theirs = torch.softmax(warped[0], -1).numpy()
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    for temperature in (0.0, 9e-6):
        p = reference.sampling_probabilities([1.0, 3.0, 3.0, 2.0], temperature=temperature)
        assert p.tolist() == [0.0, 1.0, 0.0, 0.0]


def test_top_k_keeps_what_equals_the_last() -> None:
    p = reference.sampling_probabilities([1.0, 3.0, 3.0, 2.0, 3.0], top_k=2)
    np.testing.assert_allclose(p, [0, 1 / 3, 1 / 3, 0, 1 / 3])


@given(own.logits(8), own.seeds(), st.sampled_from((1.0, 1.3, 0.7)))
def test_penalties_are_vllms(logits: own.Float32, seed: int, repetition: float) -> None:
    rng = np.random.default_rng(seed)
    prompt, output = rng.integers(0, logits.size, (2, 6)).tolist()
    seen = torch.tensor([prompt + output])
    theirs = transformers.RepetitionPenaltyLogitsProcessor(repetition)(seen, as_torch(logits)[None])[0]
    counts = torch.bincount(torch.tensor(output), minlength=logits.size).double()
    theirs = theirs - 0.4 * counts - 0.9 * (counts > 0).double()
    ours = reference.apply_penalties(
        logits, prompt, output, presence=0.9, frequency=0.4, repetition=repetition
    )
    assert_close(ours, theirs)


def test_bias_and_bans() -> None:
    out = reference.apply_bias([0.5, 1.0, 2.0], {0: -1.5, 2: 4.0}, banned=(1,))
    np.testing.assert_array_equal(out, [-1.0, -np.inf, 6.0])
    out = reference.apply_bias([0.5, 1.0, 2.0, 3.0], banned=(0,), allowed=(0, 2))
    np.testing.assert_array_equal(out, [-np.inf, -np.inf, 2.0, -np.inf])


@given(own.logits(), own.seeds())
def test_draw_inverts_the_cumulative_distribution(logits: own.Float32, seed: int) -> None:
    p = reference.sampling_probabilities(logits, top_k=20)
    edges = np.concatenate([[0.0], np.cumsum(p)])
    u = float(np.random.default_rng(seed).random())
    token = reference.draw(p, u)
    assert p[token] > 0.0
    assert edges[token] <= u < max(edges[token + 1], float(u == edges[-1]))
    assert reference.draw(p, 0.0) == np.flatnonzero(p)[0]
    assert reference.draw(p * (1 - 1e-9), 1 - 1e-12) == np.flatnonzero(p)[-1]


@given(own.logits(), st.integers(1, 10))
def test_ranks_and_top_logprobs_are_torchs(logits: own.Float32, count: int) -> None:
    count = min(count, logits.size)
    theirs = torch.log_softmax(as_torch(logits), -1).topk(count)
    ids, values = reference.top_logprobs(logits, count)
    assert ids.tolist() == theirs.indices.tolist()
    assert_close(values, theirs.values, terms=logits)
    assert [reference.rank(logits, int(token)) for token in ids] == list(range(1, count + 1))
    assert reference.rank([1.0, 1.0, 0.0], 1) == 1


# The decoder

TOLERANCE = 1e-4
"""Of max |logit|; the rest is transformers' float32 rounding, some 1e-6."""


def forward(path: Path, tokens: list[int]) -> npt.NDArray[np.float64]:
    with open_checkpoint(path) as checkpoint:
        spec = spec_from_checkpoint(checkpoint)
        return reference.decoder_forward(spec, reference.decoder_weights(checkpoint, spec), tokens)


def assert_logits(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float32]) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_decoder_is_transformers_from_safetensors(variant: str, tmp_path: Path) -> None:
    model, tokens = tiny.make_model(variant), tiny.tokens(40)
    assert_logits(forward(tiny.save_hf(model, tmp_path), tokens), tiny.logits(model, tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoder_reads_sharded_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokens = tiny.make_model("llama"), tiny.tokens(40)
    tiny.save_hf(model, tmp_path, dtype=dtype, shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_logits(forward(tmp_path, tokens), tiny.logits(model, tokens))


@pytest.mark.parametrize("variant", tiny.GGUF_VARIANTS)
def test_decoder_is_transformers_from_gguf(variant: str, tmp_path: Path) -> None:
    model, tokens = tiny.make_model(variant), tiny.tokens(40)
    path = tiny.save_gguf(model, tmp_path / "tiny.gguf")
    assert_logits(forward(path, tokens), tiny.logits(model, tokens))


@pytest.mark.parametrize("dtype", [*own.FLOAT_TYPES[1:], *own.QUANTIZED_TYPES])
def test_decoder_reads_every_gguf_type(dtype: str, tmp_path: Path) -> None:
    model, tokens = tiny.make_model("llama", **tiny.WIDE), tiny.tokens(40)
    path = tiny.save_gguf(model, tmp_path / "tiny.gguf", dtype=dtype)
    assert_logits(forward(path, tokens), tiny.logits(model, tokens))


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("llama", {"norm_eps": 0.3}),
        ("llama", {"rope_base": 20000.0}),
        ("llama", {"attention_scale": 0.2}),
        ("llama", {"attn_softcap": 1.0}),
        ("llama", {"final_softcap": 1.0}),
        ("llama", {"embedding_scale": 2.0}),
        ("llama", {"activation": "gelu_tanh"}),
        ("llama", {"rope_style": "none", "rotary_dim": 0}),
        ("llama", {"rotary_dim": 8}),
        ("llama", {"qk_row_order": "interleaved"}),
        ("llama3-rope", {"rope_factors": ()}),
        ("llama-linear-rope", {"rope_linear_factor": 1.0}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2-sliding", {"sliding_layers": (True, False)}),
        ("qwen2-sliding", {"rope_base_sliding": 100.0}),
    ],
)
def test_the_comparison_would_notice(variant: str, change: dict[str, object], tmp_path: Path) -> None:
    """A wrong field moves the logits by far more than the tolerance, so agreement means that it is right."""
    model, tokens = tiny.make_model(variant), tiny.tokens(40)
    with open_checkpoint(tiny.save_hf(model, tmp_path)) as checkpoint:
        spec = dataclasses.replace(spec_from_checkpoint(checkpoint), **change)
        logits = reference.decoder_forward(spec, reference.decoder_weights(checkpoint, spec), tokens)
    expected = tiny.logits(model, tokens)
    assert np.abs(logits - expected).max() > 10 * TOLERANCE * np.abs(expected).max()
