"""`fastllm chat`: talk with a model."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from fastllm.cli.arguments import make_llm, make_params
from fastllm.cli.text import read_text, speed, write, write_stream
from fastllm.errors import EngineDeadError, FastLLMError
from fastllm.prompts import render_chat

if TYPE_CHECKING:
    from fastllm.llm import LLM
    from fastllm.sampling_params import SamplingParams

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def chat(options: argparse.Namespace) -> int:
    """One message, or a conversation for as long as the user likes."""
    params = make_params(options)
    message = None if options.message is None else read_text(options.message, "message")
    with make_llm(options) as llm:
        conversation = _Conversation(llm, params, options.system, stats=options.stats)
        if message is not None:
            conversation.answer(message)
            return 0
        _repeat(conversation)
    return 0


class _Conversation:
    """The messages so far. A message that could not be answered is taken back."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, *, stats: bool) -> None:
        self._llm = llm
        self._params = params
        self._start: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self._stats = stats
        self.messages = list(self._start)

    def reset(self) -> None:
        self.messages = list(self._start)

    def answer(self, text: str) -> None:
        """Write the answer to a message as it comes. What came before a Ctrl-C stays in the conversation."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        last = None
        try:
            ids = render_chat(self._llm.get_tokenizer(), self.messages)
            last = write_stream(self._llm.stream({"prompt_token_ids": ids}, self._params), pieces)
        finally:
            said = "".join(pieces)
            if last is not None or said:
                self.messages.append({"role": "assistant", "content": said})
                write("\n")
            else:
                self.messages.pop()
        if last is not None and self._stats:
            print(speed(last), file=sys.stderr)


def _repeat(conversation: _Conversation) -> None:
    """Read a line, answer it, until there are no more."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() can edit and recall lines with it
        print(_HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                write("\n")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            write("\n")
            continue
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif line:
            _answer(conversation, line, interactive=interactive)


def _answer(conversation: _Conversation, line: str, *, interactive: bool) -> None:
    """One answer. A message that is refused, and Ctrl-C, end the answer and not the conversation."""
    try:
        conversation.answer(line)
    except EngineDeadError:
        raise
    except FastLLMError as error:
        print(f"fastllm: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        if not interactive:
            raise
