"""How a block of the KV cache is made fit for a file that may return other bytes than it was given.

A seal turns a block into what is written and a check, which stays in memory; with both it gives the block
back, or nothing if a bit of either, or of the content hash that the block is known by, is another one. Since
the checks are not in the file, neither a block of another place nor an older one of the same can pass.
"""

from __future__ import annotations

import importlib
import itertools
import zlib
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastllm.errors import RequestError

UInt8Array = npt.NDArray[np.uint8]

TAIL = 16  # bytes that `open` needs behind what was read
EXTRA = "crypto"  # of fastllm's: what the encrypting seal needs


class Seal(Protocol):
    """What `ChecksumSeal` and `EncryptingSeal` have in common."""

    def close(self, content: bytes, block: UInt8Array) -> tuple[memoryview, bytes]:
        """What is to be written for a block (N,), N bytes, and its check."""
        ...

    def open(self, content: bytes, buffer: UInt8Array, check: bytes) -> UInt8Array | None:
        """The block again, from a buffer (N + TAIL,) whose first N bytes were read; None: it is not that
        block. The result may be a view of the buffer, which is changed."""
        ...


class ChecksumSeal:
    """CRC-32 over content hash and block, which is written as it is.

    It is there for what disks and their drivers do by accident. zlib's took 0.24 s per GB where SHA-256 with
    the processor's instructions took 0.56 s and BLAKE2b 1.06 s, and a hit waits for it. Whoever has to fear
    that somebody writes to the file on purpose encrypts.
    """

    def close(self, content: bytes, block: UInt8Array) -> tuple[memoryview, bytes]:
        return block.data, _crc(content, block)

    def open(self, content: bytes, buffer: UInt8Array, check: bytes) -> UInt8Array | None:
        block = buffer[: len(buffer) - TAIL]
        return block if _crc(content, block) == check else None


class EncryptingSeal:
    """AES-256-GCM with a key of its own that is nowhere but in this object; nonces count up, so that none is
    used twice; the content hash is associated data.

    Raises:
        RequestError: the package that it needs is not installed.
    """

    _NONCE = 12  # bytes

    def __init__(self) -> None:
        check_encryption()
        aead: Any = importlib.import_module("cryptography.hazmat.primitives.ciphers.aead")
        self._cipher = aead.AESGCM(aead.AESGCM.generate_key(bit_length=256))
        self._invalid: type[Exception] = importlib.import_module("cryptography.exceptions").InvalidTag
        self._nonces = itertools.count()

    def close(self, content: bytes, block: UInt8Array) -> tuple[memoryview, bytes]:
        nonce = next(self._nonces).to_bytes(self._NONCE, "little")
        sealed = memoryview(self._cipher.encrypt(nonce, block.data, content))
        return sealed[:-TAIL], nonce + bytes(sealed[-TAIL:])

    def open(self, content: bytes, buffer: UInt8Array, check: bytes) -> UInt8Array | None:
        buffer[-TAIL:] = np.frombuffer(check, np.uint8)[self._NONCE :]
        try:
            block = self._cipher.decrypt(check[: self._NONCE], buffer.data, content)
        except self._invalid:
            return None
        return np.frombuffer(block, np.uint8)


def check_encryption() -> None:
    """Raises RequestError unless `EncryptingSeal` has what it needs."""
    try:
        importlib.import_module("cryptography.hazmat.primitives.ciphers.aead")
    except ImportError as error:
        limit = f"False without the package cryptography (pip install 'fastllm[{EXTRA}]')"
        raise RequestError("kv_offload_encrypted", True, limit) from error


def _crc(content: bytes, block: UInt8Array) -> bytes:
    return zlib.crc32(block.data, zlib.crc32(content)).to_bytes(4, "little")
