"""The rows of the comparison: what is measured, what has to be reached, and what peers reached before.

A row is named by its work, with any number:

    prefill-N    one prompt of N tokens, to its first token
    decode-B     B sequences with prompts of 128 tokens, not shared, decode 64 tokens each
    context-N    one sequence decodes 64 tokens after a prompt of N
    serve-B      B requests, 128 tokens in and 64 out, from handing over to the last token: what the
                 traditional loop does one after the other
    load         from the start of the process to the first token; for fastllm also its parts
    memory       most memory held until the first token, with room for one sequence of 1,024 tokens
    format       on a file of another type: prefill of 256 and decode of one sequence against the same on Q4_0
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PROMPT, DECODED = 128, 64  # tokens of a sequence
MEMORY_CONTEXT = 1024


@dataclass(frozen=True)
class Row:
    """One kind of work.

    Attributes:
        name: as in the list above.
        kind: the name without its number.
        batch, prompt, decoded: sequences, tokens of each prompt, tokens of each decode phase.
        unit: of the figure.
    """

    name: str
    kind: str
    batch: int
    prompt: int
    decoded: int

    @property
    def unit(self) -> str:
        return {"load": "s", "memory": "MB"}.get(self.kind, "tokens/s")

    @property
    def lower_is_better(self) -> bool:
        return self.kind in ("load", "memory")

    @property
    def max_len(self) -> int:
        """Tokens that a sequence needs room for, with a few to spare."""
        return MEMORY_CONTEXT if self.kind == "memory" else self.prompt + self.decoded + 16


def parse(name: str) -> Row:
    """The row of a name.

    Raises:
        ValueError: there is no such row.
    """
    match = re.fullmatch(r"(prefill|decode|context|serve)-([1-9]\d*)", name)
    if match is None:
        if name not in ("load", "memory"):
            raise ValueError(f"no such row: {name!r}")
        return Row(name, name, 1, 5, 0)
    kind, number = match[1], int(match[2])
    if kind == "prefill":
        return Row(name, kind, 1, number, 0)
    if kind == "context":
        return Row(name, kind, 1, number, DECODED)
    return Row(name, kind, number, PROMPT, DECODED)


# Rows of a full run; those of the 1B shape take much longer each.
ROWS: dict[str, tuple[str, ...]] = {
    "smollm2": (
        *("prefill-512", "prefill-4096"),
        *("decode-1", "decode-2", "decode-4", "decode-8", "decode-16", "decode-32", "decode-64"),
        *("context-7900", "serve-32", "load", "memory"),
    ),
    "1b": ("prefill-256", "decode-1", "decode-8", "decode-16", "decode-32", "load", "memory"),
}
FORMATS = ("1b-q4_1", "1b-q4_k_m", "1b-q5_k_m", "1b-q6_k", "1b-q8_0")
FORMAT_ROWS = ("prefill-256", "decode-1")


def family(model: str) -> str:
    return model.partition("-")[0]


def default(model: str) -> tuple[str, ...]:
    """The rows of a full run."""
    return FORMAT_ROWS if model in FORMATS else ROWS[family(model)]


@dataclass(frozen=True)
class Bar:
    """The lower end of the ratio's interval must reach `least`; `goal` is what is wanted.

    against: peers, of which the best counts; "read": memory's limit.
    """

    least: float
    goal: float
    against: tuple[str, ...] = ("llama.cpp",)


# On the Q4_0 files.
_BETTER_OF = ("llama.cpp", "vllm")
BARS: dict[tuple[str, str], Bar] = {
    ("smollm2", "prefill-512"): Bar(2.2, 2.8),
    ("smollm2", "prefill-4096"): Bar(2.5, 4.0),
    ("smollm2", "decode-1"): Bar(1.6, 2.0),
    ("smollm2", "decode-8"): Bar(2.2, 3.0, _BETTER_OF),
    ("smollm2", "decode-16"): Bar(2.2, 3.0, _BETTER_OF),
    ("smollm2", "decode-32"): Bar(2.2, 3.0, _BETTER_OF),
    ("smollm2", "context-7900"): Bar(3.0, 5.0),
    ("1b", "prefill-256"): Bar(1.7, 2.0),
    ("1b", "decode-1"): Bar(0.85, 0.95, ("read",)),
    ("1b", "decode-8"): Bar(1.9, 2.3),
    ("1b", "decode-16"): Bar(1.9, 2.3),
    ("1b", "decode-32"): Bar(1.9, 2.3),
}
AHEAD = Bar(1.0, 1.0)  # every row, with the AVX2 build

IMPORT_SECONDS_MOST = 0.4
LOAD_SECONDS_MOST = {"smollm2": 0.5, "1b": 3.0}  # LLM() to the first token, import apart
MEMORY_MOST = 1.25  # × (packed weights + KV cache), less what `import fastllm` holds
FORMAT_LEAST = 0.85  # of the Q4_0 file's prefill; of its decode in proportion to the bytes read per token

# What peers reached when the bars were set, and that machine's limits; of a range its middle. A peer that
# comes to less than 85 % of that in relation to the limit gets what it lacks before the bar is held to it.
ANCHOR_SHARE = 0.85
ANCHOR_LIMITS = {"int8": 670e9, "read": 33e9}
ANCHORS: dict[tuple[str, str], dict[str, float]] = {
    ("smollm2-q4_1", "prefill-512"): {"llama.cpp": 320},
    ("smollm2-q4_1", "decode-1"): {"llama.cpp": 124.5},
    ("smollm2-q4_1", "decode-8"): {"llama.cpp": 209},
    ("smollm2-q4_1", "decode-16"): {"llama.cpp": 209},
    ("smollm2-q4_1", "decode-32"): {"llama.cpp": 136},
    ("smollm2-q4_0", "prefill-512"): {"llama.cpp": 670, "openvino": 754, "vllm": 1232.5},
    ("smollm2-q4_0", "prefill-4096"): {"llama.cpp": 267},
    ("smollm2-q4_0", "decode-1"): {"llama.cpp": 157, "openvino": 87, "vllm": 41},
    ("smollm2-q4_0", "decode-8"): {"llama.cpp": 389, "vllm": 248},
    ("smollm2-q4_0", "decode-16"): {"llama.cpp": 517, "vllm": 345},
    ("smollm2-q4_0", "decode-32"): {"llama.cpp": 566, "vllm": 561},
    ("smollm2-q4_0", "context-7900"): {"llama.cpp": 24.5},
    ("1b-q4_0", "prefill-256"): {"llama.cpp": 128},
    ("1b-q4_0", "decode-1"): {"llama.cpp": 44},
    ("1b-q4_0", "decode-8"): {"llama.cpp": 74.5},
    ("1b-q4_0", "decode-16"): {"llama.cpp": 96.5},
    ("1b-q4_0", "decode-32"): {"llama.cpp": 101},
}
