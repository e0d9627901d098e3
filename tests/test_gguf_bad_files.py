"""Damaged and hostile GGUF files: each ends in a typed error, in bounded time and memory."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.errors import FastLLMError, ModelFileError, UnsupportedModelError
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.formats.gguf import BLOCK_SIZES, GGMLType, GGUFCheckpoint, StringArray

MAX_U64 = 2**64 - 1
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def info(
    name: str | bytes, ne: tuple[int, ...], kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    dims = len(ne) if n_dims is None else n_dims
    return (
        string(name)
        + struct.pack("<I", dims)
        + struct.pack(f"<{len(ne)}Q", *ne)
        + struct.pack("<IQ", kind, offset)
    )


def build(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (),
    data: bytes = b"",
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(infos) if n_tensors is None else n_tensors,
        len(keys) if n_keys is None else n_keys,
    )
    head += b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


GOOD_KEYS = (
    key("general.architecture", STRING, string("llama")),
    key("llama.block_count", U32, struct.pack("<I", 2)),
    key("llama.rope.freq_base", F32, struct.pack("<f", 1e4)),
    key("flag", BOOL, b"\1"),
    key("tokens", ARRAY, array(STRING, 3, string("a") + string(b"\xff") + string("ccc"))),
    key("types", ARRAY, array(I32, 3, struct.pack("<3i", 1, 2, 3))),
    key("nested", ARRAY, array(ARRAY, 1, array(BOOL, 2, b"\0\1"))),
)
GOOD_INFOS = (info("a", (32, 2), 2, 0), info("b", (4,), 0, 64))
GOOD = build(keys=GOOD_KEYS, infos=GOOD_INFOS, data=bytes(range(80)))


def read_everything(path: Path) -> GGUFCheckpoint:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GGUFCheckpoint)
    for value in checkpoint.config.values():
        if isinstance(value, StringArray):
            assert len(list(value)) == len(value)
    for name, tensor in checkpoint.tensors.items():
        block, size = BLOCK_SIZES[GGMLType[tensor.dtype]]
        assert len(tensor.data) == int(np.prod(tensor.shape, dtype=object)) // block * size
        assert tensor.name == name
        int(tensor.data.sum(dtype=np.int64))
    return checkpoint


def bounded(
    path: Path, action: Callable[[Path], Any], *, allowance: int = 2 << 20, seconds: float = 2.0
) -> Any:
    """Run `action(path)` and hold it to 16 times the file plus an allowance (64 MB is the promise)."""
    assert allowance <= 64_000_000
    size = path.stat().st_size
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.process_time()
    try:
        return action(path)
    finally:
        spent = time.process_time() - start
        peak = tracemalloc.get_traced_memory()[1] - before
        if not tracing:
            tracemalloc.stop()
        assert peak <= 16 * size + allowance
        assert spent < seconds


def refused(
    tmp_path: Path, raw: bytes, reason: str, kind: type[FastLLMError] = ModelFileError, **limits: Any
) -> Any:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)

    def action(path: Path) -> Any:
        with pytest.raises(kind, match=reason) as caught:
            read_everything(path)
        return caught.value

    error = bounded(path, action, **limits)
    assert str(path) in str(error)
    return error


def test_the_good_file_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD)
    checkpoint = bounded(path, read_everything)
    assert checkpoint.tensors["b"].data.tolist() == list(range(64, 80))
    assert checkpoint.config["nested"][0].tolist() == [False, True]


HEADS = {
    "empty": (b"", "the file is empty", 0),
    "magic": (build(magic=b"GGML"), "not a GGUF file", 0),
    "magic cut": (b"GG", "truncated", 0),
    "version 0": (build(version=0), "GGUF version 0", 4),
    "version 1": (build(version=1), "GGUF version 1", 4),
    "version of the future": (build(version=4), "GGUF version 4", 4),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(64), "big-endian", 4),
    "big-endian version 2": (b"GGUF" + struct.pack(">IQQ", 2, 0, 0), "big-endian", 4),
    "n_tensors": (build(n_tensors=MAX_U64), "tensors are more than", 8),
    "n_keys": (build(n_keys=MAX_U64), "metadata keys are more than", 16),
    "n_tensors beyond the file": (build(n_tensors=60_000), "truncated: 60000 tensors", 8),
    "n_keys beyond the file": (build(n_keys=60_000), "truncated: 60000 metadata keys", 16),
}


@pytest.mark.parametrize("name", HEADS)
def test_bad_head(tmp_path: Path, name: str) -> None:
    raw, reason, offset = HEADS[name]
    assert refused(tmp_path, raw, reason).offset == offset


LONG_NAME = "n" * 65
KEYS: dict[str, tuple[tuple[bytes, ...], str, str | None]] = {
    "key of length -1": ((string("k", MAX_U64) + bytes(40),), "longer than 65535", "metadata key 0"),
    "key longer than the file": ((string("k", 60_000) + bytes(40),), "truncated: the key", "metadata key 0"),
    "key too long": ((key("k" * 65_536, U8, b"\0"),), "longer than 65535", "metadata key 0"),
    "empty key": ((GOOD_KEYS[0], key("", U8, b"\0")), "the key is empty", "metadata key 1"),
    "key is not UTF-8": ((key(b"\xff\xfe", U8, b"\0"),), "not UTF-8", "metadata key 0"),
    "duplicate key": ((GOOD_KEYS[1], GOOD_KEYS[1]), "there twice", "llama.block_count"),
    "value type": ((key("k", 13, b"\0" * 8),), "unknown value type 13", "k"),
    "value type -1": ((key("k", 2**32 - 1, b"\0" * 8),), "unknown value type", "k"),
    "bool of 2": ((key("k", BOOL, b"\2"),), "expected bool 0 or 1, got 2", "k"),
    "bool of 2 in an array": ((key("k", ARRAY, array(BOOL, 3, b"\0\1\2")),), "got 2 as element 2", "k"),
    "string of length -1": ((key("k", STRING, string("x", MAX_U64)),), "longer than", "k"),
    "string beyond the file": ((key("k", STRING, string("x", 1 << 27)),), "truncated", "k"),
    "array element type": ((key("k", ARRAY, array(99, 1, b"\0" * 8)),), "unknown array element type 99", "k"),
    "array of 2^64-1": ((key("k", ARRAY, array(U8, MAX_U64, b"\0" * 8)),), "longer than", "k"),
    "array whose bytes wrap": ((key("k", ARRAY, array(U64, 2**61 + 1, b"\0" * 8)),), "longer than", "k"),
    "array beyond the file": ((key("k", ARRAY, array(F64, 1 << 20, b"\0" * 8)),), "truncated: an array", "k"),
    "strings beyond the file": ((key("k", ARRAY, array(STRING, 1 << 20, b"\0" * 8)),), "truncated", "k"),
    "strings of 2^64-1": ((key("k", ARRAY, array(STRING, MAX_U64, b"\0" * 8)),), "longer than", "k"),
    "array cut in its head": ((key("k", ARRAY, b"\0" * 9),), "truncated", "k"),
    "arrays nested too deep": (
        (key("k", ARRAY, array(ARRAY, 1, b"") * 50 + array(U8, 1, b"\0")),),
        "nested more than 4 deep",
        "k",
    ),
    "alignment 13": ((key("general.alignment", U32, struct.pack("<I", 13)),), "power of two, got", None),
    "alignment 0": ((key("general.alignment", U32, bytes(4)),), "power of two, got", None),
    "alignment uint64": ((key("general.alignment", U64, struct.pack("<Q", 32)),), "got uint64", None),
    "alignment string": ((key("general.alignment", STRING, string("32")),), "got string", None),
    "alignment array": (
        (key("general.alignment", ARRAY, array(U32, 1, struct.pack("<I", 32))),),
        r"got array\[uint32\]",
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_bad_metadata(tmp_path: Path, name: str) -> None:
    keys, reason, at = KEYS[name]
    raw = build(keys=keys, alignment=1 if "cut" in name else 32)
    error = refused(tmp_path, raw, reason)
    assert error.key == (at or "general.alignment")
    assert 24 <= error.offset <= len(raw)


@pytest.mark.parametrize(
    ("items", "bad", "reason"),
    [
        ([string("a"), string("b", MAX_U64), bytes(64)], 1, "longer than"),
        ([string("a"), string("b", 2**63 - 20), bytes(64)], 1, "longer than"),
        ([string("a"), string("b", 200), bytes(32)], 1, "truncated"),
        ([string("a"), string("b"), string("c", 200)], 2, "truncated"),
        ([string("a"), string("b"), b"\0" * 7], 2, "truncated"),
        ([string("a", MAX_U64), string("b"), bytes(64)], 0, "longer than"),
        ([string("a"), string("b" * 40), b""], 2, "truncated"),
    ],
)
def test_the_string_at_fault_is_named(tmp_path: Path, items: list[bytes], bad: int, reason: str) -> None:
    head = build(n_keys=1)[:24] + string("k") + struct.pack("<I", ARRAY) + array(STRING, 3, b"")
    error = refused(tmp_path, head + b"".join(items), f"element {bad} of an array of strings")
    assert reason in error.reason
    assert error.key == "k"
    assert error.offset == len(head) + sum(map(len, items[:bad]))


HUGE = 0x7FFFFFFFFFFFFFC0
INFOS: dict[str, tuple[tuple[bytes, ...], str, str]] = {
    "name too long": ((info(LONG_NAME, (4,)),), "longer than 64", "0"),
    "name of length -1": ((string("n", MAX_U64) + bytes(64),), "longer than 64", "0"),
    "empty name": ((info("", (4,)),), "name is empty", "0"),
    "name is not UTF-8": ((info(b"\xc3\x28", (4,)),), "not UTF-8", "0"),
    "duplicate name": ((info("a", (4,)), info("a", (4,), 0, 32)), "there twice", "a"),
    "n_dims 0": ((info("a", ()),), "0 dimensions", "a"),
    "n_dims 5": ((info("a", (1,) * 5),), "5 dimensions", "a"),
    "n_dims -1": ((info("a", (4,), n_dims=2**32 - 1),), "4294967295 dimensions", "a"),
    "zero dimension": ((info("a", (4, 0, 2)),), "a dimension is zero", "a"),
    "all zero": ((info("a", (0, 0, 0, 0)),), "a dimension is zero", "a"),
    "negative dimension": ((info("a", (MAX_U64,)),), "takes .* bytes, the file has", "a"),
    "product wraps to 0": ((info("a", (2**32, 2**32)),), "takes .* bytes, the file has", "a"),
    "product wraps to 4": ((info("a", (2**62 + 1, 4)),), "takes .* bytes, the file has", "a"),
    "every dimension 2^64-1": ((info("a", (MAX_U64 - 255,) * 4, 12),), "takes .* bytes, the file has", "a"),
    "bytes wrap": ((info("a", (2**62,)),), "takes .* bytes, the file has", "a"),
    "sum of sizes wraps": ((info("a", (HUGE,), 24), info("b", (HUGE,), 24, HUGE)), "the file has", "a"),
    "row of half a block": ((info("a", (48, 2), 2),), "not whole blocks of 32", "a"),
    "row of half a super-block": ((info("a", (128, 2), 12),), "not whole blocks of 256", "a"),
    "offset is not aligned": ((info("a", (4,), 0, 8),), "not a multiple of the alignment 32", "a"),
    "offset beyond the file": ((info("a", (4,), 0, 1 << 40),), "truncated: its data ends", "a"),
    "offset wraps": ((info("a", (4,), 0, MAX_U64 - 31),), "truncated: its data ends", "a"),
    "data truncated": ((info("a", (4,)), info("b", (17,), 0, 32)), "truncated: its data ends", "b"),
    "same data": ((info("a", (4,)), info("b", (4,))), "overlaps that of tensor a", "b"),
    "overlap": ((info("a", (4,), 0, 32), info("b", (9,), 0, 0)), "overlaps that of tensor b", "a"),
    "cut in the name": ((string("a" * 60)[:40],), "truncated", "0"),
    "cut in the dimensions": ((info("a" * 40, (4, 4, 4, 4))[:70],), "truncated", "a" * 40),
}  # fmt: skip


@pytest.mark.parametrize("name", INFOS)
def test_bad_tensor(tmp_path: Path, name: str) -> None:
    infos, reason, at = INFOS[name]
    raw = build(infos=infos, data=bytes(96))
    if name.startswith("cut"):
        raw = build(infos=infos, alignment=1)
    error = refused(tmp_path, raw, reason)
    assert error.tensor == at
    assert error.offset >= 24


@pytest.mark.parametrize(
    ("kind", "name"), [(43, "43"), (2**32 - 1, "4294967295"), (4, "Q4_2"), (31, "Q4_0_4_4")]
)
def test_unknown_tensor_type(tmp_path: Path, kind: int, name: str) -> None:
    raw = build(infos=(info("a", (32,), kind),), data=bytes(96))
    refused(tmp_path, raw, f"tensor a: offset .* unknown tensor type .*{name}", UnsupportedModelError)


def test_alignment_is_honoured_by_offset_checks(tmp_path: Path) -> None:
    align = key("general.alignment", U32, struct.pack("<I", 64))
    raw = build(keys=(align,), infos=(info("a", (4,)), info("b", (4,), 0, 32)), data=bytes(256), alignment=64)
    refused(tmp_path, raw, "data offset 32 is not a multiple of the alignment 64")
    huge = build(keys=(key("general.alignment", U32, struct.pack("<I", 2**31)),), infos=(info("a", (4,)),))
    refused(tmp_path, huge, "truncated: its data ends")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(ModelFileError) as caught:
            read_everything(path)
        assert caught.value.offset is not None


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        GGUFCheckpoint(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):
        GGUFCheckpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):  # and no waiting for a writer
        GGUFCheckpoint(tmp_path / "pipe.gguf")


def test_a_hostile_name_stays_on_one_short_line(tmp_path: Path) -> None:
    raw = build(keys=(key("evil\nline\x1b[31m" + "x" * 5000, 77, b"\0" * 8),))
    error = refused(tmp_path, raw, "unknown value type 77")
    assert str(error).isprintable()
    assert len(str(error)) < 300 + len(str(tmp_path))


def many_keys(n: int) -> bytes:
    return build(keys=tuple(key(f"{i:x}", U8, b"\0") for i in range(n)))


def many_tensors(n: int) -> bytes:
    align = key("general.alignment", U32, struct.pack("<I", 1))
    return build(
        keys=(align,), infos=tuple(info(f"{i:x}", (1,), 24, i) for i in range(n)), data=bytes(n), alignment=1
    )


def one_array(kind: int, count: int, items: bytes) -> bytes:
    return build(keys=(key("k", ARRAY, array(kind, count, items)),))


MIXED = b"".join(string("é€"[i % 2]) for i in range(1000))
QUARTER = 65_536 // 4  # of the limits on keys, tensors and nested arrays, with a quarter of the allowance
AMPLIFIERS: dict[str, tuple[Callable[[], bytes], int]] = {
    "keys": (lambda: many_keys(QUARTER), 16_000_000),
    "tensors": (lambda: many_tensors(QUARTER), 16_000_000),
    "nested arrays": (lambda: one_array(ARRAY, QUARTER, array(I16, 1, b"\0\1") * QUARTER), 16_000_000),
    "empty strings": (lambda: one_array(STRING, 150_000, bytes(8 * 150_000)), 1_000_000),
    "strings of one character": (lambda: one_array(STRING, 150_000, MIXED * 150), 1_000_000),
    "int16": (lambda: one_array(I16, 1 << 21, bytes(1 << 22)), 1_000_000),
    "bools": (lambda: one_array(BOOL, 1 << 22, bytes(1 << 22)), 1_000_000),
}


@pytest.mark.parametrize("name", AMPLIFIERS)
def test_small_pieces_in_great_number_stay_in_bounds(tmp_path: Path, name: str) -> None:
    raw, allowance = AMPLIFIERS[name]
    path = tmp_path / "many.gguf"
    path.write_bytes(raw())
    bounded(path, read_everything, allowance=allowance, seconds=15)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (lambda: many_keys(65_537), "65537 metadata keys are more than"),
        (lambda: many_tensors(65_537), "65537 tensors are more than"),
        (lambda: one_array(ARRAY, 65_537, array(U8, 0, b"") * 65_537), "more than 65536 nested arrays"),
    ],
)
def test_numbers_beyond_the_limits_are_refused(tmp_path: Path, raw: Callable[[], bytes], reason: str) -> None:
    refused(tmp_path, raw(), reason, allowance=64_000_000)


NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 5, 13, 31, 33, 255, 2**31, 2**32 - 1, 2**61, 2**63 - 1, 2**63, MAX_U64, HUGE]
)
MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), st.integers(0, len(GOOD) - 1), st.integers(0, 255)),
        st.tuples(st.just("u32"), st.integers(0, len(GOOD) - 4), NUMBERS),
        st.tuples(st.just("u64"), st.integers(0, len(GOOD) - 8), NUMBERS),
        st.tuples(st.just("cut"), st.integers(0, len(GOOD)), st.just(0)),
        st.tuples(st.just("double"), st.integers(0, len(GOOD)), st.integers(0, 64)),
    ),
    min_size=1,
    max_size=4,
)


def mutate(raw: bytes, mutations: list[tuple[str, int, int]]) -> bytes:
    out = bytearray(raw)
    for what, place, value in mutations:
        if what == "byte":
            out[place : place + 1] = bytes([value])
        elif what == "cut":
            del out[place:]
        elif what == "double":
            out[place:place] = out[place : place + value]
        else:
            out[place : place + int(what[1:]) // 8] = value.to_bytes(8, "little")[: int(what[1:]) // 8]
    return bytes(out)


@given(mutations=MUTATIONS)
def test_a_mutated_file_opens_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[str, int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(mutate(GOOD, mutations))

    def action(path: Path) -> None:
        with suppress(ModelFileError, UnsupportedModelError):
            read_everything(path)

    bounded(path, action)


@pytest.mark.parametrize(("width", "value"), [(1, 0), (1, 255), (4, 2**31), (8, 1), (8, HUGE), (8, MAX_U64)])
def test_every_number_replaced_in_turn(tmp_path: Path, width: int, value: int) -> None:
    """The systematic part of the fuzz test: one value at every byte position."""
    path = tmp_path / "mutated.gguf"
    head = len(GOOD) - 80
    piece = value.to_bytes(8, "little")[:width]
    opened = 0

    def action(path: Path) -> int:
        try:
            read_everything(path)
        except (ModelFileError, UnsupportedModelError):
            return 0
        return 1

    for place in range(head):
        path.write_bytes(GOOD[:place] + piece + GOOD[place + width :])
        opened += action(path)
    assert opened < head  # some were refused, and nothing else was raised
