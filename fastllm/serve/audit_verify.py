"""Checking an audit log: every line of every file, and how they hang together.

What is found, and told apart as far as a chain can tell:

    changed    a line's hash is not that of its bytes, or it does not follow the line before it
    removed    sequence numbers are missing, or a file's first line, or older files
    reordered  a line stands after one that should come later
    inserted   a sequence number is there a second time
    damaged    not a line of an audit log

A log that was cut off behind a whole line looks like a shorter log. Whoever keeps `AuditLog.head` somewhere
else can tell: `verify(..., head=...)`. A last line without its newline is no finding: it is being written, or
a crash came in between, and the next start mends it.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastllm.errors import AuditError, RequestError
from fastllm.formats.keys import key_id
from fastllm.serve.audit_chain import GENESIS, Hasher, Line, parse_line
from fastllm.serve.audit_files import key_words, rotated_files

MAX_PROBLEMS = 1000  # that are listed
_MAX_LINE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class AuditProblem:
    """Something that is wrong.

    Attributes:
        kind: "changed", "removed", "reordered", "inserted" or "damaged".
        file: name of the file.
        line: number of the line in it, from 1: the one at fault, or the one before which something is
            missing.
        sequence: what the line says its number is; for "removed" the first that is missing; None: it says
            nothing.
        detail: in words.
    """

    kind: str
    file: str
    line: int
    sequence: int | None
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.detail}"


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What `verify` found.

    Attributes:
        problems: in the order of the files, MAX_PROBLEMS at most.
        files: names of those that were read.
        lines: whole lines.
        requests: lines about requests.
        recoveries: lines about a crash.
        head: sequence and hash of the last line; None: there is no line.
        closed: the last line says that the log was closed.
        torn_bytes: length of a last line without its newline.
    """

    problems: tuple[AuditProblem, ...]
    files: tuple[str, ...]
    lines: int
    requests: int
    recoveries: int
    head: tuple[int, str] | None
    closed: bool
    torn_bytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    path: str | os.PathLike[str],
    key: bytes | None = None,
    *,
    head: tuple[int, str] | None = None,
    allow_missing_files: bool = False,
) -> AuditReport:
    """Check a log; it may be in use.

    Args:
        path: its newest file.
        key: the key that it was written with.
        head: sequence and hash of a line that must be there, as `AuditLog.head` gave them.
        allow_missing_files: older files may have been taken away.

    Raises:
        AuditError: there is no log, or it cannot be read.
        RequestError: it was written with another key, or without one.
    """
    place = Path(path).absolute()
    try:
        while True:
            older = rotated_files(place)
            files = [*older.items()]
            if place.exists():
                files.append((max(older, default=0) + 1, place))
            if not files:
                raise AuditError(str(path), "there is no audit log")
            check = _Check(key, head, allow_missing_files)
            for number, file in files:
                check.file(number, file, newest=file == files[-1][1])
            if rotated_files(place) == older:  # else a new file was begun meanwhile
                return check.report(tuple(file.name for _, file in files))
    except OSError as error:
        raise AuditError(str(error.filename or path), error.strerror or str(error)) from error


class _Check:
    """One pass over a log."""

    def __init__(self, key: bytes | None, head: tuple[int, str] | None, allow_missing_files: bool) -> None:
        self._key = None if key is None else key_id(key)
        self._hasher = Hasher(key)
        self._wanted = head
        self._wanted_found = head is None
        self._allow_missing_files = allow_missing_files
        self._problems: list[AuditProblem] = []
        self._gaps: list[tuple[int, int, str, int]] = []  # first and end of what is missing, file, line
        self._first = True
        self._expected, self._previous = 0, GENESIS
        self._lines = self._requests = self._recoveries = self._torn = 0
        self._closed = False

    def file(self, number: int, place: Path, *, newest: bool) -> None:
        name = place.name
        for index, raw in enumerate(_lines(place), 1):
            if not raw.endswith(b"\n"):
                if newest:
                    self._torn = len(raw)
                else:
                    self._found("damaged", name, index, None, "the last line has no newline")
                return
            self._lines += 1
            line = parse_line(raw[:-1], self._hasher)
            if line is None:
                self._found("damaged", name, index, None, "not a line of an audit log")
                self._expected += 1
                self._previous = ""
                self._closed = False
                continue
            if index == 1:
                self._begin(line, number, name)
            self._line(line, name, index)

    def _begin(self, line: Line, number: int, name: str) -> None:
        """The first line of a file."""
        body = line.body()
        if body.get("kind") != "begin":
            self._found("removed", name, 1, None, "the first line of the file is missing")
        elif body.get("key") != self._key:
            raise RequestError("key", key_words(self._key), f"a log that was written so; {name} was written "
                               f"{key_words(body.get('key'))}")  # fmt: skip
        elif body.get("file") != number:
            self._found("reordered", name, 1, line.sequence,
                        f"this is file {body.get('file')!r:.20} of the log")  # fmt: skip
        if self._first and number > 1:
            if not self._allow_missing_files:
                self._found("removed", name, 1, None, f"the {number - 1} files before it are not here")
            self._expected, self._previous = line.sequence, line.previous
        self._first = False

    def _line(self, line: Line, name: str, index: int) -> None:
        if self._wanted is not None and line.genuine and line.sequence == self._wanted[0]:
            self._wanted_found |= hmac.compare_digest(line.hash, self._wanted[1].lower())
        if not line.genuine:
            self._found("changed", name, index, line.sequence, "its hash is not that of what it says")
            self._advance(line, max(self._expected, 0) + 1)
            return
        if line.sequence < self._expected:
            self._late(line, name, index)
            return
        if line.sequence > self._expected:
            self._gaps.append((self._expected, line.sequence, name, index))
        elif self._previous and not hmac.compare_digest(line.previous, self._previous):
            self._found("changed", name, index, line.sequence,
                        "it does not follow the line before it: one of the two was changed")  # fmt: skip
        self._advance(line, line.sequence + 1)
        kind = line.body().get("kind")
        self._requests += kind == "request"
        self._recoveries += kind == "recovery"
        self._closed = kind == "close"

    def _advance(self, line: Line, expected: int) -> None:
        self._expected, self._previous = expected, line.hash
        self._closed = False

    def _late(self, line: Line, name: str, index: int) -> None:
        """A line whose number is behind what was there already."""
        for place, (first, end, file, at) in enumerate(self._gaps):
            if first <= line.sequence < end:
                rest = [(first, line.sequence, file, at), (line.sequence + 1, end, file, at)]
                self._gaps[place : place + 1] = [gap for gap in rest if gap[0] < gap[1]]
                self._found("reordered", name, index, line.sequence,
                            f"line {line.sequence} stands behind line {self._expected - 1}")  # fmt: skip
                return
        self._found("inserted", name, index, line.sequence, f"line {line.sequence} is there a second time")

    def _found(self, kind: str, file: str, line: int, sequence: int | None, detail: str) -> None:
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(AuditProblem(kind, file, line, sequence, detail))

    def report(self, files: tuple[str, ...]) -> AuditReport:
        for first, end, name, index in self._gaps:
            what = f"line {first} is" if end - first == 1 else f"lines {first} to {end - 1} are"
            self._found("removed", name, index, first, f"{what} missing before it")
        if not self._wanted_found and self._wanted is not None:
            found = f"line {self._wanted[0]} with the given hash is not there"
            detail = f"{found}: the end was cut off, or the chain was made anew"
            self._found("removed", files[-1], self._lines, self._wanted[0], detail)
        if not self._lines:
            self._found("removed", files[-1], 1, 0, "there is no line")
        order = {name: place for place, name in enumerate(files)}
        problems = sorted(self._problems, key=lambda found: (order[found.file], found.line))
        head = (self._expected - 1, self._previous) if self._lines else None
        return AuditReport(
            tuple(problems),
            files,
            self._lines,
            self._requests,
            self._recoveries,
            head,
            self._closed,
            self._torn,
        )


def _lines(place: Path) -> Iterator[bytes]:
    with open(place, "rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            yield line
