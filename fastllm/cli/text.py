"""Text in and out of the command line, and what is said about speed."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator

from fastllm.errors import RequestError
from fastllm.outputs import RequestOutput


def read_text(given: str, what: str) -> str:
    """The argument itself, or for "-" all of stdin without its last newline."""
    if given != "-":
        return given
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        wrong = error.object[error.start : error.start + 8]
        raise RequestError(what, wrong, "text in UTF-8 on stdin") from error


def for_terminal(text: str) -> str:
    """Text that cannot give a terminal orders: control characters but tab and newline are shown as U+FFFD."""
    if all(character >= " " for character in text) and text.isprintable():
        return text
    return "".join(
        "\ufffd" if unicodedata.category(character) == "Cc" and character not in "\n\t" else character
        for character in text
    )


def write(text: str) -> None:
    """To stdout, at once."""
    if text:
        sys.stdout.write(for_terminal(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def write_stream(outputs: Iterator[RequestOutput], pieces: list[str]) -> RequestOutput | None:
    """Write the pieces of one answer as they come and keep them in `pieces`. Returns the last output."""
    last = None
    for last in outputs:
        for item in last.outputs:
            pieces.append(item.text)
            write(item.text)
    return last


def speed(output: RequestOutput) -> str:
    """How fast a finished request was: one line for the prompt, one for what was generated."""
    metrics = output.metrics
    if metrics is None or metrics.first_scheduled_time is None or metrics.first_token_time is None:
        return ""
    prompt_tokens = len(output.prompt_token_ids)
    prefill = metrics.first_token_time - metrics.first_scheduled_time
    waited = metrics.first_token_time - metrics.arrival_time
    rate = _rate(prompt_tokens, prefill)
    lines = [f"prompt: {prompt_tokens} tokens, {rate}; first token after {waited * 1000:.1f} ms"]
    # The first token comes out of the prompt's pass, so the rate is that of the others.
    generated = metrics.num_generated_tokens
    decode = (metrics.last_token_time or metrics.first_token_time) - metrics.first_token_time
    if generated > 1:
        lines.append(f"generated: {generated} tokens, {_rate(generated - 1, decode)}")
    else:
        lines.append(f"generated: {generated} token")
    return "\n".join(lines)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / max(seconds, 1e-9):.1f} tokens/s"
