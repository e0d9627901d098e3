"""Which architectures there are, and the way from a checkpoint to its `DecoderSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastllm.errors import UnsupportedModelError
from fastllm.models import llama, qwen2, qwen3
from fastllm.models.architecture import Architecture
from fastllm.models.common import GGUF_HARMLESS, HF_HARMLESS
from fastllm.models.hyperparameters import HyperParameters
from fastllm.models.spec import DecoderSpec

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint

ARCHITECTURES: tuple[Architecture, ...] = (
    llama.ARCHITECTURE,
    qwen2.ARCHITECTURE,
    qwen3.ARCHITECTURE,
)


def spec_from_checkpoint(checkpoint: Checkpoint) -> DecoderSpec:
    """Reads the hyperparameters of a checkpoint.

    Args:
        checkpoint: of either kind, see `fastllm.formats.checkpoint`.

    Raises:
        ModelFileError: a hyperparameter is missing, has a wrong type or range, or contradicts another.
        UnsupportedModelError: the architecture, or something the hyperparameters ask for, is not implemented.
            A hyperparameter that fastllm does not know counts as such, unless it is listed as harmless.
    """
    if checkpoint.kind == "gguf":
        return _from_gguf(checkpoint)
    return _from_hf(checkpoint)


def hf_names(kind: str, spec: DecoderSpec) -> Mapping[str, str]:
    """Slot -> tensor name of a model's Hugging Face checkpoint.

    Args:
        kind: of the checkpoint that the spec was read from, "gguf" or "hf".

    Raises:
        UnsupportedModelError: the spec is from a GGUF file, and of none of the registered architectures.
    """
    if kind == "hf":
        return spec.tensors.names
    for architecture in ARCHITECTURES:
        if architecture.name == spec.architecture:
            return architecture.hf_names
    raise UnsupportedModelError(f"{spec.source}: {spec.architecture}: its Hugging Face names are not known")


def _from_gguf(checkpoint: Checkpoint) -> DecoderSpec:
    general = HyperParameters(checkpoint.config, "general.")
    general.expect("type", "model")
    HyperParameters(checkpoint.config, "split.").expect("count", 0, 1)
    name = general.string("architecture")
    for architecture in ARCHITECTURES:
        if name in architecture.gguf:
            params = HyperParameters(checkpoint.config, name + ".")
            spec = architecture.from_gguf(params, checkpoint)
            params.finish(GGUF_HARMLESS | architecture.harmless)
            return spec
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.gguf)
    raise general.unsupported("architecture", f"is not implemented; there are {known}")


def _from_hf(checkpoint: Checkpoint) -> DecoderSpec:
    params = HyperParameters(checkpoint.config)
    names = params.strings("architectures")
    if len(names) != 1:
        raise params.error("architectures", f"expected the name of one class, got {len(names)}")
    for architecture in ARCHITECTURES:
        if names[0] in architecture.hf:
            spec = architecture.from_hf(params, checkpoint)
            params.finish(HF_HARMLESS | architecture.harmless)
            return spec
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.hf)
    raise params.unsupported("architectures", f"is not implemented; there are {known}")
