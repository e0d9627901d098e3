"""Model directories: what the safetensors library writes is what we see; what does not belong is refused."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from fastllm.errors import ModelFileError, RequestError, UnsupportedModelError
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.formats.safetensors import SafetensorsFile

CONFIG = {"model_type": "llama", "hidden_size": 64, "rope_theta": 10000, "rope_scaling": None, "tie": True}


def directory(tmp_path: Path, config: Any = CONFIG) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "f32": torch.randn(5, 3, generator=generator),
        "f16": torch.randn(2, 3, 4, generator=generator).half(),
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "i64": torch.arange(4),
        "u8": torch.arange(3, dtype=torch.uint8),
        "fp8": torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 8),
    }


NAMES = {name: name.upper() for name in ("f32", "f16", "bf16", "i64", "u8")}
NAMES |= {"fp8": "F8_E4M3", "scalar": "F32", "empty": "F32"}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_single_file(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    tensors = some_tensors()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.kind == "hf"
        assert checkpoint.path == folder
        assert checkpoint.config == CONFIG
        assert checkpoint.generation_config.integers("eos_token_id") == [1, 2]
        assert set(checkpoint.tensors) == set(tensors)
        assert len(checkpoint.tensors) == len(tensors)
        assert "f33" not in checkpoint.tensors
        for name, tensor in tensors.items():
            ours = checkpoint.tensors[name]
            assert (ours.name, ours.dtype, ours.shape) == (name, NAMES[name], tuple(tensor.shape))
            assert ours.data.dtype == np.uint8
            assert ours.data.ndim == 1
            assert not ours.data.flags.writeable
            assert ours.data.tobytes() == bytes_of(tensor)
        kept = checkpoint.tensors["f16"].data
        checkpoint.release("f16")
        checkpoint.release("empty")
    checkpoint.close()
    assert kept.tobytes() == bytes_of(tensors["f16"])
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.tensors["f32"]


def test_nothing_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    safetensors.numpy.save_file({"a": np.zeros((1024, 4096), np.float32)}, path)  # 16 MiB
    tracemalloc.start()
    file = SafetensorsFile(path)
    view = file.tensor("a").data
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(view) == 1 << 24
    assert not view.flags.owndata
    assert peak < 1 << 20
    assert file.metadata == {}


def write_shards(folder: Path, weight_map: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    tensors = some_tensors()
    names = list(tensors)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        part = {name: tensors[name] for name in names if where[name] == shard}
        safetensors.torch.save_file(part, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": where if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_shards(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    tensors = write_shards(folder)
    (folder / "consolidated.safetensors").write_bytes(b"not a model, and not listed")
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == list(tensors)
        for name, tensor in tensors.items():
            assert checkpoint.tensors[name].data.tobytes() == bytes_of(tensor)
            checkpoint.release(name)


def test_shards_may_be_links(tmp_path: Path) -> None:
    """As in the cache of huggingface_hub."""
    folder = directory(tmp_path)
    tensors = some_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    assert len(open_checkpoint(folder).tensors) == len(tensors)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "x\0.safetensors",
        "..",
        "",
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors\n",
        5,
        None,
    ],
)
def test_a_shard_is_a_plain_name_in_the_directory(tmp_path: Path, shard: Any) -> None:
    folder = directory(tmp_path)
    safetensors.torch.save_file(some_tensors(), tmp_path / "outside.safetensors")
    write_shards(folder, {"f32": shard})
    with pytest.raises(ModelFileError, match=r"weight_map\.f32: expected") as caught:
        open_checkpoint(folder)
    assert caught.value.file.endswith("index.json")


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"f32": "model-00009-of-00002.safetensors"}, "No such file"),
        ({"ghost": "model-00001-of-00002.safetensors"}, "tensor ghost: not there, though"),
        ({}, "lists no tensor"),
        ([], "weight_map: expected object, got array"),
    ],
)
def test_a_wrong_index(tmp_path: Path, weight_map: Any, reason: str) -> None:
    folder = directory(tmp_path)
    write_shards(folder, weight_map)
    with pytest.raises(ModelFileError, match=reason):
        open_checkpoint(folder)


def test_the_only_file_may_have_any_name_but_not_several(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    with pytest.raises(ModelFileError, match=r"no \*\.safetensors file"):
        open_checkpoint(folder)
    safetensors.torch.save_file(some_tensors(), folder / "a.safetensors")
    assert len(open_checkpoint(folder).tensors) == 8
    safetensors.torch.save_file(some_tensors(), folder / "b.safetensors")
    with pytest.raises(ModelFileError, match=r"several safetensors files.*a\.safetensors, b\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    folder = directory(tmp_path)
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsupportedModelError, match=f"pickled \\({name}\\)"):
        open_checkpoint(folder)


def test_code_of_the_model_is_not_imported(tmp_path: Path) -> None:
    config = CONFIG | {"auto_map": {"AutoModel": "modeling_fastllm_probe.Model"}}
    folder = directory(tmp_path, config)
    (folder / "modeling_fastllm_probe.py").write_text("raise SystemExit('imported')")
    safetensors.torch.save_file(some_tensors(), folder / "model.safetensors")
    assert open_checkpoint(folder).config["auto_map"] == config["auto_map"]
    assert "modeling_fastllm_probe" not in sys.modules


BAD_CONFIGS = {
    "not JSON": ("{", "not JSON"),
    "an array": ("[]", "expected object, got list"),
    "a number": ("1", "expected object, got int"),
    "twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key c is there twice"),
    "deep": ('{"a":' + "[" * 50_000 + "]" * 50_000 + "}", "not usable JSON"),
    "digits": ('{"a": ' + "9" * 5000 + "}", "not usable JSON"),
    "large": (" " * (1 << 21) + "{}", "larger than"),
    "brackets": ('{"a": [' + "[]," * 600_000 + "1]}", "more than .* JSON values"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_bad_configuration(tmp_path: Path, name: str, file: str) -> None:
    folder = directory(tmp_path)
    text, reason = BAD_CONFIGS[name]
    (folder / file).write_text(text)
    safetensors.torch.save_file(some_tensors(), folder / "model.safetensors")
    with pytest.raises(ModelFileError, match=reason) as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / file)


def test_configuration_that_is_no_text_or_no_file(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ModelFileError, match="offset 7: not UTF-8"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(RequestError, match=r"directory with config\.json"):
        open_checkpoint(folder)
    os.mkfifo(folder / "config.json")
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_checkpoint(folder)


def test_getters_on_json(tmp_path: Path) -> None:
    config = CONFIG | {
        "scaling": {"factor": "8", "list": [1, "x"], "words": ["a", 2]},
        "vast": 10**400,
        "inf": 1e999,
    }
    folder = directory(tmp_path, config)
    safetensors.torch.save_file(some_tensors(), folder / "model.safetensors")
    fields = open_checkpoint(folder).config
    assert fields.number("rope_theta") == 10000.0
    assert fields.string("rope_scaling", "none") == "none"  # null is as good as absent
    scaling = fields.section("scaling")
    for call, reason in (
        (lambda: fields.number("tie"), "tie: expected number, got boolean"),
        (lambda: fields.integer("tie"), "tie: expected integer, got boolean"),
        (lambda: fields.number("model_type"), r"config\.json: model_type: expected number, got string"),
        (lambda: fields.number("vast"), "vast: expected finite number"),
        (lambda: fields.number("inf"), "inf: expected finite number, got inf"),
        (lambda: scaling.number("factor"), r"scaling\.factor: expected number, got string"),
        (lambda: scaling.integers("list"), r"scaling\.list\[1\]: expected integer, got string"),
        (lambda: scaling.strings("words"), r"scaling\.words\[1\]: expected string, got integer"),
        (lambda: scaling.integers("factor"), r"scaling\.factor: expected array, got string"),
        (lambda: fields.section("tie"), "tie: expected object, got boolean"),
    ):
        with pytest.raises(ModelFileError, match=reason):
            call()
