"""Which architectures there are, and the way from a checkpoint to its `DecoderSpec`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastllm.errors import UnsupportedModelError
from fastllm.models import llama, qwen2, qwen3
from fastllm.models.architecture import Architecture
from fastllm.models.common import GGUF_HARMLESS, HF_HARMLESS
from fastllm.models.fields import Fields
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


def _from_gguf(checkpoint: Checkpoint) -> DecoderSpec:
    path = str(checkpoint.path)
    general = Fields(path, checkpoint.config, "general.")
    general.expect("type", "model")
    name = general.string("architecture")
    Fields(path, checkpoint.config, "split.").expect("count", 0, 1)
    for architecture in ARCHITECTURES:
        if name in architecture.gguf:
            fields = Fields(path, checkpoint.config, name + ".")
            spec = architecture.from_gguf(fields, checkpoint)
            fields.finish(GGUF_HARMLESS | architecture.harmless)
            return spec
    raise _unknown(general.key("architecture"), name, path, [n for a in ARCHITECTURES for n in a.gguf])


def _from_hf(checkpoint: Checkpoint) -> DecoderSpec:
    path = str(checkpoint.path / "config.json")
    fields = Fields(path, checkpoint.config)
    names = fields.strings("architectures")
    if len(names) != 1:
        raise fields.bad("architectures", f"expected the name of one class, got {names!r}")
    for architecture in ARCHITECTURES:
        if names[0] in architecture.hf:
            spec = architecture.from_hf(fields, checkpoint)
            fields.finish(HF_HARMLESS | architecture.harmless)
            return spec
    raise _unknown("architectures", names[0], path, [n for a in ARCHITECTURES for n in a.hf])


def _unknown(key: str, name: str, path: str, known: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(f"{path}: {key} = {name!r} is not implemented; there are {', '.join(known)}")
