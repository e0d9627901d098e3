"""The format of an encrypted file: AES-256-GCM in chunks, so that any part can be read by itself.

Layout (numbers little-endian)::

    header, 104 bytes
      0   8  magic, "FLLMSEAL"
      8   4  u32 version, 1
     12   4  u32 chunk size C, bytes of plain text: a power of two, 4 KiB to 16 MiB
     16   8  u64 length L of the plain text, bytes
     24   8  key id: the first half of `key_id`, which tells a wrong key from a damaged file
     32  32  salt, random: makes the keys of this file
     64   4  u32 CRC-32 of the 64 bytes before, which tells a damaged header from a forged one
     68   4  zero
     72  32  HMAC-SHA-256 of the 72 bytes before, under the header key: the header tag
    chunks, ceil(L / C) of them, one of nothing if L = 0
      the chunk encrypted, C bytes (the last: what is left), and its tag of 16 bytes

Keys: HKDF-SHA-256 (RFC 5869) of the 32-byte key that the user has, with the salt and the info "fastllm
encrypted file 1", gives 64 bytes: the key of the chunks, then that of the header. Each file has keys of its
own, since salts are 256 random bits; so a counter is a nonce that is never used twice.

Chunk i has the nonce u64 i, u8 1 if it is the last one else 0, and three zero bytes (the STREAM construction
of Hoang, Reyhanitabar, Rogaway and Vizar, 2015); its associated data is the header tag. A chunk that was
moved, dropped, repeated, cut, or taken from another file does not open; neither does one of a file whose
header was changed. What is not hidden: the length, and a file's name.

Needs the package cryptography (extra [crypto]), which is imported when a key meets a file.
"""

from __future__ import annotations

import hmac
import importlib
import os
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm.errors import ModelFileError, RequestError
from fastllm.formats.keys import KeySource, key_id

MAGIC = b"FLLMSEAL"
VERSION = 1
HEADER_BYTES = 104
TAG_BYTES = 16
CHUNK_BYTES = 1 << 17
MIN_CHUNK_BYTES = 1 << 12
MAX_CHUNK_BYTES = 1 << 24
EXTRA = "crypto"

_FACTS = struct.Struct("<8sIIQ8s32s")  # what the CRC is of
_CHECK = struct.Struct("<II")
_NONCE = struct.Struct("<QB3x")
_INFO = b"fastllm encrypted file 1"
_MAX_LENGTH = 1 << 48


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of an encrypted file says.

    Attributes:
        chunk_bytes: plain text in a chunk.
        length: plain text in all, bytes.
        key: id of the key, as `key_id`.
        salt: 32 bytes.
    """

    chunk_bytes: int
    length: int
    key: str
    salt: bytes

    @property
    def chunks(self) -> int:
        """How many there are; at least one."""
        return max(-(-self.length // self.chunk_bytes), 1)

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return HEADER_BYTES + self.length + TAG_BYTES * self.chunks

    def place(self, index: int) -> tuple[int, int]:
        """Where chunk `index` begins in the file, and its length there, tag included."""
        begin = HEADER_BYTES + index * (self.chunk_bytes + TAG_BYTES)
        plain = min(self.chunk_bytes, self.length - index * self.chunk_bytes)
        return begin, plain + TAG_BYTES


def new_header(length: int, key: bytes, chunk_bytes: int = CHUNK_BYTES) -> Header:
    """The header of a new file of `length` bytes, with a fresh salt.

    Raises:
        RequestError: a chunk size that the format does not have.
    """
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes & (chunk_bytes - 1):
        limit = f"a power of two in {MIN_CHUNK_BYTES}..{MAX_CHUNK_BYTES}"
        raise RequestError("chunk_bytes", chunk_bytes, limit)
    return Header(chunk_bytes, length, key_id(key), os.urandom(32))


class Cipher:
    """Seals and opens the chunks of one file. Threads may share one.

    Attributes:
        header_bytes: the header as it stands in the file.

    Raises:
        RequestError: the package cryptography is not installed.
    """

    def __init__(self, header: Header, key: bytes) -> None:
        aead, self._invalid, keys = _crypto(header.salt, key)
        self._aead = aead(keys[:32])
        facts = _FACTS.pack(
            MAGIC, VERSION, header.chunk_bytes, header.length, bytes.fromhex(header.key), header.salt
        )
        told = facts + _CHECK.pack(zlib.crc32(facts), 0)
        self._tag = hmac.digest(keys[32:], told, "sha256")
        self._last = header.chunks - 1
        self.header_bytes = told + self._tag

    def seal(self, index: int, plain: bytes | memoryview) -> bytes:
        """Chunk `index`, encrypted, with its tag. To be called once for each index."""
        sealed: bytes = self._aead.encrypt(self._nonce(index), plain, self._tag)
        return sealed

    def open(self, index: int, sealed: bytes | memoryview) -> bytes | None:
        """Chunk `index` again; None: it is not what was sealed."""
        try:
            plain: bytes = self._aead.decrypt(self._nonce(index), sealed, self._tag)
        except self._invalid:
            return None
        return plain

    def open_into(self, index: int, sealed: memoryview, target: memoryview) -> bool:
        """As `open`, into `target`, which has the length of the plain text; False: it is not what was sealed,
        and the target is all zeros."""
        if hasattr(self._aead, "decrypt_into"):  # since cryptography 47; a third of the time is the copy
            try:
                self._aead.decrypt_into(self._nonce(index), sealed, self._tag, target)
                return True
            except self._invalid:
                plain = None
        else:
            plain = self.open(index, sealed)
        target[:] = bytes(len(target)) if plain is None else plain
        return plain is not None

    def _nonce(self, index: int) -> bytes:
        return _NONCE.pack(index, index == self._last)


class EncryptedFile:
    """An encrypted file, open for reading, its header checked. Threads may share one.

    Args:
        path: the file.
        keys: where its key is.

    Attributes:
        path, header: of the file.

    Raises:
        ModelFileError: it cannot be read, is damaged, cut short or too long, or was encrypted with another
            key.
        RequestError: there is no key, or the package cryptography is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], keys: KeySource) -> None:
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ModelFileError(str(self.path), error.strerror or str(error)) from error
        try:
            told = self._pread(HEADER_BYTES, 0)
            status = os.fstat(self._file)
            if not stat.S_ISREG(status.st_mode):
                raise self._error("not a regular file")
            self.header = self._parse(told, status.st_size)
            key = keys.key(str(self.path))
            if self.header.key != key_id(key):
                raise self._error(
                    f"wrong key: it was encrypted with key {self.header.key}, this is key {key_id(key)}", 24
                )
            self._cipher = Cipher(self.header, key)
            if not hmac.compare_digest(self._cipher.header_bytes, told):
                raise self._error("the header was changed: it does not match its tag", 0)
        except BaseException:
            os.close(self._file)
            raise
        self._closed = False

    def chunk(self, index: int) -> bytes:
        """The plain text of chunk `index`.

        Raises:
            ModelFileError: it is damaged, with the offset; or the file has been cut short meanwhile.
        """
        begin, count = self.header.place(index)
        sealed = self._pread(count, begin)
        self._check_count(len(sealed), index)
        plain = self._cipher.open(index, sealed)
        if plain is None:
            raise self._damaged(index)
        return plain

    def chunk_into(self, index: int, buffer: bytearray, target: memoryview) -> None:
        """The plain text of chunk `index`, without memory of its own.

        Args:
            buffer: for what is in the file: a chunk and its tag, or longer.
            target: of the length of the plain text; undefined after an error.

        Raises:
            ModelFileError: as `chunk`.
        """
        begin, count = self.header.place(index)
        sealed = memoryview(buffer)[:count]
        there = 0
        try:
            while there < count and (part := os.preadv(self._file, [sealed[there:]], begin + there)):
                there += part
        except OSError as error:
            raise self._error(error.strerror or str(error), begin) from error
        self._check_count(there, index)
        if not self._cipher.open_into(index, sealed, target):
            raise self._damaged(index)

    def _check_count(self, there: int, index: int) -> None:
        begin, count = self.header.place(index)
        if there < count:
            raise self._error(f"truncated: the chunk takes {count} bytes, {there} are there", begin)

    def _damaged(self, index: int) -> ModelFileError:
        begin, count = self.header.place(index)
        return self._error(f"damaged: chunk {index} ({count} bytes) does not match its tag", begin)

    def close(self) -> None:
        """Close the file. May be called again."""
        if not self._closed:
            self._closed = True
            os.close(self._file)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _pread(self, count: int, offset: int) -> bytes:
        try:
            parts = []
            while count and (part := os.pread(self._file, count, offset)):
                parts.append(part)
                count -= len(part)
                offset += len(part)
        except OSError as error:
            raise self._error(error.strerror or str(error), offset) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _parse(self, told: bytes, size: int) -> Header:
        """Everything that can be said without the key."""
        if told[: len(MAGIC)] != MAGIC:
            raise self._error("not an encrypted file", 0)
        if len(told) < HEADER_BYTES:
            raise self._error(f"truncated: the header takes {HEADER_BYTES} bytes, {len(told)} are there", 0)
        _, version, chunk, length, key, salt = _FACTS.unpack_from(told)
        if version != VERSION:
            raise self._error(f"encrypted in version {version} of the format; version {VERSION} is read", 8)
        if _CHECK.unpack_from(told, _FACTS.size) != (zlib.crc32(told[: _FACTS.size]), 0):
            raise self._error("the header is damaged: it does not match its checksum", _FACTS.size)
        if not MIN_CHUNK_BYTES <= chunk <= MAX_CHUNK_BYTES or chunk & (chunk - 1):
            raise self._error(f"chunks of {chunk} bytes are not of this format", 12)
        if length > _MAX_LENGTH:
            raise self._error(f"a plain text of {length} bytes is longer than {_MAX_LENGTH}", 16)
        header = Header(chunk, length, key.hex(), salt)
        if size < header.file_bytes:
            raise self._error(f"truncated: {header.file_bytes} bytes were written, {size} are there", size)
        if size > header.file_bytes:
            raise self._error(f"{size - header.file_bytes} trailing bytes", header.file_bytes)
        return header

    def _error(self, reason: str, offset: int | None = None) -> ModelFileError:
        return ModelFileError(str(self.path), reason, offset=offset)


def is_encrypted(path: str | os.PathLike[str]) -> bool:
    """Whether a file is there, regular, and begins with the magic."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return False
    try:
        return stat.S_ISREG(os.fstat(file).st_mode) and os.pread(file, len(MAGIC), 0) == MAGIC
    except OSError:
        return False
    finally:
        os.close(file)


def decrypt_small(path: str | os.PathLike[str], keys: KeySource, limit: int) -> bytes:
    """The whole plain text of an encrypted file, of which there may be `limit` bytes at most.

    Raises:
        ModelFileError, RequestError: as `EncryptedFile`; larger than `limit`.
    """
    file = EncryptedFile(path, keys)
    try:
        if file.header.length > limit:
            raise ModelFileError(str(path), f"larger than {limit} bytes")
        return b"".join(map(file.chunk, range(file.header.chunks)))
    finally:
        file.close()


def _crypto(salt: bytes, key: bytes) -> tuple[Any, type[Exception], bytes]:
    """The AEAD, what it raises, and 64 bytes of key."""
    try:
        aead: Any = importlib.import_module("cryptography.hazmat.primitives.ciphers.aead")
        invalid: type[Exception] = importlib.import_module("cryptography.exceptions").InvalidTag
        kdf: Any = importlib.import_module("cryptography.hazmat.primitives.kdf.hkdf")
        hashes: Any = importlib.import_module("cryptography.hazmat.primitives.hashes")
    except ImportError as error:
        limit = f"the package cryptography (pip install 'fastllm[{EXTRA}]')"
        raise RequestError("encryption", "an encrypted file", limit) from error
    keys: bytes = kdf.HKDF(hashes.SHA256(), 64, salt, _INFO).derive(key)
    return aead.AESGCM, invalid, keys
