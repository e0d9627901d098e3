"""What an audit log notes of a request, and the members of its line."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastllm.serve.audit_chain import Hasher

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 1024  # of a text that a client may have chosen; the rest is cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """What is noted of a finished request.

    Attributes:
        request_id: the server's name for it.
        route: what was called, for instance "/v1/chat/completions".
        who: id of the API key or user; never the key itself.
        client: address that it came from.
        model: the model or adapter that was asked.
        prompt_tokens, cached_tokens, generated_tokens: counts; cached ones are among those of the prompt.
        finish_reasons: of each answer.
        status: of the HTTP response; 0 where there is none.
        error: code of the error, if there was one.
        duration_s: from arrival to the last byte, seconds.
        prompt: text of which the hash is noted; None: there was none.
        answers: the same of each answer.
        extra: further facts; JSON scalars, at most 32.
    """

    request_id: str
    route: str
    who: str | None = None
    client: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish_reasons: Sequence[str | None] = ()
    status: int = 0
    error: str | None = None
    duration_s: float = 0.0
    prompt: str | bytes | None = None
    answers: Sequence[str | bytes] = ()
    extra: Mapping[str, str | int | float | bool | None] | None = None


def text_bytes(record: AuditRecord) -> int:
    """Length of its texts.

    Raises:
        TypeError: one of them is no text.
    """
    return (0 if record.prompt is None else len(record.prompt)) + sum(map(len, record.answers))


def record_body(record: AuditRecord, hasher: Hasher) -> dict[str, Any]:
    """The members of a record's line. Whatever a record holds, this makes a line of it."""
    try:
        return _request(record, hasher)
    except Exception as error:
        logger.exception("a record of another form than AuditRecord says")
        return {"kind": "request", "id": _text(record.request_id), "malformed": _text(repr(error))}


def _request(record: AuditRecord, hasher: Hasher) -> dict[str, Any]:
    body: dict[str, Any] = {
        "kind": "request",
        "id": _text(record.request_id),
        "who": _text(record.who),
        "client": _text(record.client),
        "route": _text(record.route),
        "model": _text(record.model),
        "prompt_tokens": _plain(record.prompt_tokens),
        "cached_tokens": _plain(record.cached_tokens),
        "generated_tokens": _plain(record.generated_tokens),
        "finish_reasons": [_text(reason) for reason in record.finish_reasons],
        "status": _plain(record.status),
        "error": _text(record.error),
        "duration_ms": round(record.duration_s * 1e3, 3) if abs(record.duration_s) < 1e12 else None,
        f"prompt_{hasher.text_kind}": None if record.prompt is None else hasher.text(record.prompt),
        f"answers_{hasher.text_kind}": [hasher.text(answer) for answer in record.answers],
    }
    if record.extra:
        body["extra"] = {_text(key): _plain(value) for key, value in list(record.extra.items())[:32]}
    return body


def _text(value: object) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "…"


def _plain(value: object) -> str | int | float | None:
    """A JSON scalar; anything else as text, numbers that JSON has not included."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return int(value)
    if isinstance(value, float) and abs(value) < float("inf"):
        return float(value)
    return _text(value)
