"""Random damage at everything that comes from outside, for a while: all of it is refused or works.

    python tests/fuzz.py --model tiny.gguf [--seconds 600] [--targets gguf,template,grammar,body] [--seed 0]

    gguf      bytes of a model file changed, doubled, cut: it is read, loaded, runs a step, or is refused
    template  the families' chat templates, cut and recombined: rendered, or refused
    grammar   regular expressions, JSON schemas and grammars, mutated, compiled for the model's vocabulary;
              what compiles masks a few tokens
    body      JSON bodies of every route of the server, mutated: an answer of status below 500

Meant for a build with sanitizers (docs/development.md); needs neither torch nor transformers. The targets
take turns. Each input is a function of the seed and its number, which are printed where something else comes
out than a result or an error of fastllm's family; a crash or a hang ends the process, and --log names the
input.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tool_templates
from serving import Running
from step_batches import Chunk, step_batch

from fastllm import LLM, FastLLMError, SamplingParams, StructuredOutputsParams
from fastllm.executor.cpu import CpuExecutor
from fastllm.formats.chat_template import ChatTemplate
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.models.registry import spec_from_checkpoint

SLOW_SECONDS = 30.0  # of one input: a hang

NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1, 1e308, float("nan"), float("inf"), 0.5)
TEXTS = ("", "a", "\0", "\ud7ff", "𝔘", "a" * 5000, "{{", "%}", "<|im_start|>", "../..", "(" * 200, "[" * 200)
SCHEMAS: tuple[Any, ...] = (
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
    {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,5}$"}, "minItems": 1, "maxItems": 3},
    {
        "anyOf": [{"type": "null"}, {"enum": ["x", 1, True]}, {"$ref": "#/$defs/d"}],
        "$defs": {"d": {"const": 5}},
    },
    {"type": "number", "multipleOf": 0.5, "exclusiveMaximum": 10},
)
REGEXES = (r"[a-c]{2,4}(x|y)*", r"\d{3}-\d{4}", r"(?i:yes|no)\s?", r"\p{Lu}\w+", r"(a|b(c|d(e|f)))+")
GRAMMARS = (
    'start: "a" item+\nitem: /[0-9]+/ | "(" item ")"',
    'root ::= "yes" | "no" rest\nrest ::= [a-z]+ ("," rest)?',
    'start: WORD ("," WORD)*\nWORD: /[a-z]+/\n%ignore / /',
)
BODIES: dict[str, Any] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2, "logprobs": 1, "n": 1, "stop": ["x"], "echo": False},
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        "max_tokens": 2, "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMAS[0]}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMAS[1]}},
        "logit_bias": {"5": 1.0}, "stream": False,
    },
    "/v1/responses": {"input": [{"role": "user", "content": "a"}], "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "system": "s"},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/tokenize": {"prompt": "a b"},
    "/detokenize": {"tokens": [5, 6]},
}  # fmt: skip


# ---- damage ------------------------------------------------------------------------------------------------


def damaged_bytes(raw: bytes, pick: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(pick.choice((1, 1, 1, 2, 6))):
        # The head, where names, types and sizes are, more often than weights.
        place = pick.randrange(min(len(out), 4096) if pick.random() < 0.5 else len(out)) if out else 0
        what = pick.randrange(5)
        if what == 0:
            out[place : place + 1] = bytes([pick.randrange(256)])
        elif what == 1:
            width = pick.choice((2, 4, 8))
            out[place : place + width] = pick.choice((0, 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")[
                :width
            ]
        elif what == 2:
            out[place:place] = out[place : place + pick.randrange(64)]
        elif what == 3 and pick.random() < 0.3:
            del out[place:]
        else:
            out[place : place + 1] = bytes([out[place] ^ 1 << pick.randrange(8)]) if out else b""
    return bytes(out)


def damaged_text(text: str, others: tuple[str, ...], pick: random.Random) -> str:
    for _ in range(pick.choice((1, 1, 2))):
        place, end = sorted(pick.randrange(len(text) + 1) for _ in range(2))
        end = min(end, place + pick.choice((1, 1, 5, 20)))
        what = pick.randrange(5)
        if what == 0:
            text = text[:place] + text[end:]
        elif what == 1:
            text = text[:place] + text[place:end] * pick.choice((2, 2, 3, 50)) + text[end:]
        elif what == 2:
            text = text[:place] + pick.choice(TEXTS) + text[end:]
        elif what == 3:
            other = pick.choice(others)
            start = pick.randrange(len(other) + 1)
            text = text[:place] + other[start : start + 60] + text[end:]
        else:
            text = text[:place] + chr(pick.choice((0, 10, 92, 123, 125, 0x2028, 0x10FFFF))) + text[end:]
    return text


def damaged_json(value: Any, pick: random.Random) -> Any:
    """One place of it replaced, doubled, left out or nested deep."""
    if isinstance(value, dict) and value and pick.random() < 0.8:
        key = pick.choice(list(value))
        if pick.random() < 0.15:
            return {name: one for name, one in value.items() if name != key}
        if pick.random() < 0.1:
            return {**value, pick.choice((*TEXTS, "seed", "top_k", "temperature")): pick.choice(NUMBERS)}
        return {**value, key: damaged_json(value[key], pick)}
    if isinstance(value, list) and value and pick.random() < 0.8:
        at = pick.randrange(len(value))
        return [*value[:at], damaged_json(value[at], pick), *value[at + (pick.random() < 0.8) :]]
    what = pick.randrange(6)
    if what == 0:
        return pick.choice(NUMBERS)
    if what == 1:
        return pick.choice(TEXTS)
    if what == 2:
        return [value] * pick.choice((0, 2, 300))
    if what == 3:
        for _ in range(pick.choice((1, 70, 400))):
            value = {"properties": {"a": value}} if pick.random() < 0.5 else [value]
        return value
    return pick.choice((None, True, {}, [], {"type": "object"}))


# ---- targets -----------------------------------------------------------------------------------------------


class Targets:
    """What is fuzzed: for each name a function of a random source, which says what came out."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._good = model.read_bytes()
        self._file = folder / "damaged.gguf"
        self._llm = LLM(model, kv_cache_tokens=512, max_num_seqs=2, threads=1, progress=False)
        self._server = Running(model, engine={"kv_cache_tokens": 512})
        self._http = self._server.client()
        templates = [
            value for value in vars(tool_templates).values() if isinstance(value, str) and "{%" in value
        ]
        self._templates = tuple(templates)

    def gguf(self, pick: random.Random) -> str:
        self._file.write_bytes(damaged_bytes(self._good, pick))
        with open_checkpoint(self._file) as checkpoint:
            spec = spec_from_checkpoint(checkpoint)
            made = CpuExecutor(
                checkpoint, spec, max_model_len=min(64, spec.context_length), max_num_seqs=1, threads=1
            )
            try:
                made.run(step_batch([Chunk([1, 2, 3], 0, [0])], made.block_size))
            finally:
                made.close()
        return "ran"

    def template(self, pick: random.Random) -> str:
        template = ChatTemplate(damaged_text(pick.choice(self._templates), self._templates, pick), "fuzz")
        messages = damaged_json(BODIES["/v1/chat/completions"]["messages"], pick)
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            messages = [{"role": "user", "content": "a"}]
        template.render(messages, tools=[BODIES["/v1/chat/completions"]["tools"][0]])
        return "rendered"

    def grammar(self, pick: random.Random) -> str:
        kind = pick.choice(("regex", "json", "grammar", "choice"))
        given: Any
        if kind == "json":
            given = damaged_json(pick.choice(SCHEMAS), pick)
        elif kind == "choice":
            given = damaged_json(["yes", "no"], pick)
        else:
            pool = REGEXES if kind == "regex" else GRAMMARS
            given = damaged_text(pick.choice(pool), pool, pick)
        params = SamplingParams(
            max_tokens=4, temperature=1.0, seed=1, structured_outputs=StructuredOutputsParams(**{kind: given})
        )
        (output,) = self._llm.generate("a", params, use_tqdm=False)
        return f"{kind}: {output.outputs[0].finish_reason}"

    def body(self, pick: random.Random) -> str:
        route = pick.choice(list(BODIES))
        body = BODIES[route]
        for _ in range(pick.choice((1, 1, 2, 3))):
            body = damaged_json(body, pick)
        text = json_text(body)
        if pick.random() < 0.1:
            text = damaged_text(text, (text,), pick)
        content = text.encode("utf-8", "surrogatepass")
        response = self._http.post(route, content=content, headers={"content-type": "application/json"})
        assert response.status_code < 500 or response.status_code == 503, (
            response.status_code,
            response.text,
        )
        return f"status {response.status_code}"

    def close(self) -> None:
        self._http.close()
        self._server.stop()
        self._llm.close()


class _Written(str):
    """Text that stands as it is, between values that are still to be written."""


def json_text(value: Any) -> str:
    """JSON of any depth, which json.dumps does not write."""
    parts: list[str] = []
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, _Written):
            parts.append(item)
            continue
        if isinstance(item, dict):
            pairs = [[_Written(f"{json.dumps(str(key))}: "), inner] for key, inner in item.items()]
            begin, end = "{", "}"
        elif isinstance(item, list):
            pairs, (begin, end) = [[inner] for inner in item], "[]"
        else:
            parts.append(json.dumps(item))
            continue
        todo: list[Any] = [_Written(begin)]
        for place, pair in enumerate(pairs):
            todo += [_Written(", "), *pair] if place else pair
        stack += reversed([*todo, _Written(end)])
    return "".join(parts)


def inputs(names: list[str], seed: int, seconds: float) -> Iterator[tuple[str, int]]:
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        for name in names:
            yield name, number
        number += 1


def run(options: argparse.Namespace) -> int:
    counts: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        targets = Targets(options.model, Path(folder))
        try:
            for name, number in inputs(options.targets.split(","), options.seed, options.seconds):
                if options.log is not None:
                    options.log.write_text(f"{name} {options.seed} {number}\n")
                target: Callable[[random.Random], str] = getattr(targets, name)
                begun = time.monotonic()
                try:
                    outcome = target(random.Random(f"{name} {options.seed} {number}"))
                except FastLLMError as error:
                    outcome = type(error).__name__
                except Exception:
                    wrong += 1
                    outcome = "wrong"
                    print(f"{name}, seed {options.seed}, number {number}:", file=sys.stderr)
                    traceback.print_exc()
                took = time.monotonic() - begun
                if took > SLOW_SECONDS:
                    wrong += 1
                    print(f"{name}, seed {options.seed}, number {number}: {took:.0f} s", file=sys.stderr)
                counts[f"{name}: {outcome}"] += 1
        finally:
            targets.close()
    for outcome, count in sorted(counts.items()):
        print(f"{count:8} {outcome}")
    print(f"{sum(counts.values())} inputs, {wrong} wrong")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a small GGUF file")
    parser.add_argument("--seconds", type=float, default=600, help="(600)")
    parser.add_argument("--targets", default="gguf,template,grammar,body")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="where the input under way is named")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
