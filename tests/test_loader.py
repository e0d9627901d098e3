"""From a checkpoint's tensors to the decoder's slots."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import memory_checkpoint
import numpy as np
import pytest
import strategies as own
import tiny
from hypothesis import given
from hypothesis import strategies as st

from fastllm.errors import ModelFileError, UnsupportedModelError
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.models.loader import interleaved_row_order, iter_tensors, to_float32
from fastllm.models.registry import spec_from_checkpoint


@given(st.integers(1, 4), st.integers(1, 20).map(lambda n: 2 * n), st.integers(0, 3).map(lambda n: 2 * n))
def test_row_order_undoes_the_converters(heads: int, rotary_dim: int, rest: int) -> None:
    rows = np.arange(heads * rotary_dim)
    stored = tiny.interleave(rows, heads)  # where the converter puts each row
    head = interleaved_row_order(rotary_dim, rotary_dim)
    order = np.concatenate([h * rotary_dim + head for h in range(heads)])
    np.testing.assert_array_equal(stored[order], rows)
    order = interleaved_row_order(rotary_dim + rest, rotary_dim)
    np.testing.assert_array_equal(order[rotary_dim:], np.arange(rotary_dim, rotary_dim + rest))


NAMES = {
    "gguf": ("blk.1.ffn_up.weight", "blk.1.attn_norm.weight", "token_embd.weight"),
    "hf": (
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_bad_tensors(kind: str, tmp_path: Path) -> None:
    checkpoint = memory_checkpoint.read(tiny.write(kind, tmp_path))
    spec = spec_from_checkpoint(checkpoint)
    matrix, vector, _ = NAMES[kind]

    def fails(changes: dict[str, Any], error: type[Exception], message: str) -> None:
        tensors = {k: v for k, v in {**checkpoint.tensors, **changes}.items() if v is not None}
        damaged = dataclasses.replace(checkpoint, tensors=tensors)
        with pytest.raises(error, match=message):
            iter_tensors(damaged, spec)  # before the first tensor is taken

    def tensor(name: str, *shape: int) -> Any:
        return memory_checkpoint.memory_tensor(name, np.zeros(shape, dtype=np.float32))

    fails({matrix: None, vector: None}, ModelFileError, f"missing tensors: {vector}, {matrix}")
    fails({"extra": tensor("extra", 2)}, ModelFileError, "tensors that llama has no place for: extra")
    many = {f"extra.{i}": tensor(f"extra.{i}", 2) for i in range(20)}
    fails(many, ModelFileError, r"extra\.0, .*extra\.7 and 12 more")
    shape = r"tensor .*: expected shape \(ffn_dim = 96, dim = 64\), found \(64, 96\)"
    fails({matrix: tensor(matrix, 64, 96)}, ModelFileError, shape)
    fails({vector: tensor(vector, 64, 1)}, ModelFileError, r"expected shape \(dim = 64\), found \(64, 1\)")
    quantized = dataclasses.replace(checkpoint.tensors[vector], dtype="Q8_0")
    fails({vector: quantized}, UnsupportedModelError, f"tensor {vector}: Q8_0 is not supported for a vector")
    unknown = dataclasses.replace(checkpoint.tensors[matrix], dtype="IQ2_XXS")
    fails({matrix: unknown}, UnsupportedModelError, f"tensor {matrix}: IQ2_XXS is not supported for a matrix")


def test_vocabulary_size_must_be_the_embeddings(tmp_path: Path) -> None:
    checkpoint = memory_checkpoint.read(tiny.write("gguf", tmp_path))
    memory_checkpoint.reconfigure(checkpoint, {"vocab_size": 301})
    with pytest.raises(ModelFileError, match=r"token_embd.*expected shape \(vocab_size = 301, dim = 64\)"):
        iter_tensors(checkpoint, spec_from_checkpoint(checkpoint))


def test_rope_factors_must_fit_the_heads(tmp_path: Path) -> None:
    checkpoint = memory_checkpoint.read(tiny.write("gguf", tmp_path, "llama3-rope"))
    for values, message in ((np.ones(7), r"rope_freqs\.weight: expected F32"), (np.zeros(8), "rope_factors")):
        factors = memory_checkpoint.memory_tensor("rope_freqs.weight", values.astype(np.float32))
        damaged = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, factors.name: factors})
        with pytest.raises(ModelFileError, match=message):
            spec_from_checkpoint(damaged)


@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_a_tied_head_is_one_copy(kind: str, tmp_path: Path) -> None:
    checkpoint = memory_checkpoint.read(tiny.write(kind, tmp_path, "llama-tied"))
    spec = spec_from_checkpoint(checkpoint)
    assert spec.tied_head
    assert "head" not in {slot for slot, *_ in iter_tensors(checkpoint, spec)}
    if kind == "hf":  # a second copy in the file changes nothing
        copy = dataclasses.replace(checkpoint.tensors["model.embed_tokens.weight"], name="lm_head.weight")
        checkpoint.tensors["lm_head.weight"] = copy
        assert spec_from_checkpoint(checkpoint).tied_head
        assert "head" not in {slot for slot, *_ in iter_tensors(checkpoint, spec)}


def test_buffers_of_old_checkpoints_are_skipped(tmp_path: Path) -> None:
    checkpoint = memory_checkpoint.read(tiny.write("hf", tmp_path))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    checkpoint.tensors[name] = memory_checkpoint.memory_tensor(name, np.ones(8, dtype=np.float32))
    assert name not in {
        tensor.name for _, _, tensor, _ in iter_tensors(checkpoint, spec_from_checkpoint(checkpoint))
    }


def test_tensors_are_released_once_they_were_used(tmp_path: Path) -> None:
    checkpoint = memory_checkpoint.read(tiny.write("gguf", tmp_path))
    used = []
    for _, _, tensor, _ in iter_tensors(checkpoint, spec_from_checkpoint(checkpoint), release=True):
        assert checkpoint.released == used
        used.append(tensor.name)
    assert checkpoint.released == used
    assert sorted(used) == sorted(checkpoint.tensors)


@given(own.floats(2, 16))
def test_to_float32_is_exact(x: own.Float32) -> None:
    half = x.astype(np.float16)
    brain = (x.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(to_float32(memory_checkpoint.memory_tensor("x", x)), x)
    np.testing.assert_array_equal(to_float32(memory_checkpoint.memory_tensor("x", half, "F16")), half)
    truncated = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(to_float32(memory_checkpoint.memory_tensor("x", brain, "BF16")), truncated)


@pytest.mark.parametrize(
    ("kind", "how"), [("gguf", {"dtype": "Q5_1"}), ("gguf", {"dtype": "F16"}), ("hf", {})]
)
def test_the_readers_agree_with_the_formats_own_packages(
    kind: str, how: dict[str, Any], tmp_path: Path
) -> None:
    path = tiny.write(kind, tmp_path, "llama3-rope", **how)
    expected = memory_checkpoint.read(path)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.config) == list(expected.config)
        assert sorted(checkpoint.tensors) == sorted(expected.tensors)
        for name, tensor in expected.tensors.items():
            ours = checkpoint.tensors[name]
            assert (ours.name, tuple(ours.shape), ours.dtype) == (name, tensor.shape, tensor.dtype)
            np.testing.assert_array_equal(ours.data, tensor.data)
