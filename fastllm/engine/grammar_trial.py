"""From a form of output to llguidance's grammar, tried out in a process of its own.

    python -I -S grammar_trial.py FOLDER < ORDER > {"grammar": ...}

ORDER is {"kind": ..., "text": ..., "limits": {...}, "seconds": of a processor that it may take}, FOLDER where
llguidance is installed.

Compiling what a stranger wrote may take for ever, take all memory, or exhaust the stack, and none of these
can be undone within a process. So the first attempt is made here, on a vocabulary of single bytes; only what
comes through is compiled by the engine's process. This file imports nothing of fastllm: it starts in some
hundredths of a second.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

# Half or less of what a thread of the engine's process has: what fits here fits there.
STACK_BYTES = 2 * 1024 * 1024
MEMORY_BYTES = 2 * 1024**3  # of address space


# Between the parts of a JSON text. Without an end to it, a model may go on with spaces until it is cut off.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"


def to_grammar(kind: str, text: str) -> str:
    """llguidance's grammar of one of the kinds of `StructuredOutputsParams`.

    Raises:
        ValueError: the text is none of that kind.
    """
    from llguidance import LLMatcher, grammar_from

    if kind in ("json", "json_object"):
        return LLMatcher.grammar_from_json_schema(
            text, overrides={"lenient": False, "whitespace_pattern": WHITESPACE}
        )
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":  # one terminal: a choice may begin with another
        texts = " | ".join(json.dumps(item) for item in json.loads(text))
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    if "::=" in text:
        return grammar_from("gbnf", text)
    return LLMatcher.grammar_from_lark(text)


def attempt(order: dict[str, Any]) -> dict[str, str]:
    """The grammar under "grammar", or under "error" why there is none."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    try:
        grammar = to_grammar(order["kind"], order["text"])
    except (ValueError, RecursionError) as error:
        return {"error": str(error)}
    limits = LLParserLimits(**order["limits"])
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return {"error": matcher.get_error()} if matcher.is_error() else {"grammar": grammar}


def main() -> None:
    order = json.load(sys.stdin)
    try:
        import resource
    except ImportError:  # not a Unix: then without the limits
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (order["seconds"], order["seconds"] + 1))
    sys.path.append(sys.argv[1])
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: json.dump(attempt(order), sys.stdout))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
