"""LoRA adapters on disk, in PEFT's layout, for the models of tiny.py; without any of fastllm's own tables.

`save_adapter` writes random matrices for a `transformers` model and returns what they add to its weights, in
float64. `merge` adds that to a copy of the model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

Float64 = npt.NDArray[np.float64]

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SLOTS = dict(zip(ALL, ("q", "k", "v", "o", "gate", "up", "down"), strict=True))
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Saved:
    """An adapter as it was written.

    Attributes:
        path: its directory.
        a, b: by module, as the file's precision has them, float64 (r, inputs) and (outputs, r).
        scale: by module.
    """

    path: Path
    a: Mapping[str, Float64]
    b: Mapping[str, Float64]
    scale: Mapping[str, float]

    def delta(self, module: str) -> Float64:
        """What is added to the weight of a module."""
        return self.scale[module] * (self.b[module] @ self.a[module])


def linear_modules(model: Any, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the modules of a model's layers whose name ends with one of the targets."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name and name.rsplit(".", 1)[-1] in targets
    }


def config_of(targets: Sequence[str], rank: int, alpha: float) -> dict[str, Any]:
    """An adapter_config.json as PEFT 0.17 writes one."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(targets),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }


def save_adapter(
    path: Path,
    model: Any,
    *,
    targets: Sequence[str] = ALL,
    rank: int = 4,
    alpha: float = 8,
    dtype: str = "F32",
    seed: int = 0,
    layers: Sequence[int] | None = None,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    rslora: bool = False,
    **config: Any,
) -> Saved:
    """Writes an adapter that changes what a model answers as much as its own weights do.

    Args:
        layers: the layers that have one; None: all.
        ranks, alphas: by whole name of a module, where they differ; written as rank_pattern and
            alpha_pattern.
        config: further fields of the configuration; they replace what stands there.
    """
    rng = np.random.default_rng(seed)
    a, b, scale, tensors = {}, {}, {}, {}
    for name, (outputs, inputs) in linear_modules(model, targets).items():
        if layers is not None and int(name.split(".layers.")[1].split(".")[0]) not in layers:
            continue
        r = (ranks or {}).get(name, rank)
        scale[name] = (alphas or {}).get(name, alpha) / (r**0.5 if rslora else r)
        parts = {"A": rng.standard_normal((r, inputs)) / inputs**0.5}
        parts["B"] = rng.standard_normal((outputs, r)) / r**0.5 / scale[name] / 2
        for half, values in parts.items():
            stored = torch.from_numpy(values).to(DTYPES[dtype])
            tensors[f"base_model.model.{name}.lora_{half}.weight"] = stored.contiguous()
            (a if half == "A" else b)[name] = stored.double().numpy()
    path.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    values = config_of(targets, rank, alpha) | {
        "layers_to_transform": None if layers is None else list(layers),
        "rank_pattern": dict(ranks or {}),
        "alpha_pattern": dict(alphas or {}),
        "use_rslora": rslora,
    }
    (path / "adapter_config.json").write_text(json.dumps(values | config, indent=2))
    return Saved(path, a, b, scale)


def edit_config(path: Path, **fields: Any) -> None:
    """Replaces fields of an adapter's configuration; a value of `...` takes the field away."""
    file = path / "adapter_config.json"
    values = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(path: Path, change: Any) -> None:
    """Rewrites an adapter's tensors; `change` gets them as a dict of torch tensors and changes it."""
    file = path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def merge(model: Any, saved: Saved) -> Any:
    """A copy of the model with the adapter in its weights, rounded to float32."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name in saved.a:
            weight = merged.get_submodule(name).weight
            weight.copy_(torch.from_numpy(weight.double().numpy() + saved.delta(name)))
    return merged


def adapted(weights: Mapping[tuple[str, int], Float64], saved: Saved) -> dict[tuple[str, int], Float64]:
    """The oracle's weights with the adapter in them."""
    changed = dict(weights)
    for name in saved.a:
        layer = int(name.split(".layers.")[1].split(".")[0])
        key = SLOTS[name.rsplit(".", 1)[-1]], layer
        changed[key] = changed[key] + saved.delta(name)
    return changed
