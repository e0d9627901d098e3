"""What bench/quality.py holds against the reference: the engine, or the reference with rounded inputs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import machine
import torch

sys.path.insert(0, str(machine.ROOT / "tests"))

import fidelity

from fastllm.executor.cpu import DEFAULT_KV_CACHE_DTYPE, KV_CACHE_DTYPES, CpuExecutor
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.models.registry import spec_from_checkpoint

Texts: TypeAlias = Mapping[str, Sequence[Sequence[int]]]
Side: TypeAlias = Callable[[Sequence[int]], torch.Tensor]
"""Token ids -> logits (T, V)."""
Figures: TypeAlias = dict[str, float]
Results: TypeAlias = dict[str, dict[str, Figures]]
"""Side -> text -> figure -> value."""

DEFAULT_CACHE = DEFAULT_KV_CACHE_DTYPE
TOGETHER = "all"  # texts as one

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
ALL = (*QKV, "o_proj", *GATE_UP, "down_proj", "lm_head")


@contextmanager
def caches(path: Path) -> Iterator[dict[str, Side]]:
    """The model with every type of KV cache: type -> side."""
    with open_checkpoint(path) as checkpoint, ExitStack() as stack:
        spec = spec_from_checkpoint(checkpoint)
        sides: dict[str, Side] = {}
        for dtype in KV_CACHE_DTYPES:
            executor = CpuExecutor(
                checkpoint, spec, kv_cache_dtype=dtype, max_model_len=fidelity.WINDOW, max_num_seqs=1
            )
            stack.enter_context(closing(executor))
            sides[dtype] = partial(fidelity.executor_logits, executor)
        yield sides


def compare(texts: Texts, reference: Side, sides: Mapping[str, Side], base: str | None = None) -> Results:
    """For every side and every text, and for all texts together, perplexity and divergence.

    Both against the reference; with `base`, one of the sides, the change of perplexity from that one as well.
    """
    tallies = {name: {text: fidelity.Tally() for text in texts} for name in sides}
    for text, cut in texts.items():
        for number, ids in enumerate(cut):
            expected = reference(ids)
            for name, side in sides.items():
                tallies[name][text].add(ids, expected, side(ids))
            print(f"{text}: window {number + 1}/{len(cut)}", file=sys.stderr)
    for of in tallies.values():
        together = fidelity.Tally()
        for tally in of.values():
            together.extend(tally)
        of[TOGETHER] = together
    return {
        name: {text: _figures(tally, tallies[base][text] if base else None) for text, tally in of.items()}
        for name, of in tallies.items()
    }


def _figures(tally: fidelity.Tally, base: fidelity.Tally | None) -> Figures:
    figures = dataclasses.asdict(fidelity.perplexity(tally.expected, tally.found))
    if base is not None:
        against = fidelity.perplexity(base.found, tally.found)
        figures |= {"change_from_base": against.change, "error_from_base": against.error}
    return figures | dataclasses.asdict(tally.divergence())


# -- rounded activations -------------------------------------------------------------------------------------


def to_int8(x: torch.Tensor, group: int = 32) -> torch.Tensor:
    """x rounded to int8 with a scale for every row and group of columns. (..., K)"""
    groups = x.reshape(*x.shape[:-1], -1, group)
    largest = groups.abs().amax(-1, keepdim=True)
    codes = (groups * (127 / largest)).nan_to_num(0.0).round()
    return (codes * (largest / 127)).reshape(x.shape)


def to_two_planes(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """As to_int8; where amax^2 of a group is above threshold times its mean over the row's groups, what the
    rounding left over is rounded to int8 as well and added."""
    once = to_int8(x)
    largest = x.reshape(*x.shape[:-1], -1, 32).abs().amax(-1).square()
    chosen = largest > threshold * largest.mean(-1, keepdim=True)
    return torch.where(chosen.repeat_interleave(32, -1), once + to_int8(x - once), once)


ROUNDINGS: dict[str, tuple[Sequence[str], Callable[[torch.Tensor], torch.Tensor]]] = {
    "int8 into all matrices": (ALL, to_int8),
    "int8 into q, k, v": (QKV, to_int8),
    "int8 into o": (("o_proj",), to_int8),
    "int8 into gate, up": (GATE_UP, to_int8),
    "int8 into down": (("down_proj",), to_int8),
    "int8 into head": (("lm_head",), to_int8),
    "int8 in groups of 16": (ALL, partial(to_int8, group=16)),
    "two planes above 4": (ALL, partial(to_two_planes, threshold=4.0)),
    "two planes above 2": (ALL, partial(to_two_planes, threshold=2.0)),
}


def rounding_side(reference: fidelity.Reference, name: str) -> Side:
    """The reference with the inputs of some matrices rounded."""
    kinds, rounding = ROUNDINGS[name]

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (rounding(inputs[0]),)

    def logits(ids: Sequence[int]) -> torch.Tensor:
        with ExitStack() as hooks:
            for module_name, module in reference.model.named_modules():
                if module_name.rpartition(".")[2] in kinds:
                    hooks.callback(module.register_forward_pre_hook(hook).remove)
            return reference.logits([ids])[0]

    return logits
