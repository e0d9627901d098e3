"""A soak of the server: mixed traffic over HTTP, much of it rude. Nothing leaks, all is answered or refused.

    python tests/serve_soak.py [--seconds 3600 | --requests 5000] [--clients 24] [--seed 0]

The server runs in a process of its own, a tiny model with random weights behind keys, limits, an audit log.
Clients send requests to every API: streams that are read, left or cut at random moments, bodies that are
wrong, keys that are unknown, more than the queue takes. An administrator changes the model meanwhile, again
and again. A canary's answer must keep its bits. At the end nothing runs or waits and no block is held, the
counts of the metrics add up, the audit log has a line for every request that was let in, its chain is whole,
and memory and open files are what they were after the first quarter. Prints one line; fails with a traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import tiny

from fastllm.serve.audit_verify import verify

KEY, ADMIN = "k" * 24, "a" * 24
# Resident, after a quarter. Versions of a small model fill an area of 32 MiB one after the other, which goes
# when the last of them does (csrc/core/memory.h): so much is no leak.
GROWTH_MAX_BYTES = (32 << 20) + (8 << 20)
MODEL = "tiny"
CANARY = {"prompt": "The capital of France is", "max_tokens": 12, "seed": 11, "logprobs": 1}
WRONG: tuple[Any, ...] = (
    {},
    {"prompt": 5},
    {"prompt": "a", "n": 10**6},
    {"prompt": "a" * 5000, "max_tokens": 2},
    {"prompt": "a", "guided_regex": "("},
    {"prompt": "a", "stop": ["x"] * 99},
    {"prompt": "a", "nonsense": True},
)


class Soak:
    """One run against a server at `url`, whose process is `pid`."""

    def __init__(self, url: str, pid: int, options: argparse.Namespace, models: list[Path]) -> None:
        self._options = options
        self._models = models
        self._pid = pid
        self.random = random.Random(options.seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.started = 0
        self._begin = time.monotonic()
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
        self.http = httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False)
        self._key = {"authorization": f"Bearer {KEY}"}
        self._admin = {"authorization": f"Bearer {ADMIN}"}

    def progress(self) -> float:
        if self._options.requests is not None:
            return float(self.started / self._options.requests)
        return float((time.monotonic() - self._begin) / self._options.seconds)

    # ---- what clients do ---------------------------------------------------------------------------------

    def body(self, route: str) -> dict[str, Any]:
        pick = self.random
        words = " ".join(
            pick.choices(("the", "river", "ran", "past", "a", "small", "town"), k=pick.randint(1, 30))
        )
        most = {"max_tokens": pick.choice((1, 8, 60)), "temperature": pick.choice((0.0, 1.0))}
        if route == "/v1/embeddings":
            return {"input": [words] * pick.randint(1, 3)}
        if route == "/v1/responses":
            return {"input": words, "max_output_tokens": most["max_tokens"]}
        if route == "/v1/completions":
            more = pick.choice(
                ({}, {"guided_regex": "[ab]{3,9}"}, {"logprobs": 3}, {"n": 2}, {"stop": ["e"]})
            )
            return {"prompt": words, **most, **more}
        return {"messages": [{"role": "user", "content": words}], **most}

    async def client(self) -> None:
        while self.progress() < 1.0:
            self.started += 1
            manner = self.random.choices(("reads", "leaves", "cuts", "wrong", "unknown"), (8, 2, 3, 2, 1))[0]
            await getattr(self, manner)()
            self.counts[manner] += 1

    def route(self) -> str:
        return self.random.choice(
            ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings")
        )

    async def reads(self) -> None:
        route = self.route()
        streamed = route != "/v1/embeddings" and self.random.random() < 0.6
        body = {**self.body(route), **({"stream": True} if streamed else {})}
        async with self.http.stream("POST", route, json=body, headers=self._key) as response:
            content = await response.aread()
        self.counts[f"status {response.status_code}"] += 1
        assert response.status_code in (200, 503), content[:500]  # full for a moment
        if response.status_code == 200 and streamed:
            end = {"/v1/messages": b"message_stop", "/v1/responses": b"response."}.get(route, b"[DONE]")
            assert end in content[-3000:], content[-500:]

    async def leaves(self) -> None:
        """In the middle of a stream."""
        route = self.random.choice(("/v1/completions", "/v1/chat/completions"))
        body = {**self.body(route), "stream": True, "max_tokens": 60, "ignore_eos": True}
        body.pop("guided_regex", None)
        async with self.http.stream("POST", route, json=body, headers=self._key) as response:
            async for _ in response.aiter_raw():
                if self.random.random() < 0.3:
                    break

    async def cuts(self) -> None:
        """At any moment, before there is an answer too."""
        route = self.route()
        work = self.http.post(route, json=self.body(route), headers=self._key)
        try:
            await asyncio.wait_for(work, self.random.random() * 0.1)
        except asyncio.TimeoutError:
            self.counts["cut off"] += 1

    async def wrong(self) -> None:
        response = await self.http.post("/v1/completions", json=self.random.choice(WRONG), headers=self._key)
        assert response.status_code in (400, 503), response.text

    async def unknown(self) -> None:
        headers = {"authorization": "Bearer not-a-key-of-this-server"}
        response = await self.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert response.status_code == 401

    # ---- what goes on beside them ------------------------------------------------------------------------

    async def regularly(self, times: int, action: Any) -> None:
        for turn in range(times):
            while self.progress() < turn / times:
                await asyncio.sleep(0.02)
            await action()

    async def change(self) -> None:
        """Another version of the same model."""
        self.counts["changes"] += 1
        body = {"name": MODEL, "version": f"v{self.counts['changes']}", "model": str(self._models[0])}
        response = await self.http.post("/admin/models", json=body, headers=self._admin)
        assert response.status_code == 200, response.text

    async def canary(self) -> None:
        response = await self.http.post("/v1/completions", json=CANARY, headers=self._key)
        if response.status_code == 503:
            return
        (choice,) = response.json()["choices"]
        if not hasattr(self, "_expected"):
            self._expected = choice
        assert choice == self._expected
        self.counts["canaries"] += 1

    async def quarter(self) -> tuple[int, int]:
        while self.progress() < 0.25:
            await asyncio.sleep(0.02)
        return self.resident(), self.files()

    def resident(self) -> int:
        return int(Path(f"/proc/{self._pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def files(self) -> int:
        """Open ones that are no connections."""
        names = []
        for name in os.listdir(f"/proc/{self._pid}/fd"):
            with contextlib.suppress(OSError):
                names.append(os.readlink(f"/proc/{self._pid}/fd/{name}"))
        return sum(not name.startswith("socket:") for name in names)

    async def metrics(self) -> dict[str, float]:
        """By name, summed over all labels."""
        text = (await self.http.get("/metrics", headers=self._key)).text
        found: dict[str, float] = collections.defaultdict(float)
        for line in text.splitlines():
            if not line.startswith("#"):
                found[re.split(r"[{ ]", line, maxsplit=1)[0]] += float(line.rsplit(" ", 1)[1])
        return found


async def soak(url: str, pid: int, options: argparse.Namespace, models: list[Path]) -> tuple[str, int]:
    """Returns the line to print, and how many requests the audit log has to have at least."""
    run = Soak(url, pid, options, models)
    await run.canary()
    (resident, files), *_ = await asyncio.gather(
        run.quarter(),
        run.regularly(options.changes, run.change),
        run.regularly(30, run.canary),
        *(run.client() for _ in range(options.clients)),
    )
    end = time.monotonic() + 20
    while True:  # what clients have left is seen within a step
        found = await run.metrics()
        left = [
            found[f"fastllm:{name}"]
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        ]
        if not any(left):
            break
        assert time.monotonic() < end, left
        await asyncio.sleep(0.05)
    assert found["http_requests_inprogress"] == 1  # the one for the metrics
    listed = (await run.http.get("/admin/models", headers=run._admin)).json()["models"]
    assert [(item["state"], item["requests"]) for item in listed] == [("current", 0)], listed
    more = run.files() - files
    assert more <= 1, f"{more} files more"
    growth = run.resident() - resident
    assert growth < GROWTH_MAX_BYTES, f"resident memory grew by {growth} bytes"
    await run.http.aclose()
    counts = ", ".join(f"{count} {name}" for name, count in sorted(run.counts.items()))
    took = time.monotonic() - run._begin
    line = f"{took:.0f} s, {run.started} requests: {counts}; resident memory {growth / 2**20:+.1f} MiB"
    return line, run.counts["reads"] + run.counts["wrong"]


async def whole(options: argparse.Namespace) -> str:
    """A server, the soak, and its end."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = tiny.save_hf(tiny.make_model("llama"), place / "model")
        command = [
            *(sys.executable, "-m", "fastllm.serve", "--model", str(model), "--port", "0"),
            *("--served-model-name", MODEL, "--model-root", str(place), "--threads", "1"),
            *("--kv-cache-tokens", "1024", "--max-num-seqs", "8", "--max-queue", "40"),
            *("--audit-log", str(place / "audit.jsonl"), "--log-level", "warning"),
        ]
        environment = {**os.environ, "FASTLLM_API_KEY": KEY, "FASTLLM_ADMIN_KEY": ADMIN}
        environment["SKBUILD_EDITABLE_VERBOSE"] = "0"
        port_file = place / "port"
        process = await asyncio.create_subprocess_exec(
            *command, "--port-file", str(port_file), env=environment
        )
        try:
            while not port_file.exists():
                assert process.returncode is None
                await asyncio.sleep(0.05)
            url = f"http://127.0.0.1:{port_file.read_text()}"
            line, least = await soak(url, process.pid, options, [model])
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 30) == 0
        finally:
            if process.returncode is None:
                process.kill()
        report = verify(place / "audit.jsonl")
        assert report.ok, report
        lines = (place / "audit.jsonl").read_text().count('"kind":"request"')
        assert lines >= least, (lines, least)
        return f"{line}; {lines} lines in the audit log"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float)
    length.add_argument("--requests", type=int)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--changes", type=int, default=10, help="of the model (10)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.seconds is None and options.requests is None:
        options.seconds = 3600.0
    return options


if __name__ == "__main__":
    print(asyncio.run(whole(parse())))
