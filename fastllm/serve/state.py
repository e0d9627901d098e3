"""What all requests of a server share."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets

from fastllm.errors import AuditError, RequestError
from fastllm.formats.keys import read_key_file
from fastllm.serve.admission import Admission
from fastllm.serve.audit import AuditLog, AuditRecord
from fastllm.serve.call import Call
from fastllm.serve.config import ServeConfig, is_loopback
from fastllm.serve.errors import HTTPError
from fastllm.serve.keys import KeyRing
from fastllm.serve.metrics import HttpMetrics
from fastllm.serve.models import Models
from fastllm.serve.telemetry import Telemetry

logger = logging.getLogger(__name__)
access = logging.getLogger("fastllm.access")

API_KEY, ADMIN_KEY = "FASTLLM_API_KEY", "FASTLLM_ADMIN_KEY"


class ServerState:
    """See the module.

    Attributes:
        config: the settings.
        api_keys, admin_keys: who may call.
        models: in service.
        admission: rates and concurrency of keys.
        telemetry: metrics and traces of the engines; `http_metrics`: of HTTP.
        leaving: whether the server is about to drain, and says so to /ready.
        draining: whether no new work is taken.
        running: HTTP requests under way; `idle` is set while there are none.
        audit: the log of what was asked and answered; None: there is none.

    Raises:
        RequestError: a key file is wrong, or the address can be reached by others and there are no keys.
    """

    def __init__(self, config: ServeConfig, models: Models, telemetry: Telemetry | None = None) -> None:
        self.config = config
        self.models = models
        self.telemetry = telemetry or Telemetry()
        self.http_metrics = HttpMetrics(self.telemetry.registry)
        self.api_keys = KeyRing.read(config.api_key_file, API_KEY)
        self.admin_keys = KeyRing.read(config.admin_key_file, ADMIN_KEY)
        if not is_loopback(config.host) and not self.api_keys:
            raise RequestError(
                "host", config.host, f"an address of this machine alone as long as there are no API keys "
                f"(--api-key-file or {API_KEY})",
            )  # fmt: skip
        self.admission = Admission(config.limits)
        self.leaving = self.draining = False
        self.audit = open_audit_log(config)
        self.running = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._salt = secrets.token_bytes(32)

    def cache_salt(self, call: Call, given: str | None) -> str | None:
        """The prefix cache's salt: requests of different keys never share blocks, whatever they say, since
        the time of an answer would tell one what the other has asked (CVE-2025-46570)."""
        if call.key is None:
            return given
        text = f"{call.key}\0{given or ''}".encode("utf-8", "surrogatepass")
        return hmac.new(self._salt, text, hashlib.sha256).hexdigest()

    async def note(self, call: Call, body: bytes) -> None:
        """A request begins that changes or asks something: with an audit log it has a line in it, however it
        ends.

        Raises:
            HTTPError: 503, the log has no room and is set to refuse.
        """
        if self.audit is None:
            return
        try:
            call.place = await self.audit.reserve_async()
        except AuditError as error:
            logger.error("audit log: %s", error)
            raise HTTPError(503, "the audit log takes no more", code="audit_log", retry_after=5) from error
        call.keep(body)

    def began(self) -> None:
        """A request has come."""
        self.running += 1
        self.idle.clear()

    async def ended(self, call: Call) -> None:
        """A request is over, in whatever way."""
        self.running -= 1
        if not self.running:
            self.idle.set()
        if call.place is not None:
            try:
                call.place.commit(_record(call))
            except AuditError:  # closed: the server is gone, and this request did not end in time
                logger.exception("no line in the audit log for request %s", call.request_id)
        access.info(
            "%s %s %s",
            call.method,
            call.path,
            call.status,
            extra={
                "client": call.client,
                "key": call.key,
                "model": call.model,
                "prompt_tokens": call.prompt_tokens,
                "generated_tokens": call.generated_tokens,
                "seconds": round(call.seconds, 4),
                "code": call.error_code,
            },
        )

    async def close(self) -> None:
        """Once nothing runs any more."""
        await asyncio.to_thread(self.telemetry.close)
        if self.audit is not None:
            await asyncio.to_thread(self.audit.close)


def open_audit_log(config: ServeConfig) -> AuditLog | None:
    """The audit log that the settings ask for.

    Raises:
        AuditError, RequestError: as `AuditLog`; a key file that is wrong.
    """
    if config.audit_log is None:
        return None
    key = None if config.audit_key_file is None else read_key_file(config.audit_key_file)
    fsync: str | float = "line" if config.audit_fsync_seconds == 0 else config.audit_fsync_seconds
    return AuditLog(config.audit_log, key=key, fsync=fsync, when_full=config.audit_when_full)


def _record(call: Call) -> AuditRecord:
    return AuditRecord(
        request_id=call.request_id,
        route=f"{call.method} {call.path}",
        who=f"admin {call.key}" if call.admin else call.key,
        client=call.client,
        model=call.model,
        prompt_tokens=call.prompt_tokens,
        cached_tokens=call.cached_tokens,
        generated_tokens=call.generated_tokens,
        finish_reasons=call.finish_reasons,
        status=call.status,
        error=call.error_code,
        duration_s=call.seconds,
        prompt=call.body,
        answers=call.answers,
        extra=None if call.version is None else {"version": call.version},
    )
