"""`fastllm generate`: continue a text."""

from __future__ import annotations

import argparse
import contextlib
import sys

from fastllm.cli.arguments import DEFAULT_PROMPT, make_llm, make_params
from fastllm.cli.text import read_text, speed, write, write_stream


def generate(options: argparse.Namespace) -> int:
    """Stream the continuation to stdout, the speed and the profile to stderr."""
    params = make_params(options)
    prompt = DEFAULT_PROMPT if options.prompt is None else read_text(options.prompt, "prompt")
    with make_llm(options) as llm:
        outputs = llm.stream(prompt, params)
        pieces: list[str] = []
        if options.echo or options.prompt is None:
            pieces.append(prompt)
            write(prompt)
        try:
            with llm.profile() if options.profile else contextlib.nullcontext() as profile:
                last = write_stream(outputs, pieces)
        finally:
            if pieces:
                write("\n")
    if last is not None and not options.quiet:
        print(speed(last), file=sys.stderr)
    if profile is not None:
        print(profile, file=sys.stderr)
    return 0
