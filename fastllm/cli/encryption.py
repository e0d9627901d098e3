"""`fastllm encrypt`, `decrypt` and `keygen`: models that are encrypted on disk."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastllm.formats.keys import (
    KEY_ENV,
    KEY_FILE_ENV,
    KeySource,
    generate_key,
    key_id,
    parse_key,
    read_key_env,
    read_key_file,
    write_key_file,
)
from fastllm.formats.source import resolve

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_commands(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds the three commands to a parser."""
    command = commands.add_parser(
        "encrypt",
        parents=[common],
        help="encrypt a model",
        description="Encrypts a model, AES-256-GCM: a file, or every file of a directory. fastllm runs the "
        "result as it runs the model, given the key.",
    )
    command.add_argument("model", metavar="MODEL", help="a path, or a model reference")
    command.add_argument("out", metavar="OUT", help="what to write; it must not exist")
    add_key(command)
    command.set_defaults(command=encrypt)

    command = commands.add_parser(
        "decrypt",
        parents=[common],
        help="decrypt a model",
        description="Writes what `encrypt` was given, readable for its owner alone.",
    )
    command.add_argument("model", metavar="MODEL", help="an encrypted file or directory")
    command.add_argument("out", metavar="OUT", help="what to write; it must not exist")
    add_key(command)
    command.set_defaults(command=decrypt)

    command = commands.add_parser(
        "keygen",
        parents=[common],
        help="make a key",
        description="Makes a key of 256 random bits for models or an audit log. Whoever has it reads what it "
        "encrypts, and nobody reads that without it: keep it apart, and keep a copy.",
    )
    command.add_argument(
        "--out", metavar="FILE", help="write it there, for this user alone (default: print it)"
    )
    command.set_defaults(command=keygen)


def add_key(parser: argparse.ArgumentParser) -> None:
    """Adds --key-file and --key-env."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--key-file", metavar="FILE", help="a file with the key, which nobody else can open")
    group.add_argument(
        "--key-env",
        metavar="NAME",
        help=f"the environment variable that has the key (default: {KEY_ENV}, or the file of {KEY_FILE_ENV})",
    )


def read_key(options: argparse.Namespace, what: str) -> bytes:
    """The key that the options name."""
    if options.key_env is not None:
        return read_key_env(options.key_env)
    return KeySource(options.key_file).key(what)


def encrypt(options: argparse.Namespace) -> int:
    """Write an encrypted copy."""
    from fastllm.formats.model_encryption import encrypt_model

    key = read_key(options, str(options.out))
    # A path as it is: an adapter's directory is no model.
    model = Path(options.model) if Path(options.model).exists() else resolve(options.model)
    encrypt_model(model, options.out, key, progress=True)
    print(f"fastllm: encrypted with key {key_id(key)}", file=sys.stderr)
    return 0


def decrypt(options: argparse.Namespace) -> int:
    """Write a copy in plain text."""
    from fastllm.formats.model_encryption import decrypt_model

    decrypt_model(Path(options.model), options.out, read_key(options, str(options.model)), progress=True)
    return 0


def keygen(options: argparse.Namespace) -> int:
    """Make a key."""
    key = generate_key()
    if options.out is None:
        print(key)
    else:
        write_key_file(options.out, key)
        key = read_key_file(options.out).hex()  # as it will be read
    print(f"fastllm: key {key_id(parse_key(key, 'key'))}", file=sys.stderr)
    return 0
