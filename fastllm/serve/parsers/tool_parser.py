"""`ToolParser`: from the text of an answer to its content and its tool calls, while it arrives.

What is common to all formats; each is a generator, `_parse`, in a file of its own. The rules:

1. What is no call comes out as content, unchanged and in order, as soon as it cannot become a call. That
   includes a call that is malformed, breaks off, or names a function that was not offered. Reading goes
   on where it was found to be malformed, never before: the cost is linear in the length of the text.
2. Spaces before a call belong to its format. Spaces after one are content only if other content stands on
   both sides of them.
3. A call comes out when it is complete. With `stream_arguments` it begins to come out when its name is known
   and its arguments have begun; it cannot be taken back then: where the rest is malformed it ends with
   `complete=False`, its arguments are the well-formed part, and the rest is content.
4. The events depend on the text alone, not on where it was cut.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Collection

from fastllm.serve.parsers.events import (
    ArgumentsDelta,
    CallBegun,
    CallEnded,
    Content,
    Event,
    Finished,
    merge_events,
)
from fastllm.serve.parsers.json_text import Put, is_object, read_string, read_word, scan_string, scan_value
from fastllm.serve.parsers.reader import SPACES, MalformedError, Reader, Wait

_ALPHABET = string.ascii_letters + string.digits
_NAME_ALPHABET = _ALPHABET + "_-"
_NAME_CHARACTERS = 64 * 6  # of a name, each of its characters perhaps written as \uXXXX
_ARGUMENT_KEYS = ("arguments", "parameters")
_KEYS = ("name", *_ARGUMENT_KEYS, "id", "type")  # models add the last two
_OTHER_CHARACTERS = 256


def call_id() -> str:
    """A new id for a call, in OpenAI's form."""
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(24))


def short_call_id() -> str:
    """A new id for a call, in the form that Mistral's chat templates insist on."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class ToolParser:
    """Reads one answer; `feed` what arrives, then `finish` once.

    Args:
        names: of the functions that may be called; None: any.
        parallel: False: the answer ends with its first call, and what follows is dropped.
        stream_arguments: see rule 3.
        new_id: makes the ids of calls.

    Attributes:
        done: nothing that follows matters; the answer may be ended.
    """

    new_id: Callable[[], str] = staticmethod(call_id)

    def __init__(
        self,
        names: Collection[str] | None = None,
        *,
        parallel: bool = True,
        stream_arguments: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self.done = False
        self._names = None if names is None else frozenset(names)
        self._parallel = parallel
        self._streams = stream_arguments
        self._new_id = new_id or self.new_id
        self._reader = Reader()
        self._events: list[Event] = []
        self._spaces: list[str] = []  # read, and content only if content follows
        self._spaces_follow_call = False
        self._num_calls = 0
        self._complete = True
        self._has_content = False
        self._name: str | None = None  # of the call that is being read
        self._arguments: list[str] = []  # of it, as far as they have not come out
        self._open = False  # it has begun to come out
        self._machine: Wait[None] | None = self._run()

    def feed(self, text: str) -> list[Event]:
        """More of the answer; what is certain now."""
        self._reader.put(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """The answer has ended; the rest, and `Finished`."""
        self._reader.final = True
        events = self._advance()
        return [*events, Finished(self._num_calls, self._complete)]

    def _advance(self) -> list[Event]:
        if self._machine is not None:
            try:
                next(self._machine)
            except StopIteration:
                self._machine = None
        if self.done:
            self._machine = None
        events = merge_events(self._events)
        self._events.clear()
        return events

    # -- for the formats -------------------------------------------------------------------------------------

    def _parse(self) -> Wait[None]:
        """The format. Where it returns, the rest of the answer is content."""
        raise NotImplementedError

    def _run(self) -> Wait[None]:
        yield from self._parse()
        while not self.done:
            self._put_content(self._reader.take(self._reader.available))
            if self._reader.final:
                break
            yield
        if not self._spaces_follow_call:
            self._put_spaces()

    def _text_until(self, marker: str) -> Wait[bool]:
        """Content up to `marker`, with which an attempt begins. False where there is none any more."""
        reader = self._reader
        while not self.done:
            found = reader.find(marker)
            if found >= 0:
                self._put_content(reader.take(found))
                reader.record()
                reader.take(len(marker))
                return True
            self._put_content(reader.take(reader.available - reader.held_back(marker)))
            if reader.final:
                return False
            yield
        return False

    def _attempt(self, body: Wait[None]) -> Wait[None]:
        """Read `body`. What has been recorded is content if it is malformed, up to where that was found."""
        try:
            yield from body
        except MalformedError:
            self._break_off()
            self._put_content(self._reader.recorded())

    def _call_objects(self) -> Wait[None]:
        """A call or several, spaces between them, or an array of them; then `_parse` goes on."""
        if (yield from self._reader.peek()) == "[":
            yield from self._call_array()
            return
        while not self.done:
            yield from self._call_object()
            yield from self._reader.spaces()
            if (yield from self._reader.peek()) != "{":
                return

    def _call_array(self) -> Wait[None]:
        reader = self._reader
        reader.take(1)
        while not self.done:
            yield from reader.spaces()
            yield from self._call_object()
            yield from reader.spaces()
            if (yield from reader.literal("]")):
                reader.record()
                return
            yield from reader.expect(",")

    def _call_object(self) -> Wait[None]:
        """{"name": ..., "arguments": {...}}; the keys in any order, "parameters" for the second."""
        reader = self._reader
        yield from reader.expect("{")
        seen: set[str] = set()
        while True:
            yield from reader.spaces()
            if "name" in seen and (yield from reader.literal("}")):
                break
            if seen:
                yield from reader.expect(",")
                yield from reader.spaces()
            key = yield from read_word(reader, _KEYS)
            kind = "arguments" if key in _ARGUMENT_KEYS else key
            if kind in seen:
                raise MalformedError
            seen.add(kind)
            yield from reader.spaces()
            yield from reader.expect(":")
            yield from reader.spaces()
            if kind == "arguments":
                yield from self._argument_value()
            elif key == "name":
                if self._names is None:
                    self._set_name((yield from read_string(reader, _NAME_CHARACTERS)))
                else:
                    self._set_name((yield from read_word(reader, self._names)))
            else:  # not used
                yield from read_string(reader, _OTHER_CHARACTERS)
        self._end_call()

    def _bare_name(self) -> Wait[str]:
        """A name without quotes, up to the first character that is none of a name."""
        name = ""
        while True:
            after = yield from self._reader.peek()
            if not after or after not in _NAME_ALPHABET:
                return name
            if len(name) == 64 or not self._may_be(name + after):
                raise MalformedError
            name += self._reader.take(1)

    def _may_be(self, beginning: str) -> bool:
        return self._names is None or any(name.startswith(beginning) for name in self._names)

    def _argument_value(self) -> Wait[None]:
        """An object; or the text of one, as some models write it; or null."""
        reader = self._reader
        first = yield from reader.peek()
        if first == '"':
            pieces: list[str] = []
            yield from scan_string(reader, pieces.append)
            inner: str = json.loads("".join(pieces))
            if not is_object(inner):
                raise MalformedError
            self._put_arguments(inner.strip(SPACES))
        elif first == "n":
            yield from reader.expect("null")
        else:
            yield from self._argument_object(self._put_arguments)

    def _argument_object(self, put: Put) -> Wait[None]:
        if (yield from self._reader.peek()) != "{":
            raise MalformedError
        yield from scan_value(self._reader, put)

    # -- what comes out --------------------------------------------------------------------------------------

    def _put_content(self, text: str) -> None:
        if self.done:
            return
        kept = text.rstrip(SPACES)
        spaces = text[len(kept) :]
        if kept:
            self._put_spaces()
            if self._spaces_follow_call and not self._has_content:
                kept = kept.lstrip(SPACES)
            self._events.append(Content(kept))
            self._has_content = True
            self._spaces_follow_call = False
        self._spaces.append(spaces)

    def _put_spaces(self) -> None:
        spaces = "".join(self._spaces)
        self._spaces.clear()
        if spaces and (self._has_content or not self._spaces_follow_call):
            self._events.append(Content(spaces))

    def _set_name(self, name: str) -> None:
        if self._names is not None and name not in self._names:
            raise MalformedError
        if not name or (self._num_calls and not self._parallel):
            raise MalformedError
        self._name = name
        if self._arguments:
            self._stream()

    def _put_arguments(self, text: str) -> None:
        self._arguments.append(text)
        if self._name is not None:
            self._stream()

    def _stream(self) -> None:
        if self._streams:
            self._begin()
            self._put_pieces()

    def _begin(self) -> None:
        """The call comes out: what was recorded of it will not come out as content."""
        if not self._open:
            assert self._name is not None
            self._open = True
            self._spaces.clear()
            self._events.append(CallBegun(self._num_calls, self._new_id(), self._name))
            self._num_calls += 1
        self._reader.record()

    def _put_pieces(self) -> None:
        if self._arguments:
            self._events.append(ArgumentsDelta(self._num_calls - 1, "".join(self._arguments)))
            self._arguments.clear()

    def _end_call(self) -> None:
        """The call is complete."""
        if not self._arguments and not self._open:
            self._arguments.append("{}")
        self._begin()
        self._put_pieces()
        self._close(True)
        self.done = not self._parallel

    def _break_off(self) -> None:
        """The call is malformed."""
        if self._open:
            self._close(False)
        self._name = None
        self._arguments.clear()

    def _close(self, complete: bool) -> None:
        self._events.append(CallEnded(self._num_calls - 1, complete))
        self._complete = self._complete and complete
        self._open = False
        self._name = None
        self._spaces_follow_call = True
