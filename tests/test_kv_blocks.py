"""Blocks of the KV cache copied out of it and back: the same bits, in any block, of every kind of cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strategies
import tiny
from hypothesis import given
from hypothesis import strategies as st
from step_batches import Chunk, step_batch
from test_decoder import executor

from fastllm import _core
from fastllm.errors import RequestError
from fastllm.executor.base import BlockStore
from fastllm.executor.cpu import BLOCK_SIZES, KV_CACHE_DTYPES
from fastllm.models.spec import DecoderSpec

TOKENS = tiny.tokens(80)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("hf", tmp_path_factory.mktemp("hf"))


def ids(blocks: list[int]) -> Any:
    return np.array(blocks, np.int32)


@pytest.mark.parametrize("dtype", KV_CACHE_DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_block_that_moved_gives_the_same_bits(dtype: str, block_size: int, directory: Path) -> None:
    """Of a context in several blocks, read out, overwritten, and written to other ones."""
    count = -(-len(TOKENS) // block_size)
    with executor(directory, kv_cache_dtype=dtype, block_size=block_size) as made:
        assert isinstance(made, BlockStore)
        assert made.block_bytes * made.kv_capacity() == made.kv_cache_bytes
        before, after = list(range(count)), [20 + 7 * i % 5 for i in range(count)]  # across groups of 16
        if made.kv_capacity() < 25:
            after = [made.kv_capacity() - 1 - i for i in range(count)]
        made.run(step_batch([Chunk(TOKENS, 0, before)], block_size))
        kept = np.full((count, made.block_bytes), 0x5A, np.uint8)
        made.read_blocks(ids(before), kept)

        def next_logits(table: list[int]) -> Any:
            """Of one more token, whose own K and V go to a block that is copied anew each time."""
            return made.run(step_batch([Chunk([5], len(TOKENS) - 1, table)], block_size), logits=True)[1]

        expected = next_logits(before)
        made.run(step_batch([Chunk(tiny.tokens(80, seed=1), 0, before)], block_size))
        assert not np.array_equal(next_logits(before), expected)
        made.write_blocks(ids(after), kept)
        assert np.array_equal(next_logits(after), expected)
        for block, row in zip(after, kept, strict=True):  # one by one, in place
            made.write_blocks(ids([block]), row[np.newaxis])
        assert np.array_equal(next_logits(after), expected)
        again = np.zeros_like(kept)
        made.write_blocks(ids(after), kept)
        made.read_blocks(ids(after), again)
        assert np.array_equal(again, kept)


@given(strategies.decoder_specs(), st.sampled_from(KV_CACHE_DTYPES), st.sampled_from(BLOCK_SIZES), st.data())
def test_every_byte_of_a_block_is_its_own(
    spec: DecoderSpec, dtype: str, block_size: int, data: st.DataObject
) -> None:
    """Blocks of random bytes come back as they were, whatever was written to the others in between."""
    decoder = _core.Decoder(spec.as_dict(), 1)
    decoder.allocate_kv(19, block_size, dtype)
    size = decoder.kv_bytes_per_block(block_size, dtype)
    rng = np.random.default_rng(0)
    known: dict[int, Any] = {}
    some_blocks = st.lists(st.integers(0, 18), min_size=1, max_size=5, unique=True)
    for blocks in data.draw(st.lists(some_blocks, min_size=1)):
        rows = rng.integers(0, 256, (len(blocks), size), np.uint8)
        decoder.write_blocks(ids(blocks), rows)
        known.update(zip(blocks, rows, strict=True))
    out = np.zeros((len(known), size), np.uint8)
    decoder.read_blocks(ids(list(known)), out)
    assert np.array_equal(out, np.array(list(known.values())))
    decoder.close()


@pytest.mark.parametrize(
    ("blocks", "rows", "excess", "match"),
    [
        (np.array([64], np.int32), 1, 0, r"blocks: expected values in \[0, 64\)"),
        (np.array([0, -1], np.int32), 2, 0, r"blocks: expected values in \[0, 64\)"),
        (np.array([0], np.int64), 1, 0, "int32"),
        (np.array([[0]], np.int32), 1, 0, "int32"),
        (np.array([0, 1], np.int32), 1, 0, "uint8"),
        (np.array([0], np.int32), 1, 1, "uint8"),
        (np.array([0], np.int32), 1, -1, "uint8"),
    ],
)
def test_what_does_not_fit_is_refused(
    blocks: Any, rows: int, excess: int, match: str, directory: Path
) -> None:
    with executor(directory) as made:
        data = np.zeros((rows, made.block_bytes + excess), np.uint8)
        for call in (made.read_blocks, made.write_blocks):
            with pytest.raises(RequestError, match=match):
                call(blocks, data)


def test_arrays_of_another_kind_are_refused(directory: Path) -> None:
    with executor(directory) as made:
        fixed = np.zeros((1, made.block_bytes), np.uint8)
        fixed.flags.writeable = False
        made.write_blocks(ids([0]), fixed)
        with pytest.raises(RequestError, match="can be written to"):
            made.read_blocks(ids([0]), fixed)
        for bad in (fixed.astype(np.int8), np.zeros((2, made.block_bytes), np.uint8)[::2][:1].T):
            with pytest.raises(RequestError, match="uint8"):
                made.write_blocks(ids([0]), bad)
        made.read_blocks(ids([]), np.zeros((0, made.block_bytes), np.uint8))
        made.sleep(1)
        with pytest.raises(RequestError, match="no KV cache"):
            made.write_blocks(ids([0]), fixed)
