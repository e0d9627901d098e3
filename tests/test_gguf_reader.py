"""The GGUF reader on good files: what the `gguf` package writes, and what it reads back, is what we see."""

from __future__ import annotations

import gc
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_blocks import QUANTIZED

from fastllm.errors import ModelFileError, RequestError, UnsupportedModelError
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.formats.gguf import BLOCK_SIZES, GGMLType, GGUFCheckpoint, GGUFFile, StringArray

SCALARS = {
    "uint8": 200,
    "int8": -100,
    "uint16": 60_000,
    "int16": -30_000,
    "uint32": 4_000_000_000,
    "int32": -2_000_000_000,
    "float32": 0.5,
    "uint64": 2**63 + 5,
    "int64": -(2**62),
    "float64": 0.1,
    "bool": True,
    "string": "naïve ▁ 🙂",
}


def write_rich_file(path: Path, alignment: int | None = None) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """A file with every scalar type, every array type and every tensor type that fastllm runs."""
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, value in SCALARS.items():
        writer.add_key_value(f"one.{name}", value, gguf.GGUFValueType[name.upper()])
        writer.add_key_value(
            f"many.{name}", [value] * 3, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[name.upper()]
        )
    written = {}
    for name in QUANTIZED:
        block, size = BLOCK_SIZES[GGMLType[name]]
        rows, columns = 3, 2 * block
        data = random.integers(0, 256, (rows, columns // block * size), np.uint8)
        writer.add_tensor(name.lower(), data, raw_dtype=gguf.GGMLQuantizationType[name])
        written[name.lower()] = (name, data)
    floats = random.standard_normal((2, 3, 5), np.float32)
    writer.add_tensor("f32", floats)
    writer.add_tensor("f16", floats.astype(np.float16))
    bf16 = (floats.view(np.uint32) >> 16).astype(np.uint16)
    writer.add_tensor("bf16", bf16.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    written |= {"f32": ("F32", floats), "f16": ("F16", floats.astype(np.float16)), "bf16": ("BF16", bf16)}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def string(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def write_strings(path: Path, key: bytes, items: list[bytes], tail: bytes = b"") -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(key) + struct.pack("<IIQ", 9, 8, len(items))
    path.write_bytes(head + b"".join(map(string, items)) + tail)


def test_types_and_block_sizes_are_those_of_the_format() -> None:
    assert {kind.name: kind.value for kind in gguf.GGMLQuantizationType}.items() <= {
        kind.name: kind.value for kind in GGMLType
    }.items()
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name == "Q8_1":  # never on disk; the package still has its size from before two fp16 took the
            size = 36  # place of two fp32
        assert BLOCK_SIZES[GGMLType(kind.value)] == (block, size)
    assert set(BLOCK_SIZES) == set(GGMLType)


@pytest.mark.parametrize("alignment", [None, 8, 4096])
def test_everything_that_the_gguf_package_writes(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "rich.gguf"
    written = write_rich_file(path, alignment)
    peer = gguf.GGUFReader(path)
    with open_checkpoint(path) as checkpoint:
        assert isinstance(checkpoint, GGUFCheckpoint)
        assert checkpoint.kind == "gguf"
        assert checkpoint.generation_config == {}
        assert checkpoint.file.alignment == (alignment or 32)
        assert checkpoint.config["general.architecture"] == "llama"
        for name, value in SCALARS.items():
            one, many = checkpoint.config[f"one.{name}"], checkpoint.config[f"many.{name}"]
            assert (one, type(one)) == (value, type(value))
            assert checkpoint.config.type_name(f"one.{name}") == name
            assert checkpoint.config.type_name(f"many.{name}") == f"array[{name}]"
            assert list(many) == [value] * 3
            if name != "string":
                assert many.dtype == np.dtype(name)
                assert not many.flags.writeable
        assert list(checkpoint.tensors) == [tensor.name for tensor in peer.tensors]
        for theirs in peer.tensors:
            ours = checkpoint.tensors[theirs.name]
            dtype, data = written[theirs.name]
            assert ours.dtype == dtype == theirs.tensor_type.name
            assert ours.shape == tuple(int(n) for n in reversed(theirs.shape))
            assert ours.data.dtype == np.uint8
            assert ours.data.shape == (theirs.n_bytes,)
            assert ours.data.flags.c_contiguous
            assert not ours.data.flags.writeable
            assert ours.data.tobytes() == data.tobytes() == theirs.data.tobytes()
            assert checkpoint.file.infos[theirs.name].offset == theirs.data_offset
    del peer


def test_version_2_reads_as_version_3(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_rich_file(path)
    raw = bytearray(path.read_bytes())
    third = GGUFFile(path)
    raw[4:8] = struct.pack("<I", 2)
    (tmp_path / "two.gguf").write_bytes(raw)
    second = GGUFFile(tmp_path / "two.gguf")
    assert (second.version, third.version) == (2, 3)
    assert second.infos == third.infos
    assert list(second.metadata) == list(third.metadata)
    assert second.data("q4_1").tobytes() == third.data("q4_1").tobytes()


@given(items=st.lists(st.one_of(st.binary(max_size=12), st.binary(min_size=250, max_size=600)), max_size=40))
def test_strings_survive_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, items: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("strings") / "s.gguf"
    write_strings(path, b"tokenizer.ggml.tokens", items)
    strings = GGUFFile(path).metadata["tokenizer.ggml.tokens"]
    assert isinstance(strings, StringArray)
    assert len(strings) == len(items)
    assert [text.encode("utf-8", "surrogateescape") for text in strings] == items
    assert [strings.raw(i) for i in range(len(items))] == items
    assert [strings[i] for i in range(len(items))] == list(strings)
    assert strings == list(strings) == strings.tolist()
    assert strings[1::2] == list(strings)[1::2]
    if items:
        assert strings.raw(-1) == items[-1]
    with pytest.raises(IndexError):
        strings[len(items)]


def test_iteration_crosses_chunks_and_scalars_keep_bytes(tmp_path: Path) -> None:
    items = [str(i).encode() for i in range(3 * StringArray._CHUNK + 5)]
    write_strings(tmp_path / "a.gguf", b"k", items)
    strings = GGUFFile(tmp_path / "a.gguf").metadata["k"]
    assert [text.encode() for text in strings] == items
    assert strings != [*strings[:-1], "x"]
    raw = b"\xff\xfe\x00ok"
    (tmp_path / "b.gguf").write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(b"k") + struct.pack("<I", 8) + string(raw)
    )
    assert GGUFFile(tmp_path / "b.gguf").metadata.string("k").encode("utf-8", "surrogateescape") == raw


def test_nested_arrays(tmp_path: Path) -> None:
    numbers = struct.pack("<IQ", 4, 2) + struct.pack("<II", 7, 8)
    words = struct.pack("<IQ", 8, 1) + string(b"x")
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(b"k") + struct.pack("<IIQ", 9, 9, 2)
    (tmp_path / "n.gguf").write_bytes(head + numbers + words)
    first, second = GGUFFile(tmp_path / "n.gguf").metadata["k"]
    assert first.tolist() == [7, 8]
    assert list(second) == ["x"]


def test_a_large_vocabulary_opens_fast(tmp_path: Path) -> None:
    tokens = [b"token%d" % i for i in range(262_144)]
    merges = [b"ab%d cd%d" % (i, i) for i in range(515_000)]
    path = tmp_path / "large.gguf"
    write_strings(path, b"tokens", tokens + merges)
    start = time.process_time()
    strings = GGUFFile(path).metadata["tokens"]
    opened = time.process_time() - start
    decoded = list(strings)
    total = time.process_time() - start
    assert decoded[-1].encode() == merges[-1]
    assert opened < 1.0  # measured: 0.09 s
    assert total < 2.0  # measured: 0.25 s


def test_views_outlive_close(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    written = write_rich_file(path)
    checkpoint = open_checkpoint(path)
    data, words = checkpoint.tensors["f32"].data, checkpoint.config["many.string"]
    checkpoint.release("f32")
    checkpoint.close()
    checkpoint.close()
    checkpoint.release("f32")
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.tensors["f32"]
    del checkpoint
    gc.collect()
    assert data.tobytes() == written["f32"][1].tobytes()
    assert list(words) == [SCALARS["string"]] * 3


def resident_file_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1])
    return 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_release_and_close_give_pages_back(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("a", "b"):
        writer.add_tensor(name, np.ones((4096, 1024), np.float32))  # 16 MiB
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(path)
    views = {name: checkpoint.tensors[name].data for name in ("a", "b")}
    before = resident_file_kib()
    sums = {name: int(view.sum(dtype=np.int64)) for name, view in views.items()}
    held = resident_file_kib()
    assert held - before > 30_000
    checkpoint.release("a")
    assert held - resident_file_kib() > 15_000
    checkpoint.close()
    assert held - resident_file_kib() > 30_000
    assert {name: int(view.sum(dtype=np.int64)) for name, view in views.items()} == sums


def test_getters_name_file_key_and_types(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("llama.rope.freq_base", "10000")
    writer.add_uint32("llama.block_count", 30)
    writer.add_float32("nan", float("nan"))
    writer.add_float32("eps", 1e-5)
    writer.add_bool("flag", True)
    writer.add_array("ids", [1, 2, 3])
    writer.add_array("words", ["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = open_checkpoint(path).config

    def refused(reason: str) -> Any:
        return pytest.raises(ModelFileError, match=reason)

    with refused(r"model\.gguf: llama\.rope\.freq_base: expected float32, got string$") as caught:
        config.number("llama.rope.freq_base")
    assert caught.value.key == "llama.rope.freq_base"
    assert caught.value.file == str(path)
    assert config.integer("llama.block_count", minimum=1, maximum=512) == 30
    with refused(r"llama\.block_count: expected uint32 of at most 8, got 30$"):
        config.integer("llama.block_count", maximum=8)
    with refused(r"expected uint32 of at least 31 and at most 40, got 30$"):
        config.integer("llama.block_count", minimum=31, maximum=40)
    with refused("expected finite float32, got nan"):
        config.number("nan")
    with refused("eps: expected uint32, got float32"):
        config.integer("eps")
    with refused("llama.block_count: expected float32, got uint32"):
        config.number("llama.block_count")
    with refused("flag: expected uint32, got bool"):
        config.integer("flag")
    with refused("llama.block_count: expected bool, got uint32"):
        config.boolean("llama.block_count")
    with refused("gone: expected string, got nothing"):
        config.string("gone")
    with refused(r"ids: expected array of string, got array\[int32\]"):
        config.strings("ids")
    with refused(r"words\[0\]: expected uint32, got string"):
        config.integers("words")
    with refused("eps: expected array, got float32"):
        config.integers("eps")
    assert config.number("eps") == np.float32(1e-5)
    assert config.boolean("flag") is True
    assert config.integers("ids") == [1, 2, 3]
    assert list(config.strings("words")) == ["a", "b"]
    assert config.string("gone", "there") == "there"
    assert config.integer("gone", 5) == 5
    assert config.integers("gone", []) == []


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="one of 3 parts of a split"):
        open_checkpoint(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"a \.gguf file or a directory"):
        open_checkpoint(tmp_path / "none.gguf")


@pytest.mark.model
def test_default_model_agrees_with_the_gguf_package(default_model_path: Path) -> None:
    peer = gguf.GGUFReader(default_model_path)
    with open_checkpoint(default_model_path) as checkpoint:
        config = checkpoint.config
        assert config.string("general.architecture") == "llama"
        assert config.integer("llama.block_count") == 30
        assert config.number("llama.rope.freq_base") == 100_000.0
        for key, field in peer.fields.items():
            if not key.startswith("GGUF."):
                theirs = field.contents()
                ours = config[key]
                assert list(ours) == theirs if isinstance(theirs, list) else ours == theirs
        assert len(checkpoint.tensors) == len(peer.tensors) == 272
        for tensor in peer.tensors:
            ours = checkpoint.tensors[tensor.name]
            assert (ours.dtype, ours.shape) == (
                tensor.tensor_type.name,
                tuple(map(int, reversed(tensor.shape))),
            )
            assert np.array_equal(ours.data, tensor.data.reshape(-1).view(np.uint8))
