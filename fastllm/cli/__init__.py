"""The command line: `python -m fastllm generate | chat | info | pull | encrypt | decrypt | keygen | audit`.

Text goes to stdout and everything else to stderr, so that output can be piped. Exit status: 0; 1 where a
check (`audit verify`) found something; 2 for an error that fastllm explains, in one line; 130 after Ctrl-C;
141 where the reader of stdout went away.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from fastllm.errors import FastLLMError

ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The exit status.
    """
    from fastllm.cli.arguments import make_parser

    options = make_parser().parse_args(arguments)
    if options.verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="fastllm: %(message)s")
    # Whatever the terminal's encoding is, a character that it lacks is no reason to fail.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    command = cast(Callable[[Any], int], options.command)
    try:
        status = command(options)
        sys.stdout.flush()
        return status
    except FastLLMError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError:
        return _fail("not enough memory")


def _fail(reason: str) -> int:
    print("fastllm: error: " + " ".join(reason.split()), file=sys.stderr)
    return ERROR
