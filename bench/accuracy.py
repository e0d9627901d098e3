"""The record of bench/quality.py for people: Markdown tables, and whether the bars are met."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

AGAINST_FP32 = 0.005
"""The most that the default may change perplexity, against the float32 reference."""
BASE = "fp16"
"""The cache that others are compared with."""
AGAINST_BASE = {"int8": 0.002}
"""KV cache type -> the most that it may change perplexity, against BASE."""


def bars(results: Record, default: str) -> Iterator[tuple[str, str, float, float, float]]:
    """(cache, against what, bar, change, its standard error) for every bar there is; all texts together."""
    figures = results[default]["all"]
    yield default, "fp32", AGAINST_FP32, figures["change"], figures["error"]
    for dtype, bar in AGAINST_BASE.items():
        figures = results[dtype]["all"]
        yield dtype, BASE, bar, figures["change_from_base"], figures["error_from_base"]


def verdict(bar: float, change: float, error: float) -> str:
    """Whether the size of a change is at most the bar, and its 95 % interval as well."""
    if abs(change) > bar:
        return "**no**"
    reach = abs(change) + 1.96 * error
    return "yes" if reach <= bar else f"yes; 95 % interval up to {100 * reach:.2f} %"


def markdown(record: Record) -> str:
    """Everything in the record."""
    lines = _preface(record)
    for model in record["models"]:
        lines += ["", *_model(model, record["default_cache"])]
    if record["random"]:
        lines += ["", *_random(record["random"], record["default_cache"])]
    return "\n".join([*lines, ""])


def _preface(record: Record) -> list[str]:
    machine = record["machine"]
    commit = machine["commit"][:12] + "+" * machine["commit"].endswith("+")
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return [
        "# Accuracy",
        "",
        f"Made by `bench/quality.py`, {machine['date']}, commit {commit}, instruction set {machine['isa']} "
        f"(all give the same bits), Python {machine['python']}, {versions}. The speed of the machine plays "
        "no part.",
        "",
        "The reference is `transformers` in float32, activations included, on the weights that `gguf` "
        "dequantizes from the same file. ± is a standard error; that of a change is paired, token by token. "
        "KL is the Kullback-Leibler divergence of the next token's distribution from the reference's, in "
        "nats. A bar is met if the change is no larger, up or down.",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _change(change: float, error: float) -> str:
    return f"{100 * change:+.2f} ± {100 * error:.2f} %"


# -- a trained model -----------------------------------------------------------------------------------------


def _model(model: Record, default: str) -> list[str]:
    file, results = model["file"], model["results"]
    tokens = results[default]["all"]["tokens"]
    texts = ", ".join(name for name in results[default] if name != "all")
    met = {
        (dtype, what): (bar, verdict(bar, *change)) for dtype, what, bar, *change in bars(results, default)
    }

    def against(dtype: str, what: str, change: float, error: float) -> list[str]:
        bar, answer = met.get((dtype, what), (None, ""))
        return [_change(change, error), "" if bar is None else f"{100 * bar:g} %: {answer}"]

    rows = [["fp32 reference", f"{results[default]['all']['reference']:.3f}", *[""] * 8]]
    for dtype, of in results.items():
        figures, greedy = of["all"], model["greedy"][dtype]
        apart = [split["margin"] for split in greedy.values() if split]
        base = against(dtype, BASE, figures["change_from_base"], figures["error_from_base"])
        rows.append(
            [
                f"{dtype} cache" + (" (default)" if dtype == default else ""),
                f"{figures['measured']:.3f}",
                *against(dtype, "fp32", figures["change"], figures["error"]),
                *(["", ""] if dtype == BASE else base),
                f"{figures['kl_mean']:.5f} ± {figures['kl_error']:.5f}",
                f"{100 * figures['same_top_token']:.1f} ± {100 * figures['same_top_token_error']:.1f} %",
                f"{len(greedy) - len(apart)} of {len(greedy)}",
                f"{max(apart):.2f} nat" if apart else "",
            ]
        )
    head = ["", "perplexity", "against fp32", "bar: met", f"against the {BASE} cache", "bar: met", "KL"]
    head += ["same most likely token", "greedy continuations equal", "largest margin at a split"]
    lines = [
        f"## {file['name']}",
        "",
        f"SHA-256 `{file['sha256']}`. {tokens:,} tokens of {texts}, in windows of {model['window']}. Greedy "
        f"continuations have {model['continuation']} tokens; the margin is between the reference's own two "
        "most likely tokens, where the continuations part.",
        "",
        *_table(head, rows),
    ]
    if "roundings" in model:
        rounded = [
            [name, _change(of["all"]["change"], of["all"]["error"]), f"{of['all']['kl_mean']:.5f}"]
            for name, of in model["roundings"].items()
        ]
        lines += ["", "The reference with rounded activations:", ""]
        lines += _table(["rounded", "perplexity against fp32", "KL"], rounded)
    return lines


# -- random shapes -------------------------------------------------------------------------------------------


def _random(entries: Sequence[Record], default: str) -> list[str]:
    dtypes = list(entries[0]["results"])
    shapes = list(dict.fromkeys(entry["about"] for entry in entries))
    rows, caches = [], []
    for entry in entries:
        figures = entry["results"][default]
        name = [str(1 + shapes.index(entry["about"])), entry["format"]]
        rows.append(
            [
                *name,
                f"{figures['entropy']:.2f}",
                f"{_small(figures['kl_mean'])} ± {_small(figures['kl_error'])}",
                _small(figures["kl_99th_percentile"]),
                _small(figures["kl_max"]),
                f"{100 * figures['logit_error']:.2g} %",
                f"{100 * figures['same_top_token']:.1f} ± {100 * figures['same_top_token_error']:.1f} %",
            ]
        )
        found = [entry["results"][dtype] for dtype in dtypes]
        caches.append([*name, *(f"{_small(of['kl_mean'])}; {_small(of['kl_max'])}" for of in found)])
    head = ["shape", "format", "entropy, nat", "KL", "99th percentile", "largest", "error of the logits"]
    return [
        "## Random shapes",
        "",
        f"Random weights, all matrices in one format, {entries[0]['sequences']} sequences of "
        f"{entries[0]['length']} random tokens. Logits and attention scores are scaled so that both "
        "distributions are about as sharp as in a trained model: `bench/random_shapes.py`. The error of the "
        "logits is the root mean square of the differences over that of the reference's logits. F16 matrices "
        "are multiplied in float, so that what is left there is the rounding of the cache.",
        "",
        *(f"{number}. {about}" for number, about in enumerate(shapes, 1)),
        "",
        f"With the {default} cache, the default:",
        "",
        *_table([*head, "same most likely token"], rows),
        "",
        "KL with every cache, mean and largest:",
        "",
        *_table(["shape", "format", *(f"{dtype} cache" for dtype in dtypes)], caches),
    ]


def _small(value: float) -> str:
    return f"{value:.5f}" if value >= 1e-4 else f"{value:.0e}"
