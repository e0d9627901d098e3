"""Damaged and hostile safetensors files: each ends in a typed error, in bounded time and memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastllm.errors import FastLLMError, ModelFileError, UnsupportedModelError
from fastllm.formats.safetensors import DTYPE_BITS, MAX_VALUES, SafetensorsFile


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


DATA = bytes(range(64))
BIG = 2**63
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "length -1": (raw_file({}, length=2**64 - 1), "longer than 100000000"),
    "length over the cap": (raw_file({}, length=100_000_001), "longer than 100000000"),
    "length beyond the file": (raw_file({}, length=3), "truncated: the header"),
    "length 0": (raw_file(b""), "not JSON"),
    "not an object": (raw_file([]), "expected object"),
    "not UTF-8": (raw_file(b'{"\xff":1}'), "not UTF-8"),
    "not JSON": (raw_file(b"{'a'}"), "not JSON"),
    "twice": (raw_file(b'{"a":1,"a":1}'), "the key a is there twice"),
    "deep": (raw_file(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "not usable JSON"),
    "entry is a number": (raw_file({"a": 1}), "a: expected object, got integer"),
    "no dtype": (
        raw_file({"a": {"shape": [], "data_offsets": [0, 0]}}),
        r"a\.dtype: expected string, got nothing",
    ),
    "dtype a number": (raw_file({"a": entry(3)}, DATA[:8]), r"a\.dtype: expected string, got integer"),
    "no shape": (raw_file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), r"a\.shape: expected array"),
    "shape of strings": (raw_file({"a": entry(shape=["2"])}), r"a\.shape\[0\]: expected integer, got string"),
    "shape of floats": (raw_file({"a": entry(shape=[2.0])}), r"a\.shape\[0\]: expected integer, got number"),
    "shape of booleans": (raw_file({"a": entry(shape=[True])}), "expected integer, got boolean"),
    "negative dimension": (raw_file({"a": entry(shape=[-2])}, DATA[:8]), "tensor a: shape: expected at most"),
    "two negative dimensions": (
        raw_file({"a": entry(shape=[-1, -2])}, DATA[:8]),
        "tensor a: shape: expected",
    ),
    "33 dimensions": (raw_file({"a": entry(shape=[1] * 33)}), "tensor a: shape: expected at most 32"),
    "dimensions of many digits": (raw_file({"a": entry(shape=[10**4000] * 30)}), "tensor a: shape: expected"),
    "product wraps": (
        raw_file({"a": entry(shape=[2**62, 4, 2])}, DATA[:8]),
        "takes 147573952589676412928 bytes",
    ),
    "offsets of one": (raw_file({"a": entry(offsets=[0])}, DATA[:8]), "data_offsets: expected"),
    "offsets of three": (raw_file({"a": entry(offsets=[0, 8, 8])}, DATA[:8]), "data_offsets: expected"),
    "offsets backwards": (raw_file({"a": entry(offsets=[8, 0])}, DATA[:8]), "data_offsets: expected"),
    "negative offset": (raw_file({"a": entry(offsets=[-8, 0])}, DATA[:8]), "data_offsets: expected"),
    "vast offset": (raw_file({"a": entry(offsets=[0, 10**4000])}, DATA[:8]), "data_offsets: expected"),
    "beyond the file": (raw_file({"a": entry()}, DATA[:7]), "tensor a: offset .*truncated: its data ends"),
    "2^63 beyond": (raw_file({"a": entry(offsets=[0, BIG - 1])}, DATA[:8]), "truncated: its data ends"),
    "bytes too few": (raw_file({"a": entry(shape=[3])}, DATA[:8]), "takes 12 bytes, its data has 8"),
    "bytes too many": (raw_file({"a": entry(shape=[1])}, DATA[:8]), "takes 4 bytes, its data has 8"),
    "half a byte": (raw_file({"a": entry("F4", [3], [0, 1])}, DATA[:1]), "takes 1 bytes and 4 bits"),
    "overlap": (
        raw_file({"a": entry(offsets=[0, 8]), "b": entry(offsets=[4, 12])}, DATA[:12]),
        "tensor b: offset .*overlaps the tensor before it",
    ),
    "same place": (raw_file({"a": entry(), "b": entry()}, DATA[:8]), "overlaps the tensor before it"),
    "hole": (raw_file({"a": entry(), "b": entry(offsets=[9, 17])}, DATA[:17]), "tensor b: .*leaves a hole"),
    "hole at the start": (raw_file({"a": entry(offsets=[8, 16])}, DATA[:16]), "leaves a hole before it"),
    "data left over": (raw_file({"a": entry()}, DATA[:9]), "the tensors end at byte"),
    "metadata not strings": (raw_file({"__metadata__": {"a": 1}}), "__metadata__.a: expected string"),
    "metadata not an object": (raw_file({"__metadata__": "x"}), "__metadata__: expected object"),
}


def bounded(path: Path, action: Callable[[], Any], seconds: float = 3.0) -> Any:
    """Hold an action to 16 times the file plus 64 MB."""
    tracemalloc.start()
    start = time.process_time()
    try:
        return action()
    finally:
        spent = time.process_time() - start
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 16 * path.stat().st_size + 64_000_000
        assert spent < seconds


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path: Path, name: str) -> None:
    raw, reason = BAD_FILES[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)

    def action() -> FastLLMError:
        with pytest.raises(ModelFileError, match=reason) as caught:
            SafetensorsFile(path)
        return caught.value

    error = bounded(path, action)
    assert str(path) in str(error)
    assert len(str(error)) < 500 + len(str(path))
    with pytest.raises((safetensors.SafetensorError, OSError, ValueError)):
        safetensors.safe_open(path, "numpy")  # the library refuses it as well


def test_unknown_element_type(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw_file({"a": entry("Q7")}, DATA[:8]))
    with pytest.raises(UnsupportedModelError, match="tensor a: unknown element type 'Q7'"):
        SafetensorsFile(path)


def test_element_types_are_those_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "types.safetensors"
    for dtype, bits in DTYPE_BITS.items():
        path.write_bytes(raw_file({"a": entry(dtype, [8], [0, bits])}, bytes(bits)))
        assert SafetensorsFile(path).tensor("a").dtype == dtype
        with safetensors.safe_open(path, "numpy") as peer:
            assert peer.get_slice("a").get_dtype() == dtype


def hostile_metadata(n: int) -> bytes:
    return raw_file(b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(n)) + b"}}")


def hostile_shape(n: int) -> bytes:
    return raw_file(b'{"a":{"dtype":"F32","shape":[' + b",".join([b"300"] * n) + b'],"data_offsets":[0,4]}}')


@pytest.mark.parametrize(
    ("raw", "accepted"),
    [
        (lambda: hostile_metadata(MAX_VALUES - 10), True),
        (lambda: hostile_metadata(MAX_VALUES + 10), False),
        (lambda: hostile_shape(MAX_VALUES - 10), False),
        (lambda: raw_file(b'{"a":[' + b"{}," * (MAX_VALUES // 2 - 10) + b"1]}"), False),
    ],
)
def test_many_values_stay_in_bounds(tmp_path: Path, raw: Callable[[], bytes], accepted: bool) -> None:
    path = tmp_path / "many.safetensors"
    path.write_bytes(raw())

    def action() -> bool:
        try:
            SafetensorsFile(path)
        except ModelFileError:
            return False
        return True

    assert bounded(path, action, seconds=15) is accepted


GOOD = raw_file(
    {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("BF16", [2, 2], [8, 16])}, DATA[:16]
)


@given(
    mutations=st.lists(
        st.tuples(
            st.sampled_from(["set", "cut", "digit", "length"]),
            st.integers(0, len(GOOD) - 1),
            st.integers(0, 255),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_what_is_accepted_the_library_reads_alike(
    tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[str, int, int]]
) -> None:
    raw = bytearray(GOOD)
    for what, place, value in mutations:
        if what == "set":
            raw[place : place + 1] = bytes([value])
        elif what == "cut":
            del raw[place:]
        elif what == "length":
            raw[0:1] = bytes([value])
        else:
            digits = [i for i, byte in enumerate(raw[8:], 8) if 48 <= byte <= 57]
            if digits:
                raw[digits[place % len(digits)]] = 48 + value % 10
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw)
    try:
        file = SafetensorsFile(path)
    except (ModelFileError, UnsupportedModelError):
        return
    with safetensors.safe_open(path, "pt") as peer:
        assert set(peer.keys()) == set(file.infos)
        for name in file.infos:
            theirs = peer.get_tensor(name).reshape(-1).view(torch.uint8)
            assert theirs.numpy().tobytes() == file.tensor(name).data.tobytes()
