"""What a registry entry consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from fastllm.models.hyperparameters import HyperParameters
from fastllm.models.spec import DecoderSpec
from fastllm.models.tensors import HF_NAMES

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint

SpecBuilder: TypeAlias = "Callable[[HyperParameters, Checkpoint], DecoderSpec]"


@dataclass(frozen=True)
class Architecture:
    """One architecture, under the names that both kinds of checkpoint give it.

    Attributes:
        name: the registry's name, also `DecoderSpec.architecture`.
        gguf: values of `general.architecture`.
        hf: class names in `architectures` of `config.json`.
        from_gguf, from_hf: build the spec; hyperparameters are read through `HyperParameters` alone, so that
            the registry can refuse those that nobody read.
        hf_names: the tensor names of its Hugging Face checkpoints, as `TensorMap.names`: what adapters call
            the modules, for a model from a GGUF file too.
        harmless: hyperparameters, besides the common ones, that cannot change the answer.
    """

    name: str
    gguf: tuple[str, ...]
    hf: tuple[str, ...]
    from_gguf: SpecBuilder
    from_hf: SpecBuilder
    harmless: frozenset[str] = frozenset()
    hf_names: Mapping[str, str] = field(default_factory=lambda: HF_NAMES)
