"""Random models of several shapes and disk formats: the accuracy of what the default model does not cover.

Attention and output of random weights would be nearly flat, and the divergence of nearly flat distributions
is small whatever the error. So attention scores get a standard deviation of 2, and logits one that makes the
entropy of the output about 3 nats, as of a trained model on text. It is a factor of the final norm, which
leaves the matrices and all other activations alone. What the entropy came out at is in the results.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import machine
import make_model
import numpy as np
import sides

sys.path.insert(0, str(machine.ROOT / "tests"))

from fidelity import Reference, Tally

VOCAB = 4096
SCORE_DEVIATION = 2.0
LOGIT_DEVIATION = 3.94  # the softmax of so many normal logits has an entropy of 3.0 nats then, on average
SEQUENCES, LENGTH = 4, 256

FORMATS = ("Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")
"""All matrices of a model are of one. F16 is not rounded anywhere but in the KV cache: what is left there."""


def _shape(
    dim: int, layers: int, heads: int, kv_heads: int, head_dim: int, ffn: int, *, tied: bool
) -> make_model.Shape:
    return make_model.Shape(
        *(dim, layers, heads, kv_heads, head_dim, ffn, VOCAB),
        context=LENGTH,
        tied=tied,
        score_deviation=SCORE_DEVIATION,
        logit_deviation=LOGIT_DEVIATION,
    )


SHAPES = (
    _shape(576, 8, 9, 3, 64, 1536, tied=True),  # rows of 576: no K-quants
    _shape(768, 6, 6, 6, 128, 2048, tied=False),
    _shape(768, 6, 16, 4, 80, 2304, tied=True),
    _shape(1024, 4, 16, 1, 64, 2816, tied=False),
)


def measure() -> list[dict[str, Any]]:
    """One entry for every shape and each format that its rows fit."""
    return [_measured(shape, kind) for shape in SHAPES for kind in FORMATS if _fits(shape, kind)]


def _fits(shape: make_model.Shape, kind: str) -> bool:
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return not any(size % block for size in (shape.dim, shape.heads * shape.head_dim, shape.ffn))


def _measured(shape: make_model.Shape, kind: str) -> dict[str, Any]:
    about = describe(shape)
    print(f"{about}, {kind}", file=sys.stderr)
    ids = np.random.default_rng(0).integers(0, VOCAB, (SEQUENCES, LENGTH)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        make_model.write(path, shape, dict.fromkeys(make_model.KINDS, kind), 0, None, "random")
        expected = Reference(path).logits(ids)
        tallies = {}
        with sides.caches(path) as caches:
            for dtype, side in caches.items():
                tallies[dtype] = Tally()
                for sequence, logits in zip(ids, expected, strict=True):
                    tallies[dtype].add(sequence, logits, side(sequence))
        return {
            "about": about,
            "shape": dataclasses.asdict(shape),
            "format": kind,
            "sequences": SEQUENCES,
            "length": LENGTH,
            "file": machine.file_facts(path),
            "results": {dtype: dataclasses.asdict(tally.divergence()) for dtype, tally in tallies.items()},
        }


def describe(shape: make_model.Shape) -> str:
    """A shape in a few words."""
    heads = f"{shape.heads} heads over {shape.kv_heads}, head width {shape.head_dim}"
    head = "tied head" if shape.tied else "own head"
    return f"{shape.layers} layers of {shape.dim}, feed-forward {shape.ffn}, {heads}, {head}"
