"""Reading a LoRA adapter: a directory in PEFT's layout, adapter_config.json and adapter_model.safetensors.

For a module with weight W (outputs, inputs) the directory has A (r, inputs) and B (outputs, r), and the
module computes W x + scale * B (A x) with scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
Whatever else a configuration can ask for would change that, so it is refused by name and never ignored.

Modules have the names that the Hugging Face checkpoint of the model gives them, whatever kind of checkpoint
the model was read from. The decoder keeps q and k in that checkpoint's row order ("half"; the loader reorders
the rows of GGUF files), so the rows of B are right as they stand. A fused module (qkv_proj) is cut into its
parts: they share A, and each has its rows of B.

Nothing but JSON and safetensors is read.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastllm.errors import ModelFileError, RequestError, UnsupportedModelError
from fastllm.formats.checkpoint import Fields, printable
from fastllm.formats.keys import KeySource
from fastllm.formats.safetensors import MAX_CONFIG_BYTES, SafetensorsFile, parse_json, read_small
from fastllm.models.hyperparameters import HyperParameters
from fastllm.models.loader import to_float32
from fastllm.models.slots import FUSED, decoder_slots, sizes
from fastllm.models.spec import DecoderSpec

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
MAX_RANK = 256
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The slots that an adapter may change."""

_PREFIX = "base_model.model."
_FLOATS = ("F32", "F16", "BF16")

_HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path revision inference_mode peft_version lora_dropout
    layers_pattern exclude_modules ensure_weight_tying
    loftq_config eva_config corda_config megatron_core qalora_group_size
    """.split()  # noqa: SIM905
)
"""Bookkeeping; training; which modules there are, where the tensors say it too; settings of what is refused
itself unless it is off."""

_REFUSED = {
    "modules_to_save": "fully trained modules are not implemented",
    "trainable_token_indices": "trained embeddings are not implemented",
    "target_parameters": "adapters of single parameters are not implemented",
    "layer_replication": "replicated layers are not implemented",
    "alora_invocation_tokens": "activated LoRA is not implemented",
    "megatron_config": "Megatron's layers are not implemented",
    "arrow_config": "routing between adapters is not implemented",
    "use_dora": "DoRA is not implemented",
    "use_qalora": "QALoRA is not implemented",
    "lora_bias": "trained biases are not implemented",
    "fan_in_fan_out": "transposed weights are not implemented",
}
"""Fields that must be absent, null, false or empty."""

_READ_HERE = frozenset({"target_modules", "layers_to_transform", "rank_pattern", "alpha_pattern"})

# What a rank_pattern or alpha_pattern may say: the end of a module's name. PEFT takes regular expressions;
# those from a file are not run.
_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_]|\\?\.)+\$?")


class AdapterPart(NamedTuple):
    """What an adapter adds to one slot of one layer: y += scale * (x A^T) B^T.

    Attributes:
        slot: one of PROJECTIONS.
        layer: from 0.
        a: float32 (rank, inputs), C-contiguous.
        b: float32 (outputs, rank), C-contiguous.
        scale: finite.
    """

    slot: str
    layer: int
    a: npt.NDArray[np.float32]
    b: npt.NDArray[np.float32]
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """An adapter as it was read.

    Attributes:
        path: its directory.
        digest: 32 bytes, SHA-256 over both files: two adapters with the same one are the same.
        rank: the largest of its ranks.
        parts: in the order of the file's tensors.
    """

    path: Path
    digest: bytes
    rank: int
    parts: tuple[AdapterPart, ...]


class _Module(NamedTuple):
    """A module that an adapter may change: its name, its layer, and the slots that its rows are."""

    name: str
    layer: int
    slots: tuple[str, ...]


def adapter_modules(spec: DecoderSpec, names: Mapping[str, str]) -> dict[str, _Module]:
    """The modules of a decoder that an adapter may change, by name.

    Args:
        spec: the decoder.
        names: slot -> tensor name of the Hugging Face checkpoint, as in `TensorMap.names`.
    """
    slots = [slot.name for slot in decoder_slots(spec) if slot.name in PROJECTIONS]
    groups: list[tuple[str, tuple[str, ...]]] = []
    for fused, parts in FUSED.items():
        if fused in names and all(part in slots for part in parts):
            groups.append((fused, parts))
            slots = [slot for slot in slots if slot not in parts]
    groups += [(slot, (slot,)) for slot in slots if slot in names]
    modules = {}
    for layer in range(spec.num_layers):
        for key, parts in groups:
            name = names[key].replace("{i}", str(layer)).removesuffix(".weight")
            modules[name] = _Module(name, layer, parts)
    return modules


def read_adapter(
    path: str | os.PathLike[str],
    spec: DecoderSpec,
    names: Mapping[str, str],
    keys: KeySource | None = None,
) -> LoraAdapter:
    """Read an adapter for a decoder.

    Args:
        path: a directory in PEFT's layout.
        spec: the decoder that it is for.
        names: slot -> tensor name of the decoder's Hugging Face checkpoint.
        keys: where the key of encrypted files is; None: in the environment.

    Raises:
        RequestError: there is no such directory, or no key for what is encrypted.
        ModelFileError: a file is missing or damaged; a tensor is missing, superfluous, not finite, or does
            not fit the decoder (with both shapes).
        UnsupportedModelError: pickled weights; something that the configuration asks for and that is not
            implemented; a module that cannot have an adapter; a rank above MAX_RANK.
    """
    place = Path(path)
    if not place.is_dir():
        raise RequestError("lora_path", str(path), f"a directory with {CONFIG_NAME} and {WEIGHTS_NAME}")
    modules = adapter_modules(spec, names)
    config = _Config(place / CONFIG_NAME, keys)
    weights = place / WEIGHTS_NAME
    if not weights.exists():
        if (place / PICKLED_NAME).exists():
            raise UnsupportedModelError(
                f"{place}: the weights are pickled ({PICKLED_NAME}), and pickle runs code when it is read; "
                f"convert them to {WEIGHTS_NAME}"
            )
        raise ModelFileError(str(weights), "there is no such file")
    file = SafetensorsFile(weights, keys)
    try:
        return _read(place, file, config, modules, sizes(spec), spec)
    finally:
        file.close()


def _read(
    place: Path,
    file: SafetensorsFile,
    config: _Config,
    modules: Mapping[str, _Module],
    value: Mapping[str, int],
    spec: DecoderSpec,
) -> LoraAdapter:
    found = _find_modules(file, modules)
    config.check_modules(found, modules)
    shapes = {slot.name: slot.shape for slot in decoder_slots(spec)}
    # All shapes before the first conversion: what is read after that is bounded by the decoder's sizes.
    for module in found:
        rank = config.rank(module.name)
        outputs = sum(value[shapes[slot][0]] for slot in module.slots)
        inputs = value[shapes[module.slots[0]][1]]
        _check_tensor(file, _tensor_name(module.name, "A"), {"r": rank, "inputs": inputs})
        _check_tensor(file, _tensor_name(module.name, "B"), {"outputs": outputs, "r": rank})
    parts = []
    for module in found:
        a = _values(file, _tensor_name(module.name, "A"))
        b = _values(file, _tensor_name(module.name, "B"))
        first = 0
        for slot in module.slots:
            rows = value[shapes[slot][0]]
            part = np.ascontiguousarray(b[first : first + rows])
            parts.append(AdapterPart(slot, module.layer, a, part, config.scale(module.name)))
            first += rows
    digest = hashlib.sha256(hashlib.sha256(config.text).digest() + file.sha256()).digest()
    return LoraAdapter(place, digest, max(part.a.shape[0] for part in parts), tuple(parts))


def _find_modules(file: SafetensorsFile, modules: Mapping[str, _Module]) -> list[_Module]:
    """The modules whose tensors are in the file, each with both."""
    halves: dict[str, set[str]] = {}
    for name in file.infos:
        inner = name.removeprefix(_PREFIX)
        module, _, half = inner.removesuffix(".weight").rpartition(".lora_")
        if inner == name or not inner.endswith(".weight") or half not in ("A", "B"):
            raise UnsupportedModelError(
                f"{file.path}: tensor {printable(name)}: expected {_PREFIX}MODULE.lora_A.weight or "
                "lora_B.weight; anything else is not implemented, and would change the answer"
            )
        if module not in modules:
            known = sorted({name.rsplit(".", 1)[-1] for name in modules})
            raise UnsupportedModelError(
                f"{file.path}: tensor {printable(name)}: the model has no such module, or none that "
                f"can have an adapter; those are {', '.join(known)} of its layers"
            )
        halves.setdefault(module, set()).add(half)
    for module, both in halves.items():
        for half in sorted({"A", "B"} - both):
            raise ModelFileError(str(file.path), "missing", tensor=_tensor_name(module, half))
    if not halves:
        raise ModelFileError(str(file.path), "has no tensor")
    return [modules[name] for name in halves]


def _tensor_name(module: str, half: str) -> str:
    return f"{_PREFIX}{module}.lora_{half}.weight"


def _check_tensor(file: SafetensorsFile, name: str, expected: Mapping[str, int]) -> None:
    place = file.infos[name]
    if place.shape != tuple(expected.values()):
        named = ", ".join(f"{symbol} = {size}" for symbol, size in expected.items())
        raise ModelFileError(str(file.path), f"expected shape ({named}), found {place.shape}", tensor=name)
    if place.dtype not in _FLOATS:
        raise UnsupportedModelError(
            f"{file.path}: tensor {name}: expected {', '.join(_FLOATS)}, got {place.dtype}"
        )


def _values(file: SafetensorsFile, name: str) -> npt.NDArray[np.float32]:
    """A copy in float32: the file need not stay mapped, nor its tensors be aligned."""
    values = np.array(to_float32(file.tensor(name)), dtype=np.float32, order="C")
    if not np.isfinite(values).all():
        raise ModelFileError(str(file.path), "a value that is not finite", tensor=name)
    file.release(name)
    return values


class _Config:
    """adapter_config.json, every field looked at."""

    def __init__(self, path: Path, keys: KeySource | None) -> None:
        self.text = read_small(path, MAX_CONFIG_BYTES, keys)
        fields = Fields(path, parse_json(path, self.text))
        self._params = params = HyperParameters(fields)
        kind = params.string("peft_type")
        if kind != "LORA":
            raise params.unsupported("peft_type", "only LORA is implemented")
        for name, why in _REFUSED.items():
            if fields.get(name) not in (None, False, [], {}):
                raise params.unsupported(name, why)
        params.expect("bias", "none")
        params.expect("task_type", "CAUSAL_LM")
        # The other ways to begin training take a part out of the base model's weights.
        params.expect("init_lora_weights", True, False, "gaussian", "eva", "orthogonal")
        self._rank = self._check_rank("r", params.integer("r"))
        self._alpha = params.number("lora_alpha")
        self._root = params.boolean("use_rslora", False)
        ranks = self._patterns(fields, "rank_pattern")
        self._ranks = {end: self._check_rank(key, values.integer(key)) for end, key, values in ranks}
        alphas = self._patterns(fields, "alpha_pattern")
        self._alphas = {end: HyperParameters(values).number(key) for end, key, values in alphas}
        self._targets = self._read_targets(fields)
        self._layers = self._read_layers(fields)
        self._complete = fields.get("exclude_modules") in (None, [], "")
        params.finish(_HARMLESS | _REFUSED.keys() | _READ_HERE)

    def _check_rank(self, name: str, rank: int) -> int:
        if rank < 1:
            raise self._params.error(name, f"expected an integer of at least 1, got {rank}")
        if rank > MAX_RANK:
            raise UnsupportedModelError(
                f"{self._params.source}: {name} = {rank}: ranks of at most {MAX_RANK} are implemented"
            )
        return rank

    def _patterns(self, fields: Fields, name: str) -> list[tuple[str, str, Fields]]:
        """(the end of a module's name, key, the object that has the key), in the order of the file."""
        section = fields.section(name, {})
        for key in section:
            if not _PATTERN.fullmatch(key):
                raise UnsupportedModelError(
                    f"{fields.file}: {name}: {printable(key)}: names of modules are implemented, "
                    "other patterns are not"
                )
        return [(key.removesuffix("$").replace("\\", ""), key, section) for key in section]

    def _read_targets(self, fields: Fields) -> tuple[str, ...]:
        """The ends of the names of modules; none where target_modules is a pattern."""
        if isinstance(fields.get("target_modules"), str):
            return ()
        return tuple(fields.strings("target_modules"))

    def _read_layers(self, fields: Fields) -> frozenset[int] | None:
        """The layers of layers_to_transform; None: all."""
        value = fields.get("layers_to_transform")
        if value is None:
            return None
        if isinstance(value, list):
            return frozenset(fields.integers("layers_to_transform"))
        return frozenset((fields.integer("layers_to_transform"),))

    def rank(self, module: str) -> int:
        return int(_of_module(self._ranks, module, self._rank))  # exact: it is at most MAX_RANK

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        alpha = _of_module(self._alphas, module, self._alpha)
        return alpha / (math.sqrt(rank) if self._root else rank)

    def check_modules(self, found: list[_Module], modules: Mapping[str, _Module]) -> None:
        """Tensors and configuration speak of the same modules.

        A target that is a pattern is not run: the tensors say which modules there are.

        Raises:
            ModelFileError: a tensor of a module that target_modules does not name, or none of one that it
                does.
            UnsupportedModelError: a target that is no module of the decoder's layers.
        """
        there = {module.name for module in found}
        for target in self._targets:
            named = [module for name, module in modules.items() if _ends(name, target)]
            if not named:
                raise UnsupportedModelError(
                    f"{self._params.source}: target_modules: {printable(target)}: the model has no such "
                    "module, or none that can have an adapter"
                )
            for module in named:
                wanted = self._layers is None or module.layer in self._layers
                if wanted and self._complete and module.name not in there:
                    raise self._params.error("target_modules", f"{target}: no tensors of {module.name}")
        for module in found:
            if self._targets and not any(_ends(module.name, target) for target in self._targets):
                raise self._params.error("target_modules", f"does not name {module.name}, which has tensors")


def _ends(module: str, end: str) -> bool:
    """Whether a module's name ends with whole parts of a name."""
    return module == end or module.endswith("." + end)


def _of_module(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The first pattern counts, as in PEFT. One that begins with ^ is a whole name."""
    for end, value in patterns.items():
        if _ends(module, end) or end == "^" + module:
            return value
    return default
