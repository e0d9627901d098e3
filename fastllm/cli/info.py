"""`fastllm info` and `fastllm pull`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fastllm import _core
from fastllm.errors import RequestError, UnsupportedModelError
from fastllm.executor.memory import available_memory, format_bytes
from fastllm.formats.digest import model_sha256
from fastllm.formats.keys import KeySource
from fastllm.formats.source import resolve

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint
    from fastllm.formats.tokenizer import Tokenizer
    from fastllm.models.spec import DecoderSpec

_PANEL_ROWS = 16  # packed matrices have whole panels of this many rows


def pull(options: argparse.Namespace) -> int:
    """Fetch and verify; print where the model is."""
    print(resolve(options.model, verify=True))
    return 0


def info(options: argparse.Namespace) -> int:
    """Print what there is to know, one fact a line."""
    from fastllm.formats.checkpoint import open_checkpoint

    path = resolve(options.model)
    if options.sha256:
        print(model_sha256(path, progress=True))
        return 0
    with open_checkpoint(path, KeySource(options.key_file)) as checkpoint:
        facts = [("model", str(options.model)), ("path", str(path)), *_model(checkpoint)]
    facts += _machine()
    width = max(len(name) for name, _ in facts) + 2
    for name, fact in facts:
        print(f"{name:<{width}}{fact}")
    return 0


def _model(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    from fastllm.formats.tokenizer import load_tokenizer
    from fastllm.models.registry import spec_from_checkpoint

    encrypted = ", encrypted" if checkpoint.encrypted else ""
    yield "format", {"gguf": "GGUF", "hf": "safetensors"}[checkpoint.kind] + encrypted
    yield from _tensors(checkpoint)
    try:
        spec = spec_from_checkpoint(checkpoint)
        yield from _decoder(spec)
        packed = _packed_bytes(checkpoint, spec)
        yield "packed", f"{format_bytes(packed)} of memory for the weights, as they are on disk"
    except (UnsupportedModelError, RequestError) as error:
        yield "not supported", " ".join(str(error).split())
    try:
        yield from _tokenizer(load_tokenizer(checkpoint))
    except UnsupportedModelError as error:
        yield "tokenizer", " ".join(str(error).split())


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Counts and sizes by type, the largest first."""
    count: dict[str, int] = {}
    size: dict[str, int] = {}
    parameters = 0
    for tensor in checkpoint.tensors.values():
        count[tensor.dtype] = count.get(tensor.dtype, 0) + 1
        size[tensor.dtype] = size.get(tensor.dtype, 0) + tensor.nbytes
        parameters += math.prod(tensor.shape)
    yield "parameters", f"{parameters / 1e6:,.1f} million"
    yield "tensors", f"{sum(count.values())}, {format_bytes(sum(size.values()))}"
    for dtype in sorted(size, key=lambda name: -size[name]):
        yield f"  {dtype}", f"{count[dtype]}, {format_bytes(size[dtype])}"


def _decoder(spec: DecoderSpec) -> Iterator[tuple[str, str]]:
    yield "architecture", spec.architecture
    yield "layers", f"{spec.num_layers}, width {spec.dim}, MLP {spec.ffn_dim}"
    yield "attention", f"{spec.num_heads} heads of {spec.head_dim}, {spec.num_kv_heads} of keys and values"
    yield "context", f"{spec.context_length} tokens"
    yield "vocabulary", f"{spec.vocab_size}" + (", head tied to the embedding" if spec.tied_head else "")
    token_bytes = 2 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    context = format_bytes(token_bytes * spec.context_length)
    yield "KV cache", f"{token_bytes} bytes per token in fp16, {context} for a full context"


def _packed_bytes(checkpoint: Checkpoint, spec: DecoderSpec) -> int:
    """What the weights take once they are packed, from packing one panel of zeros of each kind."""
    from fastllm.models.loader import iter_tensors

    panels: dict[tuple[str, int], int] = {}
    total = 0
    for entry in iter_tensors(checkpoint, spec):
        shape, dtype = entry.tensor.shape, entry.tensor.dtype
        if len(shape) != 2:  # the few vectors stay as they are
            continue
        rows, cols = shape
        if (dtype, cols) not in panels:
            zeros = np.zeros(entry.tensor.nbytes // rows * _PANEL_ROWS, np.uint8)
            panels[dtype, cols] = _core.PackedMatrix.from_ggml(dtype, zeros, _PANEL_ROWS, cols).nbytes
        total += panels[dtype, cols] * -(-rows // _PANEL_ROWS)
    return total


def _tokenizer(tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    def shown(token: int) -> str:
        return f"{token} {tokenizer.token_bytes(token).decode('utf-8', 'replace')!r}"

    ends = ", ".join(shown(token) for token in sorted(tokenizer.eos_token_ids))
    begin = "none" if tokenizer.bos_token_id is None else shown(tokenizer.bos_token_id)
    yield "tokenizer", f"{tokenizer.vocab_size} tokens; begin {begin}; end {ends or 'none'}"
    yield "chat templates", ", ".join(tokenizer.chat_templates) or "none"


def _machine() -> Iterator[tuple[str, str]]:
    best = ", ".join(_core.supported_isas())
    yield "instruction set", f"{_core.isa()} (this machine runs {best})"
    yield "processors", str(_core.available_processors())
    yield "free memory", format_bytes(available_memory())
    yield "python", sys.version.split()[0]
