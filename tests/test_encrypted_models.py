"""Encrypted and verified models through the API: the same bits as the plain ones, in every way of loading."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from lora_files import save_adapter
from test_one_answer import fingerprint
from test_other_architectures import gemma2, gpt2, make, phi3

from fastllm import LLM, AsyncLLM, LoRARequest, ModelFileError, RequestError, SamplingParams
from fastllm.cli import run
from fastllm.engine.block_seal import ChecksumSeal, EncryptingSeal
from fastllm.executor.cpu import CpuExecutor
from fastllm.executor.packing import pack_matrix, packed_slots
from fastllm.formats import gguf, safetensors
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.formats.digest import model_sha256
from fastllm.formats.encryption import is_encrypted
from fastllm.formats.keys import KEY_ENV, KEY_FILE_ENV, KeySource, write_key_file
from fastllm.formats.model_encryption import encrypt_model
from fastllm.loading import ModelOptions
from fastllm.models.hyperparameters import HyperParameters

KEY = bytes(range(32))
SMALL: dict[str, Any] = {"kv_cache_tokens": 1024, "max_num_seqs": 8, "threads": 2}
LONG = SamplingParams(temperature=0.8, seed=3, max_tokens=16, ignore_eos=True, logprobs=2)
CHUNK = 4096  # so that a tiny model has many


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)
    monkeypatch.delenv(KEY_FILE_ENV, raising=False)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.key"
    write_key_file(path, KEY.hex())
    return path


def answers(llm: LLM, lora: LoRARequest | None = None) -> list[Any]:
    prompts: Any = [{"prompt_token_ids": tiny.tokens(1 + 17 * i, seed=i)} for i in range(3)]
    return [fingerprint(item) for item in llm.generate([*prompts, "the text"], LONG, lora_request=lora)]


def write(kind: str, path: Path, variant: str = "llama", **metadata: Any) -> Path:
    path.mkdir()
    return tiny.write(kind, path, variant, **metadata)


def seal(path: Path, out: Path) -> Path:
    encrypt_model(path, out, KEY, chunk_bytes=CHUNK)
    return out


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["hf", "gguf"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_same_bits_as_the_plain_model(
    kind: str, quantization: str | None, tmp_path: Path, key_file: Path
) -> None:
    plain = write(kind, tmp_path / "plain")
    sealed = seal(plain, tmp_path / "sealed")
    with LLM(plain, quantization=quantization, **SMALL) as llm:
        expected = answers(llm)
    for path in [plain] if plain.is_file() else plain.rglob("*"):
        path.unlink()
    with LLM(sealed, key_file=key_file, quantization=quantization, **SMALL) as llm:
        assert answers(llm) == expected
        key_file.unlink()  # the key is kept for waking
        llm.sleep(2)
        llm.wake_up()
        assert answers(llm) == expected


@pytest.mark.parametrize("build", [phi3, gpt2, gemma2], ids=lambda build: build.__name__)
def test_fused_and_transposed_tensors_are_packed_the_same(build: Any, tmp_path: Path) -> None:
    """Parts of one tensor are packed at the same time; none may be given back under another's hands."""
    plain = tiny.save_hf(make(build.__name__), tmp_path / "plain")
    sealed = seal(plain, tmp_path / "sealed")

    pack = partial(pack_matrix, quantization=None)

    def packed(path: Path) -> list[Any]:
        with open_checkpoint(path, KeySource.of(KEY)) as checkpoint:
            spec = build(HyperParameters(checkpoint.config), checkpoint)
            return [
                (slot, layer, (item if isinstance(item, np.ndarray) else item.unpack()).tobytes())
                for slot, layer, item in packed_slots(checkpoint, spec, pack, 2)
            ]

    expected = packed(plain)
    for _ in range(5):
        assert packed(sealed) == expected


@pytest.mark.parametrize("variant", ["llama-biased", "qwen3-tied", "mistral"])
def test_other_architectures(variant: str, tmp_path: Path, key_file: Path) -> None:
    plain = write("gguf", tmp_path / "plain", variant)
    with LLM(plain, **SMALL) as llm:
        expected = answers(llm)
    with LLM(seal(plain, tmp_path / "sealed"), key_file=key_file, **SMALL) as llm:
        assert answers(llm) == expected


def test_a_checkpoint_reads_the_same(tmp_path: Path) -> None:
    for kind in ("hf", "gguf"):
        plain = write(kind, tmp_path / kind)
        sealed = seal(plain, tmp_path / f"{kind}.sealed")
        with open_checkpoint(plain) as one, open_checkpoint(sealed, KeySource.of(KEY)) as two:
            assert (one.encrypted, two.encrypted) == (False, True)
            assert list(one.tensors) == list(two.tensors)
            for key in one.config:
                assert np.array_equal(one.config[key], two.config[key]), key
            for name, tensor in one.tensors.items():
                other = two.tensors[name]
                assert (tensor.shape, tensor.dtype, tensor.nbytes) == (other.shape, other.dtype, other.nbytes)
                assert tensor.data.tobytes() == other.data.tobytes()
                two.release(name)
                assert tensor.data.tobytes() == other.data.tobytes()
            held = {name: two.tensors[name] for name in two.tensors}
            expected = {name: tensor.data.tobytes() for name, tensor in one.tensors.items()}
        for name, tensor in held.items():  # tensors outlive their checkpoint
            assert tensor.data.tobytes() == expected[name]


def test_strings_longer_than_what_was_decrypted_first(tmp_path: Path) -> None:
    """A vocabulary over many chunks: the reader asks for more as it goes along."""
    plain = write("gguf", tmp_path / "plain", description="x" * 50_000)
    sealed = seal(plain, tmp_path / "sealed")
    with open_checkpoint(plain) as one, open_checkpoint(sealed, KeySource.of(KEY)) as two:
        assert two.config["llama.description"] == "x" * 50_000
        tokens = two.config["tokenizer.ggml.tokens"]
        assert list(tokens) == list(one.config["tokenizer.ggml.tokens"])
        assert tokens.raw(5) == one.config["tokenizer.ggml.tokens"].raw(5)
    assert len(list(tokens)) == tiny.VOCAB_SIZE


def test_the_key_from_the_environment(
    tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sealed = seal(write("hf", tmp_path / "plain"), tmp_path / "sealed")
    with pytest.raises(RequestError, match=rf"{KEY_ENV} or {KEY_FILE_ENV} in the environment"):
        LLM(sealed, **SMALL)
    monkeypatch.setenv(KEY_FILE_ENV, str(key_file))
    LLM(sealed, **SMALL).close()
    monkeypatch.setenv(KEY_ENV, KEY.hex())
    LLM(sealed, **SMALL).close()
    assert run(["info", str(sealed)]) == 0
    assert "safetensors, encrypted" in capsys.readouterr().out
    monkeypatch.delenv(KEY_ENV)
    monkeypatch.delenv(KEY_FILE_ENV)
    assert (
        run(["generate", "a", "--model", str(sealed), "--key-file", str(key_file), "--max-tokens", "2"]) == 0
    )
    assert run(["info", str(sealed)]) == 2


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, key_file: Path) -> None:
    plain = write("gguf", tmp_path / "plain")
    sealed = seal(plain, tmp_path / "sealed")
    key_file.chmod(0o644)
    with pytest.raises(RequestError, match="no other user can open"):
        LLM(sealed, key_file=key_file, **SMALL)
    key_file.chmod(0o600)
    flip(sealed, sealed.stat().st_size - 10)
    with pytest.raises(ModelFileError, match="damaged: chunk") as caught:
        LLM(sealed, key_file=key_file, **SMALL)
    assert caught.value.file == str(sealed)
    flip(sealed, sealed.stat().st_size - 10)
    other = tmp_path / "other.key"
    write_key_file(other, bytes(range(1, 33)).hex())
    with pytest.raises(ModelFileError, match="wrong key"):
        LLM(sealed, key_file=other, **SMALL)
    os.truncate(sealed, sealed.stat().st_size - 1)
    with pytest.raises(ModelFileError, match="truncated"):
        LLM(sealed, key_file=key_file, **SMALL)


def test_damage_that_comes_before_waking(tmp_path: Path, key_file: Path) -> None:
    sealed = seal(write("gguf", tmp_path / "plain"), tmp_path / "sealed")
    with LLM(sealed, key_file=key_file, **SMALL) as llm:
        expected = answers(llm)
        llm.sleep(2)
        flip(sealed, sealed.stat().st_size - 10)
        with pytest.raises(ModelFileError, match="damaged"):
            llm.wake_up()
        flip(sealed, sealed.stat().st_size - 10)
        llm.wake_up()
        assert answers(llm) == expected


def test_adapters_and_tokenizers_may_be_encrypted(tmp_path: Path, key_file: Path) -> None:
    model = tiny.make_model("llama")
    path = tiny.save_hf(model, tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", model, seed=1).path
    sealed = seal(adapter, tmp_path / "sealed")
    assert all(is_encrypted(file) for file in sealed.iterdir())
    with LLM(path, **SMALL) as llm:
        expected = answers(llm, LoRARequest("a", adapter))
        with pytest.raises(RequestError, match=KEY_ENV):
            llm.add_lora(LoRARequest("b", sealed))
    with LLM(path, key_file=key_file, tokenizer=seal(path, tmp_path / "all"), **SMALL) as llm:
        assert answers(llm, LoRARequest("a", sealed)) == expected
        # Known by what it says, not by how it is kept.
        llm.add_lora(LoRARequest("b", adapter))
        read = llm._thread.adapters.read
        assert read(sealed).digest == read(adapter).digest


def test_a_draft_model_may_be_encrypted(tmp_path: Path, key_file: Path) -> None:
    plain = write("gguf", tmp_path / "plain")
    draft = seal(write("gguf", tmp_path / "draft"), tmp_path / "draft.sealed")
    with LLM(plain, **SMALL) as llm:
        expected = answers(llm)
    config = {"method": "draft_model", "model": draft}
    options = {**SMALL, "kv_offload_bytes": 1 << 20, "kv_offload_dir": tmp_path}
    with LLM(plain, key_file=key_file, speculative_config=config, **options) as llm:
        assert answers(llm) == expected
        assert seal_of(llm) is EncryptingSeal
        llm.sleep(2)
        llm.wake_up()
        assert answers(llm) == expected


def seal_of(llm: LLM) -> type:
    offload = llm._thread._engine._offload
    assert offload is not None
    return type(offload.file._seal)


@pytest.mark.parametrize(
    ("encrypted", "asked", "expected"),
    [
        (True, None, EncryptingSeal),
        (False, None, ChecksumSeal),
        (True, False, ChecksumSeal),
        (False, True, EncryptingSeal),
    ],
)
def test_the_kv_caches_file_is_encrypted_as_the_model_is(
    encrypted: bool, asked: bool | None, expected: type, tmp_path: Path, key_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = write("gguf", tmp_path / "plain")
    if encrypted:
        path = seal(path, tmp_path / "sealed")
    options = {
        **SMALL,
        "kv_offload_bytes": 1 << 20,
        "kv_offload_dir": tmp_path,
        "kv_offload_encrypted": asked,
    }
    with caplog.at_level(logging.WARNING), LLM(path, key_file=key_file, **options) as llm:
        assert seal_of(llm) is expected
    assert ("kv_offload_encrypted=False" in caplog.text) == (encrypted and asked is False)


def test_without_a_file_nothing_is_asked_of_it(tmp_path: Path, key_file: Path) -> None:
    sealed = seal(write("gguf", tmp_path / "plain"), tmp_path / "sealed")
    LLM(sealed, key_file=key_file, **SMALL).close()
    with pytest.raises(RequestError, match="kv_offload_encrypted"):
        ModelOptions(kv_offload_encrypted=True)


async def test_async_llm(tmp_path: Path, key_file: Path) -> None:
    plain = write("gguf", tmp_path / "plain")
    sealed = seal(plain, tmp_path / "sealed")
    with LLM(plain, **SMALL) as llm:
        expected = llm.generate("the text", LONG)[0].outputs[0].token_ids
    llm = AsyncLLM(sealed, key_file=key_file, sha256=model_sha256(sealed), **SMALL)
    try:
        async for output in llm.generate("the text", LONG):
            last = output
        assert list(last.outputs[0].token_ids) == list(expected)
    finally:
        llm.shutdown()


# ---- verified ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_model_with_another_digest_is_not_parsed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(kind, tmp_path / "model")
    digest = model_sha256(path)
    with LLM(path, sha256=digest.upper(), **SMALL) as llm:
        expected = answers(llm)
        llm.sleep(2)
        file = path if path.is_file() else path / "generation_config.json"
        content = file.read_bytes() if file.exists() else b"{}"
        file.write_bytes(content + b" ")
        with pytest.raises(ModelFileError, match="expected sha256"):
            llm.wake_up()
        if path.is_file() or content != b"{}":
            file.write_bytes(content)
        else:
            file.unlink()
        llm.wake_up()
        assert answers(llm) == expected

    def opened(*_: Any) -> None:
        raise AssertionError("something was opened")

    for module, name in ((gguf, "open_mapped"), (safetensors, "open_mapped"), (safetensors, "read_small")):
        monkeypatch.setattr(module, name, opened)
    with pytest.raises(ModelFileError, match=f"expected sha256 {'0' * 64}, found {digest}"):
        LLM(path, sha256="0" * 64, **SMALL)


@pytest.mark.parametrize("value", ["", "0" * 63, "g" * 64, b"0" * 64, 5])
def test_what_is_no_digest(value: Any) -> None:
    with pytest.raises(RequestError, match="sha256"):
        ModelOptions(sha256=value)


def test_a_model_that_changes_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("gguf", tmp_path / "model")
    load = CpuExecutor._load

    def changing(self: CpuExecutor, checkpoint: Any) -> None:
        load(self, checkpoint)
        os.utime(path)

    monkeypatch.setattr(CpuExecutor, "_load", changing)
    LLM(path, **SMALL).close()
    with pytest.raises(ModelFileError, match="changed on disk while it was loaded"):
        LLM(path, sha256=model_sha256(path), **SMALL)
