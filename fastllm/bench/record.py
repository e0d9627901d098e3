"""What is kept of one request: when things happened to it, what it got, and what went wrong.

    scheduled --> sent --> first_byte --> first token ... last token --> end

All times are seconds on `time.perf_counter`, taken when the bytes had arrived; in a record file they count
from the start of the round. Between scheduled and sent it waited for the generator (for a place, or for the
processor).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OK, FAILED, UNFINISHED = "ok", "failed", "unfinished"

_TIMES = ("scheduled", "sent", "first_byte", "end")
_FACTS = (
    "index",
    "status",
    "error",
    "detail",
    "http_status",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "counted_by",
    "finish_reason",
    "chunks",
    "wanted_prompt_tokens",
    "wanted_output_tokens",
    "group",
    "reused",
    "retried",
)


@dataclass
class RequestRecord:
    """One request.

    Attributes:
        index: its number in the round.
        scheduled: when it was due; with a fixed number of clients, when its client was free.
        sent: when it was handed to the connection; this includes making a new one.
        first_byte: when the answer's headers were there.
        tokens: when each piece of text arrived. A piece may hold several tokens.
        end: when the answer was complete, or had failed.
        status: "ok", "failed" or "unfinished" (the run ended first).
        error: what kind of failure, in a word or two; `detail` in the server's words.
        prompt_tokens, cached_tokens: from `usage`.
        output_tokens: from `usage`; if there was none, the number of pieces. `counted_by` tells: "usage"
            or "chunks". wanted_prompt_tokens, wanted_output_tokens: what was asked for.
        group: the shared prefix it began with.
        chunks: events of the stream that held JSON.
        reused: the connection had served a request before.
        retried: a connection that was kept had been closed by the server meanwhile, and the request was
            sent again.
    """

    index: int
    scheduled: float
    sent: float | None = None
    first_byte: float | None = None
    tokens: list[float] = field(default_factory=list)
    end: float | None = None
    status: str = UNFINISHED
    error: str | None = None
    detail: str | None = None
    http_status: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    counted_by: str | None = None
    finish_reason: str | None = None
    chunks: int = 0
    wanted_prompt_tokens: int | None = None
    wanted_output_tokens: int | None = None
    group: int | None = None
    reused: bool = False
    retried: bool = False

    @property
    def first_token(self) -> float | None:
        """When the first text arrived."""
        return self.tokens[0] if self.tokens else None

    @property
    def output_count(self) -> int:
        """Tokens of the answer as far as it came."""
        return self.output_tokens if self.output_tokens is not None else len(self.tokens)

    def fail(self, error: str, detail: str = "") -> None:
        """Note a failure; the first one counts."""
        if self.status != FAILED:
            self.status, self.error = FAILED, error
            self.detail = " ".join(detail.split())[:300] or None

    def to_json(self, start: float) -> dict[str, Any]:
        """Times in seconds from `start`, to the microsecond; what is not known is left out."""
        found: dict[str, Any] = {}
        for name in _TIMES:
            value = getattr(self, name)
            if value is not None:
                found[name] = round(value - start, 6)
        found["tokens"] = [round(value - start, 6) for value in self.tokens]
        for name in _FACTS:
            value = getattr(self, name)
            if value is not None and value is not False:
                found[name] = value
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> RequestRecord:
        """What `to_json` made, with the start at 0."""
        return cls(**found)
