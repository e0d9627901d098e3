"""What has to be known before a run: whether the server is there, its model, and how it counts tokens."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from fastllm.bench import dialect
from fastllm.bench.client import Client, explain
from fastllm.bench.options import ServeOptions
from fastllm.bench.prompts import (
    PROBE,
    WARM_UP,
    Dataset,
    FittedCount,
    RandomWords,
    Source,
    TokenCount,
    TokenizerCount,
    Work,
)
from fastllm.bench.record import OK, RequestRecord
from fastllm.bench.words import WORDS
from fastllm.errors import FastLLMError, RequestError

_PROBE_WORDS = (8, 24, 48, 64, 8, 24, 48, 64)  # words of the prompts that a server counts
_OPTIONAL = (
    frozenset[str](),
    frozenset({dialect.IGNORE_EOS}),
    frozenset({dialect.USAGE}),
    frozenset({dialect.IGNORE_EOS, dialect.USAGE}),
)


class ServerError(FastLLMError):
    """The server that was to be measured is not there, or does not do what is needed.

    Attributes:
        url: what was asked.
        reason: what came.
    """

    def __init__(self, url: str, reason: str) -> None:
        self.url = url
        self.reason = reason
        super().__init__(f"{url}: {reason}")


@dataclass
class Server:
    """What is known of a server.

    Attributes:
        model: the name that requests give.
        about: what it says of itself.
        left_out: fields that it does not know.
        notes: what a reader of the figures should know.
    """

    model: str
    about: dict[str, Any] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    def body_maker(self, options: ServeOptions) -> Callable[[Work], bytes]:
        """Makes requests as JSON."""
        left_out = self.left_out if options.ignore_eos else self.left_out | {dialect.IGNORE_EOS}

        def make(work: Work) -> bytes:
            return dialect.make_body(
                options.endpoint,
                work,
                model=self.model,
                stream=options.stream,
                temperature=options.temperature,
                left_out=left_out,
                extra=options.extra,
            )

        return make


async def find_server(client: Client, options: ServeOptions, wait_seconds: float = 0.0) -> Server:
    """Ask the server what it is.

    Args:
        wait_seconds: how long to wait until it answers with a list of models.

    Raises:
        ServerError: nobody answers, or no model is named and none listed.
    """
    url = options.base_url + "/v1/models"
    until = time.perf_counter() + wait_seconds
    while True:
        try:
            status, models = await client.get_json("/v1/models")
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as error:
            status, models = 0, None
            reason = ": ".join(filter(None, explain(error)))
        else:
            if status == 200 or status not in (502, 503, 504):
                break
            reason = f"HTTP {status}"
        if time.perf_counter() >= until:
            raise ServerError(url, reason)
        await asyncio.sleep(0.25)
    listed = _models(models) if status == 200 else []
    name = options.model or (listed[0] if listed else None)
    if name is None:
        what = f"HTTP {status}" if status != 200 else "it lists no model"
        raise ServerError(url, f"{what}; name a model with --model")
    about: dict[str, Any] = {}
    for path, key in (("/version", "version"), ("/props", "build_info")):
        try:
            status, found = await client.get_json(path)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError):
            continue
        if status == 200 and isinstance(found, dict) and isinstance(found.get(key), str):
            about["version"] = found[key][:200]
            break
    if client.server_header is not None:
        about["server"] = client.server_header[:200]
    return Server(name, about)


def _models(found: Any) -> list[str]:
    data = found.get("data") if isinstance(found, dict) else None
    entries = data if isinstance(data, list) else []
    return [e["id"] for e in entries if isinstance(e, dict) and isinstance(e.get("id"), str)]


async def make_source(client: Client, options: ServeOptions, server: Server, seed: int) -> Source:
    """What requests ask, after the first of them have shown that the server answers, and how it counts.

    Fields that the server refuses are noted in `server.left_out`.

    Raises:
        ServerError: it refuses or does not answer.
        RequestError: a data set or a tokenizer is at fault, or nobody counts tokens.
    """
    chat = options.endpoint == "chat"
    if options.dataset is not None:
        data = Dataset(Path(options.dataset), seed, options.output_tokens, chat=chat, shuffle=options.shuffle)
        first = data.make(0, WARM_UP)  # not one that counts
        await _ask(client, options, server, Work(first.prompt, 2), {})
        if options.requests is not None and options.requests > data.count:
            times = options.requests / data.count
            note = f"The data set's {data.count} lines were asked {times:.1f} times each: "
            server.notes.append(note + "a server that keeps prefixes knew them.")
        return data
    known = _tokenizer(options.tokenizer) if options.tokenizer else None
    counter = await _count(client, options, server, known, seed)
    assert options.output_tokens is not None
    least = options.prompt_tokens.first
    if options.prompt_tokens.kind in ("fixed", "uniform") and least < counter.overhead + counter.per_word / 2:
        enough = math.ceil(counter.overhead + counter.per_word - 0.01)
        limit = f"at least {enough}: the server adds {counter.overhead:.0f} to every prompt"
        raise RequestError("prompt_tokens", options.prompt_tokens.text, limit)
    return RandomWords(
        seed,
        options.prompt_tokens,
        options.output_tokens,
        counter,
        chat=chat,
        prefix_groups=options.prefix_groups,
        prefix_tokens=options.prefix_tokens,
    )


def _tokenizer(reference: str) -> TokenizerCount:
    from fastllm.loading import read_tokenizer

    tokenizer = read_tokenizer(reference)
    return TokenizerCount(lambda text: tokenizer.encode(text, add_special_tokens=False, parse_special=False))


async def _count(
    client: Client, options: ServeOptions, server: Server, known: TokenizerCount | None, seed: int
) -> TokenCount:
    """Have the server count: what it adds to a text, and without a tokenizer what a word makes."""
    words, tokens = [], []
    maker = _Words(seed, options.endpoint == "chat")
    left: dict[str, bool] = {}
    for number, count in enumerate(_PROBE_WORDS if known is None else _PROBE_WORDS[:1]):
        work, text = maker.make(number, count)
        record = await _ask(client, options, server, work, left)
        if record.prompt_tokens is None:
            if known is None:
                limit = "a tokenizer: the server reports no `usage` by which to count"
                raise RequestError("tokenizer", None, limit)
            server.notes.append("The server counts no tokens: what it adds to a prompt is not known.")
            return known
        words.append(count)
        tokens.append(record.prompt_tokens)
        if known is not None:
            known.overhead = max(0.0, record.prompt_tokens - (known.count(text) or 0))
            return known
    return FittedCount.fit(words, tokens)


class _Words:
    """Prompts of a number of words."""

    def __init__(self, seed: int, chat: bool) -> None:
        self._seed = seed
        self._chat = chat

    def make(self, index: int, words: int) -> tuple[Work, str]:
        random = np.random.default_rng([self._seed, PROBE, index])
        text = " ".join(WORDS[i] for i in random.integers(0, len(WORDS), words))
        return Work([{"role": "user", "content": text}] if self._chat else text, 2), text


async def _ask(
    client: Client, options: ServeOptions, server: Server, work: Work, settled: dict[str, bool]
) -> RequestRecord:
    """One request that has to succeed; the first finds out which of our fields the server refuses."""
    first: RequestRecord | None = None
    for left_out in [server.left_out] if settled else _OPTIONAL:
        if not options.ignore_eos and dialect.IGNORE_EOS in left_out:
            continue
        trial = Server(server.model, left_out=left_out)
        record = RequestRecord(0, time.perf_counter())
        await client.send(trial.body_maker(options)(work), record)
        first = first or record
        if record.status == OK:
            settled["yes"] = True
            if not server.left_out and left_out:
                refused = ", ".join(sorted(left_out))
                server.notes.append(f"The server refuses {refused}, so that is left out.")
            server.left_out = left_out
            return record
        if record.http_status not in (400, 422):
            break
    assert first is not None
    what = ": ".join(filter(None, (first.error, first.detail)))
    raise ServerError(options.base_url + dialect.PATHS[options.endpoint], what)
