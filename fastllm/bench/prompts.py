"""What requests ask: random words of a wanted number of tokens, with shared prefixes, or lines of a data set.

A request's text depends on the seed and its number alone, so that two servers get the same requests in the
same order and a run can be made again. A server that keeps prefixes would know the prompts of an earlier run
with the same seed: rounds have seeds of their own, and so have warm-up requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastllm.bench.lengths import Lengths
from fastllm.bench.words import WORDS
from fastllm.errors import RequestError

# The random streams of a seed; arrivals.py has the first.
MEASURED, WARM_UP, PROBE, _PREFIX, _ORDER = 2, 3, 4, 5, 6
MOST_DATASET_BYTES = 1 << 30


@dataclass(frozen=True)
class Work:
    """One request to make.

    Attributes:
        prompt: a text, or messages.
        max_tokens: tokens to generate at most; None: as the server likes.
        prompt_tokens: how many the prompt was meant to have; None where nobody said.
        group: which shared prefix it begins with.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    max_tokens: int | None
    prompt_tokens: int | None = None
    group: int | None = None


class Source(Protocol):
    """Where requests come from."""

    def make(self, index: int, stream: int = MEASURED) -> Work:
        """Request number `index` of a random stream."""
        ...


class TokenCount(Protocol):
    """How many tokens texts have for the server."""

    overhead: float  # tokens that every prompt has besides its text
    per_word: float

    def count(self, text: str) -> int | None:
        """Tokens of `text` without the overhead; None where this cannot be told."""
        ...


@dataclass
class FittedCount:
    """tokens = overhead + per_word * words, fitted to what a server counted."""

    overhead: float
    per_word: float

    def count(self, text: str) -> int | None:
        return None

    @classmethod
    def fit(cls, words: Sequence[int], tokens: Sequence[int]) -> FittedCount:
        """By least squares over prompts of `words` words that were `tokens` tokens."""
        matrix = np.stack([np.ones(len(words)), np.array(words, float)], 1)
        (overhead, per_word), *_ = np.linalg.lstsq(matrix, np.array(tokens, float), rcond=None)
        if not per_word > 0:
            limit = "token counts that grow with the prompt in the server's `usage`, or a tokenizer"
            raise RequestError("tokenizer", dict(zip(words, tokens, strict=True)), limit)
        return cls(max(float(overhead), 0.0), float(per_word))


class TokenizerCount:
    """Counted by a tokenizer; what the server adds to a prompt is known once it has counted one."""

    def __init__(self, encode: Any) -> None:
        self._encode = encode
        self.overhead = 0.0
        sample = " ".join(WORDS)
        self.per_word = len(encode(sample)) / len(WORDS)

    def count(self, text: str) -> int | None:
        return len(self._encode(text))


def random_text(random: np.random.Generator, tokens: int, counter: TokenCount) -> str:
    """Random words that make up about `tokens` tokens, the overhead left aside; exactly, where one can count.

    It has at least one word.
    """
    words = [WORDS[i] for i in random.integers(0, len(WORDS), max(1, round(tokens / counter.per_word)))]
    for _ in range(64):  # words have several tokens, so it closes in from both sides
        have = counter.count(" ".join(words))
        if have is None or have == tokens:
            break
        step = max(1, int(abs(tokens - have) / counter.per_word))
        if have < tokens:
            words += [WORDS[i] for i in random.integers(0, len(WORDS), step)]
        elif len(words) > 1:
            del words[-min(step, len(words) - 1) :]
        else:
            break
    return " ".join(words)


class RandomWords:
    """Random prompts.

    Args:
        seed: of everything that is drawn.
        prompt: lengths of the part of a prompt that no other shares, with what the server adds to it.
        output: lengths of answers.
        counter: tells words from tokens.
        chat: prompts are messages.
        prefix_groups, prefix_tokens: each prompt begins with one of so many texts of so many tokens,
            drawn evenly.
    """

    def __init__(
        self,
        seed: int,
        prompt: Lengths,
        output: Lengths,
        counter: TokenCount,
        *,
        chat: bool = False,
        prefix_groups: int = 0,
        prefix_tokens: int = 0,
    ) -> None:
        self._seed = seed
        self._prompt = prompt
        self._output = output
        self._counter = counter
        self._chat = chat
        self._prefix_tokens = prefix_tokens
        self._prefixes = [
            random_text(np.random.default_rng([seed, _PREFIX, group]), prefix_tokens, counter)
            for group in range(prefix_groups)
        ]

    def make(self, index: int, stream: int = MEASURED) -> Work:
        random = np.random.default_rng([self._seed, stream, index])
        wanted, answer = self._prompt.draw(random), self._output.draw(random)
        group = int(random.integers(len(self._prefixes))) if self._prefixes else None
        text = random_text(random, max(1, wanted - round(self._counter.overhead)), self._counter)
        if group is not None:
            text = f"{self._prefixes[group]} {text}"
            wanted += self._prefix_tokens
        prompt = [{"role": "user", "content": text}] if self._chat else text
        return Work(prompt, answer, wanted, group)


class Dataset:
    """Lines of a JSONL file, in order or shuffled by the seed, from the beginning again after the last.

    A line is an object with `prompt` (text) or `messages` (a conversation), and `max_tokens` where it likes.
    Warm-up requests come from the end of the order.
    """

    def __init__(
        self, path: Path, seed: int, output: Lengths | None, *, chat: bool = False, shuffle: bool = False
    ) -> None:
        self._lines = read_dataset(path, chat)
        self.count = len(self._lines)
        self._output = output
        self._seed = seed
        self._order = np.arange(len(self._lines))
        if shuffle:
            np.random.default_rng([seed, _ORDER]).shuffle(self._order)

    def make(self, index: int, stream: int = MEASURED) -> Work:
        place = index if stream == MEASURED else -1 - index
        prompt, most = self._lines[int(self._order[place % len(self._lines)])]
        if most is None and self._output is not None:
            most = self._output.draw(np.random.default_rng([self._seed, stream, index]))
        return Work(prompt, most)


def read_dataset(path: Path, chat: bool) -> list[tuple[str | list[dict[str, Any]], int | None]]:
    """Prompt and max_tokens of every line; for chat, texts become a message of the user.

    Raises:
        RequestError: the file cannot be read, or a line is not what it should be; the error names it.
    """
    found: list[tuple[str | list[dict[str, Any]], int | None]] = []
    try:
        if path.stat().st_size > MOST_DATASET_BYTES:
            raise RequestError("dataset", str(path), f"a file of at most {MOST_DATASET_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise RequestError("dataset", str(path), f"a file that can be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RequestError("dataset", str(path), f"text in UTF-8 (byte {error.start} is not)") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_entry(f"dataset: {path.name}:{number}", line, chat))
    if not found:
        raise RequestError("dataset", str(path), "at least one line")
    return found


def _entry(where: str, line: str, chat: bool) -> tuple[str | list[dict[str, Any]], int | None]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(where, line, f"JSON ({error})") from None
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise RequestError(where, line, "an object with either `prompt` or `messages`")
    most = entry.get("max_tokens")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise RequestError(f"{where}: max_tokens", most, "a whole number of at least 1")
    if "prompt" in entry:
        text = entry["prompt"]
        if not isinstance(text, str):
            raise RequestError(f"{where}: prompt", text, "a text")
        return ([{"role": "user", "content": text}] if chat else text), most
    messages = entry["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise RequestError(f"{where}: messages", messages, "a list of messages")
    if not chat:
        raise RequestError(f"{where}: messages", messages, "a prompt, unless the endpoint is chat")
    return messages, most
