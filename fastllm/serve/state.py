"""What all requests of a server share."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from typing import Any

from fastllm.errors import RequestError
from fastllm.serve.admission import Admission
from fastllm.serve.call import Call
from fastllm.serve.config import ServeConfig, is_loopback
from fastllm.serve.keys import KeyRing
from fastllm.serve.metrics import HttpMetrics
from fastllm.serve.models import Models
from fastllm.serve.telemetry import Telemetry

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
        hashes: whether somebody wants hashes of prompts and answers.

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
        self.hashes = False
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

    def began(self) -> None:
        """A request has come."""
        self.running += 1
        self.idle.clear()

    async def ended(self, call: Call, *, route: Any) -> None:
        """A request is over, in whatever way."""
        self.running -= 1
        if not self.running:
            self.idle.set()
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
