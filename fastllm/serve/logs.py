"""Logs on stderr: one line an event, as text or as JSON, with the id of the request that it belongs to."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_request_id: ContextVar[str] = ContextVar("fastllm_request_id", default="")
_OWN = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "color_message"}


@contextlib.contextmanager
def request(request_id: str) -> Iterator[None]:
    """What is logged within belongs to this request."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


class JsonFormatter(logging.Formatter):
    """A line of JSON, ASCII alone: nothing that a client sends can begin a line or move a cursor."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if _request_id.get():
            fields["request_id"] = _request_id.get()
        fields.update((name, value) for name, value in vars(record).items() if name not in _OWN)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=repr)


class TextFormatter(logging.Formatter):
    """For people: time, level, message, the request's id, and what else there is."""

    def format(self, record: logging.LogRecord) -> str:
        more = {name: value for name, value in vars(record).items() if name not in _OWN}
        if _request_id.get():
            more["request_id"] = _request_id.get()
        line = f"{_utc(record.created)} {record.levelname.lower()} {_printable(record.getMessage())}"
        line += "".join(f" {name}={_printable(str(value))}" for name, value in more.items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def set_up(log_format: str, level: str) -> None:
    """Send the logs of fastllm and of uvicorn to stderr in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for name in ("fastllm", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
    for name in ("uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logging.getLogger(name).handlers = []
    logging.getLogger("uvicorn.access").disabled = True  # guard.py writes that line


def _utc(seconds: float) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{moment}.{int(seconds % 1 * 1000):03d}Z"


def _printable(text: str) -> str:
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
