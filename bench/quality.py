"""What the engine's arithmetic costs in accuracy, against float32 on the same dequantized weights.

    python bench/quality.py [--model FILE ...] [--stdlib TOKENS] [--parts] [--only PART] [--json FILE]

Of the default model, and of smollm2-q4_0 where bench/models.py has made it, for every type of KV cache:
perplexity, divergence of the distributions (KL, nats) and how often the most likely token is the same, on the
fixed texts of tests/data/quality and, with --stdlib, on as many tokens each of Python's own documentation and
sources, which differ between Python versions; the greedy continuations of tests/fidelity.py. Of random models
of several shapes and disk formats: divergence and the error of the logits. --parts rounds the reference's
activations to int8 in groups of 32, all or the inputs of one kind of matrix, and in other ways that could be
had: what that alone costs. The reference, and what it is checked against: tests/fidelity.py,
tests/test_quality.py.

Writes the record to --json and the tables beside it, as .md. The figures do not depend on the machine's
speed. A quarter of an hour on 2 idle cores, 4 GiB.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import accuracy
import machine
import models
import random_shapes
import sides
import torch

sys.path.insert(0, str(machine.ROOT / "tests"))

import fidelity

from fastllm import LLM
from fastllm.executor.cpu import KV_CACHE_DTYPES
from fastllm.formats.source import DEFAULT_MODEL, resolve

OUT = machine.ROOT / "docs" / "benchmarks" / "accuracy.json"
STDLIB_SOURCES = ("argparse", "heapq", "json.decoder", "statistics", "textwrap", "difflib", "tarfile", "csv")


def stdlib_texts(llm: LLM, tokens: int) -> dict[str, list[list[int]]]:
    """The first so many tokens each of Python's language reference and of some of its modules."""
    topics = importlib.import_module("pydoc_data.topics").topics
    sources = [inspect.getsource(importlib.import_module(name)) for name in STDLIB_SOURCES]
    texts = {"Python's documentation": "\n\n".join(topics[key] for key in sorted(topics))}
    texts["Python's sources"] = "\n\n".join(sources)
    encode = llm.get_tokenizer().encode
    return {name: fidelity.windows(encode(text)[:tokens]) for name, text in texts.items()}


def measure(path: Path, *, stdlib: int = 0, parts: bool = False) -> dict[str, Any]:
    """All figures of one model.

    Args:
        stdlib: tokens each of Python's documentation and sources.
        parts: what rounding the activations alone costs, too.
    """
    reference = fidelity.Reference(path)
    entry: dict[str, Any] = {
        "file": machine.file_facts(path),
        "window": fidelity.WINDOW,
        "continuation": fidelity.CONTINUATION,
        "greedy": {},
    }
    texts: dict[str, list[list[int]]] = {}
    fixed: dict[str, list[list[int]]] = {}
    for dtype in KV_CACHE_DTYPES:
        with LLM(path, kv_cache_dtype=dtype) as llm:
            fixed = fixed or fidelity.text_windows(llm)
            texts = texts or {**fixed, **(stdlib_texts(llm, stdlib) if stdlib else {})}
            splits = fidelity.greedy_splits(llm, reference)
            print_splits(llm, f"{path.name}, {dtype} cache", splits)
        entry["greedy"][dtype] = {
            prompt: split and dataclasses.asdict(split) for prompt, split in splits.items()
        }

    def plain(ids: Sequence[int]) -> torch.Tensor:
        return reference.logits([ids])[0]

    with sides.caches(path) as caches:
        entry["results"] = sides.compare(texts, plain, caches, accuracy.BASE)
    if parts:
        rounded = {name: sides.rounding_side(reference, name) for name in sides.ROUNDINGS}
        entry["roundings"] = sides.compare(fixed, plain, rounded)
    return entry


def print_splits(llm: LLM, what: str, splits: Mapping[str, fidelity.Split | None]) -> None:
    token_bytes = llm.get_tokenizer().token_bytes
    same = sum(split is None for split in splits.values())
    print(f"\n{what}: {same} of {len(splits)} greedy continuations are the same.\n")
    print("| prompt | same tokens | reference | fastllm | margin, nat |\n|---|---|---|---|---|")
    for prompt, split in splits.items():
        if split is not None:
            expected, found = (
                token_bytes(token).decode("utf-8", "replace") for token in (split.expected, split.found)
            )
            print(f"| {prompt!r} | {split.step} | {expected!r} | {found!r} | {split.margin:.3f} |")


def default_models() -> list[Path]:
    """The default model, and it in Q4_0 if that is there: making it needs llama.cpp."""
    requantized = models.FOLDER / "smollm2-q4_0.gguf"
    return [resolve(DEFAULT_MODEL), *([requantized] if requantized.exists() else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", help="GGUF files of llama-like models, or references to such")
    parser.add_argument("--stdlib", type=int, default=0, metavar="TOKENS", help="more text, this much each")
    parser.add_argument("--parts", action="store_true", help="what the activations' rounding alone costs")
    parser.add_argument("--only", choices=("models", "random"), help="a part; the record has no more then")
    parser.add_argument("--json", type=Path, default=OUT, help=f"({OUT.relative_to(machine.ROOT)})")
    options = parser.parse_args()

    paths = [resolve(model) for model in options.model] if options.model else default_models()
    record: dict[str, Any] = {
        "machine": machine.describe(["torch", "transformers", "gguf", "numpy"]),
        "default_cache": sides.DEFAULT_CACHE,
        "models": [],
        "random": [],
    }
    if options.only != "random":
        for path in paths:
            record["models"].append(measure(path, stdlib=options.stdlib, parts=options.parts))
            _write(record, options.json)
    if options.only != "models":
        record["random"] = random_shapes.measure()
    _write(record, options.json)
    print("\n" + accuracy.markdown(record))


def _write(record: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(accuracy.markdown(record))


if __name__ == "__main__":
    main()
