"""fastllm's `Checkpoint` over tensors in memory, read by the `gguf` and `safetensors` packages.

Independent of fastllm's readers, and soft: a test can change, drop and add tensors and hyperparameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import safetensors
import torch

from fastllm.formats.checkpoint import CheckpointTensor, Fields


@dataclass
class MemoryCheckpoint:
    """fastllm's `Checkpoint` interface over tensors in memory; remembers what was released."""

    kind: str
    path: Path
    config: Fields
    tensors: dict[str, CheckpointTensor]
    released: list[str] = field(default_factory=list)

    def release(self, name: str) -> None:
        self.released.append(name)

    def close(self) -> None:
        self.tensors = {}

    def __enter__(self) -> MemoryCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def memory_tensor(name: str, values: npt.NDArray[Any], dtype: str = "F32") -> CheckpointTensor:
    """A tensor of plain values: F32, F16, or BF16 given as its 16-bit words."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return CheckpointTensor(name=name, shape=tuple(values.shape), dtype=dtype, data=data)


def read_gguf(path: Path) -> MemoryCheckpoint:
    """Reads a GGUF file with the `gguf` package."""
    reader = gguf.GGUFReader(path)
    config = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {
        tensor.name: CheckpointTensor(
            name=tensor.name,
            shape=tuple(int(n) for n in tensor.shape[::-1]),
            dtype=tensor.tensor_type.name,
            data=np.array(tensor.data).reshape(-1).view(np.uint8),
        )
        for tensor in reader.tensors
    }
    return MemoryCheckpoint("gguf", path, Fields(path, config), tensors)


def read_hf(path: Path) -> MemoryCheckpoint:
    """Reads a model directory with the `safetensors` package."""
    tensors = {t.name: t for file in sorted(path.glob("*.safetensors")) for t in _read_safetensors(file)}
    config = json.loads((path / "config.json").read_text())
    return MemoryCheckpoint("hf", path, Fields(path / "config.json", config), tensors)


def _read_safetensors(file: Path) -> Iterator[CheckpointTensor]:
    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    with safetensors.safe_open(file, framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118 - not a mapping
            tensor = shard.get_tensor(name)
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            yield CheckpointTensor(
                name=name, shape=tuple(tensor.shape), dtype=dtypes[tensor.dtype], data=data
            )


def read(path: Path) -> MemoryCheckpoint:
    """Reads a GGUF file or a model directory."""
    return read_hf(path) if path.is_dir() else read_gguf(path)


def reconfigure(checkpoint: MemoryCheckpoint, changes: dict[str, Any]) -> None:
    """Sets hyperparameters; `...` removes one. Those of a GGUF file are named without their architecture."""
    values = dict(checkpoint.config)
    prefix = f"{values['general.architecture']}." if checkpoint.kind == "gguf" else ""
    for key, value in changes.items():
        values[key if "general" in key or "split" in key else prefix + key] = value
    kept = {key: value for key, value in values.items() if value is not ...}
    checkpoint.config = Fields(checkpoint.config.file, kept)
