"""The options of `python -m fastllm.bench serve`, and the `ServeOptions` that they ask for."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from fastllm.bench.arrivals import PROCESSES, Spike
from fastllm.bench.dialect import PATHS
from fastllm.bench.lengths import Lengths
from fastllm.bench.options import DEFAULT_REQUESTS, SLOS, ServeOptions
from fastllm.errors import RequestError

_LENGTHS = "a number, uniform:LOW:HIGH, normal:MEAN:SD or lognormal:MEAN:SD"
_DEFAULTS = ServeOptions()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastllm.bench",
        description="Measures a running server with an OpenAI-compatible API.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "serve",
        help="put load on a server",
        allow_abbrev=False,  # the record hides what follows --header, however it is written
        description="Puts load on a server and measures every token. Without a rate, from clients that each "
        "wait for their answer; with one, by requests at their times, whatever the server does.",
    )
    _add_server(command)
    _add_load(command)
    _add_requests(command)
    _add_results(command)
    return parser


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--base-url", default=_DEFAULTS.base_url, metavar="URL", help="default: %(default)s")
    add("--endpoint", choices=tuple(PATHS), default=_DEFAULTS.endpoint, help="default: %(default)s")
    add("--model", metavar="NAME", help="its name there (default: the first that the server lists)")
    add("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    add("--header", action="append", default=[], metavar="'NAME: VALUE'", help="may be given several times")
    add("--ca", metavar="FILE", help="certificates to trust, for https")
    add("--no-stream", dest="stream", action="store_false", help="ask for answers in one piece")
    add("--no-keep-alive", dest="keep_alive", action="store_false", help="a new connection for each request")
    add("--wait", type=float, default=0.0, metavar="S", help="wait so long for the server to come up")
    for name, what in (
        ("timeout", "a whole request"),
        ("connect-timeout", "connecting"),
        ("silence-timeout", "nothing arriving"),
    ):
        default = getattr(_DEFAULTS, name.replace("-", "_"))
        add(f"--{name}", type=float, default=default, metavar="S", help=f"seconds of {what} (%(default)g)")


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    add = group.add_argument
    add(
        "--requests",
        type=int,
        metavar="N",
        help=f"end after N ({DEFAULT_REQUESTS} unless --seconds is given)",
    )
    add("--seconds", type=float, metavar="S", help="begin no request after so long")
    add(
        "--concurrency",
        type=int,
        metavar="C",
        help="clients, each with one request under way (1); with --rate: the most under way",
    )
    add("--rate", type=float, metavar="R", help="requests per second")
    add("--arrivals", choices=PROCESSES, default=_DEFAULTS.arrivals, help="gaps at a rate (%(default)s)")
    add("--burstiness", type=float, default=1.0, metavar="B", help="shape of gamma; below 1 is burstier (1)")
    add(
        "--spike",
        action="append",
        default=[],
        metavar="AT:SECONDS:FACTOR",
        help="so many times the rate for so long, from a time on; may be given several times",
    )
    add("--seed", type=int, default=0, metavar="N", help="of arrivals and prompts (0)")
    add(
        "--warmup",
        type=int,
        default=_DEFAULTS.warmup,
        metavar="N",
        help="requests before the start that do not count (%(default)d)",
    )
    add(
        "--drain",
        type=float,
        metavar="S",
        help="cut off what is under way so long after the end (default: wait)",
    )


def _add_requests(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    add = group.add_argument
    add("--prompt-tokens", default="128", metavar="LENGTHS", help=f"random words: {_LENGTHS} (128)")
    add("--output-tokens", metavar="LENGTHS", help="the same, of answers (128; data sets: the server's own)")
    add("--prefix-groups", type=int, default=0, metavar="K", help="prompts begin with one of K shared texts")
    add("--prefix-tokens", type=int, default=0, metavar="P", help="of P tokens, besides --prompt-tokens")
    add("--tokenizer", metavar="MODEL", help="count words by a model's tokenizer (default: by the server)")
    add("--dataset", metavar="FILE", help="JSONL: prompt or messages, and max_tokens where it likes")
    add("--shuffle", action="store_true", help="its lines in an order drawn from the seed")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="answers of full length, where the server knows ignore_eos (default: with random prompts)",
    )
    add(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="0 unless given; none: the server's own",
    )
    add(
        "--extra", type=str, default="{}", metavar="JSON", help="more fields of the body; null takes one away"
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results")
    add = group.add_argument
    add("--slo", default="", metavar="LIST", help=f"for goodput: {'=..,'.join(SLOS)}=..")
    add("--out", metavar="NAME", help="NAME.json, .md and .svg (default: serve-DATE-TIME here; - for none)")
    add("--append", action="store_true", help="one more round for a record that is there")
    add("--quiet", action="store_true", help="no progress")
    add("--compare", nargs=2, metavar=("A.json", "B.json"), help="ratios of two records; measures nothing")


def make_options(options: argparse.Namespace) -> ServeOptions:
    """The checked options of a run.

    Raises:
        RequestError: one of them is not what it has to be.
    """
    return ServeOptions(
        base_url=options.base_url,
        endpoint=options.endpoint,
        model=options.model,
        stream=options.stream,
        requests=options.requests,
        seconds=options.seconds,
        concurrency=options.concurrency,
        rate=options.rate,
        arrivals=options.arrivals,
        burstiness=options.burstiness,
        spikes=tuple(sorted((Spike.parse(text) for text in options.spike), key=lambda spike: spike.at)),
        seed=options.seed,
        prompt_tokens=Lengths.parse("prompt_tokens", options.prompt_tokens),
        output_tokens=Lengths.parse("output_tokens", options.output_tokens)
        if options.output_tokens
        else None,
        prefix_groups=options.prefix_groups,
        prefix_tokens=options.prefix_tokens,
        dataset=options.dataset,
        shuffle=options.shuffle,
        ignore_eos=options.ignore_eos,
        temperature=options.temperature,
        extra=_extra(options.extra),
        tokenizer=options.tokenizer,
        warmup=options.warmup,
        drain_seconds=options.drain,
        slo=_slo(options.slo),
        timeout=options.timeout,
        connect_timeout=options.connect_timeout,
        silence_timeout=options.silence_timeout,
        keep_alive=options.keep_alive,
    )


def make_headers(options: argparse.Namespace) -> dict[str, str]:
    """Headers of every request. They stand in no record."""
    found: dict[str, str] = {}
    for text in options.header:
        name, colon, value = text.partition(":")
        plain = name.strip().isascii() and name.strip().replace("-", "").replace("_", "").isalnum()
        if not colon or not plain or not value.strip().isprintable():
            raise RequestError("header", f"{name.strip()}: ...", "'NAME: VALUE'")
        found[name.strip()] = value.strip()
    if options.api_key_env is not None:
        key = os.environ.get(options.api_key_env, "").strip()
        if not key or not key.isprintable() or not key.isascii():
            raise RequestError("api_key_env", options.api_key_env, "a variable that is set to a key")
        found["Authorization"] = f"Bearer {key}"
    return found


def _temperature(text: str) -> float | None:
    return None if text == "none" else float(text)


def _extra(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError("extra", text, f"JSON ({error})") from None
    if not isinstance(found, dict):
        raise RequestError("extra", text, "a JSON object")
    return found


def _slo(text: str) -> dict[str, float]:
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise RequestError("slo", part, "NAME=MILLISECONDS, separated by commas")
    return found
