"""What a row costs at least: operations at the integer peak, bytes at the speed of reading memory.

The greater of the two times is the row's limit. A multiply-add counts as two operations, attention's as
well, all at the int8 peak. Bytes are the matrices as the file stores them, once per step, and the sequences'
K and V. Norms, rope, sampling and activations are taken to be free.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rows import Row

KV_BYTES = {"auto": 2.0, "int16": 2.0, "fp16": 2.0, "bf16": 2.0, "fp32": 4.0, "int8": 1.0}


@dataclass(frozen=True)
class Work:
    """What a model asks for: the weights of its layers and of its head, and attention's widths."""

    layer_weights: int
    head_weights: int
    layer_bytes: int
    head_bytes: int
    attention_width: int  # layers × heads × head_dim
    kv_width: int  # layers × KV heads × head_dim, K and V each


def work_of(path: Path) -> Work:
    """From a GGUF file's tensors. The head is the embedding where there is no other."""
    from fastllm.formats.checkpoint import open_checkpoint
    from fastllm.models.registry import spec_from_checkpoint

    sizes = {"layer": [0, 0], "head": [0, 0], "embed": [0, 0]}
    with open_checkpoint(path) as checkpoint:
        spec = spec_from_checkpoint(checkpoint)
        for name, tensor in checkpoint.tensors.items():
            if len(tensor.shape) == 2:
                kind = {"token_embd.weight": "embed", "output.weight": "head"}.get(name, "layer")
                sizes[kind][0] += tensor.shape[0] * tensor.shape[1]
                sizes[kind][1] += tensor.data.nbytes
    head = sizes["head"] if sizes["head"][0] else sizes["embed"]
    layers = spec.num_layers * spec.head_dim
    return Work(*_pair(sizes["layer"], head), layers * spec.num_heads, layers * spec.num_kv_heads)


def _pair(layer: list[int], head: list[int]) -> tuple[int, int, int, int]:
    return layer[0], head[0], layer[1], head[1]


def from_record(record: dict[str, Any]) -> Work:
    return Work(**record)


def to_record(work: Work) -> dict[str, Any]:
    return asdict(work)


def limit(row: Row, work: Work, limits: dict[str, float], kv_cache_dtype: str = "auto") -> tuple[float, str]:
    """The most tokens per second, and which of the two limits says so: "int8" or "read"."""
    seconds = {"int8": 0.0, "read": 0.0}
    if row.kind in ("prefill", "serve"):
        for name, value in _prefill(row.prompt, row.batch, work, limits).items():
            seconds[name] += value
    if row.kind != "prefill":
        for name, value in _decode(row, work, limits, KV_BYTES[kv_cache_dtype]).items():
            seconds[name] += value * row.decoded
    tokens = row.batch * (row.prompt if row.kind == "prefill" else row.decoded)
    binding = max(seconds, key=seconds.__getitem__)
    return tokens / seconds[binding], binding


def _prefill(prompt: int, batch: int, work: Work, limits: dict[str, float]) -> dict[str, float]:
    """A prompt attends to itself: half of the pairs; scores and values are a multiply-add each."""
    attention = 2 * prompt**2 * work.attention_width
    operations = batch * (2 * prompt * work.layer_weights + 2 * work.head_weights + attention)
    read = work.layer_bytes + work.head_bytes
    return {"int8": operations / limits["int8"], "read": read / limits["read"]}


def _decode(row: Row, work: Work, limits: dict[str, float], kv_bytes: float) -> dict[str, float]:
    """One step at the mean context."""
    context = row.prompt + row.decoded / 2
    per_token = 2 * (work.layer_weights + work.head_weights) + 4 * context * work.attention_width
    read = work.layer_bytes + work.head_bytes + row.batch * context * 2 * work.kv_width * kv_bytes
    return {"int8": row.batch * per_token / limits["int8"], "read": read / limits["read"]}
