"""The file of evicted blocks by itself: what is found in it is what was put, and faults are only misses."""

from __future__ import annotations

import errno
import os
import random
import stat
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastllm.engine import offload
from fastllm.engine.block_seal import ChecksumSeal, EncryptingSeal
from fastllm.engine.offload import PAGE, OffloadFile
from fastllm.errors import CapacityError, RequestError

SIZE = 5000  # of a block: two pages


def block(content: bytes) -> Any:
    """What the tests put under a content hash."""
    return np.random.default_rng(list(content)).integers(0, 256, SIZE, np.uint8)


def put(file: OffloadFile, contents: Sequence[bytes]) -> None:
    file.put(contents, lambda places: np.array([block(contents[place]) for place in places]))


def found(file: OffloadFile, content: bytes) -> bool:
    """Whether it is there; what is there is right."""
    got = file.get(content)
    assert got is None or np.array_equal(got, block(content))
    return got is not None


def names(count: int) -> list[bytes]:
    return [bytes([i]) * 32 for i in range(count)]


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., OffloadFile]]:
    """Makes files of so many blocks, in a directory of their own."""
    made: list[OffloadFile] = []

    def make_one(blocks: int = 4, **more: Any) -> OffloadFile:
        made.append(OffloadFile(SIZE, blocks * 2 * PAGE, tmp_path, encrypted=request.param, **more))
        return made[-1]

    yield make_one
    for file in made:
        file.check()
        file.close()


def test_the_longest_unused_block_makes_room(make: Any) -> None:
    file = make(3)
    a, b, c, d, e = names(5)
    put(file, [a, b, c])
    file.wait()
    assert found(file, a)
    put(file, [d])
    file.wait()
    assert [found(file, name) for name in (a, b, c, d)] == [True, False, True, True]
    file.touch([c])
    put(file, [a, e])  # one that is there counts as used
    file.wait()
    assert [found(file, name) for name in (a, c, d, e)] == [True, True, False, True]
    assert (file.num_blocks, file.num_bytes, file.num_dropped, file.num_failed) == (3, 6 * PAGE, 0, 0)


def test_only_what_is_missing_is_read(make: Any) -> None:
    file = make()
    put(file, names(2))
    asked: list[list[int]] = []

    def read(places: list[int]) -> Any:
        asked.append(places)
        return np.array([block(names(4)[place]) for place in places])

    file.put(names(4), read)
    file.put(names(4), read)
    assert asked == [[2, 3]]
    file.wait()
    assert all(found(file, name) for name in names(4))


def test_what_waits_for_the_writer_is_found_and_a_full_queue_drops_the_first(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "QUEUE_BYTES", 0)  # so it is QUEUE_BLOCKS
    gate, write = threading.Event(), offload.write_at

    def held(*arguments: Any) -> int:
        gate.wait(10)
        return write(*arguments)

    monkeypatch.setattr(offload, "write_at", held)
    file = make(100)
    put(file, names(12))
    assert [found(file, name) for name in names(12)] == [False] * 4 + [True] * 8
    put(file, names(5))
    assert file.num_dropped == 8
    file.check()
    gate.set()
    file.wait()
    assert [found(file, name) for name in names(12)] == [False] * 4 + [True] * 8


def test_memory_that_is_not_there_drops_blocks(make: Any) -> None:
    def read(places: list[int]) -> Any:
        raise MemoryError

    file = make()
    file.put(names(2), read)
    assert (file.num_blocks, file.num_dropped) == (0, 2)


def test_reset_gives_the_space_back_also_while_a_block_is_written(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, entered, write = threading.Event(), threading.Event(), offload.write_at

    def held(*arguments: Any) -> int:
        entered.set()
        gate.wait(10)
        return write(*arguments)

    file = make()
    put(file, names(3))
    file.wait()
    assert os.fstat(file._file).st_size > 0
    monkeypatch.setattr(offload, "write_at", held)
    put(file, names(4))
    entered.wait()
    file.reset()
    file.check()
    assert (file.num_blocks, file.num_bytes, os.fstat(file._file).st_size) == (0, 0, 0)
    put(file, names(2)[1:])
    gate.set()
    file.wait()
    assert [found(file, name) for name in names(4)] == [False, True, False, False]
    assert file.num_bytes == 2 * PAGE


def test_close_waits_for_the_write_at_hand_only(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, write = threading.Event(), offload.write_at
    written: list[int] = []

    def slow(*arguments: Any) -> int:
        entered.set()
        time.sleep(0.05)
        written.append(write(*arguments))
        return written[-1]

    monkeypatch.setattr(offload, "write_at", slow)
    file = make()
    put(file, names(4))
    entered.wait()
    file.close()
    assert written == [SIZE]
    assert (file.num_blocks, file.num_dropped) == (0, 0)


def test_two_threads_at_once_disturb_nothing(make: Any) -> None:
    """The reader may ask for a block whose slot the writer is after."""
    file = make(3)
    rng, hits = random.Random(1), 0
    for _ in range(800):
        put(file, rng.sample(names(8), rng.randint(1, 3)))
        hits += found(file, rng.choice(names(8)))
        if rng.random() < 0.02:
            file.reset()
        file.check()
    assert hits > 100
    assert file.num_failed == 0


# ---- faults ---------------------------------------------------------------------------------------------


def fail_writes(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(offload, "write_at", fail)


def test_a_full_disk_ends_growth_with_one_warning(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = make(10)
    put(file, names(3))
    file.wait()
    with monkeypatch.context() as patch:
        fail_writes(patch, errno.ENOSPC)
        put(file, names(4))
        file.wait()
    assert (file.num_blocks, file.max_blocks, file.num_dropped) == (3, 3, 1)
    put(file, names(6))
    file.wait()
    assert [found(file, name) for name in names(6)] == [False] * 3 + [True] * 3
    assert len(caplog.records) == 1
    assert "No space" in caplog.text
    file.reset()  # the space came back
    put(file, names(6))
    file.wait()
    assert file.num_blocks == 6


def test_a_disk_that_was_always_full_is_left_alone(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(10)
    fail_writes(monkeypatch, errno.ENOSPC)
    put(file, names(3))
    file.wait()
    file.put(names(2), lambda places: pytest.fail("it asks for more"))
    assert (file.num_blocks, file.max_blocks) == (0, 0)


def test_errors_are_misses_and_are_not_logged_each_time(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = make()
    with monkeypatch.context() as patch:
        fail_writes(patch, errno.EIO)
        put(file, names(3))
        file.wait()
    assert (file.num_blocks, file.num_dropped) == (0, 3)
    put(file, names(3))
    file.wait()

    def fail(*arguments: Any) -> int:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(offload, "read_at", fail)
        assert not found(file, names(1)[0])
    with monkeypatch.context() as patch:
        patch.setattr(offload, "read_at", lambda *arguments: 17)
        assert not found(file, names(2)[1])
    assert [found(file, name) for name in names(3)] == [False, False, True]
    assert file.num_failed == 2
    assert len(caplog.records) == 1


def test_writes_in_pieces_are_complete(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write = offload.write_at
    monkeypatch.setattr(offload, "write_at", lambda file, data, at: write(file, data[:1234], at))
    file = make()
    put(file, names(2))
    file.wait()
    assert all(found(file, name) for name in names(2))


def test_a_block_in_the_place_of_another_is_no_block(make: Any) -> None:
    """Nor is an older one in its own place."""
    file = make(2)
    a, b, c = names(3)
    put(file, [a, b])
    file.wait()
    slots = [file._index[name][0] * file.slot_bytes for name in (a, b)]
    stored = [os.pread(file._file, SIZE, slot) for slot in slots]
    for slot, data in zip(slots, reversed(stored), strict=True):
        os.pwrite(file._file, data, slot)
    assert not found(file, a)
    assert not found(file, b)
    put(file, [a])
    file.wait()
    old = os.pread(file._file, SIZE, file._index[a][0] * file.slot_bytes)
    put(file, [b, c])
    file.wait()
    for name in (b, c):
        os.pwrite(file._file, old, file._index[name][0] * file.slot_bytes)
        assert not found(file, name)


class FileMachine(RuleBasedStateMachine):
    """Against a dictionary in order of use; the writer has time to finish after each rule."""

    contents = st.sampled_from(names(9))

    @initialize(blocks=st.integers(1, 6), encrypted=st.booleans())
    def start(self, blocks: int, encrypted: bool) -> None:
        self.file = OffloadFile(SIZE, blocks * 2 * PAGE, encrypted=encrypted)
        self.model: OrderedDict[bytes, None] = OrderedDict()
        self.room = blocks
        self.blocks = blocks
        self.faults: list[int] = []
        self.patch = pytest.MonkeyPatch()
        write = offload.write_at

        def write_at(*arguments: Any) -> int:
            if self.faults and (code := self.faults.pop(0)):
                raise OSError(code, os.strerror(code))
            return write(*arguments)

        self.patch.setattr(offload, "write_at", write_at)

    @rule(
        contents=st.lists(contents, min_size=1, max_size=4, unique=True),
        faults=st.lists(st.sampled_from([0, 0, errno.EIO, errno.ENOSPC]), max_size=2),
    )
    def put(self, contents: list[bytes], faults: list[int]) -> None:
        self.faults = list(faults)
        put(self.file, contents)
        self.file.wait()
        for content in contents:
            if content in self.model:
                self.model.move_to_end(content)
        if self.room == 0:
            faults = []
        for content in [content for content in contents if content not in self.model]:
            if self.room == 0:
                continue
            if len(self.model) == self.room:
                self.model.popitem(last=False)
            fault = faults.pop(0) if faults else 0
            if fault == errno.ENOSPC:
                assert len(self.model) <= self.file.max_blocks <= self.room
                self.room = self.file.max_blocks
            if not fault:
                self.model[content] = None

    @rule(content=contents)
    def get(self, content: bytes) -> None:
        assert found(self.file, content) == (content in self.model)
        if content in self.model:
            self.model.move_to_end(content)

    @rule(contents=st.lists(contents, max_size=4))
    def touch(self, contents: list[bytes]) -> None:
        self.file.touch(contents)
        for content in contents:
            if content in self.model:
                self.model.move_to_end(content)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), at=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
    def flip_a_bit(self, data: st.DataObject, at: int, bit: int) -> None:
        content = data.draw(st.sampled_from(sorted(self.model)))
        place = self.file._index[content][0] * self.file.slot_bytes + at
        (byte,) = os.pread(self.file._file, 1, place)
        os.pwrite(self.file._file, bytes([byte ^ 1 << bit]), place)
        assert not found(self.file, content)
        del self.model[content]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, SIZE - 1))
    def read_too_little(self, data: st.DataObject, count: int) -> None:
        content = data.draw(st.sampled_from(sorted(self.model)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offload, "read_at", lambda *arguments: count)
            assert not found(self.file, content)
        del self.model[content]

    @rule()
    def reset(self) -> None:
        self.file.reset()
        self.model.clear()
        self.room = self.blocks

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "file"):
            self.file.check()
            assert self.file.num_blocks == len(self.model)
            assert list(self.file._index) == list(self.model)
            assert self.file.num_bytes <= self.blocks * 2 * PAGE
            assert os.fstat(self.file._file).st_size <= self.blocks * 2 * PAGE

    def teardown(self) -> None:
        if hasattr(self, "file"):
            for content in names(9):
                self.get(content)
            self.file.close()
            self.patch.undo()


TestFileMachine = FileMachine.TestCase


# ---- who can read it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unnamed", [True, False])
def test_the_file_has_no_name_and_is_for_one_user(
    unnamed: bool, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not unnamed:  # a system, or a file system, where it has to have one first
        monkeypatch.delattr(os, "O_TMPFILE")
    before = os.umask(0)
    try:
        file = make()
    finally:
        os.umask(before)
    put(file, names(3))
    file.wait()
    status = os.fstat(file._file)
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert (status.st_nlink, list(tmp_path.iterdir())) == (0, [])
    assert not os.get_inheritable(file._file)
    number = file._file
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    assert not any(thread.name == "fastllm-offload" for thread in threading.enumerate())
    file.close()
    assert not found(file, names(1)[0])
    put(file, names(1))


@pytest.mark.parametrize("encrypted", [False, True])
def test_only_an_encrypted_file_hides_what_is_in_it(encrypted: bool, tmp_path: Path) -> None:
    file = OffloadFile(SIZE, 10 * 2 * PAGE, tmp_path, encrypted=encrypted)
    same = np.frombuffer(b"a secret!!" * (SIZE // 10), np.uint8)
    file.put(names(2), lambda places: np.array([same] * len(places)))
    file.wait()
    stored = [os.pread(file._file, SIZE, slot * file.slot_bytes) for slot, _ in file._index.values()]
    whole = os.pread(file._file, 10**6, 0)
    assert (b"secret" in whole) == (not encrypted)
    assert (stored[0] == stored[1]) == (not encrypted)
    for name in names(2):
        got = file.get(name)
        assert got is not None
        assert np.array_equal(got, same)
    file.close()


def test_no_nonce_is_used_twice_and_no_key_either() -> None:
    seal, other = EncryptingSeal(), EncryptingSeal()
    content, data = names(1)[0], block(b"x")
    checks = [seal.close(content, data)[1] for _ in range(100)]
    assert len({check[:12] for check in checks}) == 100
    stored, check = seal.close(content, data)
    buffer = np.concatenate([np.frombuffer(stored, np.uint8), np.zeros(16, np.uint8)])
    assert seal.open(content, buffer, check) is not None
    assert other.open(content, buffer, check) is None
    assert seal.open(names(2)[1], buffer, check) is None
    assert seal.open(content, buffer, checks[0]) is None


def test_a_checksum_is_over_the_content_hash_too() -> None:
    seal = ChecksumSeal()
    stored, check = seal.close(b"a" * 32, block(b"x"))
    buffer = np.concatenate([np.frombuffer(stored, np.uint8), np.zeros(16, np.uint8)])
    assert seal.open(b"a" * 32, buffer, check) is not None
    assert seal.open(b"b" * 32, buffer, check) is None


def test_encryption_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(RequestError, match=r"fastllm\[crypto\]") as caught:
        OffloadFile(SIZE, 10 * PAGE, encrypted=True)
    assert caught.value.field == "kv_offload_encrypted"


def test_a_process_that_was_forked_finds_nothing_and_writes_nothing(make: Any) -> None:
    file = make()
    put(file, names(2))
    file.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if child == 0:
        file.put(names(4), lambda places: os._exit(3))
        file.touch(names(1))
        file.reset()
        quiet = not any(file.get(name) is not None for name in names(4))
        file.close()
        os._exit(0 if quiet else 4)
    assert os.waitpid(child, 0)[1] == 0
    assert all(found(file, name) for name in names(2))


# ---- bounds ---------------------------------------------------------------------------------------------


def test_less_than_a_block_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(CapacityError, match="asked 8192 bytes, had 8191, would fit 0"):
        OffloadFile(SIZE, 2 * PAGE - 1)


def test_a_directory_that_takes_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(RequestError, match="kv_offload_dir"):
            OffloadFile(SIZE, 10 * PAGE, place)
