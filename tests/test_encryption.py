"""Encrypted files: the format, keys, whole models on disk, and what every kind of damage is called."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import stat
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm import ModelFileError, RequestError
from fastllm.cli import run
from fastllm.formats import decrypted, encryption, model_encryption
from fastllm.formats.decrypted import DecryptedFile, open_mapped
from fastllm.formats.digest import VerifiedModel, model_files, model_sha256
from fastllm.formats.encryption import HEADER_BYTES, TAG_BYTES, EncryptedFile, decrypt_small, is_encrypted
from fastllm.formats.keys import (
    KEY_ENV,
    KEY_FILE_ENV,
    KeySource,
    generate_key,
    key_id,
    parse_key,
    read_key_file,
    write_key_file,
)
from fastllm.formats.model_encryption import decrypt_model, encrypt_model

KEY = bytes(range(32))
OTHER = bytes(range(1, 33))
CHUNK = 4096


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)
    monkeypatch.delenv(KEY_FILE_ENV, raising=False)


def sealed(folder: Path, plain: bytes, *, key: bytes = KEY, chunk: int = CHUNK, name: str = "file") -> Path:
    """An encrypted file with `plain` in it."""
    source, out = folder / f"{name}.plain", folder / f"{name}.sealed"
    source.write_bytes(plain)
    out.unlink(missing_ok=True)
    encrypt_model(source, out, key, chunk_bytes=chunk)
    source.unlink()
    return out


def text(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def whole(path: Path, key: bytes = KEY) -> bytes:
    return decrypt_small(path, KeySource.of(key), 1 << 30)


# ---- the format --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 17])
def test_what_was_encrypted_comes_back(size: int, tmp_path: Path) -> None:
    plain = text(size)
    path = sealed(tmp_path, plain)
    assert is_encrypted(path)
    assert whole(path) == plain
    chunks = max(-(-size // CHUNK), 1)
    assert path.stat().st_size == HEADER_BYTES + size + TAG_BYTES * chunks
    out = tmp_path / "again"
    decrypt_model(path, out, KEY)
    assert out.read_bytes() == plain
    assert sorted(os.listdir(tmp_path)) == ["again", path.name]


def test_an_independent_implementation_of_the_description_reads_it(tmp_path: Path) -> None:
    """The format's description and nothing of ours: HKDF from HMAC, nonces, associated data."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    plain = text(2 * CHUNK + 5)
    data = sealed(tmp_path, plain).read_bytes()
    salt, tag = data[32:64], data[72:104]
    prk = hmac.digest(salt, KEY, "sha256")
    info = b"fastllm encrypted file 1"
    first = hmac.digest(prk, info + b"\1", "sha256")
    second = hmac.digest(prk, first + info + b"\2", "sha256")
    assert hmac.digest(second, data[:72], "sha256") == tag
    found = b""
    for index in range(3):
        begin = 104 + index * (CHUNK + 16)
        nonce = index.to_bytes(8, "little") + bytes([index == 2, 0, 0, 0])
        found += AESGCM(first).decrypt(nonce, data[begin : begin + CHUNK + 16], tag)
    assert found == plain


def test_equal_files_have_nothing_in_common(tmp_path: Path) -> None:
    plain = bytes(4 * CHUNK)
    one = sealed(tmp_path, plain, name="one").read_bytes()
    two = sealed(tmp_path, plain, name="two").read_bytes()
    pieces = [data[HEADER_BYTES + i :][:16] for data in (one, two) for i in range(0, 4 * CHUNK, 16)]
    assert len(set(pieces)) == len(pieces)


@given(data=st.data())
def test_any_flipped_bit_is_found(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = sealed(folder, text(2 * CHUNK + 100))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.one_of(st.integers(0, 8 * HEADER_BYTES - 1), st.integers(0, 8 * len(content) - 1)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        whole(path)
    assert caught.value.file == str(path)
    assert caught.value.offset is not None


@given(data=st.data())
def test_chunks_cannot_be_moved_dropped_or_repeated(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    plain = text(5 * CHUNK)
    path = sealed(folder, plain)
    content = path.read_bytes()
    size = CHUNK + TAG_BYTES
    chunks = [content[HEADER_BYTES + i * size :][:size] for i in range(5)]
    order = data.draw(st.lists(st.integers(0, 4), min_size=5, max_size=5))
    path.write_bytes(content[:HEADER_BYTES] + b"".join(chunks[i] for i in order))
    if order == [0, 1, 2, 3, 4]:
        assert whole(path) == plain
        return
    wrong = next(i for i in range(5) if order[i] != i)
    with pytest.raises(ModelFileError, match=f"damaged: chunk {wrong} ") as caught:
        whole(path)
    assert caught.value.offset == HEADER_BYTES + wrong * size


def test_a_chunk_of_another_file_does_not_open(tmp_path: Path) -> None:
    one, two = (sealed(tmp_path, bytes(2 * CHUNK), name=name) for name in ("one", "two"))
    content = bytearray(one.read_bytes())
    content[HEADER_BYTES : HEADER_BYTES + CHUNK + 16] = two.read_bytes()[HEADER_BYTES:][: CHUNK + 16]
    one.write_bytes(content)
    with pytest.raises(ModelFileError, match="chunk 0"):
        whole(one)


@pytest.mark.parametrize(
    ("cut", "match"),
    [
        (8, "truncated: the header takes"),
        (HEADER_BYTES, "truncated: .* were written, 104 are there"),
        (HEADER_BYTES + CHUNK + TAG_BYTES, "truncated"),
        (-1, "truncated"),
        (None, "3 trailing bytes"),
    ],
)
def test_length_is_told_exactly(cut: int | None, match: str, tmp_path: Path) -> None:
    path = sealed(tmp_path, text(2 * CHUNK))
    content = path.read_bytes()
    path.write_bytes(content + b"abc" if cut is None else content[:cut])
    with pytest.raises(ModelFileError, match=match):
        whole(path)


def test_errors_of_keys_and_header_are_told_apart(tmp_path: Path) -> None:
    path = sealed(tmp_path, b"abc")
    with pytest.raises(ModelFileError, match=rf"wrong key: .*{key_id(KEY)}, this is key {key_id(OTHER)}"):
        whole(path, OTHER)
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="header is damaged: it does not match its checksum"):
        whole(path)
    content[64:68] = zlib.crc32(content[:64]).to_bytes(4, "little")  # forged, not damaged
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"truncated|header was changed"):
        whole(path)
    content[20] ^= 1
    content[40] ^= 1  # the salt
    content[64:68] = zlib.crc32(content[:64]).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="the header was changed: it does not match its tag"):
        whole(path)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = sealed(tmp_path, text(3 * CHUNK))
    file = EncryptedFile(path, KeySource.of(KEY))
    os.truncate(path, HEADER_BYTES + CHUNK + 100)
    assert len(file.chunk(0)) == CHUNK
    with pytest.raises(ModelFileError, match="truncated: the chunk takes"):
        file.chunk(1)
    file.close()
    file.close()


@pytest.mark.parametrize("chunk", [0, 4095, 12288, 1 << 25])
def test_chunk_sizes_that_the_format_does_not_have(chunk: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(RequestError, match="chunk_bytes"):
        encrypt_model(tmp_path / "a", tmp_path / "b", KEY, chunk_bytes=chunk)
    assert os.listdir(tmp_path) == ["a"]


def test_without_the_package_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sealed(tmp_path, b"abc")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(RequestError, match=r"fastllm\[crypto\]"):
        whole(path)


def test_importing_the_readers_imports_nothing_of_the_extra() -> None:
    code = (
        "import sys, fastllm.loading, fastllm.formats.checkpoint, fastllm.formats.gguf, fastllm.serve.audit\n"
        "import fastllm.formats.model_encryption, fastllm.cli.arguments\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'cryptography']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- plain text in memory ----------------------------------------------------------------------------------


@given(data=st.data())
def test_views_are_right_whatever_was_read_and_released(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chunk = data.draw(st.sampled_from([4096, 8192, 32768]))
    size = data.draw(st.integers(1, 5 * chunk + 3))
    plain = text(size, seed=size)
    path = sealed(tmp_path_factory.mktemp("views"), plain, chunk=chunk)
    file = DecryptedFile(path, KeySource.of(KEY))
    assert file.size == size
    ranges = st.tuples(st.integers(0, size - 1), st.integers(0, size)).map(
        lambda pair: (pair[0], min(pair[1], size - pair[0]))
    )
    for _ in range(data.draw(st.integers(1, 12))):
        offset, count = data.draw(ranges)
        if data.draw(st.booleans()):
            view = file.view(offset, count)
            assert view.tobytes() == plain[offset : offset + count]
            assert not view.flags.writeable
        else:
            file.release(offset, count)
    assert file.read(0, size) == plain
    file.release(0, size)
    assert file.view(0, size).tobytes() == plain
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.view(0, 1)


def test_only_what_is_asked_for_is_decrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = text(16 * CHUNK)
    file = DecryptedFile(sealed(tmp_path, plain), KeySource.of(KEY))
    opened: list[int] = []
    for name in ("chunk", "chunk_into"):
        real = getattr(EncryptedFile, name)

        def spy(self: Any, index: int, *rest: Any, real: Any = real) -> Any:
            opened.append(index)
            return real(self, index, *rest)

        monkeypatch.setattr(EncryptedFile, name, spy)
    tensor = file.tensor("t", (4, CHUNK), "U8", 3 * CHUNK + 10, 4 * CHUNK)
    assert tensor.nbytes == 4 * CHUNK
    assert opened == []
    assert tensor.beginning(5).tobytes() == plain[3 * CHUNK + 10 :][:5]
    assert opened == [3]
    row = tensor.rows(2, 1)
    assert row.shape == (1, CHUNK)
    assert opened == [3]
    assert row.data.tobytes() == plain[5 * CHUNK + 10 :][:CHUNK]
    assert opened == [3, 5, 6]
    assert tensor.data.tobytes() == plain[3 * CHUNK + 10 :][: 4 * CHUNK]
    assert opened == [3, 5, 6, 4, 7]
    # Once more only where pages were given back.
    file.release(3 * CHUNK + 10, CHUNK)
    assert tensor.data.tobytes() == plain[3 * CHUNK + 10 :][: 4 * CHUNK]
    assert opened == [3, 5, 6, 4, 7]  # no whole page lies in there
    file.release(4 * CHUNK, CHUNK)
    assert tensor.data.tobytes() == plain[3 * CHUNK + 10 :][: 4 * CHUNK]
    assert opened == [3, 5, 6, 4, 7, 4]
    # What is held outlives the file.
    view = file.view(0, 10)
    file.close()
    file.close()
    assert view.tobytes() == plain[:10]
    assert tensor.data.tobytes() == plain[3 * CHUNK + 10 :][: 4 * CHUNK]


def test_released_memory_goes_back(tmp_path: Path) -> None:
    def anonymous() -> int:
        rows = Path("/proc/self/status").read_text().splitlines()
        return next(int(row.split()[1]) << 10 for row in rows if row.startswith("RssAnon"))

    size = 32 << 20
    path = sealed(tmp_path, bytes(size), chunk=1 << 17)
    for locked in (True, False):
        file = DecryptedFile(path, KeySource.of(KEY))
        if not locked:
            file._memory().locked = False
        before = anonymous()
        if file.locked and not locked:
            continue
        file.view(0, size)
        assert anonymous() > before + size // 2
        file.release(0, size)
        assert anonymous() < before + size // 4
        file.close()


def test_threads_read_the_same_chunks(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    plain = text(64 * CHUNK)
    file = DecryptedFile(sealed(tmp_path, plain), KeySource.of(KEY))
    # Neighbours share chunks, each is released when it was read.
    places = [(begin, min(1000 + begin % 7000, len(plain) - begin)) for begin in range(0, len(plain), 1777)]

    def read(place: tuple[int, int]) -> bool:
        return file.read(*place) == plain[place[0] :][: place[1]]

    with ThreadPoolExecutor(4) as workers:
        for _ in range(4):
            assert all(workers.map(read, places))
            file.release(0, file.size)


@pytest.mark.parametrize("into", [True, False])
def test_an_older_cryptography_does_too(into: bool, tmp_path: Path) -> None:
    """`decrypt_into` is younger than the oldest version that is allowed."""
    plain = text(3 * CHUNK + 5)
    path = sealed(tmp_path, plain)
    file = DecryptedFile(path, KeySource.of(KEY))
    cipher = file._memory()._file._cipher
    if not into:
        cipher._aead = SimpleNamespace(encrypt=cipher._aead.encrypt, decrypt=cipher._aead.decrypt)
    assert file.read(0, len(plain)) == plain
    file.release(0, len(plain))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="damaged: chunk 3"):
        file.read(0, len(plain))
    assert file.read(0, 3 * CHUNK) == plain[: 3 * CHUNK]
    target = bytearray(b"x" * 5)
    with memoryview(content)[-5 - TAG_BYTES :] as last:
        assert not cipher.open_into(3, last, memoryview(target))
    assert target == bytes(5)


def test_a_plain_file_is_mapped_and_an_empty_one_refused(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"FLLMSEA")
    file = open_mapped(tmp_path / "plain")
    assert not file.encrypted
    assert file.read(0, 7) == b"FLLMSEA"
    with pytest.raises(ModelFileError, match="the file is empty"):
        open_mapped(sealed(tmp_path, b""), KeySource.of(KEY))


def test_without_locking_it_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decrypted, "_lock_pages", lambda address, nbytes: False)
    plain = text(3 * CHUNK)
    file = DecryptedFile(sealed(tmp_path, plain), KeySource.of(KEY))
    assert not file.locked
    assert file.read(0, len(plain)) == plain
    file.release(0, len(plain))
    assert file.sha256() == hashlib.sha256(plain).digest()
    assert file.read(5, 100) == plain[5:105]


# ---- keys --------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32).filter(lambda key: len(set(key)) > 1))
def test_every_spelling_of_a_key(key: bytes) -> None:
    spellings = [
        key.hex(),
        key.hex().upper(),
        base64.b64encode(key).decode(),
        base64.urlsafe_b64encode(key).decode(),
        base64.b64encode(key).decode().rstrip("="),
    ]
    for spelling in spellings:
        assert parse_key(f" {spelling}\n", "key") == key


@pytest.mark.parametrize(
    "value", ["", "abc", "0" * 64, "g" * 64, "ab" * 31, "a" * 45, base64.b64encode(b"x").decode()]
)
def test_what_is_no_key(value: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_key(value, "key")
    assert not value or value not in str(caught.value)


def test_key_files_that_others_can_open_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key_file(path, generate_key())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = read_key_file(path)
    for mode in (0o640, 0o604, 0o602, 0o660, 0o644):
        path.chmod(mode)
        with pytest.raises(RequestError, match="no other user"):
            read_key_file(path)
    path.chmod(0o400)
    assert read_key_file(path) == key
    with pytest.raises(RequestError, match="does not exist yet"):
        write_key_file(path, generate_key())
    with pytest.raises(RequestError, match="No such file"):
        read_key_file(tmp_path / "none")
    with pytest.raises(RequestError, match="key_file"):
        read_key_file(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_a_key_that_a_group_was_given(tmp_path: Path) -> None:
    """As mounted secrets are: somebody else's file, which this process reads as one of the group."""
    path = tmp_path / "key"
    write_key_file(path, KEY.hex())
    path.chmod(0o440)
    os.chown(path, 12345, -1)
    assert read_key_file(path) == KEY
    path.chmod(0o460)
    with pytest.raises(RequestError, match="no other user"):
        read_key_file(path)


def test_where_a_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=rf"the key of it, .*{KEY_ENV}"):
        KeySource().key("it")
    path = tmp_path / "key"
    write_key_file(path, OTHER.hex())
    monkeypatch.setenv(KEY_FILE_ENV, str(path))
    assert KeySource().key("it") == OTHER
    monkeypatch.setenv(KEY_ENV, KEY.hex())
    assert KeySource().key("it") == KEY
    source = KeySource(path)
    monkeypatch.chdir("/")
    assert source.key("it") == OTHER
    path.unlink()
    assert source.key("it") == OTHER  # kept
    assert KEY.hex() not in repr(source) + repr(vars(source))
    with pytest.raises(RequestError, match="key_file"):
        KeySource("")


# ---- models on disk, and the command line ------------------------------------------------------------------


def model_folder(path: Path) -> dict[str, bytes]:
    files = {
        "config.json": b"{}",
        "model.safetensors": text(3 * CHUNK),
        "additional_chat_templates/tool_use.jinja": b"{{ x }}",
        "empty.txt": b"",
    }
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    (path / ".cache").mkdir()
    (path / ".cache" / "secret").write_bytes(b"no part of the model")
    return files


def test_a_directory_becomes_one_of_encrypted_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = model_folder(tmp_path / "model")
    (tmp_path / "model" / "config.json").chmod(0o640)
    key = tmp_path / "key"
    assert run(["keygen", "--out", str(key)]) == 0
    assert run(["encrypt", str(tmp_path / "model"), str(tmp_path / "sealed"), "--key-file", str(key)]) == 0
    assert key_id(read_key_file(key)) in capsys.readouterr().err
    assert model_files(tmp_path / "sealed") == sorted(files)
    for name in files:
        assert is_encrypted(tmp_path / "sealed" / name)
    assert stat.S_IMODE((tmp_path / "sealed" / "config.json").stat().st_mode) == 0o640
    assert run(["decrypt", str(tmp_path / "sealed"), str(tmp_path / "back"), "--key-file", str(key)]) == 0
    assert {name: (tmp_path / "back" / name).read_bytes() for name in model_files(tmp_path / "back")} == files
    assert {
        stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "back").rglob("*") if path.is_file()
    } == {0o600}
    assert stat.S_IMODE((tmp_path / "back").stat().st_mode) == 0o700
    assert sorted(os.listdir(tmp_path)) == ["back", "key", "model", "sealed"]


def test_the_command_line_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"abc")
    monkeypatch.setenv("MY_KEY", KEY.hex())

    def fails(*arguments: object) -> str:
        assert run([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    assert "MY_KEY_2" in fails("encrypt", source, tmp_path / "b", "--key-env", "MY_KEY_2")
    assert KEY_ENV in fails("encrypt", source, tmp_path / "b")
    assert run(["encrypt", str(source), str(tmp_path / "b"), "--key-env", "MY_KEY"]) == 0
    assert "does not exist yet" in fails("encrypt", source, tmp_path / "b", "--key-env", "MY_KEY")
    assert "encrypted already" in fails("encrypt", tmp_path / "b", tmp_path / "c", "--key-env", "MY_KEY")
    assert "not an encrypted file" in fails("decrypt", source, tmp_path / "c", "--key-env", "MY_KEY")
    monkeypatch.setenv("MY_KEY", OTHER.hex())
    assert "wrong key" in fails("decrypt", tmp_path / "b", tmp_path / "c", "--key-env", "MY_KEY")
    assert "directory that exists" in fails(
        "decrypt", tmp_path / "b", tmp_path / "x" / "c", "--key-env", "MY_KEY"
    )
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    capsys.readouterr()
    assert run(["keygen"]) == 0
    assert len(parse_key(capsys.readouterr().out, "key")) == 32


@pytest.mark.parametrize("nameless", [True, False])
def test_nothing_is_left_where_it_fails(
    nameless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nameless:  # a file system that has no files without names
        real = os.open

        def without(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(95, "Operation not supported")
            return real(path, flags, *rest, **named)

        monkeypatch.setattr(model_encryption.os, "open", without)
    files = model_folder(tmp_path / "model")
    encrypt_model(tmp_path / "model", tmp_path / "sealed", KEY)
    damaged = tmp_path / "sealed" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"model.safetensors"):
        decrypt_model(tmp_path / "sealed", tmp_path / "back", KEY)
    with pytest.raises(ModelFileError, match="damaged"):
        decrypt_model(damaged, tmp_path / "back", KEY)
    assert sorted(os.listdir(tmp_path)) == ["model", "sealed"]
    content[-1] ^= 1
    damaged.write_bytes(content)
    decrypt_model(damaged, tmp_path / "back", KEY)
    assert (tmp_path / "back").read_bytes() == files["model.safetensors"]
    with pytest.raises(RequestError, match="outside the model"):
        encrypt_model(tmp_path / "model", tmp_path / "model" / "inside", KEY)


def test_a_name_that_comes_up_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    real = encryption.Cipher.seal

    def seal(self: Any, index: int, plain: bytes) -> bytes:
        (tmp_path / "b").write_bytes(b"somebody else's")
        return real(self, index, plain)

    monkeypatch.setattr(encryption.Cipher, "seal", seal)
    with pytest.raises(RequestError, match="does not exist yet"):
        encrypt_model(tmp_path / "a", tmp_path / "b", KEY)
    assert (tmp_path / "b").read_bytes() == b"somebody else's"


@pytest.mark.parametrize("change", [b"", b"longer than it was"])
def test_a_source_that_changes_is_noticed(
    change: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(text(3 * CHUNK))
    real = encryption.Cipher.seal

    def seal(self: Any, index: int, plain: bytes) -> bytes:
        if index == 0:
            with open(tmp_path / "a", "r+b" if not change else "ab") as file:
                if change:
                    file.write(change)
                else:
                    file.truncate(10)
        return real(self, index, plain)

    monkeypatch.setattr(encryption.Cipher, "seal", seal)
    with pytest.raises(ModelFileError, match=r"became (shorter|longer)"):
        encrypt_model(tmp_path / "a", tmp_path / "b", KEY, chunk_bytes=CHUNK)
    assert os.listdir(tmp_path) == ["a"]


# ---- digests -----------------------------------------------------------------------------------------------


def test_the_digest_is_what_sha256sum_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model_folder(model)
    (model / "fastllm.json").write_text("{}")
    (model / "Zz.txt").write_text("sorts before small letters")
    command = "find -L * -type f ! -name fastllm.json | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum"
    expected = subprocess.run(
        command, shell=True, cwd=model, capture_output=True, text=True, check=True
    ).stdout
    assert model_sha256(model) == expected.split()[0]
    file = model / "model.safetensors"
    expected = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout
    assert model_sha256(file) == expected.split()[0]
    assert run(["info", "--sha256", str(file.rename(model / "m.gguf"))]) == 0
    assert capsys.readouterr().out.strip() == expected.split()[0]


def test_every_change_of_a_directory_changes_its_digest(tmp_path: Path) -> None:
    model_folder(tmp_path)
    seen = {model_sha256(tmp_path)}

    def changed() -> None:
        digest = model_sha256(tmp_path)
        assert digest not in seen
        seen.add(digest)

    (tmp_path / "new").write_bytes(b"")
    changed()
    (tmp_path / "new").rename(tmp_path / "newer")
    changed()
    (tmp_path / "newer").write_bytes(b"x")
    changed()
    (tmp_path / ".hidden").write_bytes(b"x")
    assert model_sha256(tmp_path) in seen
    (tmp_path / "line\nbreak").write_bytes(b"")
    with pytest.raises(ModelFileError, match="a file of the name"):
        model_sha256(tmp_path)
    (tmp_path / "line\nbreak").unlink()
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(ModelFileError, match="contains itself"):
        model_sha256(tmp_path)


def test_a_model_that_changes_after_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"abc")
    verified = VerifiedModel(path, model_sha256(path).upper())
    verified.check_unchanged()
    path.write_bytes(b"abd")
    with pytest.raises(ModelFileError, match="changed on disk"):
        verified.check_unchanged()
    with pytest.raises(ModelFileError, match=r"expected sha256 .*, found "):
        VerifiedModel(path, "0" * 64)
    path.unlink()
    with pytest.raises(ModelFileError, match="No such file"):
        VerifiedModel(path, "0" * 64)
