"""What the engine's arithmetic costs the default model, against float32 on its dequantized weights.

    python bench/quality.py [--json FILE] [--stdlib TOKENS] [--parts] [--model FILE]

Perplexity, divergence of the distributions (KL, nats) and how often the most likely token is the same, on the
fixed texts of tests/data/quality and, with --stdlib, on as many tokens each of Python's own documentation and
sources, which differ between Python versions; for every type of KV cache. Then the greedy continuations of
tests/fidelity.py. --parts rounds the reference's activations to int8 in groups of 32, all or the inputs of
one kind of matrix, and in other ways that could be had: what that alone costs. The reference, and what it is
checked against: tests/fidelity.py, tests/test_quality.py.

The figures do not depend on the machine's speed. Any GGUF file of a llama-like model can stand in for the
default one. Several minutes on 2 cores, 4 GiB.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import machine
import numpy as np
import torch

sys.path.insert(0, str(machine.ROOT / "tests"))

import fidelity
from step_batches import step_batch, whole

from fastllm import LLM
from fastllm.executor.cpu import KV_CACHE_DTYPES, CpuExecutor
from fastllm.formats.checkpoint import Checkpoint, open_checkpoint
from fastllm.formats.source import DEFAULT_MODEL, resolve
from fastllm.models.registry import spec_from_checkpoint
from fastllm.models.spec import DecoderSpec

Texts: TypeAlias = Mapping[str, Sequence[Sequence[int]]]
Side: TypeAlias = Callable[[Sequence[int]], torch.Tensor]
"""Token ids -> logits (T, V)."""
Results: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Side -> text -> figure -> value."""

STDLIB_SOURCES = ("argparse", "heapq", "json.decoder", "statistics", "textwrap", "difflib", "tarfile", "csv")
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
ALL = (*QKV, "o_proj", *GATE_UP, "down_proj", "lm_head")


def stdlib_texts(llm: LLM, tokens: int) -> dict[str, list[list[int]]]:
    """The first so many tokens each of Python's language reference and of some of its modules."""
    topics = importlib.import_module("pydoc_data.topics").topics
    sources = [inspect.getsource(importlib.import_module(name)) for name in STDLIB_SOURCES]
    texts = {"Python's documentation": "\n\n".join(topics[key] for key in sorted(topics))}
    texts["Python's sources"] = "\n\n".join(sources)
    encode = llm.get_tokenizer().encode
    return {name: fidelity.windows(encode(text)[:tokens]) for name, text in texts.items()}


# -- one side against another --------------------------------------------------------------------------------


class Tally:
    """Sums of two sides' logprobs, divergences and agreements, token by token."""

    def __init__(self) -> None:
        self._expected: list[fidelity.Float64] = []
        self._found: list[fidelity.Float64] = []
        self._divergence: list[fidelity.Float64] = []
        self._same: list[fidelity.Float64] = []

    def add(self, ids: Sequence[int], expected: torch.Tensor, found: torch.Tensor) -> None:
        """One window's logits (T, V) of both."""
        for first in range(0, len(ids) - 1, 128):  # float64 for a few rows at a time
            rows = slice(first, min(first + 128, len(ids) - 1))
            targets = torch.tensor(list(ids[rows.start + 1 : rows.stop + 1]))[:, None]
            p, q = (side[rows].double().log_softmax(-1) for side in (expected, found))
            self._expected.append(p.gather(-1, targets)[:, 0].numpy())
            self._found.append(q.gather(-1, targets)[:, 0].numpy())
            self._divergence.append((p.exp() * (p - q)).sum(-1).numpy())
            self._same.append((p.argmax(-1) == q.argmax(-1)).double().numpy())

    def summary(self) -> dict[str, float]:
        divergence = np.concatenate(self._divergence)
        return {
            **dataclasses.asdict(fidelity.perplexity(self._expected, self._found)),
            "kl_mean": float(divergence.mean()),
            "kl_99th_percentile": float(np.quantile(divergence, 0.99)),
            "same_top_token": float(np.concatenate(self._same).mean()),
        }


def compare(texts: Texts, reference: Side, sides: Mapping[str, Side]) -> Results:
    """For every side and every text, and for all texts together, its summary against the reference."""
    tallies = {name: {text: Tally() for text in (*texts, "all")} for name in sides}
    for text, cut in texts.items():
        for number, ids in enumerate(cut):
            expected = reference(ids)
            for name, side in sides.items():
                found = side(ids)
                tallies[name][text].add(ids, expected, found)
                tallies[name]["all"].add(ids, expected, found)
            print(f"{text}: window {number + 1}/{len(cut)}", file=sys.stderr)
    return {name: {text: tally.summary() for text, tally in of.items()} for name, of in tallies.items()}


def executor_side(executor: CpuExecutor) -> Side:
    """The executor by itself: what the engine asks of it, in one step."""

    def logits(ids: Sequence[int]) -> torch.Tensor:
        blocks = range(-(-len(ids) // executor.block_size))
        found = executor.run(step_batch([whole(ids, blocks)], executor.block_size), logits=True)[1]
        assert found is not None
        return torch.from_numpy(found.copy())

    return logits


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


# -- the table -----------------------------------------------------------------------------------------------


def print_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    print("| what | text | tokens | reference | perplexity | change | KL | same top token |")
    print("|---|---|---|---|---|---|---|---|")
    for name, texts in results.items():
        for text, row in texts.items():
            print(
                f"| {name} | {text} | {row['tokens']} | {row['reference']:.3f} | {row['measured']:.3f} "
                f"| {100 * row['change']:+.2f} ± {100 * row['error']:.2f} % "
                f"| {row['kl_mean']:.5f} | {100 * row['same_top_token']:.1f} % |"
            )


def print_splits(llm: LLM, splits: Mapping[str, fidelity.Split | None]) -> None:
    token_bytes = llm.get_tokenizer().token_bytes
    same = sum(split is None for split in splits.values())
    print(f"\n{same} of {len(splits)} greedy continuations of {fidelity.CONTINUATION} tokens are the same.\n")
    print("| prompt | same tokens | reference | fastllm | margin, nat |\n|---|---|---|---|---|")
    for prompt, split in splits.items():
        if split is not None:
            expected, found = (
                token_bytes(token).decode("utf-8", "replace") for token in (split.expected, split.found)
            )
            print(f"| {prompt!r} | {split.step} | {expected!r} | {found!r} | {split.margin:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a GGUF file or a reference to one")
    parser.add_argument("--stdlib", type=int, default=0, metavar="TOKENS", help="more text, this much each")
    parser.add_argument("--parts", action="store_true", help="what the activations' rounding alone costs")
    parser.add_argument("--json", type=Path, help="write the record there")
    options = parser.parse_args()

    path = resolve(options.model)
    record: dict[str, Any] = {
        "machine": machine.describe(["torch", "transformers", "gguf", "numpy"]),
        "model": machine.file_facts(path),
        "window": fidelity.WINDOW,
    }
    reference = fidelity.Reference(path)
    with ExitStack() as stack:
        llm = stack.enter_context(LLM(path))
        fixed = fidelity.text_windows(llm)
        texts = {**fixed, **(stdlib_texts(llm, options.stdlib) if options.stdlib else {})}
        splits = fidelity.greedy_splits(llm, reference)
        print_splits(llm, splits)
        record["greedy"] = {prompt: split and dataclasses.asdict(split) for prompt, split in splits.items()}

        def plain(ids: Sequence[int]) -> torch.Tensor:
            return reference.logits([ids])[0]

        with open_checkpoint(path) as checkpoint:
            spec = spec_from_checkpoint(checkpoint)
            sides = {
                f"{dtype} cache": executor_side(
                    stack.enter_context(closing(_executor(checkpoint, spec, dtype)))
                )
                for dtype in KV_CACHE_DTYPES
            }
        record["results"] = compare(texts, plain, sides)
        _write(record, options.json)
        if options.parts:
            sides = {name: rounding_side(reference, name) for name in ROUNDINGS}
            record["parts"] = compare(fixed, plain, sides)
    print()
    print_table({**record["results"], **record.get("parts", {})})
    _write(record, options.json)


def _write(record: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n")


def _executor(checkpoint: Checkpoint, spec: DecoderSpec, dtype: str) -> CpuExecutor:
    return CpuExecutor(checkpoint, spec, kv_cache_dtype=dtype, max_model_len=fidelity.WINDOW, max_num_seqs=1)


if __name__ == "__main__":
    main()
