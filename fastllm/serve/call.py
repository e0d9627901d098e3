"""One HTTP request on its way through the server: what every layer knows of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastllm.serve.audit import Reservation

CALL = "fastllm.call"  # where it stands in the ASGI scope


@dataclass(slots=True)
class Call:
    """A request, what came of it so far, and who asked.

    Attributes:
        request_id: in logs and in the header X-Request-Id of the answer.
        client: address of the other side.
        method, path: of HTTP.
        key: name of the API key, None without one.
        admin: whether the key was an administrator's.
        started: monotonic seconds.
        model, version: what answered.
        prompt_tokens, cached_tokens, generated_tokens: over all prompts and choices.
        finish_reasons: of the choices, in order.
        status: of HTTP; 0 before there is one. 499: the client was gone.
        error_code: of the error, if there was one.
        body: what was sent; None where nobody wants it, as below.
        place: in the audit log's queue, if there is a log.
        trace: the headers that say which trace it belongs to.
    """

    request_id: str
    client: str
    method: str
    path: str
    key: str | None = None
    admin: bool = False
    started: float = field(default_factory=time.monotonic)
    model: str | None = None
    version: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish_reasons: Sequence[str] = ()
    status: int = 0
    error_code: str | None = None
    trace: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    place: Reservation | None = None
    _answers: dict[tuple[int, int], list[str]] | None = None  # (prompt, choice) -> pieces of text

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.monotonic() - self.started

    def keep(self, body: bytes) -> None:
        """Keep what was asked, and what is going to be answered."""
        self.body = body
        self._answers = {}

    def answered(self, prompt: int, choice: int, text: str) -> None:
        """A piece of a choice's text has come."""
        if self._answers is not None and text:
            self._answers.setdefault((prompt, choice), []).append(text)

    @property
    def answers(self) -> list[str]:
        """The texts of the choices, in order, as far as they have come; none where nobody wants them."""
        found = self._answers or {}
        return ["".join(found[place]) for place in sorted(found)]


def call_of(scope: Any) -> Call:
    """The call of an ASGI scope."""
    found: Call = scope[CALL]
    return found
