"""What a server can be told, checked before anything is loaded or bound."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllm.errors import RequestError
from fastllm.formats.source import DEFAULT_MODEL

KIB, MIB = 1 << 10, 1 << 20
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
TLS_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request, one key and the whole server may take. Checked before any work fans out.

    Attributes:
        body_bytes: of a request's body.
        header_bytes: of its request line and headers.
        header_seconds, body_seconds: until the headers, and then the body, have come.
        idle_seconds: that a connection may be without a request. More than proxies and HTTP clients keep one
            for another request (Go 90, nginx and AWS 60, Node and Python 5 to 15): who opens it has to be
            the one who closes it.
        prompt_tokens: of one prompt; None: as many as the model's context holds.
        sequences: that one request may ask for: prompts x n.
        queued: requests that may wait while as many as the engine runs at once are running.
        request_seconds: from a request's arrival to its last token; None: no limit.
        rate: per key, in the words of the `limits` library, such as "600/minute"; None: no limit.
        concurrent: requests of one key at a time; None: no limit.
        connections: at a time.
    """

    body_bytes: int = 4 * MIB
    header_bytes: int = 32 * KIB
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 120.0
    prompt_tokens: int | None = None
    sequences: int = 64
    queued: int = 256
    request_seconds: float | None = 600.0
    rate: str | None = None
    concurrent: int | None = None
    connections: int = 1024

    def __post_init__(self) -> None:
        for name in ("body_bytes", "header_bytes", "sequences", "connections"):
            _positive(name, getattr(self, name))
        for name in ("prompt_tokens", "concurrent", "request_seconds"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for name in ("header_seconds", "body_seconds", "idle_seconds"):
            _positive(name, getattr(self, name))
        if self.queued < 0:
            raise RequestError("queued", self.queued, "0 or more")
        if self.rate is not None:
            from limits import parse_many

            try:
                parse_many(self.rate)
            except ValueError:
                raise RequestError("rate", self.rate, 'a rate such as "600/minute"') from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """A server's settings.

    Attributes:
        model: the first model, a reference as for `LLM`; None: none until an administrator loads one.
        served_names: what requests call it; its first is what answers say. None: the reference itself.
        version: what the first model's version is called.
        loras: adapters of the first model, name -> path; requests call them by name, as models.
        engine: further arguments of `AsyncLLM`.
        tool_parser, reasoning_parser: format of tool calls and of reasoning; None: as the chat template
            tells; "none": there is none.
        chat_template: jinja2 source instead of the model's.
        host, port: where it listens.
        port_file: a file that gets the port's number once it listens; None: none does.
        api_key_file, admin_key_file: keys, one a line; see `keys.py`. Further ones come from the
            environment: FASTLLM_API_KEY, FASTLLM_ADMIN_KEY.
        allowed_hosts: values of the Host header, without port; empty: the loopback names where that is
            where it listens, else any.
        allowed_origins: pages of other origins that may call, such as "https://chat.example.org".
        certfile, keyfile, key_password, tls_version: TLS, and its lowest version.
        model_roots: directories below which an administrator may load models.
        allow_download: whether an administrator may load references that are fetched.
        audit_log, audit_key_file: the audit log, and a key for its hashes.
        audit_fsync_seconds: that a line of it may take to the disk; 0: it is there before the line counts.
        audit_when_full: what happens to requests when it has no room: "wait" or "refuse".
        drain_seconds: that running requests have after SIGTERM.
        drain_delay: seconds after SIGTERM in which requests are still taken, while /ready already says no.
        page: whether / shows the page.
        log_format, log_level: of what is written to stderr.
        otlp_endpoint: where traces go; None: nowhere.
        limits: see `Limits`.
    """

    model: str | None = DEFAULT_MODEL
    served_names: Sequence[str] = ()
    version: str = "1"
    loras: Mapping[str, str] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    chat_template: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    certfile: Path | None = None
    keyfile: Path | None = None
    key_password: str | None = None
    tls_version: str = "1.3"
    model_roots: Sequence[Path] = ()
    allow_download: bool = False
    audit_log: Path | None = None
    audit_key_file: Path | None = None
    audit_fsync_seconds: float = 1.0
    audit_when_full: str = "wait"
    drain_seconds: float = 30.0
    drain_delay: float = 0.0
    page: bool = True
    log_format: str = "text"
    log_level: str = "info"
    otlp_endpoint: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise RequestError("port", self.port, "0..65535")
        if self.tls_version not in TLS_VERSIONS:
            raise RequestError("tls_version", self.tls_version, " or ".join(TLS_VERSIONS))
        if (self.certfile is None) != (self.keyfile is None):
            raise RequestError("ssl_keyfile", self.keyfile, "a certificate and its key, or neither")
        if self.log_format not in LOG_FORMATS:
            raise RequestError("log_format", self.log_format, " or ".join(LOG_FORMATS))
        if self.drain_seconds < 0 or self.drain_delay < 0:
            raise RequestError("drain_seconds", self.drain_seconds, "0 or more")
        for name in self.names:
            check_model_name(name)
        for name in self.loras:
            check_model_name(name)
        for origin in self.allowed_origins:
            scheme, _, rest = origin.partition("://")
            if scheme not in ("http", "https") or not rest or "/" in rest:
                raise RequestError("allowed_origins", origin, "an origin such as https://chat.example.org")

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the first model."""
        if self.served_names:
            return tuple(self.served_names)
        return () if self.model is None else (default_name(self.model),)

    @property
    def hosts(self) -> frozenset[str] | None:
        """Host names that are accepted, in lower case; None: all."""
        if self.allowed_hosts:
            return None if "*" in self.allowed_hosts else frozenset(map(str.lower, self.allowed_hosts))
        return frozenset(LOOPBACK_HOSTS) if is_loopback(self.host) else None


def default_name(model: str) -> str:
    """What a model is called where nobody says otherwise: a file's or directory's name, or the reference."""
    if os.path.exists(model):
        return Path(model).resolve().name.removesuffix(".gguf")
    return model


def check_model_name(name: str) -> None:
    """
    Raises:
        RequestError: nothing that could stand in a request, a log and a metric's label.
    """
    if not 0 < len(name) <= 256 or not name.isprintable() or name != name.strip():
        raise RequestError("model name", name, "1..256 printable characters")


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise RequestError(name, value, "more than 0")
