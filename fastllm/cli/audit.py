"""`fastllm audit verify`: is a server's audit log what it wrote?"""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING

from fastllm.errors import RequestError
from fastllm.formats.keys import read_key_env, read_key_file

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

FOUND = 1  # exit status
_HEAD = re.compile(r"([0-9]{1,18}):([0-9a-fA-F]{64})")


def add_commands(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds the command to a parser."""
    audit = commands.add_parser("audit", help="check an audit log", description="Checks an audit log.")
    actions = audit.add_subparsers(title="actions", metavar="ACTION", required=True)
    command = actions.add_parser(
        "verify",
        parents=[common],
        help="check every line and their chain",
        description="Checks every line of a log and of its older files, and that none was changed, removed, "
        "moved or inserted. Exit status 1 where something was found. Prints the head of the chain, which a "
        "later check can ask for.",
    )
    command.add_argument("path", metavar="PATH", help="the newest file of the log")
    group = command.add_mutually_exclusive_group()
    group.add_argument("--key-file", metavar="FILE", help="a file with the key that the log was written with")
    group.add_argument("--key-env", metavar="NAME", help="the environment variable that has the key")
    command.add_argument(
        "--head", metavar="SEQ:HASH", help="a line that must be there: nothing up to it was cut off"
    )
    command.add_argument(
        "--allow-missing-files", action="store_true", help="older files may have been taken away"
    )
    command.set_defaults(command=verify_log)


def verify_log(options: argparse.Namespace) -> int:
    """Check, print what is wrong, one finding a line, and what there is."""
    from fastllm.serve.audit_verify import verify

    key = None
    if options.key_file is not None:
        key = read_key_file(options.key_file)
    elif options.key_env is not None:
        key = read_key_env(options.key_env)
    head = None
    if options.head is not None:
        match = _HEAD.fullmatch(options.head)
        if match is None:
            raise RequestError("head", options.head, "SEQ:HASH, as an earlier check printed it")
        head = (int(match[1]), match[2])
    report = verify(options.path, key, head=head, allow_missing_files=options.allow_missing_files)
    for problem in report.problems:
        print(problem)
    if report.torn_bytes:
        print(f"fastllm: it ends in an unfinished line of {report.torn_bytes} bytes", file=sys.stderr)
    if not report.closed:
        print("fastllm: it was not closed: in use, killed, or cut off", file=sys.stderr)
    files = "1 file" if len(report.files) == 1 else f"{len(report.files)} files"
    print(f"{'ok' if report.ok else 'NOT OK'}: {report.lines} lines in {files}, {report.requests} requests, "
          f"{report.recoveries} recoveries")  # fmt: skip
    if report.head is not None:
        print(f"head: {report.head[0]}:{report.head[1]}")
    return 0 if report.ok else FOUND
