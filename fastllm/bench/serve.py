"""`serve`: from options to a record, its report and its chart."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastllm.bench import compare, report
from fastllm.bench.arguments import make_headers, make_options
from fastllm.bench.arrivals import arrival_times
from fastllm.bench.chart import chart
from fastllm.bench.client import Timeouts, connect
from fastllm.bench.load import Load
from fastllm.bench.options import ServeOptions
from fastllm.bench.probe import Server, find_server, make_source
from fastllm.bench.prompts import WARM_UP
from fastllm.bench.rounds import make_round, new_record, read_record, write_record, write_text
from fastllm.errors import RequestError

Record = dict[str, Any]


def command(options: Any, arguments: Sequence[str]) -> int:
    """Run `serve`. Returns the exit status (see `fastllm.bench.__main__`).

    Args:
        options: what the parser made of `arguments`.
        arguments: as they were given after "serve", for the record.
    """
    if options.compare is not None:
        return _compare(Path(options.compare[0]), Path(options.compare[1]))
    asked = make_options(options)
    out = _out(options)
    record = _known(out, asked) if options.append else new_record(asked)
    if out is not None:
        _check_writable(out)
    made = asyncio.run(measure(asked, options, arguments, len(record["rounds"])))
    if made is None:
        return 130
    record["rounds"].append(made)
    if out is not None:
        write_record(_suffixed(out, ".json"), record)
        write_text(_suffixed(out, ".md"), report.markdown(record))
        write_text(_suffixed(out, ".svg"), chart(record))
    print(report.terminal(record), flush=True)
    if out is not None:
        print(f"written: {out}.json, .md, .svg", file=sys.stderr)
    if made["stopped"]:
        return 130
    return 0 if made["summary"]["ok"] else 1


async def measure(
    asked: ServeOptions, options: argparse.Namespace, arguments: Sequence[str], number: int
) -> dict[str, Any] | None:
    """One round, as it stands in a record; None if it was stopped before it began.

    Args:
        number: of the round in its record.
    """
    stop = asyncio.Event()
    timeouts = Timeouts(asked.timeout, asked.connect_timeout, asked.silence_timeout)
    seed = asked.seed + number
    connected = connect(
        asked.base_url,
        asked.endpoint,
        stream=asked.stream,
        headers=make_headers(options),
        timeouts=timeouts,
        keep_alive=asked.keep_alive,
        ca_file=options.ca,
    )
    with _stopped_by_signals(stop):
        async with connected as client:

            async def prepare() -> tuple[Server, Load]:
                server = await find_server(client, asked, options.wait)
                source = await make_source(client, asked, server, seed)
                body = server.body_maker(asked)
                if asked.warmup:
                    warm = Load(
                        client,
                        source,
                        body,
                        concurrency=min(asked.warmup, asked.concurrency or asked.warmup),
                        requests=asked.warmup,
                        stream=WARM_UP,
                    )
                    await warm.run()
                times = _schedule(asked, seed)
                load = Load(
                    client,
                    source,
                    body,
                    schedule=times,
                    concurrency=asked.concurrency,
                    requests=asked.requests,
                    seconds=asked.seconds,
                    drain_seconds=asked.drain_seconds,
                    stop=stop,
                )
                await load.prepare()
                return server, load

            preparing = asyncio.create_task(prepare())
            waiting = asyncio.create_task(stop.wait())
            await asyncio.wait({preparing, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if not preparing.done():
                preparing.cancel()
                await asyncio.gather(preparing, return_exceptions=True)
                return None
            server, load = preparing.result()
            if stop.is_set():
                return None
            with _progress(load, options.quiet or not sys.stderr.isatty()):
                found = await load.run()
    return make_round(found, asked, server, seed, arguments)


def _schedule(asked: ServeOptions, seed: int) -> list[float] | None:
    """When requests are due; None of a closed loop."""
    if asked.rate is None:
        return None
    times = arrival_times(
        asked.arrivals,
        asked.rate,
        seed,
        requests=asked.requests,
        seconds=asked.seconds,
        burstiness=asked.burstiness,
        spikes=asked.spikes,
    )
    if not times:
        raise RequestError("seconds", asked.seconds, f"time for a request at {asked.rate:g} a second")
    return times


@contextlib.contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the round in order; the next ends the process."""
    loop = asyncio.get_running_loop()
    both = (signal.SIGINT, signal.SIGTERM)

    def end() -> None:
        stop.set()
        for which in both:
            loop.remove_signal_handler(which)

    installed = []
    for which in both:
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread
            loop.add_signal_handler(which, end)
            installed.append(which)
    try:
        yield
    finally:
        for which in installed:
            loop.remove_signal_handler(which)


@contextlib.contextmanager
def _progress(load: Load, quiet: bool) -> Iterator[None]:
    """A line on stderr, twice a second."""
    if quiet:
        yield
        return

    async def show() -> None:
        while True:
            await asyncio.sleep(0.5)
            print(f"\r{load.progress()}\x1b[K", end="", file=sys.stderr, flush=True)

    task = asyncio.create_task(show())
    try:
        yield
    finally:
        task.cancel()
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# -- files ---------------------------------------------------------------------------------------------------


def _out(options: argparse.Namespace) -> Path | None:
    """The path of the files without their endings."""
    if options.out == "-":
        if options.append:
            raise RequestError("append", options.out, "--out with the name of a record")
        return None
    if options.out is None:
        if options.append:
            raise RequestError("append", None, "--out with the name of a record")
        return Path(time.strftime("serve-%Y%m%d-%H%M%S", time.gmtime()))
    return Path(options.out.removesuffix(".json"))


def _suffixed(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def _check_writable(out: Path) -> None:
    """Better now than when the figures are there."""
    if not out.name or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise RequestError("out", str(out), "a name in a directory that can be written to")


def _known(out: Path | None, asked: ServeOptions) -> Record:
    """The record that a round is added to; a new one where there is none."""
    assert out is not None
    path = _suffixed(out, ".json")
    if not path.exists():
        return new_record(asked)
    record = read_record(path)
    now = json.loads(json.dumps(asked.to_json()))
    for name, value in now.items():
        if record["settings"].get(name) != value:
            raise RequestError(
                f"append: {name}", value, f"{record['settings'].get(name)!r}, as in {path.name}"
            )
    return record


def _compare(first: Path, second: Path) -> int:
    records = read_record(first), read_record(second)
    ratios = compare.compare(*records)
    print(f"A: {first.name}\nB: {second.name}\n")
    print("\n".join(report.columns(compare.table(ratios))))
    for note in compare.remarks(*records):
        print(f"note: {note}")
    return 0
