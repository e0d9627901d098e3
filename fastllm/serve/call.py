"""One HTTP request on its way through the server: what every layer knows of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        prompt_digest: SHA-256 of the body, in hexadecimal; None where nobody wants it, as below.
        trace: the headers that say which trace it belongs to.
        generates: whether a model was asked, so that the audit log has a line for it.
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
    prompt_digest: str | None = None
    generates: bool = False
    _answers: dict[tuple[int, int], Any] | None = None  # (prompt, choice) -> a hash under way

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.monotonic() - self.started

    def digest(self, body: bytes) -> None:
        """Hash what was asked, and what is going to be answered."""
        self.prompt_digest = hashlib.sha256(body).hexdigest()
        self._answers = {}

    def answered(self, prompt: int, choice: int, text: str) -> None:
        """A piece of a choice's text has come."""
        if self._answers is not None and text:
            found = self._answers.setdefault((prompt, choice), hashlib.sha256())
            found.update(text.encode("utf-8", "surrogatepass"))

    @property
    def answer_digest(self) -> str | None:
        """SHA-256 of the answer's text, of several over their digests in order; None where nobody wants it or
        there was no answer."""
        if not self._answers:
            return None
        digests = [self._answers[place].digest() for place in sorted(self._answers)]
        return (digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()).hex()


def call_of(scope: Any) -> Call:
    """The call of an ASGI scope."""
    found: Call = scope[CALL]
    return found
