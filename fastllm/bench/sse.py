"""Server-sent events out of bytes that come in pieces of any size.

The rules are those of the HTML standard, "Interpreting an event stream". Two differences: the last event
counts even if the connection ends before its blank line, since some servers send none; retry times are
ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_EVENT_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"


class SSEError(ValueError):
    """What came is no event stream."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        data: its data lines, joined by newlines.
        name: its type.
        id: the last id that the stream has given.
    """

    data: str
    name: str = "message"
    id: str = ""


class SSEParser:
    """An incremental parser: the events of a stream are the same however its bytes are cut.

    An event comes out of the call that gets the end of its blank line. The time is linear in the bytes.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._most = max_event_bytes
        self._line: list[bytes] = []  # pieces of a line that has no end yet
        self._data: list[bytes] = []
        self._name = b""
        self._id = b""
        self._size = 0  # bytes of the pending event
        self._after_cr = False  # a newline at the beginning belongs to the line before
        self._first = True

    def feed(self, piece: bytes) -> list[Event]:
        """The events that `piece` completes.

        Raises:
            SSEError: an event is larger than `max_event_bytes`.
        """
        if not piece:
            return []
        if self._after_cr and piece[0] == 0x0A:
            piece = piece[1:]
        self._after_cr = piece.endswith(b"\r") if piece else False
        events: list[Event] = []
        # For bytes these are exactly the ends that the standard knows: \n, \r and \r\n.
        for line in piece.splitlines(keepends=True):
            bare = line.rstrip(b"\r\n")
            self._size += len(bare)
            if self._size > self._most:
                raise SSEError(f"an event of more than {self._most} bytes")
            if len(bare) == len(line):
                self._line.append(line)
            elif self._line:
                self._line.append(bare)
                whole = b"".join(self._line)
                self._line.clear()
                self._take(whole, events)
            else:
                self._take(bare, events)
        return events

    def close(self) -> list[Event]:
        """The event that the end of the connection completes, if there is one."""
        events: list[Event] = []
        if self._line:
            whole = b"".join(self._line)
            self._line.clear()
            self._take(whole, events)
        self._dispatch(events)
        return events

    def _take(self, line: bytes, events: list[Event]) -> None:
        if self._first:
            self._first = False
            line = line.removeprefix(_BOM)
        if not line:
            self._dispatch(events)
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._name = value
        elif name == b"id" and b"\0" not in value:
            self._id = value

    def _dispatch(self, events: list[Event]) -> None:
        self._size = 0
        if self._data:
            data = b"\n".join(self._data).decode("utf-8", "replace")
            name = self._name.decode("utf-8", "replace") if self._name else "message"
            events.append(Event(data, name, self._id.decode("utf-8", "replace")))
            self._data.clear()
        self._name = b""
